"""The exact spectrum of a matrix by QR and singular value decomposition, values only."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from rmtjax._axes import MatrixView, native
from rmtjax._modes import in_usual_modes
from rmtjax._sharding import by_compiler
from rmtjax._types import Spectrum

# Entries between this and its reciprocal have squares in the range of float32, and small ones too.
_RANGE = 1e10

# The default precision on accelerators rounds the operands, which a spectrum would show.
matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Values(NamedTuple):
    """The spectra of a kernel, whatever computed them.

    Attributes:
      spectrum: NumPy arrays with a leading axis for the matrices of a stack, in float32 at least.
        Of factors it is that of their product, with zeros up to the short side.
        They are those of the kernel over a power of two, if its squares could leave float32.
      num_exact: How many of the largest eigenvalues are those of the matrix. The others are
        estimated quantiles of its bulk.
      live: The number of rows and of columns that are not zero; of factors, all.
      exponent: The exponents of the powers of two.
    """

    spectrum: Spectrum
    num_exact: Int[np.ndarray, " stack"]
    live: Int[np.ndarray, "stack 2"]
    exponent: Int[np.ndarray, " stack"]


def check_matrix(name: str, matrix: Float[Array, "m n"]) -> None:
    """Raises an error for arrays that `jnp.linalg.svd` would take for a batch, or not at all."""
    if matrix.ndim != 2:
        raise ValueError(
            f"`{name}` needs a matrix, got shape {matrix.shape}. Reshape a convolution "
            "kernel to (window * in, out) first, or use `rmtjax.analyze` on a tree."
        )
    if 0 in matrix.shape:
        raise ValueError(f"`{name}` needs a matrix with entries, got shape {matrix.shape}.")
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` needs a real floating-point matrix, got dtype {matrix.dtype}. "
            "Cast it with `matrix.astype(jnp.float32)` if its values are meant as weights."
        )


def as_matrix(name: str, matrix: Any) -> Array:
    """Returns an argument as a matrix; raises an error for anything else."""
    if isinstance(matrix, jax.ShapeDtypeStruct):
        raise TypeError(
            f"`{name}` needs a matrix with values, got {matrix}. For shapes alone, call it by "
            "`jax.eval_shape`."
        )
    matrix = jnp.asarray(native(matrix))
    check_matrix(name, matrix)
    return matrix


def lift(array: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns an array in float32 at least: LAPACK has no bfloat16, nor would it do."""
    # Not by promotion, which users may have made strict.
    return array if jnp.finfo(array.dtype).bits > 32 else array.astype(jnp.float32)


def aspect_ratio(matrix: Float[Array, "*batch m n"]) -> Float[Array, ""]:
    r"""Returns $\gamma = p / n$, the shorter side over the longer."""
    *_, rows, columns = matrix.shape
    ratio = min(rows, columns) / max(rows, columns)
    return jnp.asarray(ratio, jnp.promote_types(matrix.dtype, jnp.float32))


def from_singular_values(
    singular_values: Float[Array, "*batch p"], matrix: Float[Array, "*batch m n"]
) -> Spectrum:
    """Returns the spectrum of a matrix from its singular values, descending."""
    eigenvalues = singular_values**2 / max(matrix.shape[-2:])
    return Spectrum(eigenvalues=eigenvalues, ratio=aspect_ratio(matrix))


