"""Leading singular vectors by Chebyshev-filtered subspace iteration (Zhou et al., 2006)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rmtjax.spectra._spectrum import matmul

# The most that a filter amplifies one direction over another: more would drown it in rounding.
_MAX_GAIN = 1e4
# Multiplications by the matrix, of as many vectors as it has columns, after which it gives up. A
# decomposition costs about as much; half of it the eigenvectors of the Gram matrix.
_MAX_WORK, _MAX_WORK_ABOVE = 12, 6
_MIN_SIDE = 1000  # below, a decomposition takes less time than compiling an iteration


class Leading(NamedTuple):
    """Approximate singular triplets, the largest first.

    Attributes:
      u: Left vectors, orthonormal.
      s: Singular values; none is above the one it approximates.
      vt: Right vectors, orthonormal.
      residual: Largest norm of `matrix.T @ u - s v` over the wanted directions, relative to the
        largest value; `matrix @ v - s u` is zero. For a wide matrix the two change places. A
        singular value lies within this much of each value returned (Weyl).
      converged: Whether the residual has come down to rounding.
    """

    u: Float[Array, "m b"]
    s: Float[Array, " b"]
    vt: Float[Array, "b n"]
    residual: Float[Array, ""]
    converged: Bool[Array, ""]


class _State(NamedTuple):
    v: Float[Array, "n b"]
    leading: Leading
    norms: Float[Array, " b"]  # of the residuals of all directions
    products: Int[Array, ""]  # with the matrix or its transpose, so far
    lifts: Int[Array, ""]  # of these the ones of filters


# Tells which triplets are wanted, from their values and their residuals relative to the first.
_Wanted = Callable[[Array, Array], Array]
# Tells whether a state is the goal, and whether a later one may be.
_Goal = Callable[[_State], tuple[Array, Array]]


def block_size(rank: int) -> int:
    """Returns how many directions to iterate for a rank, in steps: few sizes are compiled."""
    return -(-(rank + max(8, rank // 2)) // 8) * 8


def iteration_pays(block: int, shape: tuple[int, ...]) -> bool:
    """Returns True if iterating a block is cheaper than a decomposition: measured on two cores."""
    # At a tenth of the short side both cost the same if the last direction is in the bulk, where
    # iteration is slowest. A long matrix is iterated whole, but decomposed by its small triangle.
    short, long = sorted(shape)
    return short >= _MIN_SIDE and 10 * block <= short and long < 2 * short


def _ritz(matrix, v, wanted: _Wanted) -> _State:
    """Returns the best triplets within a subspace (Rayleigh and Ritz), and their residuals."""
    q, r = jnp.linalg.qr(matmul(matrix, v))
    w, s, zt = jnp.linalg.svd(r)
    u, v = matmul(q, w), matmul(v, zt.T)
    # Relative to the largest, so that no square overflows or underflows in float32.
    scale = jnp.maximum(s[0], jnp.finfo(s.dtype).tiny)
    norms = jnp.linalg.norm((matmul(matrix.T, u) - v * s[None]) / scale, axis=0)
    residual = jnp.max(jnp.where(wanted(s, norms), norms, 0))
    triplets = Leading(u, s, v.T, residual, residual <= 20 * jnp.finfo(s.dtype).eps)
    products, lifts = jnp.full((), 2, jnp.int32), jnp.zeros((), jnp.int32)
    return _State(v, triplets, norms, products, lifts)


def _degree(s: Float[Array, " b"], norms: Float[Array, " b"]) -> Int[Array, ""]:
    """Returns the degree of the polynomial that amplifies as much as rounding allows."""
    # A direction with a small residual is hardly in the other vectors, and may be amplified more.
    growth = jnp.arccosh(2 * jnp.maximum(s / s[-1], 1 + 1e-3) ** 2 - 1)
    room = jnp.log(2 * _MAX_GAIN / jnp.clip(norms, jnp.finfo(s.dtype).eps, 1))
    return jnp.clip(jnp.min(room / growth), 1, 30).astype(jnp.int32)


def _filter(matrix, v, s, degree):
    """Applies the Chebyshev polynomial of A^T A that is at most 1 below the least Ritz value."""
    middle = jnp.maximum(s[-1] / s[0], jnp.finfo(s.dtype).eps) ** 2 / 2
    step = lambda x: matmul(matrix.T, matmul(matrix, x) / s[0]) / s[0] / middle - x

    def climb(_, pair):
        previous, current = pair
        return current, 2 * step(current) - previous

    return lax.fori_loop(1, degree, climb, (v, step(v)))[1]


def _iterate(matrix, block: int, wanted: _Wanted, goal: _Goal, max_work: int) -> Leading:
    """Improves a block of random directions until the goal is reached, or out of reach."""
    if matrix.shape[0] < matrix.shape[1]:
        turned = _iterate(matrix.T, block, wanted, goal, max_work)
        return turned._replace(u=turned.vt.T, vt=turned.u.T)
    start = jax.random.normal(jax.random.key(0), (matrix.shape[1], block), matrix.dtype)

    def more(state: _State):
        reached, hope = goal(state)
        return ~reached & hope & (state.products * block < max_work * matrix.shape[1])

    def improve(state: _State):
        degree = _degree(state.leading.s, state.norms)
        v = _filter(matrix, state.v, state.leading.s, degree)
        v, _ = jnp.linalg.qr(v / jnp.linalg.norm(v, axis=0, keepdims=True))
        products, lifts = state.products + 2 * degree + 2, state.lifts + 2 * degree
        return _ritz(matrix, v, wanted)._replace(products=products, lifts=lifts)

    last = lax.while_loop(more, improve, _ritz(matrix, jnp.linalg.qr(start)[0], wanted))
    return last.leading._replace(converged=goal(last)[0])


@partial(jax.jit, static_argnames="block")
def leading(matrix: Float[Array, "m n"], rank: Int[Array, ""] | int, block: int) -> Leading:
    r"""Returns the first singular directions by subspace iteration with a Chebyshev filter.

    A block of random vectors is multiplied by $T_d(2 A^T A / c - 1)$, which keeps eigenvalues
    below $c$ at 1 and amplifies the rest. Ritz vectors of its span replace the block, until
    $\max_{i \le r} \|A^T u_i - s_i v_i\| \le 20 \epsilon s_1$. $c$ is the square of the least
    Ritz value of the block, $d$ as large as rounding allows. A product with A costs O(m n b), a
    decomposition O(m n^2). It gives up when it has cost about as much. Reverse-mode derivatives
    do not go through it.

    Args:
      matrix: Finite, of float32 or float64.
      rank: Directions wanted, less than `block`; may be traced.
      block: Directions iterated, from `block_size`.

    References:
      Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219 (2006) 172-184.
    """
    wanted = lambda s, _: jnp.arange(len(s)) < rank
    goal = lambda state: (state.leading.converged, jnp.array(True))
    return _iterate(matrix, block, wanted, goal, _MAX_WORK)


@partial(jax.jit, static_argnames="block")
def leading_above(matrix: Float[Array, "m n"], least: Float[Array, ""], block: int) -> Leading:
    r"""Returns all singular directions above a value, by the iteration of `leading`.

    Wanted are those that may be above it, $s_i + \|A^T u_i - s_i v_i\| > least$. Random vectors
    have a part of each direction. A filter of degree d amplifies directions above `least` over
    those that the block leaves out by $(least / s_b)^{2d}$ or more, since $T_n(x) / x^n$ grows.
    After ten thousandfold amplification none can have been missed. If as many as `block` are above
    `least`, which must be positive, it does not converge.
    """

    def goal(state: _State):
        lifted = state.lifts * jnp.log(least / state.leading.s[-1])
        reached = state.leading.converged & (lifted >= jnp.log(_MAX_GAIN))
        return reached, state.leading.s[-1] < least

    return _iterate(matrix, block, lambda s, norms: s + norms * s[0] > least, goal, _MAX_WORK_ABOVE)
