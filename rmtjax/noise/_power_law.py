r"""Power laws in the tail of a spectrum: exponent, error, start, and a test against other tails.

Every tail of a spectrum is its k largest eigenvalues, and starts at $x_{min} = \lambda_k$. All
formulas use $y_i = \ln(\lambda_i / x_{min})$. If the eigenvalues follow a power law of exponent
$\alpha$, the $y_i$ are exponential with mean $1 / (\alpha - 1)$.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import erfc
from jaxtyping import Array, Bool, Float

from rmtjax._types import Count, Scalar

# The best of many starts is a random choice. It makes exponents spread by 1.13 to 1.21 times
# their error at a fixed start, as simulated for 64 to 1,024 eigenvalues, at exponents of 1.8 to 4.
_CHOICE = 1.2

Values = Float[Array, " p"]
# Beyond this start a truncated normal is an exponential to 1e-6, which no spectrum can tell.
_FURTHEST = 1000.0
# At 2 the error of the continued fraction is exp(-4 sqrt(2 * 40)), and beyond 2 it is smaller.
_LEVELS, _SWITCH = 40, 2.0


class Logs(NamedTuple):
    """Holds the logarithms of a descending spectrum, as sums of gaps that lose no digits."""

    depth: Values  # ln(x_1 / x_k)
    mean: Values  # mean of ln(x_i / x_k) over the k largest


class Tail(NamedTuple):
    """Holds a power law that was fitted to the k largest eigenvalues."""

    alpha: Scalar
    error: Scalar
    size: Count
    distance: Scalar


class Verdict(NamedTuple):
    """Holds Vuong's normalised ratio of likelihoods and its two-sided p-value."""

    ratio: Scalar
    p: Scalar


def logs_of(eigenvalues: Values, count: Count) -> Logs:
    """Returns the logarithms of the first `count` eigenvalues, which are positive."""
    order = jnp.arange(1, eigenvalues.shape[0])
    inside = order < count
    upper, lower = eigenvalues[:-1], jnp.where(inside, eigenvalues[1:], 1)
    gaps = jnp.where(inside, jnp.log1p((upper - lower) / lower), 0)
    # Sums of k logarithms less k times the smallest would cancel. These terms are positive.
    sums = jnp.cumsum(jnp.stack([gaps, gaps * order]), axis=1)
    depth, total = jnp.pad(sums, ((0, 0), (1, 0)))
    return Logs(depth, total / jnp.arange(1, eigenvalues.shape[0] + 1))


def _exceedances(logs: Logs, size: Count) -> tuple[Values, Bool[Array, " p"]]:
    """Returns ln(x_i / x_min) of the eigenvalues in a tail, 0 for others, and a mask."""
    inside = jnp.arange(logs.depth.shape[0]) < size
    return jnp.where(inside, logs.depth[size - 1] - logs.depth, 0), inside


def _distance(logs: Logs, size: Count) -> Scalar:
    """Returns the Kolmogorov distance of a tail, as Clauset, Shalizi and Newman compute it."""
    excess, inside = _exceedances(logs, size)
    law = jnp.exp(-excess / logs.mean[size - 1])
    shares = jnp.arange(1, excess.shape[0] + 1) / size
    return jnp.max(jnp.where(inside, jnp.abs(law - shares), 0))


def tail_of(logs: Logs, size: Count) -> Tail:
    """Fits a power law to the `size` largest by maximum likelihood; NaN if they are all equal."""
    mean = logs.mean[size - 1]
    spread = (size > 1) & (mean > 0)
    slope = jnp.where(spread, 1 / jnp.where(spread, mean, 1), jnp.nan)
    error = slope / jnp.sqrt(size.astype(slope.dtype))
    return Tail(1 + slope, error, size, jnp.where(spread, _distance(logs, size), jnp.nan))