def from_squares(view: MatrixView, squared: np.ndarray) -> tuple[Spectrum, Any]:
    """Returns the spectrum of a kernel from squared singular values in float64, and exponents."""
    dtype = np.dtype(jnp.promote_types(view.dtype, jnp.float32))
    eigenvalues = np.maximum(squared, 0) / view.long
    largest = eigenvalues[:, 0]
    with np.errstate(invalid="ignore"):
        # Those that float32 holds, with room for smaller eigenvalues, stay as they are.
        usual = (largest > 1e-31) & (largest < 1e35) | ~np.isfinite(largest) | (largest == 0)
    exponent = np.where(usual, 0, np.frexp(largest)[1] // 2).astype(np.int32)
    eigenvalues: Any = np.ldexp(eigenvalues, -2 * exponent[:, None]).astype(dtype)
    ratio: Any = np.full(view.stack, view.short / view.long, dtype)
    return Spectrum(eigenvalues, ratio), exponent


def each(function: Callable[[Any], Any], stack: PyTree) -> PyTree:
    """Applies a decomposition to each matrix of a stack, of arrays with a leading axis."""
    if len(jax.tree.leaves(stack)[0]) == 1:
        result = function(jax.tree.map(lambda array: array[0], stack))
        return jax.tree.map(lambda array: array[None], result)
    # On CPU, LAPACK's calls for a stack wait for one another in XLA's threads. Two stacks in one
    # program may wait for ever. So matrices are decomposed one after another there.
    one_by_one = lambda stack: lax.map(function, stack)
    return lax.platform_dependent(stack, cpu=one_by_one, default=jax.vmap(function))


# Made once: `lax.map` compiles again for each new function.
_triangle_of = partial(jnp.linalg.qr, mode="r")


def triangle(matrix: Float[Array, "m n"]) -> Float[Array, "n n"]:
    """Returns R of A = Q R, which has the singular values and right vectors of A.

    It is the triangle of the stacked triangles of equal parts of the rows. So one part is copied
    at a time.
    """
    rows, columns = matrix.shape
    most = min(16, max(rows // (2 * columns), 1))
    parts = next(count for count in range(most, 0, -1) if rows % count == 0)
    if parts == 1:
        return _triangle_of(matrix)
    triangles = lax.map(_triangle_of, matrix.reshape(parts, -1, columns))
    return _triangle_of(triangles.reshape(-1, columns))


@in_usual_modes
def spectrum(matrix: Float[ArrayLike, "m n"]) -> Spectrum:
    r"""Returns the empirical spectral density of a matrix.

    $\lambda_k = s_k^2 / n$ for the singular values $s_1 \ge \dots \ge s_p$ of the matrix,
    $n$ the longer and $p$ the shorter of its sides.

    Args:
      matrix: Real matrix of any floating dtype; below float32 it is lifted to float32. Works
        under `jit` and `vmap`.

    Returns:
      `Spectrum(eigenvalues, ratio)`; NaN for a matrix that is not finite. In float32, squares of
      entries above 1e18 are infinite, and below 1e-19 they are 0. Divide such a matrix by its
      largest entry first, as `rmtjax.plan` does.

    Raises:
      ValueError, TypeError: `matrix` does not have two axes, entries, or a real floating dtype.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (100, 400))
      >>> eigenvalues, ratio = rmtjax.spectrum(noise)
      >>> eigenvalues.shape, float(ratio)
      ((100,), 0.25)
      >>> print(f"{eigenvalues.mean():.1f}")  # the mean square of the entries
      1.0
    """
    matrix = as_matrix("spectrum", matrix)
    return by_compiler(_spectrum, matrix)


def times_power(array: Any, exponent: Any) -> Array:
    """Returns an array times a power of two, exactly."""
    # In two steps: the reciprocal of a large power of two is no normal number.
    half = exponent // 2
    return jnp.ldexp(jnp.ldexp(array, half), exponent - half)


def to_unit(array: Float[Array, "..."]) -> tuple[Float[Array, "..."], Int[Array, ""]]:
    """Returns an array over a power of two near its largest entry, and the exponent.

    The exponent is 0 unless squares could leave the range of float32: no ordinary array changes.
    """
    largest = jnp.max(jnp.abs(array), initial=0)
    _, exponent = jnp.frexp(largest)
    usual = (largest > 1 / _RANGE) & (largest < _RANGE) | ~jnp.isfinite(largest) | (largest == 0)
    exponent = jnp.where(usual, 0, exponent)
    return times_power(array, -exponent), exponent


@jax.jit
def _spectrum(matrix: Float[Array, "m n"]) -> Spectrum:
    matrix = lift(matrix)
    finite = jnp.isfinite(matrix).all()
    long = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
    core = triangle(long) if len(long) >= 2 * long.shape[1] else matrix
    # The decomposition may loop for long, or stop, on NaN or infinity; the triangle does not.
    safe = jnp.where(finite, core, 0)
    # Memory for full matrices would be allocated even though only values are returned.
    values = jnp.linalg.svd(safe, full_matrices=False, compute_uv=False)
    return from_singular_values(jnp.where(finite, values, jnp.nan), matrix)


def blocks_of(rows: int, columns: int, ratio: float) -> list[tuple[slice, slice]]:
    """Returns blocks of one aspect ratio that cover a matrix, each with one of its complete sides.

    They overlap where they do not divide the other side.
    """
    short, long = sorted((rows, columns))
    width = round(short / ratio)
    # A matrix that is nearer to square than the blocks is divided along its short side.
    whole, size = (long, width) if width <= long else (short, max(1, round(long * ratio)))
    count = -(-whole // size)
    starts = [round(index * (whole - size) / max(count - 1, 1)) for index in range(count)]
    parts = [slice(start, start + size) for start in starts]
    along_columns = (columns >= rows) == (width <= long)
    every = slice(None)
    return [(every, part) if along_columns else (part, every) for part in parts]


@in_usual_modes
def pooled_spectrum(matrix: Float[ArrayLike, "m n"], *, ratio: float = 1.0) -> Spectrum:
    r"""Returns the spectra of blocks of one aspect ratio as one spectrum.

    An exponent of the tail depends on the aspect ratio of the kernel, also for noise. Those of
    blocks of one aspect ratio can be compared between kernels of different shapes (FARMS).

    Args:
      matrix: Real matrix of any floating dtype. Works under `jit` and `vmap`.
      ratio: Aspect ratio of the blocks, in (0, 1]. Each block has one side of the matrix complete.
        Where blocks do not divide the other side they overlap, and entries count twice.

    Returns:
      `Spectrum(eigenvalues, ratio)` of all blocks, for `rmtjax.metrics_of`. The law of noise does
      not hold for it: only norms, ranks and exponents of it have a meaning.

    Raises:
      ValueError, TypeError: As `rmtjax.spectrum`, or `ratio` is out of range.

    Examples:
      >>> import jax, rmtjax
      >>> for columns in (100, 300, 1000):
      ...     noise = jax.random.normal(jax.random.key(0), (100, columns))
      ...     spectra = rmtjax.spectrum(noise), rmtjax.pooled_spectrum(noise)
      ...     print([f"{rmtjax.metrics_of(spectrum).hill:.1f}" for spectrum in spectra])
      ['2.1', '2.1']
      ['3.1', '2.2']
      ['5.1', '2.1']

    References:
      Hu et al., ICML (2025), https://arxiv.org/abs/2506.06280.
    """
    matrix = as_matrix("pooled_spectrum", matrix)
    if not 0 < ratio <= 1:
        raise ValueError(f"`ratio` must be in (0, 1], a short side over a long one, got {ratio}.")
    rows, columns = matrix.shape
    return by_compiler(partial(_pooled, places=blocks_of(rows, columns, ratio)), matrix)


def _pooled(matrix: Float[Array, "m n"], places: list[tuple[slice, slice]]) -> Spectrum:
    """Returns the spectra of blocks as one."""
    blocks = jnp.stack([matrix[place] for place in places])
    eigenvalues, ratios = each(_spectrum, blocks)
    return Spectrum(jnp.sort(eigenvalues.ravel())[::-1], ratios[0])
