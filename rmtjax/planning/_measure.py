"""Measures kernels: the noise and the signal in their spectra, and their outputs on data."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from rmtjax._axes import join_stacks, kernel_shape, KernelLeaf, MatrixView, split_stacks, Views
from rmtjax._sharding import beside_accelerator, fetch
from rmtjax._types import BulkFit, Spectrum
from rmtjax.moments import Moments, Second
from rmtjax.noise import above_rounding, count_above
from rmtjax.planning._cost import rows_by_path
from rmtjax.planning._kernels import check_tree, find_kernels, leaves_by_path, obstacle
from rmtjax.planning._options import PlanOptions
from rmtjax.planning._rows import Kept, LayerPlan
from rmtjax.spectra import each, estimated_spectra, output_losses, OutputLosses, spectra, Values

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


def bias_of(view: MatrixView, leaves: Mapping[str, Any]) -> str | None:
    """Returns the path of the bias beside a kernel; None if there is none of its outputs."""
    parent, slash, _ = view.path.rpartition("/")
    path = f"{parent}{slash}bias"
    shape = tuple(view.shape[axis] for axis in (*view.axes.batch, *view.axes.outputs))
    return path if path in leaves and kernel_shape(leaves[path]) == shape else None


def second_of(moments: Moments, view: MatrixView, leaves: Mapping[str, Any]) -> Second:
    """Returns the second moments of the inputs of a kernel in a tree with these leaves.

    They are centred only if there is a bias to correct. Raises ValueError for other inputs.
    """
    moment = moments[view.path]
    if moment.size != view.rows:
        raise ValueError(
            f"`moments` is of another model: it has {moment.size} inputs for {view.path!r}, whose "
            f"kernel of shape {view.shape} has {view.rows}. Collect the moments with this model."
        )
    if len(moment.total) not in (1, view.stack):
        raise ValueError(
            f"`moments` must have one moment for each matrix of {view.path!r}, {view.stack}, or "
            f"one for all, got {len(moment.total)}. Collect the moments with the same `axes`."
        )
    second = moments.second(view.path, centred=bias_of(view, leaves) is not None)
    if not np.isfinite(second.exact).all():
        raise ValueError(
            f"`moments` is not finite for {view.path!r}: collect the moments anew, or leave the "
            "kernel out with `where`."
        )
    return second


def _all_losses(
    views: Views, moments: Moments | None, leaves: Mapping[str, Any]
) -> dict[str, OutputLosses]:
    """Returns what cuts of each rank do to the outputs of the kernels that have moments."""
    losses = {}
    for path, view in views.items():
        if moments is not None and path in moments and not view.in_parts:
            losses[path] = output_losses(view, second_of(moments, view, leaves))
    return losses


def _check_paths(name: str, by_path: Any, params: PyTree) -> None:
    """Raises ValueError if an option by path has one that is not in the tree."""
    # A table of `rmtjax.linen`, also a function, may know leaves that were stacked since.
    if isinstance(by_path, Mapping) and not callable(by_path):
        unknown = min(by_path.keys() - leaves_by_path(params).keys(), default=None)
        if unknown is not None:
            raise ValueError(
                f"`{name}` has {unknown!r}, which is no path of `params`: give it for this tree."
            )


def _given_fits(fits: Any, kernels: Mapping[str, KernelLeaf]) -> dict[str, BulkFit]:
    """Returns the noise levels that are known, as NumPy numbers."""
    levels = jax.tree.map(np.asarray, fetch(dict(fits or {})))
    given = {path: fit for path, fit in levels.items() if np.isfinite(fit.threshold).all()}
    for path in given.keys() & kernels.keys():
        kernel, count = kernels[path], np.size(given[path].threshold)
        if isinstance(kernel, MatrixView) and count != kernel.stack:
            raise ValueError(
                f"`fits` must have an entry for each matrix of {path!r}, {kernel.stack}, got "
                f"{count}. Take them from the state of `prune_spectrum` with the same `axes`."
            )
    return given


class Findings(NamedTuple):
    """Holds what is known of the kernels of a tree before anything is decided, by path.

    Attributes:
      kernels: All that were chosen, in the order of the tree.
      rows: Those of the kernels that no number can change.
      measured: The spectra and the noise of the others.
      losses: What cuts do to their outputs, of those that have moments.
    """

    kernels: dict[str, KernelLeaf]
    rows: dict[str, LayerPlan]
    measured: dict[str, Measurement]
    losses: dict[str, OutputLosses]


def merge_findings(one: Findings, other: Findings) -> Findings:
    """Returns the findings of two trees as those of one."""
    return Findings(*({**ours, **theirs} for ours, theirs in zip(one, other, strict=True)))


def study(params: PyTree, options: PlanOptions) -> Findings:
    """Measures the kernels of a tree."""
    check_tree(params)
    # Without a word, the kernel that is meant would be fitted anew, or seen along other axes.
    _check_paths("axes", options.axes, params)
    _check_paths("fits", options.fits, params)
    _check_paths("moments", options.moments, params)
    kernels = find_kernels(params, options.where, options.axes)
    rows_by_path(options.batch, kernels)  # raises an error for other paths before the work
    given = _given_fits(options.fits, kernels)
    rows: dict[str, LayerPlan] = {}
    views = {}
    for path, kernel in kernels.items():
        cause = obstacle(kernel, options.min_size)
        # What a factorization has left out cannot be fitted any more.
        needs_noise = options.rule.needs_noise and options.budget is None
        if not cause and kernel.is_factored and needs_noise and path not in given:
            cause = "factorized, and `fits` has no noise level for it"
        if not cause and path in given and (given[path].threshold < 0).any():
            cause = "pruning left it alone while training"
        if cause or not isinstance(kernel, MatrixView):
            rows[path] = Kept(f"kept: {cause}", kernel.shape, getattr(kernel, "axes", None))
        else:
            views[path] = kernel
    measured = measure(views, options.rule, given, options.exact_below)
    return Findings(
        kernels, rows, measured, _all_losses(views, options.moments, leaves_by_path(params))
    )
