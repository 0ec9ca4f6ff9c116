"""Measures the noise and the signal in the spectra of kernels."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from rmtjax._axes import join_stacks, split_stacks, Views
from rmtjax._sharding import beside_accelerator
from rmtjax._types import BulkFit, Spectrum
from rmtjax.noise import above_rounding, count_above
from rmtjax.spectra import each, estimated_spectra, spectra, Values

# An estimate is off by 0.01 in the distance from the law. Above this one it leaves no doubt.
_CLEARLY = 0.05

Fits = Mapping[str, BulkFit]


class Measurement(NamedTuple):
    """The measurements of a kernel: NumPy arrays with an entry for each matrix of a stack."""

    spectra: Spectrum  # those of factors end in the zeros that the dense kernel would have
    fits: BulkFit  # the noise in force; NaN for factors that were given none
    noisy: Bool[Array, " b"]  # whether there is noise above rounding
    accepted: Bool[Array, " b"]  # whether the rule may be believed
    signal: Int[Array, " b"]  # number of signal directions
    populated: Int[Array, " b"]  # number of directions that may be kept: of factors, not the zeros
    estimated: bool = False  # whether the bulk of the spectra is made of estimated quantiles


@partial(jax.jit, static_argnames=("rule", "factored"))
def _judge(spectra: Spectrum, fits: BulkFit | None, *, rule, factored: bool) -> dict[str, Any]:
    """Returns what a `Measurement` says besides the spectra, by the names of its fields."""
    if fits is not None:
        levels = fits
    elif factored:  # what factors have left out cannot be fitted
        unknown = jnp.full_like(spectra.ratio, jnp.nan)
        levels = BulkFit(*[unknown] * 4, num_spikes=jnp.zeros(unknown.shape, jnp.int32))
    else:
        # One by one on CPU, where `vmap` would let every fit take as long as the slowest.
        levels = each(rule.fit, spectra)
    # A supplied fit came from another spectrum. Recount its spikes on this one.
    levels = levels._replace(num_spikes=jax.vmap(count_above)(spectra, levels.threshold))
    # The directions of factors that a truncation has left are not zero.
    present = lambda s: jax.vmap(above_rounding, (None, 0))(s, s.eigenvalues) | (not factored)
    return {
        "fits": levels,
        "noisy": jax.vmap(above_rounding)(spectra, levels.variance),
        "accepted": jax.vmap(rule.accepts)(spectra, levels),
        "signal": jax.vmap(rule)(spectra, levels),
        "populated": jnp.sum(jax.vmap(present)(spectra), axis=1, dtype=jnp.int32),
    }


def _measure_values(
    views: Views, values: Mapping[str, Values], rule, fits: Fits
) -> dict[str, Measurement]:
    """Judges spectra, those with as many eigenvalues together: one program judges a group."""
    groups: dict[tuple, list[str]] = {}
    for path, found in values.items():
        eigenvalues = found.spectrum.eigenvalues
        given = fits[path].threshold.dtype if path in fits else None
        program = eigenvalues.shape[1], eigenvalues.dtype, given, views[path].is_factored
        groups.setdefault(program, []).append(path)
    measured = {}
    for paths in groups.values():
        spectra = join_stacks([values[path].spectrum for path in paths])
        given = [jax.tree.map(np.ravel, fits[path]) for path in paths if path in fits]
        levels = join_stacks(given) if given else None
        with beside_accelerator():  # small loops with many steps, which an accelerator is slow at
            judged = _judge(spectra, levels, rule=rule, factored=views[paths[0]].is_factored)
        parts = split_stacks(jax.device_get(judged), [views[path].stack for path in paths])
        for path, part in zip(paths, parts, strict=True):
            spectrum, num_exact = values[path]
            estimated = bool((num_exact < views[path].full_rank).any())
            measured[path] = Measurement(spectrum, **part, estimated=estimated)
    return measured


def _decides(measured: Measurement, values: Values) -> bool:
    """Returns True if an estimated spectrum leaves no doubt about the plan."""
    counted = measured.accepted & (measured.signal <= values.num_exact)
    refused = ~measured.accepted & (measured.fits.distance > _CLEARLY)
    return bool((counted | refused).all())


def measure(views: Views, rule, fits: Fits, exact_below: int) -> dict[str, Measurement]:
    """Measures kernels, with the noise levels that are given for some of them."""
    values = estimated_spectra(views, exact_below)
    measured = _measure_values(views, values, rule, fits)
    # Where the estimate of a large kernel does not decide, the spectrum is computed.
    measured = {path: row for path, row in measured.items() if _decides(row, values[path])}
    rest = {path: view for path, view in views.items() if path not in measured}
    measured |= _measure_values(views, spectra(rest), rule, fits)
    return {path: measured[path] for path in views}
