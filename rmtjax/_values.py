"""The spectra of kernels in the memory of the host, where LAPACK is called without a program."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from rmtjax._kernels import matrix_shape, to_matrices
from rmtjax._typing import KernelAxes, Spectrum

# So many entries are squared at a time: of a long matrix no copy is made.
_PART = 2**20
# Largest over smallest eigenvalue up to which squares in float32 have four digits of it or more.
_MODERATE = 2048
_SMALL = 1e-30  # squares under it may be less than normal in float32


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
    step = max(1, _PART // tall.shape[1])
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


def _squared_values(tall: np.ndarray) -> np.ndarray:
    """The squared singular values, from the Gram matrix in the dtype that it needs."""
    rows, columns = tall.shape
    if rows >= 2 * columns:  # its law has no small values
        values = eigenvalues(gram(tall, np.float32))
        if _SMALL < values[-1] <= _MODERATE * values[0]:
            return values
    return eigenvalues(gram(tall, np.float64))


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
    which is taken where all eigenvalues are of one size, it is off by a few $2^{-24} \lambda_1$.
    """
    matrices = to_matrices(np.asarray(kernel), axes)
    tall = matrices if matrices.shape[1] >= matrices.shape[2] else matrices.mT
    return to_spectrum(np.stack(list(map(_squared_values, tall)))[:, ::-1], kernel, axes)
