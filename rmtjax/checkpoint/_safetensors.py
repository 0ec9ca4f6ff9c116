"""Reads and writes one .safetensors file, one tensor at a time.

The format (https://github.com/huggingface/safetensors) is a length of 8 bytes, little-endian, a
JSON object of that length, which places each name in the data, and the data. The library of its
authors is not used: it maps the complete file into memory, does not read float8 into NumPy, and
needs all tensors in memory before it writes the first.
"""

import contextlib
import json
import os
import secrets
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rmtjax.checkpoint._tensors import (
    are_sizes,
    code_of,
    CODES,
    Entry,
    parse_object,
    reading,
    Tensors,
    UnsupportedError,
)

MAX_HEADER = 100_000_000  # bytes; the same limit as in the library of the format's authors
# Files that people take for checkpoints, by their first bytes.
_AGAIN = (
    "which can run code and is not read. Save it with `safetensors.torch.save_file`, or a tree of "
    "JAX with `rmtjax.checkpoint.save`"
)
_FOREIGN = {
    b"PK": f"an archive, as `torch.save` and `np.savez` write it. Torch's is a pickle, {_AGAIN}",
    b"\x80": f"a pickle, {_AGAIN}",
    b"\x93NUMPY": "an array in a .npy file, and has no names of tensors",
    b"\x89HDF": "an HDF5 file, as of Keras: save its arrays as .safetensors",
}
_ALIGNED = 64  # bytes; JAX on CPU copies an array that is not aligned to them
_FIELDS = ("dtype", "shape", "data_offsets")
Places = dict[str, tuple[Entry, int]]  # of each tensor its entry, and its offset in the file


def _parse_place(name: str, fields: Any) -> tuple[Entry, int, int]:
    """Returns the entry of a tensor, and where in the data it begins and ends."""
    # The library of the format's authors takes a list of the three, and other fields besides.
    if isinstance(fields, list) and len(fields) == 3:
        fields = dict(zip(_FIELDS, fields, strict=True))
    if not isinstance(fields, dict) or not fields.keys() >= {*_FIELDS}:
        raise ValueError(f"tensor {name!r} needs a dtype, a shape and data_offsets")
    entry, offsets = Entry.parse(name, fields["dtype"], fields["shape"]), fields["data_offsets"]
    if not are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has no two offsets of at least 0")
    begin, end = offsets
    if end - begin != entry.num_bytes:
        raise ValueError(f"tensor {name!r} has {end - begin} bytes and is {entry}")
    return entry, begin, end


def _parse_header(header: bytes, begin: int, size: int) -> tuple[Places, dict[str, str]]:
    """Returns the places of the tensors, in their order, and the metadata."""
    # The library of the format's authors takes the last of two tensors with one name.
    fields = parse_object(header, once=("__metadata__", *_FIELDS))
    metadata = fields.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict):
        raise ValueError("its metadata is not a JSON object")
    for text in (*fields, *metadata, *metadata.values()):
        if not isinstance(text, str):
            raise ValueError(f"{text!r:.50} of its metadata is not a text")
        # JSON can escape half of a surrogate pair, which no file name or terminal can have.
        if text != text.encode(errors="ignore").decode():
            raise ValueError(f"the name {text!r:.50} is not Unicode")
    places = [(name, *_parse_place(name, value)) for name, value in fields.items()]
    places.sort(key=lambda place: place[2:])
    # Without gaps and overlaps, no bytes are hidden and none belong to two tensors.
    position = 0
    for name, _, first, end in places:
        if first != position:
            raise ValueError(f"tensor {name!r} begins at {first}, where {position} is next")
        position = end
    if position != size:
        raise ValueError(f"its tensors take {position} bytes, and it has {size} for them")
    return {name: (entry, begin + first) for name, entry, first, _ in places}, metadata


