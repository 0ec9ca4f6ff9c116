"""Training an operator by sweeps, as in the density-matrix renormalization group (2211.14657).

For each bond the two cores beside it are merged, moved by the gradient while all others rest, and
split by a singular value decomposition. The split decides the bond anew. The authors keep the
values above a number eps, at most chi. Here a rank rule may decide: what the gradient leaves of
noise in the merged core is white, so that the Marchenko-Pastur edge is the place to cut.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rmtjax
from rmtjax import lowrank

MODES = ((8, 8), (4, 4), (8, 8))  # 256 inputs, 256 outputs
PLANTED, SAMPLES, NOISE = 3, 2000, 1.0
Count = Callable[[jax.Array], int]  # the number of directions of a matrix that stay


class Case(NamedTuple):
    """A linear layer to learn: inputs, noisy outputs, and the cores that were planted."""

    x: jax.Array
    y: jax.Array
    cores: list[jax.Array]


def planted(seed: int = 0) -> Case:
    """Returns outputs of a random operator of bond 3, with noise."""
    keys = jax.random.split(jax.random.key(seed), 5)
    bonds = [1, PLANTED, PLANTED, 1]
    shapes = [(bonds[k], n, m, bonds[k + 1]) for k, (n, m) in enumerate(MODES)]
    cores = [jax.random.normal(k, s) / 4 for k, s in zip(keys, shapes, strict=False)]
    x = jax.random.normal(keys[3], (SAMPLES, 256))
    noise = NOISE * jax.random.normal(keys[4], (SAMPLES, 256))
    return Case(x, x @ product(cores) + noise, cores)


def product(cores: Sequence[jax.Array]) -> jax.Array:
    """Returns the matrix of some cores."""
    rows, columns = (int(np.prod([c.shape[i] for c in cores])) for i in (1, 2))
    return lowrank.TensorTrain(tuple(cores), (rows,), (columns,)).multiply()


@jax.jit
def _slope(merged, left, right, x, y):
    """Returns the gradient of half the squared error by a merged core, a mean over samples."""

    def error(merged):
        return 0.5 * jnp.sum(jnp.square(x @ product([*left, merged, *right]) - y)) / len(x)

    return jax.grad(error)(merged)


def _merge(first: jax.Array, second: jax.Array) -> jax.Array:
    """Returns two neighbours as one core (bond, rows, columns, bond)."""
    a, n, m, _ = first.shape
    _, p, q, b = second.shape
    merged = jnp.einsum("anmr,rpqb->anpmqb", first, second)
    return merged.reshape(a, n * p, m * q, b)


def _split(merged, first_mode, second_mode, count: Count, to_right: bool):
    """Returns two cores of a merged one; the values go with the core that is moved next."""
    (n, m), (p, q) = first_mode, second_mode
    a, b = merged.shape[0], merged.shape[-1]
    matrix = merged.reshape(a, n, p, m, q, b).transpose(0, 1, 3, 2, 4, 5).reshape(a * n * m, -1)
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    bond = max(1, count(matrix))
    u, vt = (u, s[:, None] * vt) if to_right else (u * s[None], vt)
    return u[:, :bond].reshape(a, n, m, bond), vt[:bond].reshape(bond, p, q, b)


def by_rule(rule: rmtjax.ranks.RankRule, most: int = 16) -> Count:
    """Returns a count by a rank rule, at most chi."""
    return lambda matrix: min(most, int(rule(rmtjax.spectrum(matrix))))


def by_eps(eps: float, most: int = 16) -> Count:
    """Returns the count of the paper: values above eps, at most chi."""
    return lambda matrix: min(most, int((jnp.linalg.svd(matrix, compute_uv=False) > eps).sum()))


def train(case: Case, count: Count, sweeps: int = 3, rate: float = 0.8, inner: int = 5, bond=8):
    """Returns cores that were trained by sweeps from left to right and back.

    Args:
      case: What to learn.
      count: Decides the bond at each split.
      sweeps: To the right and back.
      rate, inner: Of the steps on a merged core.
      bond: To begin with.
    """
    start = jax.random.normal(jax.random.key(1), (256, 256)) / 256
    fit = lowrank.tensor_train(start, MODES, rule=rmtjax.ranks.fixed(bond))
    cores, places = [*fit.train.cores], range(len(MODES) - 1)
    # Orthonormal from the right, so that the first merged core holds the norm.
    for k in reversed(places):
        merged = _merge(cores[k], cores[k + 1])
        cores[k : k + 2] = _split(merged, MODES[k], MODES[k + 1], lambda _: bond, False)
    for number in range(2 * sweeps):
        to_right = number % 2 == 0
        for k in places if to_right else reversed(places):
            merged = _merge(cores[k], cores[k + 1])
            for _ in range(inner):
                slope = _slope(merged, cores[:k], cores[k + 2 :], case.x, case.y)
                merged = merged - rate * slope
            cores[k : k + 2] = _split(merged, MODES[k], MODES[k + 1], count, to_right)
    return cores


def error_of(cores, case: Case) -> float:
    """Returns the relative distance from the planted matrix."""
    planted = product(case.cores)
    return float(jnp.linalg.norm(product(cores) - planted) / jnp.linalg.norm(planted))
