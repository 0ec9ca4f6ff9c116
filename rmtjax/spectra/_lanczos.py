r"""The spectrum of a large matrix without its decomposition, at a cost of O(n^2).

A block Lanczos iteration from random probes finds what stands out of the bulk by itself, and by
the quadrature that belongs to it the distribution of the rest; the trace, which is known, sets
the scale of that. In the place of the eigenvalues of the bulk stand its quantiles.

References:
  Golub and Welsch, Math. Comp. 23 (1969) 221-230. Ubaru, Chen and Saad, SIAM J. Matrix Anal.
  Appl. 38 (2017) 1075-1099, https://doi.org/10.1137/16M1104974. Chen, Trogdon and Ubaru, ICML
  (2021), https://arxiv.org/abs/2105.06595.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rmtjax._types import Spectrum
from rmtjax.spectra._spectrum import aspect_ratio, lift

_STEPS = 16
# Numbers drawn: quantiles are off by some 1 / sqrt(_DRAWN), whatever the size of the matrix.
_DRAWN = 2**17
_FEWEST = 16
# Residual, relative to its eigenvalue, of a direction that is found.
_RESIDUAL = 0.003
_product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Estimate(NamedTuple):
    """An estimated spectrum.

    Attributes:
      spectrum: Its bulk is made of quantiles, p - num_found of them.
      num_found: Number of the largest eigenvalues that are those of the matrix.
    """

    spectrum: Spectrum
    num_found: Int[Array, ""]


def num_probes(size: int) -> int:
    """Columns of a block."""
    return max(_DRAWN // size // 8 * 8, _FEWEST)


def pays(shape: tuple[int, ...]) -> bool:
    """Whether the iteration spans so little of the space that it is cheaper than all of it."""
    size = min(shape)
    return 4 * _STEPS * num_probes(size) <= size


class _State(NamedTuple):
    basis: Float[Array, "p k"]
    projected: Float[Array, "k k"]  # the matrix in the basis
    block: Float[Array, "p s"]
    beyond: Float[Array, "s s"]  # what couples the basis to the next block


def _lanczos(long: Float[Array, "n p"], start: Float[Array, "p s"]) -> _State:
    """The Gram matrix over n in the Krylov space of the blocks, whose basis stays orthonormal."""
    (rows, size), width = long.shape, start.shape[1]
    total = _STEPS * width
    # On CPU each product with a transpose would transpose anew, which takes longer than the rest.
    stored = lambda long: lax.optimization_barrier(long.T)
    transpose = lax.platform_dependent(long, cpu=stored, default=lambda long: long.T)

    def without(basis, block):
        inside = _product(basis.T, block)
        return block - _product(basis, inside), inside

    def step(i, state):
        at = i * width
        basis = lax.dynamic_update_slice(state.basis, state.block, (0, at))
        image = _product(transpose, _product(long, state.block)) / rows
        # Twice, or rounding would bring back what has been found.
        image, first = without(basis, image)
        image, second = without(basis, image)
        block, beyond = jnp.linalg.qr(image)
        # Where nothing is left its columns are any: not again those of the basis.
        block, _ = jnp.linalg.qr(without(basis, block)[0])
        projected = lax.dynamic_update_slice(state.projected, first + second, (0, at))
        return _State(basis, projected, block, beyond)

    state = _State(
        jnp.zeros((size, total), long.dtype),
        jnp.zeros((total, total), long.dtype),
        jnp.linalg.qr(start)[0],
        jnp.zeros((width, width), long.dtype),
    )
    state = lax.fori_loop(0, _STEPS, step, state)
    upper = jnp.triu(state.projected)  # each column was projected on what came before it
    return state._replace(projected=upper + jnp.triu(upper, 1).T)


def _quadrature(values, weights, width: int):
    """Singular values of the bulk, ascending, and the share that lies below each.

    The values of a block lie in as many groups as there were steps, with nothing between them. At
    their middles the distribution function is known far better than in between, where it is smooth.
    """
    values, weights = values[::-1].reshape(-1, width), weights[::-1].reshape(-1, width)
    total = weights.sum(axis=1)
    nodes = (weights * values).sum(axis=1) / jnp.where(total > 0, total, 1)
    # Between singular values, whose density has no pole at 0 for a square matrix.
    nodes = jnp.sqrt(jnp.maximum(jnp.where(total > 0, nodes, jnp.max(nodes)), 0))
    share = total / jnp.sum(total)
    below = jnp.cumsum(share) - share / 2
    slope = (nodes[1] - nodes[0]) / jnp.maximum(below[1] - below[0], jnp.finfo(below.dtype).eps)
    lowest = jnp.maximum(nodes[0] - below[0] * slope, 0)
    highest = jnp.sqrt(jnp.max(jnp.where(weights > 0, values, 0)))
    return jnp.r_[lowest, nodes, jnp.maximum(highest, nodes[-1])], jnp.r_[0.0, below, 1.0]


def _fill(values, weights, found, trace, size: int, width: int):
    """All eigenvalues, descending: those found, and the quantiles of the others."""
    own, count = jnp.where(found, values, 0), jnp.sum(found)
    rest = jnp.where(found, 0, weights)
    # None is left where a few values are all that there is.
    nodes, below = _quadrature(values, jnp.where(jnp.sum(rest) > 0, rest, 1 - found), width)
    ranks = jnp.arange(size - 1, -1, -1)
    bulk = jnp.interp((ranks + 0.5) / (size - count), below, nodes) ** 2
    bulk = jnp.where(ranks < size - count, bulk, 0)
    left = jnp.maximum(trace - jnp.sum(own), 0)
    bulk = bulk * (left / jnp.maximum(jnp.sum(bulk), jnp.finfo(bulk.dtype).tiny))
    return jnp.sort(bulk + jnp.pad(own, (0, size - len(own))), descending=True)


def _iterate(matrix: Float[Array, "m n"]) -> tuple[Float[Array, " p"], Int[Array, ""]]:
    rows, columns = matrix.shape
    long = matrix if rows >= columns else matrix.T
    size = long.shape[1]
    # The same probes every time: a number that is printed can be printed again.
    start = jax.random.normal(jax.random.key(0), (size, num_probes(size)), long.dtype)
    state, width = _lanczos(long, start), start.shape[1]
    values, vectors = jnp.linalg.eigh(state.projected)
    values, vectors = values[::-1], vectors[:, ::-1]
    residuals = jnp.linalg.norm(_product(state.beyond, vectors[-width:]), axis=0)
    found = jnp.cumprod(residuals <= _RESIDUAL * values) == 1
    found &= jnp.arange(len(found)) < len(found) // 2
    weights = jnp.sum(vectors[:width] ** 2, axis=0)
    trace = jnp.sum(jnp.square(long)) / len(long)
    return _fill(values, weights, found, trace, size, width), jnp.sum(found, dtype=jnp.int32)


def estimate(matrix: Float[Array, "m n"]) -> Estimate:
    r"""The spectrum of a matrix of which `pays` says so; NaN where the matrix is not finite.

    In each step the matrix is read twice, for all probes. An eigenvalue that is found lies below
    its own by at most $r^2 / g$, r its residual and g what separates it from the next: for those
    5 % above the edge by 0.02 %, and in practice by rounding. The quantiles of the bulk scatter by
    0.2 % around one factor that is off by as much; their mean is exact.
    """
    lifted = lift(matrix)
    size = min(matrix.shape)
    # A branch, for which the matrix is not copied.
    nothing = lambda: (jnp.full(size, jnp.nan, lifted.dtype), jnp.zeros((), jnp.int32))
    finite = jnp.isfinite(lifted).all()
    eigenvalues, num_found = lax.cond(finite, lambda: _iterate(lifted), nothing)
    return Estimate(Spectrum(eigenvalues, aspect_ratio(matrix)), num_found)
