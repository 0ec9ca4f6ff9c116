r"""The spectrum of a large matrix in O(n^2), by block Lanczos quadrature from random probes.

The iteration finds the eigenvalues that stand out of the bulk. Its quadrature estimates the
distribution of the others, and the trace, which is known, sets their scale. Quantiles of that
distribution replace the eigenvalues of the bulk.

References:
  Golub and Welsch, Math. Comp. 23 (1969) 221-230. Ubaru, Chen and Saad, SIAM J. Matrix Anal.
  Appl. 38 (2017) 1075-1099, https://doi.org/10.1137/16M1104974. Chen, Trogdon and Ubaru, ICML
  (2021), https://arxiv.org/abs/2105.06595.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from rmtjax._types import Spectrum
from rmtjax.spectra._spectrum import aspect_ratio, lift, matmul

# Steps of the iteration. The quadrature has as many nodes, between which the bulk is smooth.
_STEPS = 16
# Random numbers: quantiles are off by some 1 / sqrt(_DRAWN), whatever the size of the matrix.
_DRAWN = 2**17
# A wider block multiplies more vectors for each time the matrix is read from memory.
_FEWEST = 16
# Relative residual below which an eigenvalue counts as exact: it is then off by its square.
_RESIDUAL = 0.003


def _num_probes(size: int, drawn: int) -> int:
    """Returns the number of columns of a block."""
    return max(drawn // size // 8 * 8, _FEWEST)


def lanczos_pays(size: int) -> bool:
    """Returns True if the iteration spans a quarter of the short side at most."""
    return 4 * _STEPS * _num_probes(size, _DRAWN) <= size


class _State(NamedTuple):
    basis: Float[Array, "p k"]
    projected: Float[Array, "k k"]  # the matrix in the basis
    block: Float[Array, "p s"]
    beyond: Float[Array, "s s"]  # what couples the basis to the next block


def _lanczos(long: Float[Array, "n p"], start: Float[Array, "p s"]) -> _State:
    """Projects the Gram matrix over n on the Krylov space of a block, with an orthonormal basis."""
    (rows, size), width = long.shape, start.shape[1]
    total = _STEPS * width
    # On CPU, XLA transposes anew for each product, which takes longer than the product.
    stored = lambda long: lax.optimization_barrier(long.T)
    transpose = lax.platform_dependent(long, cpu=stored, default=lambda long: long.T)

    def without(basis, block):
        inside = matmul(basis.T, block)
        return block - matmul(basis, inside), inside

    def step(i, state):
        at = i * width
        basis = lax.dynamic_update_slice(state.basis, state.block, (0, at))
        image = matmul(transpose, matmul(long, state.block)) / rows
        # Orthogonalized twice: rounding would bring back directions that were removed.
        image, first = without(basis, image)
        image, second = without(basis, image)
        block, beyond = jnp.linalg.qr(image)
        # If nothing is left, QR fills in any columns. They must not repeat the basis.
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
    """Returns singular values of the bulk, ascending, and the share below each.

    The Ritz values form one group for each step. The distribution function is known best at the
    middle of each group, and is smooth in between.
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


def _fill(values, weights, exact, trace, size: int, width: int):
    """Returns all eigenvalues, descending: the exact ones, and quantiles for the others."""
    spikes, count = jnp.where(exact, values, 0), jnp.sum(exact)
    rest = jnp.where(exact, 0, weights)
    # A matrix of low rank has no other values than the exact ones.
    nodes, below = _quadrature(values, jnp.where(jnp.sum(rest) > 0, rest, 1 - exact), width)
    ranks = jnp.arange(size - 1, -1, -1)
    bulk = jnp.interp((ranks + 0.5) / (size - count), below, nodes) ** 2
    bulk = jnp.where(ranks < size - count, bulk, 0)
    left = jnp.maximum(trace - jnp.sum(spikes), 0)
    bulk = bulk * (left / jnp.maximum(jnp.sum(bulk), jnp.finfo(bulk.dtype).tiny))
    return jnp.sort(bulk + jnp.pad(spikes, (0, size - len(spikes))), descending=True)


