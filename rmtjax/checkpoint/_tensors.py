"""What a checkpoint holds, known before any of its data is read."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

KEY = "rmtjax"  # the key under which the metadata of a checkpoint hold its plan
# The codes of the safetensors format that NumPy, with the types that jax adds, can hold.
DTYPES = {
    code: np.dtype(dtype)
    for code, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E5M2": jnp.float8_e5m2,
        "F8_E4M3": jnp.float8_e4m3fn,
        "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
        "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
        "F8_E8M0": jnp.float8_e8m0fnu,
        "U16": np.uint16,
        "I16": np.int16,
        "F16": np.float16,
        "BF16": jnp.bfloat16,
        "U32": np.uint32,
        "I32": np.int32,
        "F32": np.float32,
        "U64": np.uint64,
        "I64": np.int64,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_NDIM = 32  # what every NumPy can hold


class Entry(NamedTuple):
    """The shape and dtype of one tensor of a checkpoint.

    Attributes:
      shape: Its shape.
      dtype: Its NumPy dtype; bfloat16 and float8 are those of jax.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"

    @property
    def num_bytes(self) -> int:
        """What its numbers take, however large a shape is claimed."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def possible(self) -> bool:
        """Whether an array can have the shape: NumPy limits that of an empty one, too."""
        largest = self._replace(shape=tuple(max(size, 1) for size in self.shape))
        return len(self.shape) <= MAX_NDIM and largest.num_bytes < 2**63


@dataclass(frozen=True)
class Tensors:
    """An open checkpoint: what it holds, and a function that reads one tensor.

    Attributes:
      path: Where it lies.
      layout: "safetensors" or "orbax".
      entries: Name to `Entry`, in the order of the file.
      metadata: Texts that were saved with it.
      read: `read(name)` gives one tensor; its memory is free when it is dropped.
      files: What is read while it is open: files, or the folder that orbax wrote.
    """

    path: Path
    layout: Literal["safetensors", "orbax"]
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    read: Callable[[str], np.ndarray]
    files: tuple[Path, ...]


def parse_json(text: str | bytes) -> Any:
    """JSON in which a name stands once and a number is finite; ValueError for anything else."""

    def unique(pairs):
        names = dict(pairs)
        if len(names) < len(pairs):
            raise ValueError("a name stands twice in an object")
        return names

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
