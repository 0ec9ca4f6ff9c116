"""The spectra of kernels in the memory of the host, where LAPACK is called without a program."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmtjax._kernels import matrix_shape, to_matrices
from rmtjax._typing import KernelAxes, Spectrum

# So many rows are squared at a time: of a long matrix no copy is made.
_ROWS = 1024
# Sides from which a matrix that is not long is decomposed: in float64 it would need five times its
# room, and save little time.
_LARGE = 1536
# Largest over smallest eigenvalue up to which squares in float32 have four digits of it or more.
_MODERATE = 2048


def on_host(kernel: Any, axes: KernelAxes) -> bool:
    """Whether the host finds the spectrum of a kernel faster than a compiled program.

    An array of the CPU is not copied for it. A float64 kernel is not among them: squared, its
    small values drown in the rounding of the large ones.
    """
    if isinstance(kernel, jax.Array):
        # Whole, and not on devices of other processes alone.
        whole = kernel.is_fully_replicated and bool(kernel.addressable_shards)
        here = whole and all(device.platform == "cpu" for device in kernel.devices())
    else:
        here = isinstance(kernel, np.ndarray) and jax.default_backend() == "cpu"
    if not here or kernel.dtype.itemsize == 8:
        return False
    short, long = sorted(matrix_shape(kernel.shape, axes)[1:])
    return short < _LARGE or long >= 2 * short


def _gram(long: np.ndarray, dtype: type) -> np.ndarray:
    """A^T A of a matrix with more rows than columns."""
    gram = np.zeros((long.shape[1],) * 2, dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # told by what comes out
        for first in range(0, len(long), _ROWS):
            rows = long[first : first + _ROWS].astype(dtype, copy=False)
            gram += rows.T @ rows
    return gram


def _squared_values(long: np.ndarray) -> np.ndarray:
    """The squared singular values, ascending, from the Gram matrix in the dtype that it needs."""
    rows, columns = long.shape
    if rows >= 2 * columns:  # its law has no small values
        gram = _gram(long, np.float32)
        values = np.linalg.eigvalsh(gram) if np.isfinite(gram).all() else np.zeros(columns)
        if 0 < values[-1] <= _MODERATE * values[0]:
            return values
    return np.linalg.eigvalsh(_gram(long, np.float64))


def _eigenvalues(matrix: np.ndarray) -> np.ndarray:
    rows, columns = matrix.shape
    if not np.isfinite(matrix).all():
        return np.full(min(rows, columns), np.nan)
    return _squared_values(matrix if rows >= columns else matrix.T)[::-1]


def to_spectrum(values: np.ndarray, kernel: Any, axes: KernelAxes) -> Spectrum:
    """The spectra of a kernel whose squared singular values are known, descending."""
    stack, *sides = matrix_shape(kernel.shape, axes)
    dtype = np.dtype(jnp.promote_types(kernel.dtype, jnp.float32))
    eigenvalues: Any = (np.maximum(values, 0) / max(sides)).astype(dtype)
    ratios: Any = np.full(stack, min(sides) / max(sides), dtype)
    return Spectrum(eigenvalues, ratios)


def host_spectra(kernel: Any, axes: KernelAxes) -> Spectrum:
    r"""The spectra of a kernel of at most 32 bits, as NumPy arrays with a leading axis.

    By the Gram matrix. In float64 the products of its entries are exact, and an eigenvalue is off
    by about $2^{-53} \lambda_1$ times a small multiple of p: less than by the singular values in
    float32, which are off by $2^{-24} s_1$, down to $\lambda_k = 10^{-12} \lambda_1$. In float32,
    which is taken where all eigenvalues are of one size, it is off by some $2^{-24} \lambda_1$.
    """
    matrices = to_matrices(np.asarray(kernel), axes)
    return to_spectrum(np.stack([_eigenvalues(matrix) for matrix in matrices]), kernel, axes)
