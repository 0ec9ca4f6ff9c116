"""Products, norms and sums in floating point, with bounds on their rounding."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from rmtjax._modes import in_usual_modes
from rmtjax.spectra import as_matrix, lift, matmul, spectrum


class Layer(NamedTuple):
    """A dense layer: `inputs @ kernel + bias`."""

    kernel: Array
    bias: Array


def eps(array: Array) -> float:
    """Returns the distance from 1 to the next number of the dtype."""
    return float(jnp.finfo(array.dtype).eps)


def largest(array: Array) -> Array:
    """Returns the largest number of each row; NaN if one is, which `jnp.max` may pass over."""
    return jnp.where(jnp.isnan(array).any(axis=1), jnp.nan, jnp.max(array, axis=1))


def norm(array: Array, axis: int | None = None) -> Array:
    """Returns the Euclidean norm along an axis, rounded up."""
    peak = jnp.max(jnp.abs(array), axis=axis, keepdims=True)
    # Without the scaling, the squares of small entries would underflow to 0.
    scaled = array / jnp.where(peak > 0, peak, 1)
    size = array.size if axis is None else array.shape[axis]
    norm = jnp.squeeze(peak, axis) * jnp.sqrt(jnp.sum(scaled**2, axis))
    return norm * (1 + (size + 8) * eps(array))


@in_usual_modes
def operator_norm(matrix: Float[ArrayLike, "m n"]) -> Float[Array, ""]:
    r"""Returns the largest singular value $\|W\|_2$, rounded up; NaN if the matrix is not finite.

    The value is multiplied by $1 + 2 \max(m, n)\, \epsilon$. The decomposition is assumed to be
    correct to $\max(m, n)\, \epsilon$, as in `jnp.linalg.matrix_rank`.

    Args:
      matrix: Real matrix of any floating dtype; lifted to float32 at least.

    Raises:
      ValueError, TypeError: `matrix` does not have two axes, entries, or a real floating dtype.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> print(f"{rmtjax.certificate.operator_norm(jnp.diag(jnp.array([2.0, -3.0]))):.4f}")
      3.0000
    """
    matrix = lift(as_matrix("operator_norm", matrix))
    peak, longer = jnp.max(jnp.abs(matrix)), max(matrix.shape)
    eigenvalues, _ = spectrum(matrix / jnp.where(peak > 0, peak, 1))
    return peak * jnp.sqrt(longer * eigenvalues[0]) * (1 + 2 * longer * eps(matrix))


def affine(inputs: Array, layer: Layer) -> tuple[Array, Array]:
    """Returns the outputs of a layer, and a bound on the rounding of each.

    In any order of summation, a sum of n products has an error of at most n u / (1 - n u) of the
    sum of their magnitudes, with u = eps / 2 (Higham, Accuracy and Stability of Numerical
    Algorithms, 2002, section 3.1). Twice this bound also covers the rounding of a kernel that
    is a difference, of the bound itself and of the sums in which it is used.
    """
    kernel, bias = layer
    magnitudes = matmul(jnp.abs(inputs), jnp.abs(kernel)) + jnp.abs(bias)[None, :]
    rounding = (len(kernel) + 8) * eps(kernel) * magnitudes
    return matmul(inputs, kernel) + bias[None, :], rounding


def mean(values: Array) -> Array:
    """Returns the mean, rounded up."""
    return jnp.mean(values) + (len(values) + 8) * eps(values) * jnp.mean(jnp.abs(values))


def lost_squares(old: Array, new: Array) -> Array:
    """Returns the sum of squares of `old` minus that of `new`, rounded down."""
    terms = (old - new) * (old + new)
    # A sum of sums of columns is rounded less than one long sum, which XLA would make of it.
    columns = lax.optimization_barrier([jnp.sum(a, axis=0) for a in (terms, jnp.abs(terms))])
    total, magnitudes = map(jnp.sum, columns)
    return total - (sum(old.shape) + 8) * eps(old) * magnitudes
