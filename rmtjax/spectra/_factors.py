"""Singular value decomposition of a matrix or a product, and products of few directions."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rmtjax._axes import factored_axes, FactoredKernel, Factors, KernelAxes
from rmtjax._modes import in_usual_modes
from rmtjax._sharding import by_compiler, constrain, merged_sharding
from rmtjax.spectra._spectrum import as_matrix, each, einsum, lift, matmul


def svd(matrix: Float[Array, "*batch m n"] | Factors) -> tuple[Array, Array, Array]:
    """Returns the thin decomposition (u, s, vt) in float32 at least; s is NaN if not finite.

    For factors it is that of their product, with as many directions as their rank allows.
    """
    return by_compiler(_svd, matrix)


@jax.jit
def _svd(matrix):
    if jax.tree.leaves(matrix)[0].ndim > 2:
        return each(_svd, matrix)
    lifted = jax.tree.map(lift, matrix)
    # LAPACK may loop for long, or stop, on NaN and infinity.
    checks = [jnp.isfinite(a).all(axis=(-2, -1)) for a in jax.tree.leaves(lifted)]
    finite = checks[0] & checks[-1]
    safe = jax.tree.map(lambda a: jnp.where(finite[..., None, None], a, 0), lifted)
    if isinstance(safe, Factors):
        # With left = Q R and right^T = P T the product, which is not formed, is Q (R T^T) P^T.
        q, r = jnp.linalg.qr(safe.left)
        p, t = jnp.linalg.qr(safe.right.mT)
        u, s, vt = jnp.linalg.svd(matmul(r, t.mT), full_matrices=False)
        u, vt = matmul(q, u), matmul(vt, p.mT)
    else:
        u, s, vt = jnp.linalg.svd(safe, full_matrices=False)
    return u, jnp.where(finite[..., None], s, jnp.nan), vt


def compose(u, s, vt, rank: Int[Array, ""] | int) -> Float[Array, "*batch m n"]:
    """Returns the product of the first `rank` directions. The rank may be traced: it is a mask."""
    kept = jnp.where(jnp.arange(s.shape[-1]) < rank, s, 0)
    return matmul(u * kept[..., None, :], vt)


@jax.custom_jvp
def project(u, s, vt, matrices, rank: Int[Array, ""] | int) -> Float[Array, "*batch m n"]:
    """Returns the product of the first `rank` directions of matrices, of which only some are given.

    Its derivative is that of a truncation, to first order in the values that are cut over those
    that stay. u, s and vt have no derivative.
    """
    del s, vt
    u = jnp.where(jnp.arange(u.shape[-1]) < rank, u, 0)
    return matmul(u, matmul(u.mT, matrices))


@project.defjvp
def _project_jvp(primals, tangents):
    u, s, vt, matrices, rank = primals
    lower, tangent = project(*primals), tangents[3]
    kept = jnp.arange(s.shape[-1]) < rank
    u, vt = jnp.where(kept, u, 0), jnp.where(kept[:, None], vt, 0)
    inverse = 1 / jnp.where(kept, s, jnp.inf)[..., None]
    left, right, cut = matmul(u.mT, tangent), matmul(tangent, vt.mT), matrices - lower
    # With the coefficients s_i^2 and s_i s_j, over s_i^2 - s_j^2, of kept i and cut j.
    same = matmul(u, left) + matmul(right - matmul(u, matmul(left, vt.mT)), vt)
    crossed = matmul(matmul(cut, left.mT), inverse * vt)
    crossed += matmul((inverse * u.mT).mT, matmul(right.mT, cut))
    return lower, same + crossed


@jax.jit
def split(u, s, vt) -> Factors:
    """Returns directions as factors. Each gets the root of each value, so that both train alike.

    s has the batch axes and the rank; u and vt may have several axes of inputs and outputs.
    """
    root = jnp.sqrt(s)
    left = u * jnp.expand_dims(root, tuple(range(s.ndim - 1, u.ndim - 1)))
    return Factors(left, jnp.expand_dims(root, tuple(range(s.ndim, vt.ndim))) * vt)


def shrink_values(
    s: Float[Array, "*batch k"],
    shrink: Callable[[Array, Array], Array],
    variance: Float[ArrayLike, "*batch"],
    sides: tuple[Int[ArrayLike, "*#batch"], Int[ArrayLike, "*#batch"]],
) -> Float[Array, "*batch k"]:
    r"""Returns $\sqrt n\, \sigma\, \eta(s / (\sqrt n\, \sigma), \gamma)$ for two sides."""
    first, second = (jnp.asarray(side, s.dtype) for side in sides)
    longer = jnp.maximum(first, second)
    # The variance may be in float64, since squares can leave the range of float32.
    deviation = (
        np.sqrt(variance) if isinstance(variance, np.ndarray | np.floating) else jnp.sqrt(variance)
    )
    scale = (jnp.sqrt(longer) * jnp.asarray(deviation, s.dtype))[..., None]
    return scale * shrink(s / scale, (jnp.minimum(first, second) / longer)[..., None])


@in_usual_modes
def truncate_matrix(
    matrix: Float[ArrayLike, "m n"], rank: Int[Array, ""] | int
) -> Float[Array, "m n"]:
    """Returns the nearest matrix of rank `rank` in Frobenius norm, of the same shape and dtype.

    Args:
      matrix: Real matrix of any floating dtype.
      rank: Number of singular values kept, at least 0; may be traced by `jit`.

    Raises:
      ValueError, TypeError: `matrix` or `rank` is not as described.

    Examples:
      >>> import jax, jax.numpy as jnp, rmtjax
      >>> matrix = jax.random.normal(jax.random.key(0), (6, 4))
      >>> int(jnp.linalg.matrix_rank(rmtjax.truncate_matrix(matrix, 2)))
      2

    References:
      Eckart and Young, Psychometrika 1 (1936) 211-218.
    """
    matrix = as_matrix("truncate_matrix", matrix)
    if not isinstance(rank, jax.Array) and operator.index(rank) < 0:
        raise ValueError(f"`rank` must be at least 0, got {rank}.")
    return compose(*svd(matrix), rank).astype(matrix.dtype)


@in_usual_modes
def factorize_matrix(matrix: Float[ArrayLike, "m n"], rank: int) -> Factors:
    """Returns the two thin factors of the nearest matrix of rank `rank`.

    `left = U_r sqrt(S_r)` of shape (m, r) and `right = sqrt(S_r) V_r^T` of shape (r, n).
    They hold `r (m + n)` numbers: fewer than the matrix if `r < m n / (m + n)`.

    Args:
      matrix: Real matrix of any floating dtype, which is also that of the factors.
      rank: A Python integer in [1, min(m, n)]: it becomes a shape.

    Raises:
      ValueError, TypeError: `matrix` or `rank` is not as described, or `rank` is traced.

    Examples:
      >>> import jax, rmtjax
      >>> left, right = rmtjax.factorize_matrix(jax.numpy.ones((6, 4)), 1)
      >>> left.shape, right.shape
      ((6, 1), (1, 4))
    """
    matrix = as_matrix("factorize_matrix", matrix)
    rank = operator.index(rank)  # raises for a float, and for a value traced by jit
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"`rank` must be in [1, {min(matrix.shape)}], got {rank}.")
    u, s, vt = svd(matrix)
    left, right = split(u[:, :rank], s[:rank], vt[:rank])
    return Factors(left.astype(matrix.dtype), right.astype(matrix.dtype))


# Compiled, so that XLA fuses the cast and copies the product once, in the order of the axes.
@partial(jax.jit, static_argnames=("axes", "dtype", "sharding"))
def contract(factors: Factors, *, axes: KernelAxes, dtype: Any, sharding: NamedSharding | None):
    """Returns the product of factors in the axes of a kernel, in a dtype and a sharding."""
    rank = sum(map(len, axes))
    left, right = [*axes.batch, *axes.inputs, rank], [*axes.batch, rank, *axes.outputs]

    def find(factors):
        operands = lift(factors.left), left, lift(factors.right), right
        kernel = einsum(*operands, [*range(rank)]).astype(dtype)
        return kernel if sharding is None else constrain(kernel, sharding.mesh, sharding.spec)

    return by_compiler(find, factors, out=sharding)


def multiply(factors: Factors | FactoredKernel) -> Float[Array, "..."]:
    """Returns the dense kernel that `factors` stand for, batch axes first."""
    if isinstance(factors, FactoredKernel):
        return factors.multiply()
    axes, dtype = factored_axes(factors), factors.left.dtype
    sharding = merged_sharding(*factors, axes)
    return contract(factors, axes=axes, dtype=dtype, sharding=sharding)
