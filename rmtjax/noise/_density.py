r"""What a picture of a spectrum shows, as numbers: bars, and the law of the noise as a curve.

The axis is that of $\sqrt\lambda = s / \sqrt n$, on which bulk and spikes can be seen together.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rmtjax.laws import bulk_law, marchenko_pastur


class Histogram(NamedTuple):
    """Bars of one width.

    Attributes:
      counts: Values in each bar, from 0 on; a value on the border of two belongs to the right one.
      stop: Where the last bar ends; what lies beyond is in none.
      zeros: Number of values that are 0 but for rounding, and in no bar: they would hide the rest.
    """

    counts: Int[np.ndarray, " bins"]
    stop: float
    zeros: int


def roots(eigenvalues: Float[Array | np.ndarray, " p"]) -> Float[np.ndarray, " p"]:
    r"""$\sqrt\lambda$ in float64; what rounding has put below 0 is 0."""
    return np.sqrt(np.maximum(np.asarray(eigenvalues, np.float64), 0))


def rounding(values: Float[np.ndarray, " p"]) -> float:
    """The most that float32, with some room, leaves of a value that is 0."""
    return 1e-5 * float(values.max(initial=0))


def histogram(values: Float[np.ndarray, " p"], bins: int, stop: float) -> Histogram:
    """Counts the values from 0 to `stop` > 0."""
    present = values > rounding(values)
    counts, _ = np.histogram(values[present], bins, (0, stop))
    return Histogram(counts, stop, int((~present).sum()))


def law_left(
    ratio: Float[Array, ""], size: ArrayLike, spikes: Int[Array, ""], edge: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Ratio and variance of the law that K spikes have left to the other p - K, and their share."""
    ratio, _ = bulk_law(ratio, size, spikes)
    return ratio, edge / marchenko_pastur.support(ratio)[1], 1 - spikes / size


def law_curve(
    ratio: Float[Array, ""],
    size: ArrayLike,
    spikes: Int[Array, ""],
    edge: Float[Array, ""],
    points: int,
) -> tuple[Float[Array, " points"], Float[Array, " points"]]:
    r"""The density of $\sqrt\lambda$ under that law, with its share of the mass.

    Args:
      ratio: Aspect ratio of the matrix.
      size: Number of its eigenvalues, p.
      spikes: Number of those that are spikes, K.
      edge: Of the fit.
      points: How many; they crowd at both ends, where the slope may be infinite.
    """
    ratio, variance, share = law_left(ratio, size, spikes, edge)
    lower, upper = (jnp.sqrt(end) for end in marchenko_pastur.support(ratio, variance))
    grid = lower + (upper - lower) * jnp.sin(jnp.linspace(0, jnp.pi / 2, points)) ** 2
    return grid, share * marchenko_pastur.pdf(grid**2, ratio, variance) * 2 * grid
