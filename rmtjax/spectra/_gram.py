"""Singular directions in a compiled program, from the eigenvectors of the Gram matrix."""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rmtjax.spectra._factors import svd
from rmtjax.spectra._spectrum import each, lift

_product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
# Times the root of the machine's precision, the share of the largest singular value down to which
# squares tell: there values are off by 0.1 %, about as much as neighbours in a bulk differ.
_CLEAR = 32


def _by_squares(matrix: Float[Array, "m n"]) -> tuple[Array, Array, Array]:
    """The decomposition of a finite matrix.

    With A A^T = U L U^T, for no more rows than columns, the rows of U^T A are s_k v_k, and their
    lengths, not the roots of L, the singular values. Where squares tell them apart they are off by
    the rounding of s_1, as by a decomposition of A; where not, by up to a few eps s_1^2 in their
    squares, and there the rows of vt are not orthogonal. U always is, and U_r U_r^T A the product
    of the first directions. What is zero has no v_k, and needs none.
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vt = _by_squares(matrix.T)
        return vt.T, s, u.T
    scale = jnp.maximum(jnp.abs(matrix).max(), jnp.finfo(matrix.dtype).tiny)
    matrix = matrix / scale  # no square is too large or too small
    _, u = jnp.linalg.eigh(_product(matrix, matrix.T), symmetrize_input=False)
    rows = _product(u.T, matrix)
    s = jnp.linalg.norm(rows, axis=1)
    order = jnp.argsort(s, descending=True)  # lengths within the rounding of L are in none
    s = s[order]
    vt = rows[order] / jnp.where(s > 0, s, jnp.inf)[:, None]
    return u[:, order], s * scale, vt


def directions(
    matrices: Float[Array, "b m n"], least: Float[Array, " b"]
) -> tuple[Array, Array, Array]:
    r"""Thin singular value decompositions in float32 at least, cheaper than by `svd`.

    The eigenvectors of the Gram matrix of the shorter side tell apart what differs by more than
    $\epsilon s_1^2$ in its square: in float32 down to a ninetieth of the largest value. Where what
    must be told apart lies under it, all are decomposed by `svd` besides, and cost more.

    Args:
      matrices: A stack; s is NaN for one that is not finite.
      least: The singular value of each down to which directions must be told apart; where it is
        NaN, the median: the bulk is to be fitted.
    """
    matrices = lift(matrices)
    # LAPACK may loop for long, or stop, on what is not finite.
    finite = jnp.isfinite(matrices).all(axis=(1, 2))
    u, s, vt = each(_by_squares, jnp.where(finite[:, None, None], matrices, 0))
    least = jnp.where(jnp.isnan(least), s[:, s.shape[1] // 2], least)
    clear = least >= _CLEAR * jnp.sqrt(jnp.finfo(s.dtype).eps) * s[:, 0]
    found = u, jnp.where(finite[:, None], s, jnp.nan), vt
    return lax.cond(jnp.any(finite & ~clear), lambda: svd(matrices), lambda: found)
