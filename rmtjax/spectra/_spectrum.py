"""Exact spectra of matrices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from rmtjax._sharding import by_compiler
from rmtjax._types import Spectrum


def check_matrix(name: str, matrix: Float[Array, "m n"]) -> None:
    """Refuses what `jnp.linalg.svd` would take for something else, or not at all."""
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


def lift(matrix: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
    """In float32 at least: no LAPACK works in bfloat16, and no spectrum survives it."""
    return matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))


def aspect_ratio(matrix: Float[Array, "*batch m n"]) -> Float[Array, ""]:
    r"""$\gamma = p / n$, the shorter side over the longer."""
    *_, rows, columns = matrix.shape
    ratio = min(rows, columns) / max(rows, columns)
    return jnp.asarray(ratio, jnp.promote_types(matrix.dtype, jnp.float32))


def from_singular_values(
    singular_values: Float[Array, "*batch p"], matrix: Float[Array, "*batch m n"]
) -> Spectrum:
    """The spectrum of `matrix`, whose singular values are known, descending."""
    eigenvalues = singular_values**2 / max(matrix.shape[-2:])
    return Spectrum(eigenvalues=eigenvalues, ratio=aspect_ratio(matrix))


def each(function: Callable[[Any], Any], stack: PyTree) -> PyTree:
    """Applies a decomposition to each matrix of a stack, of arrays with a leading axis.

    Not at once on CPU: there LAPACK's calls for a stack wait for one another in XLA's own
    threads, and two stacks in a program may wait for ever.
    """
    if len(jax.tree.leaves(stack)[0]) == 1:
        found = function(jax.tree.map(lambda array: array[0], stack))
        return jax.tree.map(lambda array: array[None], found)
    one_by_one = lambda stack: lax.map(function, stack)
    return lax.platform_dependent(stack, cpu=one_by_one, default=jax.vmap(function))


# One and the same function for `lax.map`, which would compile a new one each time.
_triangle_of = partial(jnp.linalg.qr, mode="r")


def triangle(matrix: Float[Array, "m n"]) -> Float[Array, "n n"]:
    """R of the decomposition A = Q R, with the singular values and right vectors of A.

    That of the triangles of some equal parts of the rows, one by one, is that of the whole:
    one part is copied at a time.
    """
    rows, columns = matrix.shape
    most = min(16, max(rows // (2 * columns), 1))
    parts = next(count for count in range(most, 0, -1) if rows % count == 0)
    if parts == 1:
        return _triangle_of(matrix)
    triangles = lax.map(_triangle_of, matrix.reshape(parts, -1, columns))
    return _triangle_of(triangles.reshape(-1, columns))


def _core(matrix: Float[Array, "m n"]) -> Float[Array, "k k2"]:
    """A smaller matrix with the same singular values: the triangle of a long one."""
    rows, columns = matrix.shape
    long = matrix.T if rows < columns else matrix
    return triangle(long) if len(long) >= 2 * min(rows, columns) else matrix


def spectrum(matrix: Float[ArrayLike, "m n"]) -> Spectrum:
    r"""The empirical spectral density of a matrix.

    $\lambda_k = s_k^2 / n$ for the singular values $s_1 \ge \dots \ge s_p$ of the matrix,
    $n$ the longer and $p$ the shorter of its sides. A matrix and its transpose have the
    same spectrum.

    Args:
      matrix: Real matrix of any floating dtype; bfloat16 and float16 are lifted to
        float32, in which the spectrum is computed. Works under `jit` and `vmap`.

    Returns:
      `Spectrum(eigenvalues, ratio)`. A matrix with a NaN or an infinity has a spectrum
      of NaN.

    Raises:
      ValueError: `matrix` has not two axes, or no entries.
      TypeError: `matrix` is not of a real floating dtype.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (100, 400))
      >>> eigenvalues, ratio = rmtjax.spectrum(noise)
      >>> eigenvalues.shape, float(ratio)
      ((100,), 0.25)
      >>> print(f"{eigenvalues.mean():.1f}")  # the mean square of the entries
      1.0
    """
    matrix = jnp.asarray(matrix)
    check_matrix("spectrum", matrix)
    return by_compiler(_spectrum, matrix)


def _spectrum(matrix: Float[Array, "m n"]) -> Spectrum:
    matrix = lift(matrix)
    finite = jnp.isfinite(matrix).all()
    # The decomposition may loop for long, or stop, on what is not finite; the triangle does not.
    safe = jnp.where(finite, _core(matrix), 0)
    # Full matrices are not returned, but room is made for them.
    values = jnp.linalg.svd(safe, full_matrices=False, compute_uv=False)
    return from_singular_values(jnp.where(finite, values, jnp.nan), matrix)
