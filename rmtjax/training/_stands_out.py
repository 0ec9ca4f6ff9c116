"""Tests whether a kernel has signal, at a level that holds over all looks together.

Noise that drifts gets a new chance at each look, so the level is spread over them. Its rows and
columns differ in scale, which lifts the largest eigenvalue: draws show by how much.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rmtjax._types import BulkFit, Spectrum
from rmtjax.laws import bulk_law, noise_threshold
from rmtjax.noise import ranks
from rmtjax.spectra import largest_eigenvalue

_DRAWS = 4
_LEAST = 1e-6  # the smallest level that float32 tells from 0
_CAP = 3.0  # times the median: a row or a column of a larger scale is taken for signal
_SAMPLING = math.pi / 2 - 1  # n times the variance of the logarithm of a mean of n magnitudes


def _scales(sizes: Float[Array, "m n"], axis: int) -> Float[Array, "..."]:
    """Returns the scales of rows or columns, less the scatter that equal ones have."""
    logs = jnp.log(jnp.maximum(jnp.mean(sizes, axis, keepdims=True), jnp.finfo(sizes.dtype).tiny))
    logs = jnp.minimum(logs - jnp.median(logs), math.log(_CAP))
    scatter = _SAMPLING / sizes.shape[axis]
    mean, variance = jnp.mean(logs), jnp.var(logs)
    share = jnp.maximum(1 - scatter / jnp.maximum(variance, scatter), 0)
    return jnp.exp(mean + jnp.sqrt(share) * (logs - mean))


def _reach(matrix: Float[Array, "m n"], look: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the mean largest eigenvalue of noise of variance 1 with the profile of a matrix."""
    sizes = jnp.abs(matrix)
    scale = _scales(sizes, 1) * _scales(sizes, 0)
    scale = scale / jnp.sqrt(jnp.mean(scale**2))
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
    size, has_level = spectra.eigenvalues.shape[-1], isinstance(rule, ranks.bema)
    level = rule.level if isinstance(rule, ranks.bema) else 0.01
    spent = jnp.maximum(level / (len(matrices) * look * (look + 1.0)), _LEAST)

    def compared(fit: BulkFit):
        """Returns the threshold, and a threshold over the median of the law."""
        ratio, _ = bulk_law(spectra.ratio, size, fit.num_spikes)
        levels = jnp.stack([spent, level, 0.5])
        raised, usual, median = noise_threshold(ratio, size - fit.num_spikes, levels)
        return fit.threshold * (raised / usual if has_level else 1), raised / median

    threshold, margin = jax.vmap(compared)(fits)
    largest = spectra.eigenvalues[:, 0]

    # Draws must wait for the decompositions also under `vmap`: both at once may wait for ever.
    matrices = jnp.where((largest > threshold)[:, None, None], lax.stop_gradient(matrices), 1)

    def with_profile():
        unit = lax.map(lambda matrix: _reach(matrix, look), matrices)

        def extend(_, reach):  # what the fit has taken for signal may be noise, and add to it
            rest = spectra.eigenvalues <= reach[:, None]
            total = jnp.sum(jnp.where(rest, spectra.eigenvalues, 0), axis=1)
            return jnp.maximum(reach, margin * unit * total / jnp.maximum(jnp.sum(rest, axis=1), 1))

        reach = lax.fori_loop(0, 10, extend, margin * unit * fits.variance)
        return jnp.any(largest > jnp.maximum(threshold, reach))

    return lax.cond(jnp.any(largest > threshold), with_profile, lambda: jnp.array(False))
