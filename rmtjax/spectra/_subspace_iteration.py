"""The leading singular directions of a matrix, at the price of those alone."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# By how much a filter may lift what a vector has of another direction: more would drown it.
_MAX_GAIN = 1e4
# Of multiplications by the matrix, for all its columns: a decomposition costs about as much.
_MAX_WORK = 12
_MAX_WORK_ABOVE = 6  # and as much the eigenvectors of the Gram matrix
_MIN_SIDE = 1000  # below, a decomposition takes less time than to compile an iteration
_product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Leading(NamedTuple):
    """Approximate singular triplets, the largest first.

    Attributes:
      u: Left vectors, orthonormal.
      s: Singular values; none is above the one it approximates.
      vt: Right vectors, orthonormal.
      residual: Largest norm of `matrix.T @ u - s v` over the directions asked for, relative to
        the largest value; `matrix @ v - s u` is zero. Of a wide matrix it is that of the second,
        and the first is zero. A singular value lies within this much of
        each that was found (Weyl).
      converged: Whether the residual has come down to rounding.
    """

    u: Float[Array, "m b"]
    s: Float[Array, " b"]
    vt: Float[Array, "b n"]
    residual: Float[Array, ""]
    converged: Bool[Array, ""]


class _State(NamedTuple):
    v: Float[Array, "n b"]
    found: Leading
    norms: Float[Array, " b"]  # of the residuals of all directions
    products: Int[Array, ""]  # with the matrix or its transpose, so far
    lifts: Int[Array, ""]  # of these the ones of filters


# Which of some triplets are asked for, by their values and their residuals relative to the first.
_Asked = Callable[[Array, Array], Array]
# Whether a state is what was wanted, and whether a later one may be.
_Goal = Callable[[_State], tuple[Array, Array]]


def block_size(rank: int) -> int:
    """Directions to iterate for so many: some more, in steps, so that few programs compile."""
    return -(-(rank + max(8, rank // 2)) // 8) * 8


def pays(block: int, shape: tuple[int, ...]) -> bool:
    """Whether so many directions alone are cheaper than all: measured, on two cores.

    At a tenth of the shorter side both cost the same if the last direction lies in the bulk,
    where iteration is slowest. A long matrix is iterated in all its length, and decomposed by
    its triangle.
    """
    short, long = sorted(shape)
    return short >= _MIN_SIDE and 10 * block <= short and long < 2 * short


def _ritz(matrix, v, asked: _Asked) -> _State:
    """The best triplets within a subspace (Rayleigh and Ritz), and how far they are from true."""
    q, r = jnp.linalg.qr(_product(matrix, v))
    w, s, zt = jnp.linalg.svd(r)
    u, v = _product(q, w), _product(v, zt.T)
    # Relative to the largest, so that no square is too large or too small for float32.
    scale = jnp.maximum(s[0], jnp.finfo(s.dtype).tiny)
    norms = jnp.linalg.norm((_product(matrix.T, u) - v * s[None]) / scale, axis=0)
    residual = jnp.max(jnp.where(asked(s, norms), norms, 0))
    tolerance = 20 * jnp.finfo(s.dtype).eps
    found = Leading(u, s, v.T, residual, residual <= tolerance)
    products, lifts = jnp.full((), 2, jnp.int32), jnp.zeros((), jnp.int32)
    return _State(v, found, norms, products, lifts)


def _degree(s: Float[Array, " b"], norms: Float[Array, " b"]) -> Int[Array, ""]:
    """Of the polynomial that lifts as much as rounding allows.

    A direction that is nearly found, with a small residual, is hardly in the vectors of the
    others, and may be lifted further.
    """
    growth = jnp.arccosh(2 * jnp.maximum(s / s[-1], 1 + 1e-3) ** 2 - 1)
    room = jnp.log(2 * _MAX_GAIN / jnp.clip(norms, jnp.finfo(s.dtype).eps, 1))
    return jnp.clip(jnp.min(room / growth), 1, 30).astype(jnp.int32)


def _filter(matrix, v, s, degree):
    """Chebyshev's polynomial of A^T A, at most 1 up to the least value of the block, on v."""
    middle = jnp.maximum(s[-1] / s[0], jnp.finfo(s.dtype).eps) ** 2 / 2
    step = lambda x: _product(matrix.T, _product(matrix, x) / s[0]) / s[0] / middle - x

    def climb(_, pair):
        before, now = pair
        return now, 2 * step(now) - before

    return lax.fori_loop(1, degree, climb, (v, step(v)))[1]


