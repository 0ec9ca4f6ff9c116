"""Tells where the spikes of a kernel come from: low rank, an entry, a row or a column."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from rmtjax._sharding import by_compiler
from rmtjax._types import Scalar, Spectrum
from rmtjax.laws import check_level, shuffled_threshold
from rmtjax.noise import fit_bema
from rmtjax.spectra import as_matrix, from_singular_values, lift, svd, to_unit

_KINDS: dict[tuple[bool, bool], Literal["low rank", "row", "column", "entry"]] = {
    (False, False): "low rank",
    (True, False): "row",
    (False, True): "column",
    (True, True): "entry",
}


class Spike(NamedTuple):
    r"""Holds an eigenvalue above the threshold, and where its singular vectors u and v are.

    Attributes:
      eigenvalue: $\lambda = s^2 / n$.
      kind: "row" if u has a component that is too large for a vector that is spread evenly,
        "column" if v has one, "entry" if both have one, and "low rank" if none has.
      left_participation: $\sum_i u_i^4$, from $1 / m$ for equal components to 1 for a single one;
        near $3 / m$ for random components.
      right_participation: $\sum_j v_j^4$.
      row: Row of the largest component of u.
      column: Column of the largest component of v.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (60, 80))
      >>> spike = rmtjax.find_traps(noise.at[7].multiply(4.0), jax.random.key(1)).spikes[0]
      >>> spike.kind, spike.row
      ('row', 7)
    """

    eigenvalue: float
    kind: Literal["low rank", "row", "column", "entry"]
    left_participation: float
    right_participation: float
    row: int
    column: int


class Entry(NamedTuple):
    """Holds an entry of a kernel.

    Attributes:
      row: Its row.
      column: Its column.
      deviations: Its distance from the mean of the entries, in their standard deviations.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (60, 80))
      >>> entry = rmtjax.find_traps(noise.at[7, 9].set(40.0), jax.random.key(1)).largest[0]
      >>> entry.row, entry.column, round(entry.deviations)
      (7, 9, 34)
    """

    row: int
    column: int
    deviations: float


class Traps(NamedTuple):
    """Holds the spikes of a kernel as it is, and of its entries in random order.

    Attributes:
      spikes: A `Spike` for each eigenvalue above the threshold of the kernel, largest first.
      shuffled: The same for each draw. Spikes that survive come from the entries, not from their
        arrangement.
      largest: The five `Entry` values that are furthest from the mean.
      reach: Distance from which one entry alone is a spike in noise, in standard deviations.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (60, 80))
      >>> traps = rmtjax.find_traps(noise, jax.random.key(3))
      >>> len(traps.spikes), [len(spikes) for spikes in traps.shuffled]
      (0, [0, 0, 0, 0, 0])
    """

    spikes: tuple[Spike, ...]
    shuffled: tuple[tuple[Spike, ...], ...]
    largest: tuple[Entry, ...]
    reach: float


def _too_large(share: Float[Array, " p"], size: int, level: float) -> Array:
    """Returns True where the largest squared component of a random unit vector is too large."""
    # One squared component of a random direction has a beta law, and any of them may be largest.
    return size * (1 - betainc(0.5, (size - 1) / 2, share)) < level


class _Side(NamedTuple):
    """Holds what is known of the left or of the right singular vectors of a matrix."""

    participation: Float[Array, " p"]
    place: Array  # of the largest component
    localized: Array


class _Directions(NamedTuple):
    """Holds the spectrum of a matrix, and both sides of its singular directions."""

    spectrum: Spectrum
    left: _Side
    right: _Side


def _side(vectors: Float[Array, "p n"], level: float) -> _Side:
    """Returns what is known of vectors, which are rows."""
    squares = vectors**2
    localized = _too_large(jnp.max(squares, axis=1), vectors.shape[1], level)
    return _Side(jnp.sum(squares**2, axis=1), jnp.argmax(squares, axis=1), localized)


def _directions(matrix: Float[Array, "m n"], level: float) -> _Directions:
    """Returns the singular directions of a matrix."""
    u, s, vt = svd(matrix)
    return _Directions(from_singular_values(s, matrix), _side(u.T, level), _side(vt, level))


@partial(jax.jit, static_argnames="level")
def _of_kernel(matrix: Float[Array, "m n"], level: float) -> tuple[_Directions, Scalar]:
    """Returns the directions of a kernel, and the threshold of the noise that is fitted."""
    found = _directions(matrix, level)
    return found, fit_bema(found.spectrum, level=level).threshold


@partial(jax.jit, static_argnames="level")
def _of_shuffled(
    matrix: Float[Array, "m n"], key: Array, level: float
) -> tuple[_Directions, Scalar]:
    """Returns the directions of the shuffled entries, and the threshold for independent entries."""
    # A mean that is not 0 would be a spike of every order. Of the rest the variance is known.
    centred = matrix - jnp.mean(matrix)
    shuffled = jax.random.permutation(key, centred.ravel()).reshape(matrix.shape)
    found = _directions(shuffled, level)
    size, ratio = min(matrix.shape), found.spectrum.ratio
    return found, jnp.mean(centred**2) * shuffled_threshold(ratio, size, level)


def _spikes(found: _Directions, threshold: Any, exponent: int) -> tuple[Spike, ...]:
    """Returns the directions above the threshold, of a matrix over a power of two."""
    (eigenvalues, _), left, right = found
    spike = lambda i: Spike(
        eigenvalue=float(np.ldexp(np.float64(eigenvalues[i]), 2 * exponent)),
        kind=_KINDS[bool(left.localized[i]), bool(right.localized[i])],
        left_participation=float(left.participation[i]),
        right_participation=float(right.participation[i]),
        row=int(left.place[i]),
        column=int(right.place[i]),
    )
    return tuple(map(spike, range(int(np.sum(eigenvalues > threshold)))))


def _largest(matrix: np.ndarray, count: int = 5) -> tuple[Entry, ...]:
    """Returns the entries that are furthest from the mean; none without a finite mean."""
    if not np.isfinite(matrix).all():
        return ()
    distances = (matrix - matrix.mean(dtype=np.float64)) / (matrix.std(dtype=np.float64) or 1)
    order = np.argsort(-np.abs(distances), axis=None)[:count]
    places = zip(*np.unravel_index(order, matrix.shape), strict=True)
    return tuple(Entry(int(i), int(j), float(distances[i, j])) for i, j in places)


def find_traps(
    matrix: Float[ArrayLike, "m n"], key: Array, *, draws: int = 5, level: float = 0.01
) -> Traps:
    r"""Shuffles the entries of a kernel, and tells where its spikes come from.

    A spike of the shuffled kernel is a *correlation trap*: a few entries are so large that they
    are a direction in whatever place. Independent entries of variance $\sigma^2$ have such a spike
    with probability `level`, for each draw. A single entry in noise is one from
    $\sigma (m n)^{1/4}$ on.

    Spikes of the kernel itself are told apart by their vectors. The largest component of a random
    unit vector of m exceeds $x$ with a probability under $m P(\beta > x)$, where
    $\beta$ has the beta law of $1/2$ and $(m - 1)/2$. If that is less than `level`, the vector is
    localized. The vector of a row of its own scale is localized on the left only.

    Args:
      matrix: Real matrix of m rows and n columns, on the host or a device.
      key: A `jax.random.key`; equal keys give equal draws.
      draws: Number of random orders, at least 1.
      level: Probability that noise alone gives a spike, from 1e-6 to 1 - 1e-6.

    Returns:
      `Traps`. A matrix that is not finite has no spikes, and none of its entries is told.

    Raises:
      ValueError, TypeError: `matrix` is no real matrix, or an option is out of range.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (100, 200))
      >>> traps = rmtjax.find_traps(noise.at[7, 9].set(40.0), jax.random.key(1))
      >>> [len(spikes) for spikes in traps.shuffled], traps.spikes[0].kind
      ([1, 1, 1, 1, 1], 'entry')
      >>> traps = rmtjax.find_traps(noise.at[7].multiply(2.5), jax.random.key(1))
      >>> [len(spikes) for spikes in traps.shuffled], traps.spikes[0].kind, traps.spikes[0].row
      ([0, 0, 0, 0, 0], 'row', 7)

    References:
      Martin and Mahoney, JMLR 22 (2021) 165, for shuffled kernels; Prakash and Martin (2025),
      https://arxiv.org/abs/2506.04434, for traps. Benaych-Georges and Nadakuditi, J. Multivar.
      Anal. 111 (2012) 120-135, for the reach of an entry.
    """
    kernel = lift(as_matrix("find_traps", matrix))
    check_level(level)
    if operator.index(draws) < 1:
        raise ValueError(f"`draws` must be at least 1, got {draws}.")
    # Squares of very large and very small entries leave the range of float32.
    unit, exponent = to_unit(kernel)

    def find(function: Callable, *arguments: Array) -> tuple[Spike, ...]:
        found = by_compiler(partial(function, level=level), unit, *arguments)
        directions, threshold = jax.device_get(found)
        return _spikes(directions, threshold, int(exponent))

    return Traps(
        spikes=find(_of_kernel),
        shuffled=tuple(find(_of_shuffled, one) for one in jax.random.split(key, draws)),
        largest=_largest(np.asarray(kernel, np.float64)),
        reach=float(kernel.size) ** 0.25,
    )
