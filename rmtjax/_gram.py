"""Singular directions in a compiled program, from the eigenvectors of the Gram matrix."""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rmtjax._factors import svd
from rmtjax._spectrum import each, lift

_product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
# Times the root of the machine's precision, the least share of the largest singular value that the
# median may have. Squares are then off by 0.1 % of the median's, and less than they differ.
_CLEAR = 32


def _by_squares(wide: Float[Array, "p n"]) -> tuple[Array, Array, Array]:
    """All directions of a matrix with no more rows than columns, that is finite.

    With A A^T = U L U^T the rows of U^T A are s_k v_k. Their lengths, and not the roots of L, are
    the singular values: each is off by the rounding of the largest, as by a decomposition.
    """
    scale = jnp.maximum(jnp.abs(wide).max(), jnp.finfo(wide.dtype).tiny)
    wide = wide / scale  # no square is too large or too small
    _, u = jnp.linalg.eigh(_product(wide, wide.T), symmetrize_input=False)
    rows = _product(u.T, wide)
    s = jnp.linalg.norm(rows, axis=1)
    order = jnp.argsort(s, descending=True)
    s = s[order]
    vt = rows[order] / jnp.where(s > 0, s, jnp.inf)[:, None]
    return u[:, order], s * scale, vt


def _one(arguments) -> tuple[Array, Array, Array]:
    matrix, fitted = arguments
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vt = _one((matrix.T, fitted))
        return vt.T, s, u.T
    # LAPACK may loop for long, or stop, on what is not finite.
    finite = jnp.isfinite(matrix).all()
    u, s, vt = _by_squares(jnp.where(finite, matrix, 0))
    clear = s[len(s) // 2] >= _CLEAR * jnp.sqrt(jnp.finfo(s.dtype).eps) * s[0]
    found = u, jnp.where(finite, s, jnp.nan), vt
    return lax.cond(fitted & ~clear & finite, lambda: svd(matrix), lambda: found)


def directions(
    matrices: Float[Array, "b m n"], fitted: Bool[Array, " b"]
) -> tuple[Array, Array, Array]:
    r"""Thin singular value decompositions in float32 at least, at about half the price of `svd`.

    The eigenvectors of the Gram matrix of the shorter side tell apart what differs by more than
    $\epsilon s_1^2$ in its square: all signal, and the bulk unless it lies some thousand times
    under the largest value. There, a matrix whose bulk is to be fitted is decomposed by `svd`.

    Args:
      matrices: A stack; s is NaN for one that is not finite.
      fitted: Whether the bulk of each is to be fitted.
    """
    return each(_one, (lift(matrices), fitted))
