"""Tests whether a kernel has signal, at a level that holds over all looks together.

Noise that drifts gets a new chance at each look, so the level is spread over them. Its rows and
columns differ in scale, which lifts the largest eigenvalue: a law says by how much.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rmtjax._types import BulkFit, LiveSpectrum, Spectrum
from rmtjax.laws import bulk_law, marchenko_pastur, noise_threshold, profile_edge
from rmtjax.noise import live_spectra, ranks

_LEAST = 1e-6  # the smallest level that float32 tells from 0
_CAP = 3.0  # times the median: a row or a column of a larger scale is taken for signal
_SAMPLING = math.pi / 2 - 1  # n times the variance of the logarithm of a mean of n magnitudes


def _variances(sizes: Float[Array, "m n"]) -> tuple[Float[Array, " m"], Float[Array, " n"]]:
    """Returns the variances of rows and of columns, less the scatter that equal ones have.

    Those of zeros are 0, and the mean of the others is 1.
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
    variances = jnp.where(live, jnp.exp(2 * (mean + jnp.sqrt(share) * (logs - mean))), 0)
    variances = variances / jnp.mean(variances, **options)
    return variances[0, : len(sizes)], variances[1, : sizes.shape[1]]


def stands_out(
    matrices: Float[Array, "b m n"],
    spectra: Spectrum,
    fits: BulkFit,
    look: Int[Array, ""],
    rule: ranks.RankRule,
) -> Bool[Array, ""]:
    r"""Returns True if a matrix of a stack has a direction that drifting noise would not have.

    The largest eigenvalue must exceed the threshold at $level / (b\, j (j + 1))$ for look j, which
    sums to the level of the rule. It must also exceed what noise with such rows and columns has.
    """
    has_level, live = isinstance(rule, ranks.bema), live_spectra(spectra, matrices)[0]
    level = rule.level if isinstance(rule, ranks.bema) else 0.01
    spent = jnp.maximum(level / (len(matrices) * look * (look + 1.0)), _LEAST)

    def compared(fit: BulkFit, live: LiveSpectrum):
        """Returns the threshold, and a threshold over the edge of the law."""
        ratio, _ = bulk_law(live.ratio, live.size, fit.num_spikes)
        levels = jnp.stack([spent, level])
        raised, usual = noise_threshold(ratio, live.size - fit.num_spikes, levels)
        edge = marchenko_pastur.support(ratio, 1.0)[1]
        return fit.threshold * (raised / usual if has_level else 1), raised / edge

    threshold, margin = jax.vmap(compared)(fits, live)
    largest, dead = spectra.eigenvalues[:, 0], spectra.eigenvalues.shape[1] - live.size

    def with_profile():
        sizes = jnp.abs(lax.stop_gradient(matrices))
        unit = jax.vmap(lambda sizes: profile_edge(*_variances(sizes)))(sizes)

        def extend(_, reach):  # what the fit has taken for signal may be noise, and add to it
            rest = spectra.eigenvalues <= reach[:, None]
            total = jnp.sum(jnp.where(rest, live.eigenvalues, 0), axis=1)
            count = jnp.maximum(jnp.sum(rest, axis=1) - dead, 1)
            return jnp.maximum(reach, margin * unit * total / count)

        reach = lax.fori_loop(0, 10, extend, margin * unit * fits.variance)
        return jnp.any(largest > jnp.maximum(threshold, reach))

    return lax.cond(jnp.any(largest > threshold), with_profile, lambda: jnp.array(False))
