"""A matrix as a thin product."""

import operator
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rmtjax._axes import factored_axes, Factors, is_factors, kernel_shape, to_stack
from rmtjax._sharding import by_compiler, merged_sharding
from rmtjax.spectra._spectrum import check_matrix, each, lift

_product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _svd_of_product(left: Float[Array, "*batch m r"], right: Float[Array, "*batch r n"]):
    """The decomposition of `left @ right` from that of a matrix of at most r by r.

    With left = Q R and right^T = P T the product is Q (R T^T) P^T, and costs O((m + n) r^2).
    """
    q, r = jnp.linalg.qr(left)
    p, t = jnp.linalg.qr(right.mT)
    u, s, vt = jnp.linalg.svd(_product(r, t.mT), full_matrices=False)
    return _product(q, u), s, _product(vt, p.mT)


def svd(matrix: Float[Array, "*batch m n"] | Factors) -> tuple[Array, Array, Array]:
    """Thin singular value decomposition in float32 at least; s is NaN where not finite.

    Of factors, that of their product, with as many directions as their rank allows.
    """
    return by_compiler(_svd, matrix)


def _svd(matrix):
    if jax.tree.leaves(matrix)[0].ndim > 2:
        return each(_svd, matrix)
    lifted = jax.tree.map(lift, matrix)
    # LAPACK may loop for long, or stop, on what is not finite.
    checks = [jnp.isfinite(a).all(axis=(-2, -1)) for a in jax.tree.leaves(lifted)]
    finite = checks[0] & checks[-1]
    safe = jax.tree.map(lambda a: jnp.where(finite[..., None, None], a, 0), lifted)
    if is_factors(safe):
        u, s, vt = _svd_of_product(*safe)
    else:
        u, s, vt = jnp.linalg.svd(safe, full_matrices=False)
    return u, jnp.where(finite[..., None], s, jnp.nan), vt


def compose(u, s, vt, rank: Int[Array, ""] | int) -> Float[Array, "*batch m n"]:
    """The product of the first `rank` directions; the rank may be traced: it is a mask."""
    kept = jnp.where(jnp.arange(s.shape[-1]) < rank, s, 0)
    return _product(u * kept[..., None, :], vt)


@jax.custom_jvp
def project(u, s, vt, matrices, rank: Int[Array, ""] | int) -> Float[Array, "*batch m n"]:
    """The product of the first `rank` singular directions of matrices, of which these are some.

    Its derivative is that of a truncation to first order in the values that are cut, relative to
    those that stay; u, s and vt have none.
    """
    del s, vt
    u = jnp.where(jnp.arange(u.shape[-1]) < rank, u, 0)
    return _product(u, _product(u.mT, matrices))


@project.defjvp
def _project_jvp(primals, tangents):
    u, s, vt, matrices, rank = primals
    lower, tangent = project(*primals), tangents[3]
    kept = jnp.arange(s.shape[-1]) < rank
    u, vt = jnp.where(kept, u, 0), jnp.where(kept[:, None], vt, 0)
    inverse = 1 / jnp.where(kept, s, jnp.inf)[..., None]
    left, right, cut = _product(u.mT, tangent), _product(tangent, vt.mT), matrices - lower
    # With the coefficients s_i^2 and s_i s_j, over s_i^2 - s_j^2, of kept i and cut j.
    same = _product(u, left) + _product(right - _product(u, _product(left, vt.mT)), vt)
    crossed = _product(_product(cut, left.mT), inverse * vt)
    crossed += _product((inverse * u.mT).mT, _product(right.mT, cut))
    return lower, same + crossed


def split(u, s, vt) -> Factors:
    """Directions as factors: half of each value to each, so that they train alike.

    Of matrices, or with the axes of a kernel: s has those of the batch and the rank.
    """
    root = jnp.sqrt(s)
    left = u * jnp.expand_dims(root, tuple(range(s.ndim - 1, u.ndim - 1)))
    return Factors(left, jnp.expand_dims(root, tuple(range(s.ndim, vt.ndim))) * vt)


def shrink_values(
    s: Float[Array, "*batch k"],
    shrink: Callable[[Array, Array], Array],
    variance: Float[ArrayLike, "*batch"],
    shape: tuple[int, int],
) -> Float[Array, "*batch k"]:
    r"""$\sqrt n\, \sigma\, \eta(s / (\sqrt n\, \sigma), \gamma)$ for matrices of a shape."""
    scale = jnp.sqrt(max(shape) * jnp.asarray(variance, s.dtype))[..., None]
    return scale * shrink(s / scale, jnp.asarray(min(shape) / max(shape), s.dtype))


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

    Raises:
      ValueError: `matrix` is no matrix, or `rank` is negative.
      TypeError: `rank` is no integer, or `matrix` is not floating.

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
    if not isinstance(rank, jax.Array) and operator.index(rank) < 0:
        raise ValueError(f"`rank` must be at least 0, got {rank}.")
    return compose(*svd(matrix), rank).astype(matrix.dtype)


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
    rank = check_rank(rank, matrix.shape)
    u, s, vt = svd(matrix)
    left, right = split(u[:, :rank], s[:rank], vt[:rank])
    return Factors(left.astype(matrix.dtype), right.astype(matrix.dtype))


def multiply(factors: Factors) -> Float[Array, "..."]:
    """The dense kernel that `factors` stand for, batch axes first."""
    return by_compiler(_multiply, factors, out=merged_sharding(*factors, factored_axes(factors)))


def _multiply(factors: Factors) -> Float[Array, "..."]:
    left, right = to_stack(factors, factored_axes(factors))
    product = _product(lift(left), lift(right))
    return product.astype(left.dtype).reshape(kernel_shape(factors))
