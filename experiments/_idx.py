"""IDX files, the format in which MNIST and its successors were published.

Two zero bytes, a byte for the type (8 is uint8), a byte for the number of axes, the axes as
big-endian 4-byte integers, then the values, last axis fastest. Often packed with gzip.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from experiments._arrays import Arrays, check, damaged

FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}

# The files of all sets have the same names. How the training labels begin tells them apart.
_FIRST_LABELS = {
    "mnist": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4],
    "fashion_mnist": [9, 0, 0, 3, 0, 2, 7, 2, 5, 5],
}


def parse(raw: bytes, place: str | Path) -> UInt8[np.ndarray, "*shape"]:
    """The array in the bytes of an IDX file, packed or not; `place` is for the message."""
    if raw[:2] == b"\x1f\x8b":  # by content, since browsers unpack and keep the name
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise damaged(place, f"gzip can not unpack it ({error})") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise damaged(place, f"no IDX file of bytes, it begins with {raw[:4].hex(' ')!r}")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise damaged(place, "cut short within its header")
    shape = struct.unpack(f">{raw[3]}I", raw[4:start])
    if math.prod(shape) != len(raw) - start:
        problem = f"its header {list(shape)} promises {math.prod(shape)} values"
        raise damaged(place, f"{problem}, but {len(raw) - start} follow")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy()  # writable


def _spelled(folder: Path, stem: str) -> Path | None:
    names = [stem, stem.replace("-idx", ".idx")]
    paths = [folder / f"{name}{suffix}" for name in names for suffix in ("", ".gz")]
    return next((path for path in paths if path.is_file()), None)


def read_folder(folder: Path) -> Arrays | None:
    """The four arrays of a folder; None if it has no IDX file at all.

    Raises:
      ValueError: One of the files is missing or damaged, or they do not fit together.
    """
    paths = {field: _spelled(folder, stem) for field, stem in FILES.items()}
    if not any(paths.values()):
        return None
    for field, path in paths.items():
        if path is None:
            raise damaged(folder, f"IDX files, but no {FILES[field]} among them")
    places = [path for path in paths.values() if path]
    return check(Arrays(*(parse(path.read_bytes(), path) for path in places)), places)


def recognize(arrays: Arrays) -> str | None:
    """Which of the known sets these arrays are, in the order of publication."""
    first = arrays.train_labels[:10].tolist()
    return next((name for name, labels in _FIRST_LABELS.items() if labels == first), None)
