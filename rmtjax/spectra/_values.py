"""Gram matrices and eigenvalues in the memory of the host, where LAPACK needs no program."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from rmtjax._axes import KernelAxes, matrix_shape
from rmtjax._types import Spectrum

# So many entries are squared at a time: of a long matrix no copy is made.
PART = 2**20


def on_host(kernel: Any) -> bool:
    """Whether the host decomposes a kernel faster, and in less room, than a compiled program.

    An array of the CPU is not copied for it. A float64 kernel is not among them: squared, its
    small values drown in the rounding of the large ones.
    """
    if isinstance(kernel, jax.core.Tracer):
        return False
    if isinstance(kernel, jax.Array):
        # Whole, and not on devices of other processes alone.
        whole = kernel.is_fully_replicated and bool(kernel.addressable_shards)
        here = whole and all(device.platform == "cpu" for device in kernel.devices())
    else:
        read = isinstance(kernel, (np.ndarray, jax.ShapeDtypeStruct))  # or to be, from a file
        here = read and jax.default_backend() == "cpu"
    return here and kernel.dtype.itemsize < 8


def gram(tall: np.ndarray, dtype: type) -> np.ndarray:
    """A^T A of a matrix with no fewer rows than columns: its lower triangle, and zeros above."""
    from scipy.linalg import blas  # comes with jax; loaded by those who need it

    squares = np.zeros((tall.shape[1],) * 2, dtype, order="F")
    add: Any = blas.get_blas_funcs("syrk", dtype=squares.dtype)
    step = max(1, PART // tall.shape[1])
    for first in range(0, len(tall), step):
        rows = tall[first : first + step].astype(dtype, order="C", copy=False)
        squares = add(1, rows.T, beta=1, c=squares, overwrite_c=True, lower=True)
    return squares


def eigenvalues(squares: np.ndarray) -> np.ndarray:
    """Of the lower triangle of a symmetric matrix, in its place; ascending, NaN if not finite."""
    from scipy.linalg import eigvalsh

    if not np.isfinite(squares).all():
        return np.full(len(squares), np.nan)
    return eigvalsh(squares, driver="ev", overwrite_a=True, check_finite=False)


def to_spectrum(values: np.ndarray, kernel: Any, axes: KernelAxes) -> Spectrum:
    """The spectra of a kernel whose squared singular values are known, descending."""
    stack, *sides = matrix_shape(kernel.shape, axes)
    dtype = np.dtype(jnp.promote_types(kernel.dtype, jnp.float32))
    eigenvalues: Any = (np.maximum(values, 0) / max(sides)).astype(dtype)
    ratios: Any = np.full(stack, min(sides) / max(sides), dtype)
    return Spectrum(eigenvalues, ratios)
