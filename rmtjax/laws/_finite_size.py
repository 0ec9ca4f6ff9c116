"""Laws of a noise matrix of finite size: its bulk, largest eigenvalue and distance from the law."""

import math
from contextlib import nullcontext
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from rmtjax._types import Count, Scalar
from rmtjax.laws import marchenko_pastur, tracy_widom

# Quantiles of p D - 0.4 log p for pure noise, where D is the distance of a fit. They come from
# 2,000 to 6,000 draws of each of nine shapes from 10 x 20 to 400 x 667, which agree to 0.07.
# Eigenvalues repel one another, so their counting function fluctuates with the logarithm of p.
_SIGNIFICANCES = (0.001, 0.01, 0.05, 0.1, 0.5)
_DISTANCES = (1.67, 1.32, 1.0, 0.84, 0.38)
# Of the Tracy-Widom law (Bornemann, 2010).
_MEAN, _VARIANCE = -1.2065335745820, 1.6077810345810


def bulk_law(ratio: Scalar, size: ArrayLike, spikes: Count):
    """Returns the aspect ratio and the variance, at unit noise, of the law of the bulk.

    Each of K spikes takes a row and a column from the noise. The rest is (p - K) x (n - K), and
    its eigenvalues are still divided by n.
    """
    share = spikes / jnp.asarray(size, ratio.dtype)
    left = 1 - share * ratio  # (n - K) / n
    # Compiled, the quotient of two equal numbers can round to above 1, where there is no law.
    return jnp.minimum(ratio * (1 - share) / left, 1), left


def law_left(ratio: Scalar, size: ArrayLike, spikes: Count, edge: Scalar) -> tuple[Scalar, ...]:
    """Returns ratio and variance of the law below K spikes, and its mass (p - K) / p."""
    ratio, _ = bulk_law(ratio, size, spikes)
    return ratio, edge / marchenko_pastur.support(ratio)[1], 1 - spikes / size


def law_curve(
    ratio: Scalar, size: ArrayLike, spikes: Count, edge: Scalar, points: int
) -> tuple[Float[Array, " points"], Float[Array, " points"]]:
    r"""Returns a grid and the density of $\sqrt\lambda$ on it, scaled to the mass of the noise.

    On this scale, figures show bulk and spikes. `edge` is that of the bulk fitted below the spikes.
    """
    ratio, variance, share = law_left(ratio, size, spikes, edge)
    lower, upper = (jnp.sqrt(end) for end in marchenko_pastur.support(ratio, variance))
    # The points crowd at both ends, because the slope of the density can be infinite there.
    grid = lower + (upper - lower) * jnp.sin(jnp.linspace(0, jnp.pi / 2, points)) ** 2
    return grid, share * marchenko_pastur.pdf(grid**2, ratio, variance) * 2 * grid


def roots(eigenvalues: Float[Array | np.ndarray, " p"]) -> Float[np.ndarray, " p"]:
    r"""Returns $\sqrt\lambda$ in float64. Values that rounding put below 0 become 0."""
    return np.sqrt(np.maximum(np.asarray(eigenvalues, np.float64), 0))


def rounding(values: Float[np.ndarray, " p"]) -> float:
    """Returns the size up to which a value counts as 0."""
    # About 80 times the rounding unit of float32, since errors grow with the size of the matrix.
    return 1e-5 * float(values.max(initial=0))


def _largest(size: ArrayLike, longer: ArrayLike):
    """Returns centre and scale of the largest eigenvalue of unit noise, times its longer side."""
    rows, columns = (jnp.sqrt(jnp.subtract(side, 0.5)) for side in (size, longer))
    return (rows + columns) ** 2, (rows + columns) * (1 / rows + 1 / columns) ** (1 / 3)