def best_tail(logs: Logs, count: Count) -> Tail:
    """Fits a power law to the tail that is nearest to one, of two to `count` eigenvalues."""
    sizes = jnp.arange(1, logs.depth.shape[0] + 1)
    following = jnp.append(logs.depth[1:], jnp.inf)
    # A tail does not end between equal values.
    possible = (logs.mean > 0) & (sizes <= count) & ((following > logs.depth) | (sizes == count))
    safe = logs._replace(mean=jnp.where(logs.mean > 0, logs.mean, 1))
    distances = lax.map(lambda size: _distance(safe, size), sizes)
    best = jnp.argmin(jnp.where(possible, distances, jnp.inf))
    tail = tail_of(logs, jnp.asarray(best + 1, jnp.int32))
    found = possible.any()
    alpha, error, size, distance = tail
    unknown = lambda number: jnp.where(found, number, jnp.nan)
    return Tail(
        unknown(alpha), unknown(_CHOICE * error), jnp.where(found, size, 0), unknown(distance)
    )


def _vuong(differences: Values, inside: Bool[Array, " p"], size: Count) -> Verdict:
    """Compares two models by the differences of their log-likelihoods at each eigenvalue."""
    differences = jnp.where(inside, differences, 0)
    mean = jnp.sum(differences) / size
    variance = jnp.sum(jnp.where(inside, (differences - mean) ** 2, 0)) / size
    differ = variance > 0
    ratio = mean * jnp.sqrt(size / jnp.where(differ, variance, 1))
    ratio = jnp.where(differ, ratio, 0)
    return Verdict(ratio, erfc(jnp.abs(ratio) / np.sqrt(2)))


def _truncated_normal(start: Scalar) -> tuple[Scalar, Scalar]:
    """Returns d and t of a normal variable beyond `start` = a: its mean is a + d, d = 1 / (a + t).

    The mean square over the squared mean of the excess is t / d. Both terms come from the continued
    fraction of Mills' ratio where their definitions would cancel.
    """
    near = jnp.minimum(start, _SWITCH)
    density = jnp.exp(-0.5 * near**2) / np.sqrt(2 * np.pi)
    mills = density / (0.5 * erfc(near / np.sqrt(2))) - near
    far = jnp.maximum(start, _SWITCH)
    fraction = lambda i, t: (_LEVELS - i) / (far + t)
    t = lax.fori_loop(0, _LEVELS - 1, fraction, jnp.zeros_like(start))
    is_far = start > _SWITCH
    d = jnp.where(is_far, 1 / (far + t), mills)
    return d, jnp.where(is_far, t, 1 / d - start)


def _fit_start(spread: Scalar, lowest: float) -> Scalar:
    """Returns the start of the truncated normal whose excess has this mean square over mean^2."""

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        d, t = _truncated_normal(middle)
        above = t / d > spread
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    ends = jnp.full_like(spread, lowest), jnp.full_like(spread, _FURTHEST)
    low, high = lax.fori_loop(0, 60, halve, ends)
    return (low + high) / 2


def against_lognormal(logs: Logs, size: Count) -> Verdict:
    r"""Compares a power law with a log-normal of the same tail, which a negative ratio favours.

    Beyond $x_{min}$ the logarithm of a log-normal is a truncated normal. If its coefficient of
    variation is 1 or more, the best log-normal is the power law itself, which is its limit. Then
    the ratio is 0 and p is 1.
    """
    excess, inside = _exceedances(logs, size)
    mean = logs.mean[size - 1]
    units = excess / jnp.where(mean > 0, mean, 1)
    spread = jnp.sum(units**2) / size
    # At least the smallest of k values is 0, so the mean is at most sqrt(k) deviations.
    d, t = _truncated_normal(_fit_start(spread, -np.sqrt(excess.shape[0]) - 2))
    differences = -jnp.log1p(d**2 - t * d) - t * d * units + (units * d) ** 2 / 2
    return _vuong(jnp.where(spread < 2, differences, 0), inside, size)


def against_exponential(logs: Logs, size: Count) -> Verdict:
    """Compares a power law with an exponential of the same tail, as `against_lognormal` does."""
    excess, inside = _exceedances(logs, size)
    slope = 1 / jnp.where(logs.mean[size - 1] > 0, logs.mean[size - 1], 1)
    values = jnp.expm1(excess)  # x / x_min - 1
    mean = jnp.sum(values) / size
    scale = jnp.where(mean > 0, mean, 1)
    differences = jnp.log(slope * scale) - (slope + 1) * excess + values / scale
    return _vuong(differences, inside, size)