def _read_header(file: BinaryIO) -> tuple[Places, dict[str, str]]:
    """Returns the places of the tensors, and the metadata."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise ValueError(f"it has {size} bytes, too few for a header")
    begin = file.read(8)
    (length,) = struct.unpack("<Q", begin)
    # Checked before the header is read: a damaged length would fill the memory.
    if length > min(size - 8, MAX_HEADER):
        for sign, kind in _FOREIGN.items():
            if begin.startswith(sign):
                raise UnsupportedError(f"it is {kind}")
        raise ValueError(
            f"its header claims {length} bytes, of {size - 8} that follow and {MAX_HEADER} allowed"
        )
    return _parse_header(file.read(length), 8 + length, size - 8 - length)


def _read_tensor(file: BinaryIO, entry: Entry, begin: int) -> np.ndarray:
    """Reads one tensor into memory that JAX can use without a copy."""
    buffer = np.empty(entry.num_bytes + _ALIGNED, np.uint8)
    first = -buffer.ctypes.data % _ALIGNED
    data = buffer[first : first + entry.num_bytes]
    array = data if entry.is_packed else data.view(entry.dtype).reshape(entry.shape)
    file.seek(begin)
    if file.readinto(data.data) != data.size:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("it has become shorter since it was opened")
    # NumPy expects no other bytes in booleans than 0 and 1, and counts wrongly with them.
    if entry.dtype == np.bool_:
        np.minimum(data, 1, out=data)
    return array


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[Tensors]:
    """Opens one .safetensors file, as `open_tensors` describes."""
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {str(path)!r}: give a path that is there.")
    # To open a pipe would wait for a writer, so the check comes first.
    if not path.is_file():
        raise ValueError(f"cannot read {str(path)!r}: it is not a regular file. Give a file.")
    with open(path, "rb") as file:
        with reading(path, "a .safetensors file"):
            places, metadata = _read_header(file)

        def read(name: str) -> np.ndarray:
            with reading(path, "a .safetensors file"):
                return _read_tensor(file, *places[name])

        entries = {name: entry for name, (entry, _) in places.items()}
        yield Tensors(path, "safetensors", entries, metadata, read, (path,))


def check_codes(entries: Mapping[str, Entry]) -> None:
    """Raises ValueError for a dtype that a .safetensors file cannot hold."""
    for name, entry in entries.items():
        if code_of(entry.dtype) is None:
            raise ValueError(
                f"{name!r} has dtype {entry.dtype}, which a .safetensors file cannot hold: cast it "
                f"to one of {', '.join(map(str, CODES))}."
            )


def _make_header(
    entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Returns the header of a file, and where in the file each tensor begins."""
    check_codes(entries)
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, position = {}, 0
    # Larger items first, so that each tensor begins at a multiple of its item size.
    for name in sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name)):
        entry = entries[name]
        end = position + entry.num_bytes
        row = {"dtype": code_of(entry.dtype), "shape": entry.shape, "data_offsets": (position, end)}
        fields[name], offsets[name], position = row, position, end
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of 8
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"`entries` make a header of {len(text)} bytes, over {MAX_HEADER}: write several files."
        )
    begin = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: begin + n for name, n in offsets.items()}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that replaces the one at `path` when the context ends without an error."""
    path = Path(os.path.realpath(path))  # a link stays a link, and the mode of its file is kept
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            if path.exists():
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            yield file
            # Without `fsync`, a crash could leave the new name with none of the data.
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_regular(path: Path, name: str) -> None:
    """Raises ValueError if a folder, a device or a pipe is at `path`."""
    if path.exists() and not path.is_file():
        raise ValueError(f"`{name}` {str(path)!r} is not a regular file: give the path of a file.")


def write_tensors(
    path: str | os.PathLike[str],
    entries: Mapping[str, Entry],
    arrays: Iterable[tuple[str, Any]],  # in any order
    metadata: Mapping[str, str],
) -> None:
    """Writes a .safetensors file, one tensor at a time. An error leaves the old file in place."""
    header, offsets = _make_header(entries, metadata)
    check_regular(Path(path), "path")
    with replacing(Path(path)) as file:
        file.write(header)
        for name, array in arrays:
            array = np.asarray(array, order="C")
            if name not in offsets:
                raise ValueError(f"`arrays` has {name!r} twice, or `entries` does not have it.")
            entry, wanted = Entry.of(array), entries[name]
            bytes_alone = Entry((wanted.num_bytes,), np.dtype(np.uint8))
            if entry != (bytes_alone if wanted.is_packed else wanted):
                raise ValueError(f"`arrays` gave {entry} for {name!r}, not {wanted}.")
            file.seek(offsets.pop(name))
            file.write(array.reshape(-1).view(np.uint8).data)
            del array  # so that its memory is free before the next one is read
        if offsets:
            raise ValueError(f"`arrays` lacks {min(offsets)!r}, which `entries` has.")
