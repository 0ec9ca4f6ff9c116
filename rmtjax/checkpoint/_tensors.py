"""Names, shapes and dtypes of the tensors in a checkpoint, known before any data is read."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

FilePath = str | os.PathLike[str]
KEY = "rmtjax"  # the key of this package in the metadata of a checkpoint
# The codes of the safetensors format that NumPy can hold, with the dtypes that jax adds to it.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2FNUZ": np.dtype(jnp.float8_e5m2fnuz),
    "F8_E4M3FNUZ": np.dtype(jnp.float8_e4m3fnuz),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
    "C64": np.dtype(np.complex64),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_NDIM = 32  # the limit of NumPy 1, so that every NumPy can read the shape


def are_sizes(value: Any) -> bool:
    """Returns True for a list of integers of at least 0."""
    # `type` and not `isinstance`: a boolean is not a size.
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


class Entry(NamedTuple):
    """Holds the shape and dtype of one tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: np.dtype  # bfloat16 and float8 are those of jax

    @classmethod
    def of(cls, array: Any) -> "Entry":
        """Returns the entry of any object with a shape and a dtype."""
        return cls(tuple(array.shape), np.dtype(array.dtype))

    @classmethod
    def parse(cls, name: str, code: Any, shape: Any) -> "Entry":
        """Parses the entry of a tensor from JSON; raises ValueError if no array can have it."""
        if not isinstance(code, str) or code not in DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {code!r}, not one of {list(DTYPES)}")
        if not are_sizes(shape):
            raise ValueError(f"tensor {name!r} has no shape of sizes of at least 0")
        entry = cls(tuple(shape), DTYPES[code])
        # NumPy refuses huge shapes even if one size is 0 and the array is empty.
        largest = entry._replace(shape=tuple(max(size, 1) for size in shape))
        if len(shape) > MAX_NDIM or largest.num_bytes >= 2**63:
            raise ValueError(f"tensor {name!r} is larger than any memory")
        return entry

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"

    @property
    def num_bytes(self) -> int:
        """The size of the data in bytes."""
        # In Python integers: a damaged file may claim a shape that overflows 64 bits.
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Tensors:
    """An open checkpoint: the entries of its tensors, and a function that reads one tensor."""

    path: Path  # that was opened
    layout: Literal["safetensors", "orbax"]
    entries: Mapping[str, Entry]  # in the order of the file
    metadata: Mapping[str, str]  # texts that were saved with the tensors
    read: Callable[[str], np.ndarray]  # keeps no reference to the tensor that it returns
    files: tuple[Path, ...]  # those that stay open, or the folder that orbax wrote


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """Stands for an array that is still in a file, and reads it anew for each `np.asarray`."""

    tensors: Tensors
    name: str
    dtype: np.dtype  # in which it is read
    shape = property(lambda self: self.tensors.entries[self.name].shape)
    ndim = property(lambda self: len(self.shape))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # every read is a new array
        return self.tensors.read(self.name).astype(dtype or self.dtype, copy=False)


@contextlib.contextmanager
def reading(path: Path, kind: str, errors: type[Exception] = ValueError) -> Iterator[None]:
    """Turns an error of a damaged file into a ValueError with its path and a remedy."""
    try:
        yield
    except errors as error:
        raise ValueError(
            f"cannot read {str(path)!r}: {error}. It is damaged or not {kind}: copy it again, or "
            "download it again."
        ) from error


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parses a JSON object with unique names and finite numbers; raises ValueError for others."""

    def unique(pairs):
        names = dict(pairs)
        if len(names) < len(pairs):
            raise ValueError("a name stands twice in an object")
        return names

    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    try:
        text = text.decode() if isinstance(text, bytes) else text
        fields = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        cause = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"it is not JSON ({cause})") from error
    if not isinstance(fields, dict):
        raise ValueError("it is not a JSON object")
    return fields
