"""Tests whether a kernel has signal, at a level that holds over all looks together.

Noise that drifts gets a new chance at each look, so the level is spread over them. Its rows and
columns differ in scale, which lifts the largest eigenvalue: draws show by how much.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rmtjax._types import BulkFit, LiveSpectrum, Spectrum
from rmtjax.laws import bulk_law, noise_threshold
from rmtjax.noise import live_spectra, ranks
from rmtjax.spectra import largest_eigenvalue

_DRAWS = 4
_LEAST = 1e-6  # the smallest level that float32 tells from 0
_CAP = 3.0  # times the median: a row or a column of a larger scale is taken for signal
_SAMPLING = math.pi / 2 - 1  # n times the variance of the logarithm of a mean of n magnitudes


def _scales(sizes: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Returns the scales of rows times those of columns, less the scatter that equal ones have.

    Those of zeros are 0.
    """
    pad = lambda means: jnp.pad(means, (0, max(sizes.shape) - len(means)))
    # Both sides in one array, which makes the program smaller.
    means = jnp.stack([pad(jnp.mean(sizes, axis)) for axis in (1, 0)])
    live = means > 0
    # Up to a factor, which the profile of noise does not depend on.
    logs = jnp.log(jnp.where(live, means, 1))
    median = jnp.nanmedian(jnp.where(live, logs, jnp.nan), axis=1, keepdims=True)
    logs = jnp.minimum(logs - median, math.log(_CAP))
    # A mean over a row has as many numbers as there are columns that are not zero.
    scatter = _SAMPLING / jnp.sum(live[::-1], axis=1, keepdims=True)
    options = {"axis": 1, "keepdims": True, "where": live}
    mean, variance = jnp.mean(logs, **options), jnp.var(logs, **options)
    share = jnp.maximum(1 - scatter / jnp.maximum(variance, scatter), 0)
    scales = jnp.where(live, jnp.exp(mean + jnp.sqrt(share) * (logs - mean)), 0)
    return scales[0, : len(sizes), None] * scales[1, None, : sizes.shape[1]]


def _reach(matrix: Float[Array, "m n"], look: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the mean largest eigenvalue of noise of variance 1 with the profile of a matrix."""
    scale = _scales(jnp.abs(matrix))
    scale = scale / jnp.sqrt(jnp.mean(scale**2, where=scale > 0))
    draw = lambda key: largest_eigenvalue(scale * jax.random.normal(key, scale.shape, scale.dtype))
    return lax.map(draw, jax.random.split(jax.random.key(look), _DRAWS)).mean()


def stands_out(
    matrices: Float[Array, "b m n"],
    spectra: Spectrum,
    fits: BulkFit,
    look: Int[Array, ""],
    rule: ranks.RankRule,
) -> Bool[Array, ""]:
    r"""Returns True if a matrix of a stack has a direction that drifting noise would not have.

    The largest eigenvalue must exceed the threshold at $level / (b\, j (j + 1))$ for look j, which
    sums to the level of the rule, and what noise with the scales of rows and columns reaches.
    """
    has_level, live = isinstance(rule, ranks.bema), live_spectra(spectra, matrices)[0]
    level = rule.level if isinstance(rule, ranks.bema) else 0.01
    spent = jnp.maximum(level / (len(matrices) * look * (look + 1.0)), _LEAST)

    def compared(fit: BulkFit, live: LiveSpectrum):
        """Returns the threshold, and a threshold over the median of the law."""
        ratio, _ = bulk_law(live.ratio, live.size, fit.num_spikes)
        levels = jnp.stack([spent, level, 0.5])
        raised, usual, median = noise_threshold(ratio, live.size - fit.num_spikes, levels)
        return fit.threshold * (raised / usual if has_level else 1), raised / median

    threshold, margin = jax.vmap(compared)(fits, live)
    largest, dead = spectra.eigenvalues[:, 0], spectra.eigenvalues.shape[1] - live.size

    # Draws must wait for the decompositions also under `vmap`: both at once may wait for ever.
    matrices = jnp.where((largest > threshold)[:, None, None], lax.stop_gradient(matrices), 1)

    def with_profile():
        unit = lax.map(lambda matrix: _reach(matrix, look), matrices)

        def extend(_, reach):  # what the fit has taken for signal may be noise, and add to it
            rest = spectra.eigenvalues <= reach[:, None]
            total = jnp.sum(jnp.where(rest, live.eigenvalues, 0), axis=1)
            count = jnp.maximum(jnp.sum(rest, axis=1) - dead, 1)
            return jnp.maximum(reach, margin * unit * total / count)

        reach = lax.fori_loop(0, 10, extend, margin * unit * fits.variance)
        return jnp.any(largest > jnp.maximum(threshold, reach))

    return lax.cond(jnp.any(largest > threshold), with_profile, lambda: jnp.array(False))
