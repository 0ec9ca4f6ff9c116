"""Names, shapes and dtypes of the tensors in a checkpoint, known before any data is read."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
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
# Dtypes of fewer bits than a byte, which the format packs. Their bytes are copied, and not read.
PACKED = {
    "F4": (np.dtype(ml_dtypes.float4_e2m1fn), 4),
    "F6_E2M3": (np.dtype(ml_dtypes.float6_e2m3fn), 6),
    "F6_E3M2": (np.dtype(ml_dtypes.float6_e3m2fn), 6),
}
_BITS = {dtype: bits for dtype, bits in PACKED.values()}
_ALL = CODES | {dtype: code for code, (dtype, _) in PACKED.items()}
_BY_CODE = {code: dtype for dtype, code in _ALL.items()}
MAX_NDIM = 64  # the limit of NumPy 2


class UnsupportedError(ValueError):
    """Tells of a file that is not damaged, and that this package cannot read."""


def code_of(dtype: np.dtype) -> str | None:
    """Returns the code of a dtype in the safetensors format; None for one that it cannot hold."""
    return _ALL.get(dtype)


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
        if not isinstance(code, str):
            raise ValueError(f"tensor {name!r} has dtype {code!r}, which is not a text")
        if code not in _BY_CODE:
            raise UnsupportedError(
                f"tensor {name!r} has dtype {code!r}, not one of {list(_BY_CODE)}. Upgrade rmtjax, "
                "or write this tensor in another dtype"
            )
        if not are_sizes(shape):
            raise ValueError(f"tensor {name!r} has no shape of sizes of at least 0")
        entry = cls(tuple(shape), _BY_CODE[code])
        if math.prod(shape) * _BITS.get(entry.dtype, 8) % 8:
            raise ValueError(f"tensor {name!r} is {entry}, which does not fill its last byte")
        # NumPy refuses huge shapes even if one size is 0 and the array is empty.
        largest = entry._replace(shape=tuple(max(size, 1) for size in shape))
        if len(shape) > MAX_NDIM or largest.num_bytes >= 2**63:
            empty = 0 in shape or len(shape) > MAX_NDIM
            words = f"tensor {name!r} has a shape {str(shape)[:40]} that is larger than any memory"
            raise (
                UnsupportedError(f"{words}, and no array can have it")
                if empty
                else ValueError(words)
            )
        return entry

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"

    @property
    def num_bytes(self) -> int:
        """The size of the data in bytes."""
        # In Python integers: a damaged file may claim a shape that overflows 64 bits.
        bits = _BITS.get(self.dtype, 8 * self.dtype.itemsize)
        return math.prod(self.shape) * bits // 8

    @property
    def is_packed(self) -> bool:
        """Returns True if several entries share a byte, so that the data are bytes alone."""
        return self.dtype in _BITS


@dataclass(frozen=True)
class Tensors:
    """An open checkpoint: the entries of its tensors, and a function that reads one tensor."""

    path: Path  # that was opened
    layout: Literal["safetensors", "orbax"]
    entries: Mapping[str, Entry]  # in the order of the file
    metadata: Mapping[str, str]  # texts that were saved with the tensors
    # Keeps no reference to the tensor that it returns; of a packed one, the bytes.
    read: Callable[[str], np.ndarray]
    files: tuple[Path, ...]  # those that stay open, or the folder that orbax wrote

    def array(self, name: str) -> np.ndarray:
        """Reads one tensor; raises ValueError if it is packed."""
        if self.entries[name].is_packed:
            raise ValueError(
                f"{name!r} is {self.entries[name].dtype}, of which several share a byte: it can be "
                "copied, and not read. Leave it out by `where`, or write it in another dtype."
            )
        return self.read(name)


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
        return self.tensors.array(self.name).astype(dtype or self.dtype, copy=False)


def check_dtype(dtype: Any) -> np.dtype | None:
    """Returns the dtype of a computation; raises ValueError for one that it cannot have."""
    if dtype is None:
        return None
    checked = np.dtype(dtype)
    if checked.name not in ("float32", "float64"):
        raise ValueError(f"`dtype` must be float32 or float64, got {checked}: give one or None.")
    # JAX would silently compute in float32.
    if jax.dtypes.canonicalize_dtype(checked) != checked:
        raise ValueError("`dtype` float64 needs `jax.config.update('jax_enable_x64', True)`.")
    return checked


def with_dtype(leaf: Any, dtype: np.dtype | None) -> Any:
    """Returns a stored leaf that is read in another dtype, if it is floating."""
    # float8 keeps its dtype, so that the plan reports that it has too few bits.
    wide = lambda part: jnp.issubdtype(part.dtype, jnp.floating) and part.dtype.itemsize > 1
    change = lambda part: replace(part, dtype=dtype) if wide(part) else part
    return jax.tree.map(change, leaf) if dtype else leaf


@contextlib.contextmanager
def reading(path: Path, kind: str, errors: type[Exception] = ValueError) -> Iterator[None]:
    """Turns an error of a damaged file into a ValueError with its path and a remedy."""
    try:
        yield
    except UnsupportedError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}.") from error
    except errors as error:
        raise ValueError(
            f"cannot read {str(path)!r}: {error}. It is damaged or not {kind}: copy it again, or "
            "download it again."
        ) from error


def parse_object(text: str | bytes, once: Container[str] | None = None) -> dict[str, Any]:
    """Parses a JSON object with finite numbers; raises ValueError for others.

    Names must be unique in their object, or only those that may be there `once`. Of others the last
    one is then taken.
    """

    def unique(pairs):
        names = [name for name, _ in pairs if once is None or name in once]
        if len({*names}) < len(names):
            raise ValueError("a name stands twice in an object")
        return dict(pairs)

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