def _iterate(matrix, block: int, asked: _Asked, goal: _Goal, max_work: int) -> Leading:
    """Improves a block of random directions until the goal is reached, or out of reach."""
    if matrix.shape[0] < matrix.shape[1]:
        found = _iterate(matrix.T, block, asked, goal, max_work)
        return found._replace(u=found.vt.T, vt=found.u.T)
    start = jax.random.normal(jax.random.key(0), (matrix.shape[1], block), matrix.dtype)

    def more(state: _State):
        reached, hope = goal(state)
        return ~reached & hope & (state.products * block < max_work * matrix.shape[1])

    def improve(state: _State):
        degree = _degree(state.found.s, state.norms)
        v = _filter(matrix, state.v, state.found.s, degree)
        v, _ = jnp.linalg.qr(v / jnp.linalg.norm(v, axis=0, keepdims=True))
        products, lifts = state.products + 2 * degree + 2, state.lifts + 2 * degree
        return _ritz(matrix, v, asked)._replace(products=products, lifts=lifts)

    last = lax.while_loop(more, improve, _ritz(matrix, jnp.linalg.qr(start)[0], asked))
    return last.found._replace(converged=goal(last)[0])


@partial(jax.jit, static_argnames="block")
def leading(matrix: Float[Array, "m n"], rank: Int[Array, ""] | int, block: int) -> Leading:
    r"""The first singular directions by subspace iteration with a Chebyshev filter.

    A block of random vectors is multiplied by $T_d(2 A^T A / c - 1)$, which keeps what lies
    under $c$ at 1 and lifts the rest, and is replaced by the Ritz vectors of its span, until
    $\max_{i \le r} \|A^T u_i - s_i v_i\| \le 20 \epsilon s_1$. $c$ is the square of the least
    Ritz value of the block, $d$ as large as rounding allows. Costs O(m n b) a product with A,
    where the decomposition costs O(m n^2), and room for a few blocks. It gives up when it has
    cost about as much. Reverse-mode derivatives do not go through it.

    Args:
      matrix: Finite, of float32 or float64.
      rank: Directions asked for, less than `block`; may be traced.
      block: Directions iterated, from `block_size`.

    References:
      Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219 (2006) 172-184.
    """
    asked = lambda s, _: jnp.arange(len(s)) < rank
    goal = lambda state: (state.found.converged, jnp.array(True))
    return _iterate(matrix, block, asked, goal, _MAX_WORK)


@partial(jax.jit, static_argnames="block")
def leading_above(matrix: Float[Array, "m n"], least: Float[Array, ""], block: int) -> Leading:
    r"""All singular directions above a value, by the iteration of `leading`.

    Asked for are those that may be above it, $s_i + \|A^T u_i - s_i v_i\| > least$. Random vectors
    have some of each direction, and a filter of degree d lifts what lies above `least` over what
    the block leaves out by $(least / s_b)^{2d}$ or more, since $T_n(x) / x^n$ grows: none can have
    been missed when all filters together have lifted it ten thousandfold.

    Args:
      matrix: Finite, of float32 or float64.
      least: The value; positive.
      block: Directions iterated. If there are as many above `least` it does not converge.
    """

    def goal(state: _State):
        lifted = state.lifts * jnp.log(least / state.found.s[-1])
        reached = state.found.converged & (lifted >= jnp.log(_MAX_GAIN))
        return reached, state.found.s[-1] < least

    return _iterate(matrix, block, lambda s, norms: s + norms * s[0] > least, goal, _MAX_WORK_ABOVE)
