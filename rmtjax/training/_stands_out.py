"""Tests whether a kernel has signal, at a level that holds over all looks together.

Noise that drifts gets a new chance at each look, so the level is spread over them. And it is seldom
of one variance: rows that have trained for longer have more of it, and the largest eigenvalue is
above the edge of the law. Draws of noise with the same variances show by how much.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rmtjax._types import BulkFit, Spectrum
from rmtjax.laws import bulk_law, marchenko_pastur, noise_threshold
from rmtjax.noise import ranks
from rmtjax.spectra import largest_eigenvalue

_DRAWS = 4
_LEAST = 1e-6  # the smallest level that float32 tells from 0
_CAP = 1.5  # times the median: a row or a column of a larger scale is taken for signal
_SAMPLING = math.pi / 2 - 1  # n times the variance of the logarithm of a mean of n magnitudes


def _scales(sizes: Float[Array, "m n"], axis: int) -> Float[Array, "..."]:
    """Returns the scales of rows or columns, less the scatter that equal ones would show."""
    logs = jnp.log(jnp.maximum(jnp.mean(sizes, axis, keepdims=True), jnp.finfo(sizes.dtype).tiny))
    logs = jnp.minimum(logs - jnp.median(logs), math.log(_CAP))
    scatter = _SAMPLING / sizes.shape[axis]
    mean, variance = jnp.mean(logs), jnp.var(logs)
    share = jnp.maximum(1 - scatter / jnp.maximum(variance, scatter), 0)
    return jnp.exp(mean + jnp.sqrt(share) * (logs - mean))


def _reach(matrix: Float[Array, "m n"], variance, look: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the mean largest eigenvalue of noise with the profile of a matrix, and a variance."""
    sizes = jnp.abs(matrix)
    scale = _scales(sizes, 1) * _scales(sizes, 0)
    scale = scale * jnp.sqrt(variance / jnp.mean(scale**2))

    def draw(key):
        return largest_eigenvalue(scale * jax.random.normal(key, scale.shape, scale.dtype))

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
    sums to the level of the rule. Without a level the threshold is not spread. Where noise with the
    variances of rows and columns reaches beyond the edge of the law, it is raised in proportion.
    The stack is read only if the law alone finds signal.
    """
    size, level = spectra.eigenvalues.shape[-1], getattr(rule, "level", None)
    spent = jnp.maximum((level or 1) / (len(matrices) * look * (look + 1)), _LEAST)

    def compared(fit: BulkFit):
        """Returns the threshold, and where the law expects the largest eigenvalue of the noise."""
        ratio, _ = bulk_law(spectra.ratio, size, fit.num_spikes)
        at_level = lambda level: noise_threshold(ratio, size - fit.num_spikes, level)
        expected = fit.edge * at_level(0.5) / marchenko_pastur.support(ratio)[1]
        raised = 1 if level is None else at_level(spent) / at_level(level)
        return fit.threshold * raised, expected

    (threshold, expected), largest = jax.vmap(compared)(fits), spectra.eigenvalues[:, 0]

    def with_profile():
        # If all is noise, this is its variance. The fit has left out what it took for signal.
        variances = spectra.eigenvalues[:, 1:].mean(axis=1)
        reached = lax.map(lambda pair: _reach(pair[0], pair[1], look), (matrices, variances))
        return jnp.any(largest > threshold * jnp.maximum(reached / expected, 1))

    matrices = lax.stop_gradient(matrices)
    return lax.cond(jnp.any(largest > threshold), with_profile, lambda: jnp.array(False))
