"""One .safetensors file: its header checked, its tensors read and written one by one.

The format is a length (8 bytes, little-endian), a JSON object of that length, and the data that
the object divides among its names. The library of its authors maps the whole file into memory,
has no float8 in NumPy, and writes no tensor before it has them all; hence these few functions.

References:
  https://github.com/huggingface/safetensors, "Format".
"""

import contextlib
import json
import os
import secrets
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rmtjax.checkpoint._tensors import CODES, DTYPES, Entry, parse_json, Tensors

MAX_HEADER = 100_000_000  # bytes, as in the library of the format's authors
_ALIGNED = 64  # bytes, to which XLA wants arrays aligned; others JAX copies


class _MalformedError(ValueError):
    """What is wrong with a file, without its name."""


def _entry(name: str, told: Any) -> tuple[Entry, int, int]:
    """The entry of a tensor, and where in the data it begins and ends."""
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise _MalformedError(f"tensor {name!r} needs a dtype, a shape and data_offsets alone")
    code, shape, offsets = told["dtype"], told["shape"], told["data_offsets"]
    sizes = lambda value: isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
    if not isinstance(code, str) or code not in DTYPES:
        raise _MalformedError(f"tensor {name!r} has dtype {code!r}, not one of {list(DTYPES)}")
    if not sizes(shape):
        raise _MalformedError(f"tensor {name!r} has no shape of sizes of at least 0")
    if not sizes(offsets) or len(offsets) != 2:
        raise _MalformedError(f"tensor {name!r} has no two offsets of at least 0")
    entry, (begin, end) = Entry(tuple(shape), DTYPES[code]), offsets
    if not entry.possible:
        raise _MalformedError(f"tensor {name!r} is larger than any memory")
    if end - begin != entry.num_bytes:
        raise _MalformedError(f"tensor {name!r} has {end - begin} bytes and is {entry}")
    return entry, begin, end


def _check_text(*names: Any) -> None:
    for name in names:
        if not isinstance(name, str):
            raise _MalformedError(f"{name!r:.50} of its metadata is no text")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise _MalformedError(f"the name {name!r:.50} is no Unicode") from error


def _parse(header: bytes, size: int) -> tuple[dict[str, tuple[Entry, int]], dict[str, str]]:
    """Entries with where they begin, in the order of the data, and the metadata."""
    try:
        told = parse_json(header.decode())
    except ValueError as error:
        raise _MalformedError(f"its header is no JSON ({error})") from error
    if not isinstance(told, dict):
        raise _MalformedError("its header is no JSON object")
    metadata = told.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _MalformedError("its metadata is no JSON object")
    _check_text(*told, *metadata, *metadata.values())
    places = sorted(
        ((name, *_entry(name, value)) for name, value in told.items()), key=lambda row: row[2:]
    )
    position = 0
    for name, _, begin, end in places:
        if begin != position:
            raise _MalformedError(f"tensor {name!r} begins at {begin}, where {position} is next")
        position = end
    if position != size:
        raise _MalformedError(f"its tensors take {position} bytes, and it has {size} for them")
    return {name: (entry, begin) for name, entry, begin, _ in places}, metadata


def _read_header(file: BinaryIO) -> tuple[dict[str, tuple[Entry, int]], dict[str, str]]:
    """Entries with where in the file they begin, and the metadata."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise _MalformedError(f"it has {size} bytes, too few for a header")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, MAX_HEADER):
        raise _MalformedError(
            f"its header claims {length} bytes, of {size - 8} that follow and {MAX_HEADER} allowed"
        )
    places, metadata = _parse(file.read(length), size - 8 - length)
    return {name: (entry, 8 + length + begin) for name, (entry, begin) in places.items()}, metadata


def _read_tensor(file: BinaryIO, entry: Entry, begin: int) -> np.ndarray:
    room = np.empty(entry.num_bytes + _ALIGNED, np.uint8)
    first = -room.ctypes.data % _ALIGNED
    data = room[first : first + entry.num_bytes]
    array = data.view(entry.dtype).reshape(entry.shape)
    file.seek(begin)
    if file.readinto(data.data) != data.size:  # pyright: ignore[reportAttributeAccessIssue]
        raise _MalformedError("it has become shorter since it was opened")
    if entry.dtype == np.bool_ and data.max(initial=0) > 1:
        raise _MalformedError("it has a boolean that is neither 0 nor 1")
    return array


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except _MalformedError as error:
        remedy = "It is damaged or no .safetensors file: copy or download it again."
        raise ValueError(f"cannot read {str(path)!r}: {error}. {remedy}") from error


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[Tensors]:
    """Opens one .safetensors file; see `rmtjax._files.open_tensors`."""
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {str(path)!r}: give a path that is there.")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"cannot read {str(path)!r}: it is no regular file. Give a file's path.")
    with open(path, "rb") as file:
        with _naming(path):
            places, metadata = _read_header(file)

        def read(name: str) -> np.ndarray:
            with _naming(path):
                return _read_tensor(file, *places[name])

        entries = {name: entry for name, (entry, _) in places.items()}
        yield Tensors(path, "safetensors", entries, metadata, read, (path,))


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    told: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, entry in entries.items():
        if entry.dtype not in CODES:
            raise ValueError(
                f"`entries` has {name!r} of dtype {entry.dtype}, which a .safetensors file cannot "
                f"hold: cast it to one of {', '.join(map(str, CODES))}."
            )
        end = position + entry.num_bytes
        row = {"dtype": CODES[entry.dtype], "shape": entry.shape, "data_offsets": (position, end)}
        told[name], position = row, end
    text = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of 8
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"`entries` and `metadata` make a header of {len(text)} bytes, over the {MAX_HEADER} "
            "of the format: write several files."
        )
    return struct.pack("<Q", len(text)) + text


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of the one at `path` once all has been written.

    A link stays, what it leads to is replaced, and has the mode that it had.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            if path.exists():
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_regular(path: Path, name: str) -> None:
    """Refuses to put a file in the place of a folder, a device or a pipe."""
    if path.exists() and not path.is_file():
        raise ValueError(f"`{name}` {str(path)!r} is no regular file: give the path of a file.")


def write_file(
    path: Path,
    entries: Mapping[str, Entry],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes one .safetensors file; see `rmtjax._files.write_tensors`."""
    # Larger items first: each tensor then begins at a multiple of the size of its items.
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    header = _header({name: entries[name] for name in order}, metadata)
    check_regular(path, "path")
    with replacing(path) as file:
        file.write(header)
        for name in order:
            array = np.asarray(read(name), order="C")
            found = Entry(array.shape, array.dtype)
            if found != entries[name]:
                raise ValueError(f"`read` gave {found} for {name!r}, not {entries[name]}.")
            file.write(array.reshape(-1).view(np.uint8).data)
            del array  # before the next one is read
