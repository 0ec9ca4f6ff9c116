"""What pure noise does: the law of its bulk, its largest eigenvalue, its distance from the law."""

import math

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rmtjax.laws import tracy_widom

# Quantiles of p D - 0.4 log p for pure noise, D the distance of a fit: 2,000 to 6,000 draws
# each of nine shapes from 10 x 20 to 400 x 667 agree to 0.07. The logarithm is that of the
# fluctuations of a counting function of eigenvalues, which repel one another.
_SIGNIFICANCES = (0.001, 0.01, 0.05, 0.1, 0.5)
_DISTANCES = (1.67, 1.32, 1.0, 0.84, 0.38)


def bulk_law(ratio: Float[Array, ""], size: ArrayLike, spikes: Int[Array, ""]):
    """Aspect ratio, and variance at unit noise, of the law that the bulk follows.

    Each of K spikes takes a row and a column from the noise: (p - K) x (n - K) are left, on
    an axis that is divided by n still.
    """
    share = spikes / jnp.asarray(size, ratio.dtype)
    left = 1 - share * ratio  # (n - K) / n
    # A square stays one: compiled, the quotient of two equal numbers may round to above 1.
    return jnp.minimum(ratio * (1 - share) / left, 1), left


def noise_threshold(ratio: Float[Array, ""], size: ArrayLike, level: float) -> Float[Array, ""]:
    r"""Value that the largest eigenvalue of unit noise exceeds with probability `level`.

    $(\sqrt n + \sqrt p)^2 / n + t\, (\sqrt n + \sqrt p)(1/\sqrt n + 1/\sqrt p)^{1/3} / n$ with
    $t$ the $1 - level$ quantile of the Tracy-Widom law (Johnstone, 2001), where $n$ and $p$
    within the roots are each less by a half, which makes its error one of second order (Ma, 2012).
    """
    longer = size / ratio
    rows, columns = jnp.sqrt(size - 0.5), jnp.sqrt(longer - 0.5)
    scale = (rows + columns) * (1 / rows + 1 / columns) ** (1 / 3)
    quantile = tracy_widom.ppf(1 - level).astype(ratio.dtype)
    return ((rows + columns) ** 2 + quantile * scale) / longer


def critical_distance(size: int, significance: float) -> float:
    """The distance that pure noise of `size` ranks exceeds with probability `significance`."""
    logs = np.log(_SIGNIFICANCES)
    return float(np.interp(math.log(significance), logs, _DISTANCES) + 0.4 * math.log(size)) / size


def check_level(level: float) -> None:
    """Refuses what is no probability, or so near to 0 or 1 that float32 takes it for them."""
    if not 1e-6 <= level <= 1 - 1e-6:
        raise ValueError(
            f"`level` must be in (0, 1), from 1e-6 to 1 - 1e-6, got {level}: it is the probability "
            "that noise alone gives a spike, 0.01 by default; a small level is a high threshold."
        )


def check_significance(significance: float) -> None:
    """Refuses what the simulated quantiles do not reach."""
    if not _SIGNIFICANCES[0] <= significance <= _SIGNIFICANCES[-1]:
        raise ValueError(
            f"`significance` must be in [{_SIGNIFICANCES[0]}, {_SIGNIFICANCES[-1]}], got "
            f"{significance}: it is the probability that pure noise is refused, 0.01 by default."
        )
