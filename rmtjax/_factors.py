"""A matrix as a thin product."""

import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rmtjax._spectrum import check_matrix, lift


class Factors(NamedTuple):
    """A kernel as the product of two thinner ones, in the kernel's place of a tree.

    Attributes:
      left: The input axes of the kernel, then the rank; batch axes first.
      right: The rank, then the output axes of the kernel; batch axes first.
    """

    left: Float[Array, "*inputs r"]
    right: Float[Array, "*r_outputs"]


def is_factors(leaf: Any) -> bool:
    """Tells where to stop, as `is_leaf` of `jax.tree.map`."""
    return isinstance(leaf, Factors)


def svd(matrix: Float[Array, "*batch m n"]):
    """Thin singular value decomposition in float32 at least; NaN where not finite."""
    matrix = lift(matrix)
    finite = jnp.isfinite(matrix).all(axis=(-2, -1), keepdims=True)
    u, s, vt = jnp.linalg.svd(jnp.where(finite, matrix, 0), full_matrices=False)
    return u, jnp.where(finite[..., 0], s, jnp.nan), vt


def compose(u, s, vt, rank: Int[Array, ""] | int) -> Float[Array, "*batch m n"]:
    """The product of the first `rank` directions; the rank may be traced: it is a mask."""
    kept = jnp.where(jnp.arange(s.shape[-1]) < rank, s, 0)
    return jnp.matmul(u * kept[..., None, :], vt, precision=lax.Precision.HIGHEST)


def check_rank(rank: int, shape: tuple[int, ...]) -> int:
    """The rank as a Python integer: it is a shape."""
    rank = operator.index(rank)  # refuses a float, and a value traced by jit
    if not 1 <= rank <= min(shape):
        raise ValueError(f"`rank` must be in [1, {min(shape)}], got {rank}.")
    return rank


def truncate_matrix(
    matrix: Float[ArrayLike, "m n"], rank: Int[Array, ""] | int
) -> Float[Array, "m n"]:
    """The nearest matrix of rank `rank` in Frobenius norm, of the same shape and dtype.

    Args:
      matrix: Real matrix of any floating dtype.
      rank: Number of singular values kept, at least 0; may be traced by `jit`.

    Examples:
      >>> import jax, jax.numpy as jnp, rmtjax
      >>> matrix = jax.random.normal(jax.random.key(0), (6, 4))
      >>> int(jnp.linalg.matrix_rank(rmtjax.truncate_matrix(matrix, 2)))
      2

    References:
      Eckart and Young, Psychometrika 1 (1936) 211-218.
    """
    matrix = jnp.asarray(matrix)
    check_matrix("truncate_matrix", matrix)
    return compose(*svd(matrix), rank).astype(matrix.dtype)


def factorize_stack(matrix: Float[Array, "*batch m n"], rank: int) -> Factors:
    """Factors of each matrix of a stack, all of one rank."""
    u, s, vt = svd(matrix)
    root = jnp.sqrt(s[..., :rank])  # half to each factor, so that they train alike
    left = u[..., :rank] * root[..., None, :]
    right = root[..., :, None] * vt[..., :rank, :]
    return Factors(left.astype(matrix.dtype), right.astype(matrix.dtype))


def factorize_matrix(matrix: Float[ArrayLike, "m n"], rank: int) -> Factors:
    """The two thin factors of the nearest matrix of rank `rank`.

    `left = U_r sqrt(S_r)` of shape (m, r) and `right = sqrt(S_r) V_r^T` of shape (r, n).
    They hold `r (m + n)` numbers: fewer than the matrix if `r < m n / (m + n)`.

    Args:
      matrix: Real matrix of any floating dtype, shape (m, n).
      rank: A Python integer in [1, min(m, n)]: it becomes a shape.

    Returns:
      `Factors(left, right)` in the dtype of the matrix.

    Raises:
      ValueError: `matrix` is no matrix, or `rank` is out of range.
      TypeError: `rank` is a float or traced, or `matrix` is not floating.

    Examples:
      >>> import jax, rmtjax
      >>> left, right = rmtjax.factorize_matrix(jax.numpy.ones((6, 4)), 1)
      >>> left.shape, right.shape
      ((6, 1), (1, 4))

    References:
      Eckart and Young, Psychometrika 1 (1936) 211-218.
    """
    matrix = jnp.asarray(matrix)
    check_matrix("factorize_matrix", matrix)
    return factorize_stack(matrix, check_rank(rank, matrix.shape))


def multiply(factors: Factors) -> Float[Array, "..."]:
    """The dense kernel that `factors` stand for, batch axes first.

    Both factors have three axes or more only where a batch comes first in both, or where
    a kernel has several input and several output axes; the rank tells which.
    """
    left, right = factors
    stacked = (
        left.ndim >= 3
        and right.ndim >= 3
        and left.shape[0] == right.shape[0]
        and left.shape[-1] == right.shape[1]
    )
    rows = left.reshape(*left.shape[:stacked], -1, left.shape[-1])
    columns = right.reshape(*right.shape[: stacked + 1], -1)
    product = jnp.matmul(lift(rows), lift(columns), precision=lax.Precision.HIGHEST)
    shape = left.shape[:-1] + right.shape[stacked + 1 :]
    return product.astype(left.dtype).reshape(shape)