def _iterate(matrix: Float[Array, "m n"], drawn: int) -> tuple[Float[Array, " p"], Int[Array, ""]]:
    long = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    size = long.shape[1]
    width = _num_probes(size, drawn)
    # A fixed key: the same matrix gives the same numbers each time.
    state = _lanczos(long, jax.random.normal(jax.random.key(0), (size, width), long.dtype))
    values, vectors = jnp.linalg.eigh(state.projected)
    values, vectors = values[::-1], vectors[:, ::-1]
    residuals = jnp.linalg.norm(matmul(state.beyond, vectors[-width:]), axis=0)
    exact = jnp.cumprod(residuals <= _RESIDUAL * values) == 1
    exact &= jnp.arange(len(exact)) < len(exact) // 2
    weights = jnp.sum(vectors[:width] ** 2, axis=0)
    trace = jnp.sum(jnp.square(long)) / len(long)
    return _fill(values, weights, exact, trace, size, width), jnp.sum(exact, dtype=jnp.int32)


def largest_eigenvalue(matrix: Float[Array, "m n"], steps: int = 48) -> Float[Array, ""]:
    """Returns $s_1^2 / n$ by Lanczos iteration; of noise it is right to five digits."""
    # No call of LAPACK, which may wait for ever under `vmap`: see `each`.
    scale = jnp.maximum(jnp.abs(matrix).max(), jnp.finfo(matrix.dtype).tiny)
    long = (matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T) / scale
    rows, size = long.shape
    steps = min(steps, size)

    def step(i, state):
        basis, diagonal, beside, vector = state
        basis = basis.at[:, i].set(vector)
        image = matmul(long.T, matmul(long, vector)) / rows
        diagonal = diagonal.at[i].set(jnp.dot(vector, image))

        def without(turn, state):
            vector, length = state
            vector = vector - matmul(basis, matmul(basis.T, vector))
            return _unit(vector), jnp.where(turn == 0, jnp.linalg.norm(vector), length)

        # Again: if nothing is left but rounding, that must not repeat the basis.
        vector, length = lax.fori_loop(0, 4, without, (image, jnp.zeros((), long.dtype)))
        return basis, diagonal, beside.at[i].set(length), vector

    # Drawn by NumPy: the random numbers of JAX compile for longer than the rest of a step.
    start = jnp.asarray(np.random.default_rng(0).standard_normal(size), long.dtype)
    zeros = jnp.zeros((size, steps), long.dtype), *[jnp.zeros(steps, long.dtype)] * 2
    state = lax.fori_loop(0, steps, step, (*zeros, _unit(start)))
    beside = jnp.diag(state[2][:-1], 1)
    return _top_value(jnp.diag(state[1]) + beside + beside.T) * scale**2


def _top_value(matrix: Float[Array, "k k"]) -> Float[Array, ""]:
    """Returns the largest eigenvalue of a small positive semi-definite matrix, by squaring it."""

    def square(_, power):
        power = _unit(power)
        return matmul(power, power)

    # The power is 2^20. A value that lies closer to the largest than a part in a million may mix
    # with it, but then it changes the quotient by no more.
    power = lax.fori_loop(0, 20, square, matrix)
    vector = _unit(power[:, jnp.argmax(jnp.diag(power))])
    return jnp.dot(vector, matmul(matrix, vector))


def _unit(array: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns an array over its norm, and zeros as they are."""
    return array / jnp.maximum(jnp.linalg.norm(array), jnp.finfo(array.dtype).tiny)


def estimated_spectrum(
    matrix: Float[Array, "m n"], drawn: int = _DRAWN
) -> tuple[Spectrum, Int[Array, ""]]:
    r"""Estimates the spectrum of a matrix for which `lanczos_pays`; NaN if it is not finite.

    Each step reads the matrix twice, for all probes. An exact eigenvalue is too small by at most
    $r^2 / g$, r its residual and g its distance from the next: 5 % above the edge by 0.02 %, and
    in practice by rounding. The quantiles of the bulk scatter by 0.2 % around one factor that is
    off by as much; their mean is exact.

    Returns:
      The spectrum, and how many of its largest eigenvalues are those of the matrix. The others
      are quantiles of the bulk.
    """
    lifted, size = lift(matrix), min(matrix.shape)
    # A branch, and not a mask: the matrix is not copied for it.
    nothing = lambda: (jnp.full(size, jnp.nan, lifted.dtype), jnp.zeros((), jnp.int32))
    finite = jnp.isfinite(lifted).all()
    eigenvalues, num_exact = lax.cond(finite, lambda: _iterate(lifted, drawn), nothing)
    return Spectrum(eigenvalues, aspect_ratio(matrix)), num_exact
