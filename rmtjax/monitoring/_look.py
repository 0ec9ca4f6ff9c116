"""Measures the columns of one kernel in a compiled program, from its singular values alone."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from rmtjax._axes import KernelAxes, to_matrices
from rmtjax._types import BulkFit, Spectrum
from rmtjax.laws import shuffled_threshold
from rmtjax.noise import fit_live, ranks, some_metrics, SpectralMetrics
from rmtjax.spectra import each, lift, spectrum, times_power, to_unit

_LAW = ("variance", "edge", "threshold", "spikes", "distance")
_SHUFFLED = ("shuffled_spikes", "shuffled_rate", "shuffled_top")
COLUMNS = (*_LAW, *SpectralMetrics._fields, *_SHUFFLED)
# By which power of the scale of the kernel a column grows.
_POWERS = {"variance": 2, "edge": 2, "threshold": 2, "alpha_start": 2}
_POWERS |= {"spectral_norm": 1, "frobenius_norm": 1}
_LOGARITHMS = ("alpha_weighted", "log_alpha_norm")


class LookOptions(NamedTuple):
    """Options that are not arrays. Another value is another program."""

    columns: tuple[str, ...]
    rule: ranks.RankRule
    min_size: int  # of what rows and columns of zeros leave
    shuffles: int


class Look(NamedTuple):
    """Holds what was measured of a kernel, with an entry for each matrix of its stack."""

    columns: dict[str, Array]
    accepted: Bool[Array, " b"]
    spikes: Any
    traps: Bool[Array, " b"]


def check_columns(columns: tuple[str, ...], shuffles: int) -> None:
    """Raises ValueError for a column that cannot be measured."""
    unknown = next((name for name in columns if name not in COLUMNS), None)
    if unknown is not None:
        raise ValueError(f"`columns` must be some of {COLUMNS}, got {unknown!r}.")
    shuffled = next((name for name in columns if name in _SHUFFLED), None)
    if shuffled and not shuffles:
        raise ValueError(
            f"`columns` has {shuffled!r}, which needs `shuffles` of at least 1, got 0."
        )


def _shuffled(matrix: Float[Array, "m n"], key: Array, options: LookOptions) -> dict[str, Array]:
    """Returns the spikes of random orders of the entries, for which the variance is known."""
    centred = matrix - jnp.mean(matrix)
    level: Any = getattr(options.rule, "level", 0.01)
    ratio = jnp.asarray(min(matrix.shape) / max(matrix.shape), matrix.dtype)
    threshold = jnp.mean(centred**2) * shuffled_threshold(ratio, min(matrix.shape), level)

    def one(key):
        order = jax.random.permutation(key, centred.ravel()).reshape(matrix.shape)
        eigenvalues = spectrum(order).eigenvalues
        return jnp.sum(eigenvalues > threshold), eigenvalues[0] / threshold

    counts, tops = lax.map(one, jax.random.split(key, options.shuffles))
    mean = lambda numbers: jnp.mean(numbers, dtype=matrix.dtype)
    return dict(zip(_SHUFFLED, (mean(counts), mean(counts > 0), mean(tops)), strict=True))


def _on_scale(columns: dict[str, Array], exponent: Any) -> dict[str, Array]:
    """Returns columns of a kernel that was divided by a power of two, on its own scale."""
    moved = {n: times_power(columns[n], p * exponent) for n, p in _POWERS.items() if n in columns}
    for name in _LOGARITHMS:
        if name in columns:
            shift = 2 * np.log10(2) * exponent.astype(columns["alpha"].dtype)
            moved[name] = columns[name] + shift * columns["alpha"]
    return columns | moved


def look_at(kernel: Any, key: Array, axes: KernelAxes, options: LookOptions) -> Look:
    """Returns the columns of a kernel. Numbers that do not exist are 0: a state has no NaN."""
    matrices, exponent = to_unit(lift(to_matrices(jnp.asarray(kernel), axes)))
    spectra: Spectrum = each(spectrum, matrices)
    fits, accepted = fit_live(options.rule, options.min_size, spectra, matrices)
    known = dict(zip(BulkFit._fields, fits, strict=True))
    columns: dict[str, Array] = {name: known[name] for name in _LAW if name in known}
    columns["spikes"] = spikes = fits.num_spikes
    names = {*options.columns}
    names |= {"alpha"} if names & {*_LOGARITHMS} else set()
    if names & {*SpectralMetrics._fields}:
        size = jnp.asarray(spectra.eigenvalues.shape[1], jnp.int32)
        one = lambda s, fit: some_metrics(s, size, fit, fit.num_spikes, names=names)
        columns |= jax.vmap(one)(spectra, fits)
    traps = jnp.zeros(accepted.shape, bool)
    if options.shuffles:
        keys = jax.random.split(key, len(matrices))
        shuffled = lambda pair: _shuffled(pair[0], pair[1], options)
        columns |= lax.map(shuffled, (matrices, keys))
        traps = columns["shuffled_rate"] > 0.5
    columns = _on_scale(columns, exponent)
    finite = lambda value: jnp.where(jnp.isfinite(value), value, 0)
    chosen = {name: finite(columns[name]) for name in options.columns}
    return Look(chosen, accepted, spikes, traps)


@partial(jax.jit, static_argnames=("axes", "options"))
def shapes_of(kernel: Any, *, axes: KernelAxes, options: LookOptions) -> Look:
    """Returns what a look will return: for `jax.eval_shape`, which traces a program once."""
    return look_at(kernel, jax.random.key(0), axes, options)
