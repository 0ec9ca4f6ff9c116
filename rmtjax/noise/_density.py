r"""Roots of a spectrum and density curve of the noise, for figures and report pages.

The horizontal axis is $\sqrt\lambda = s / \sqrt n$, which shows bulk and spikes on one scale.
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rmtjax.laws import bulk_law, marchenko_pastur


def roots(eigenvalues: Float[Array | np.ndarray, " p"]) -> Float[np.ndarray, " p"]:
    r"""Returns $\sqrt\lambda$ in float64. Values that rounding put below 0 become 0."""
    return np.sqrt(np.maximum(np.asarray(eigenvalues, np.float64), 0))


def rounding(values: Float[np.ndarray, " p"]) -> float:
    """Returns the size up to which a value counts as 0."""
    # About 80 times the rounding unit of float32, since errors grow with the size of the matrix.
    return 1e-5 * float(values.max(initial=0))


def law_left(
    ratio: Float[Array, ""], size: ArrayLike, spikes: Int[Array, ""], edge: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Returns ratio and variance of the law below K spikes, and its mass (p - K) / p."""
    ratio, _ = bulk_law(ratio, size, spikes)
    return ratio, edge / marchenko_pastur.support(ratio)[1], 1 - spikes / size


def law_curve(
    ratio: Float[Array, ""],
    size: ArrayLike,
    spikes: Int[Array, ""],
    edge: Float[Array, ""],
    points: int,
) -> tuple[Float[Array, " points"], Float[Array, " points"]]:
    r"""Returns a grid and the density of $\sqrt\lambda$ on it, scaled to the mass of the noise.

    `edge` is the upper edge of the bulk that was fitted below the spikes.
    """
    ratio, variance, share = law_left(ratio, size, spikes, edge)
    lower, upper = (jnp.sqrt(end) for end in marchenko_pastur.support(ratio, variance))
    # The points crowd at both ends, because the slope of the density can be infinite there.
    grid = lower + (upper - lower) * jnp.sin(jnp.linspace(0, jnp.pi / 2, points)) ** 2
    return grid, share * marchenko_pastur.pdf(grid**2, ratio, variance) * 2 * grid