def noise_threshold(ratio: Scalar, size: ArrayLike, level: ArrayLike):
    r"""Returns the value that the largest eigenvalue of unit noise exceeds with `level`.

    $(\sqrt n + \sqrt p)^2 / n + t\, (\sqrt n + \sqrt p)(1/\sqrt n + 1/\sqrt p)^{1/3} / n$, where
    $t$ is the $1 - level$ quantile of the Tracy-Widom law (Johnstone, 2001). Within the roots $n$
    and $p$ are reduced by a half, which makes the error one of second order (Ma, 2012).
    """
    return threshold_at(ratio, size, level_quantile(level).astype(ratio.dtype))


def shuffled_threshold(ratio: Scalar, size: ArrayLike, level: ArrayLike):
    r"""Returns `noise_threshold` for noise whose mean square is 1, not only expected to be 1.

    Random orders of given entries are such noise. The largest eigenvalue is then the product of two
    independent variables, the mean square and the largest eigenvalue at a mean square of 1. The
    first has the variance $2 / np$, which the second does not have. So it spreads less about its
    mean than the Tracy-Widom law, by a tenth in deviation for 64 x 64.
    """
    longer = size / ratio
    centre, scale = _largest(size, longer)
    share = 2 * centre**2 / (size * longer * scale**2 * _VARIANCE)
    quantile = level_quantile(level).astype(ratio.dtype) - _MEAN
    return threshold_at(ratio, size, _MEAN + quantile * jnp.sqrt(jnp.maximum(1 - share, 0)))


def level_quantile(level: ArrayLike) -> Array:
    """Returns the Tracy-Widom quantile at 1 - level: of a number a constant, not a program."""
    with jax.ensure_compile_time_eval() if isinstance(level, float) else nullcontext():
        return tracy_widom.ppf(1 - level)


def threshold_at(ratio: Scalar, size: ArrayLike, quantile: Array):
    """Returns the value of `noise_threshold` for the quantile of its level."""
    longer = size / ratio
    centre, scale = _largest(size, longer)
    return (centre + quantile * scale) / longer


def noise_above(ratio: Scalar, size: ArrayLike, cut: Scalar):
    r"""Returns the share of its energy that unit noise is expected to have above a cut.

    Within the bulk this is $(\varphi - \sin\varphi \cos\varphi) / \pi$ for
    $\cos\varphi = (x - 1 - \gamma) / 2 \sqrt\gamma$, the integral of the law. Beyond it, only the
    largest eigenvalue can be above. It adds $P(\lambda_1 > x)\, x / p$.
    """
    angle = jnp.arccos(jnp.clip((cut - 1 - ratio) / (2 * jnp.sqrt(ratio)), -1, 1))
    bulk = (angle - jnp.sin(angle) * jnp.cos(angle)) / np.pi
    longer = size / ratio
    centre, scale = _largest(size, longer)
    alarm = 1 - tracy_widom.cdf((cut * longer - centre) / scale).astype(ratio.dtype)
    return jnp.maximum(bulk, alarm * cut / size)


def critical_distance(size: Any, significance: float) -> Any:
    """Returns the distance that noise of `size` ranks exceeds with probability `significance`."""
    log = math.log(size) if isinstance(size, int) else jnp.log(size)
    base = float(np.interp(math.log(significance), np.log(_SIGNIFICANCES), _DISTANCES))
    return (base + 0.4 * log) / size


def check_level(level: float | jax.Array) -> None:
    """Raises ValueError if `level` is not a probability that float32 tells from 0 and 1.

    A traced level is not checked.
    """
    if not isinstance(level, jax.core.Tracer) and not 1e-6 <= level <= 1 - 1e-6:
        raise ValueError(f"`level` must be in (0, 1), from 1e-6 to 1 - 1e-6, got {level}.")


def check_significance(significance: float) -> None:
    """Raises ValueError if `significance` is outside the simulated quantiles."""
    low, *_, high = _SIGNIFICANCES
    if not low <= significance <= high:
        raise ValueError(f"`significance` must be in [{low}, {high}], got {significance}.")
