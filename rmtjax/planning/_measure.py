"""Measures kernels: the noise and the signal in their spectra, and their outputs on data."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from rmtjax._axes import join_stacks, KernelLeaf, MatrixView, split_stacks, Views
from rmtjax._modes import in_usual_modes
from rmtjax._progress import Step
from rmtjax._sharding import beside_accelerator, fetch
from rmtjax._types import BulkFit, size_of, Spectrum
from rmtjax.noise import (
    above_rounding,
    advises,
    count_above,
    equalized_view,
    equalizes,
    join_rule,
    level_after,
    level_of,
    on_scale,
    pad_for,
    Piece,
    rescale,
    Sides,
    split_pieces,
    split_rule,
)
from rmtjax.planning._cost import rows_by_path
from rmtjax.planning._kernels import (
    check_chosen,
    check_patterns,
    check_tree,
    check_values,
    find_kernels,
    leaves_by_path,
    obstacle,
    unchosen,
)
from rmtjax.planning._options import PlanOptions
from rmtjax.planning._outputs import all_losses
from rmtjax.planning._rows import Kept, LayerPlan, left_alone
from rmtjax.spectra import each, estimated_spectra, OutputLosses, spectra, Values

# An estimate is off by 0.01 in the distance from the law. Above this one it leaves no doubt.
_CLEARLY = 0.05

# What is tried for a kernel that the law does not fit, in words.
_WORDS: dict[Sides, str] = {"rows": "rows", "columns": "columns", "both": "rows and columns"}

Fits = Mapping[str, BulkFit]


class Measurement(NamedTuple):
    """The measurements of a kernel: NumPy arrays with an entry for each matrix of a stack."""

    spectra: Spectrum  # those of factors end in the zeros that the dense kernel would have
    fits: BulkFit  # the noise in force; NaN for factors that were given none
    finite: Bool[Array, " b"]  # whether all entries are finite
    held: Bool[Array, " b"]  # whether float64 has room for the squares
    noisy: Bool[Array, " b"]  # whether there is noise above rounding
    accepted: Bool[Array, " b"]  # whether the rule may be believed
    signal: Int[Array, " b"]  # number of signal directions
    populated: Int[Array, " b"]  # number of directions that may be kept: of factors, not the zeros
    live: Int[np.ndarray, "b 2"]  # number of rows and of columns that are not zero
    estimated: bool = False  # whether the bulk of the spectra is made of estimated quantiles
    values: Values | None = None  # from which another rule can judge
    equalized: bool = False  # whether all this is of the kernel over the scales of its noise
    advice: str = ""  # on a kernel that is refused


@partial(jax.jit, static_argnames=("rule", "factored"))
def _judge(
    spectra: Spectrum, fits: BulkFit | None, numbers: dict[str, Any] | None, *, rule, factored: bool
) -> dict[str, Any]:
    """Returns what a `Measurement` says besides the spectra, by the names of its fields."""
    rule = join_rule(rule, numbers)
    spectra, fits = jax.tree.map(jnp.asarray, (spectra, fits))  # also without `jit`
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
    # Without an edge a threshold is a floor, above which pruning had to leave all.
    floored = jnp.where(jnp.isnan(levels.edge), levels.num_spikes, 0)
    noisy = jax.vmap(above_rounding)(spectra, levels.variance)
    # Above a bulk of rounding errors stand others of them.
    shown = jnp.where(noisy | jnp.isnan(levels.edge), levels.num_spikes, 0)

    # The directions of factors that a truncation has left are not zero.
    def present(s: Spectrum) -> Bool[Array, " p"]:
        there = jnp.arange(s.eigenvalues.shape[0]) < size_of(s)
        return there & (jax.vmap(above_rounding, (None, 0))(s, s.eigenvalues) | (not factored))

    return {
        "fits": levels._replace(num_spikes=shown),
        "noisy": noisy,
        "accepted": jax.vmap(rule.accepts)(spectra, levels),
        "signal": jnp.maximum(jax.vmap(rule)(spectra, levels), floored),
        "populated": jnp.sum(jax.vmap(present)(spectra), axis=1, dtype=jnp.int32),
    }


def _judge_pieces(pieces: list[Piece], views: Views, rule, fits: Fits) -> list[dict[str, Any]]:
    """Judges pieces, those with as many eigenvalues together: one program judges a group."""
    given = {i: level_of(p, fits[p.path]) for i, p in enumerate(pieces) if p.path in fits}
    groups: dict[tuple, list[int]] = {}
    base, numbers = split_rule(rule)
    padded = [pad_for(rule, piece.spectra) for piece in pieces]
    for index, piece in enumerate(pieces):
        eigenvalues = padded[index].eigenvalues
        dtype = given[index].threshold.dtype if index in given else None
        program = eigenvalues.shape[1], eigenvalues.dtype, dtype, views[piece.path].is_factored
        groups.setdefault(program, []).append(index)
    results: dict[int, Any] = {}
    for (*_, factored), group in groups.items():
        spectra = join_stacks([padded[index] for index in group])
        levels = [given[index] for index in group if index in given]
        with beside_accelerator():  # small loops with many steps, which an accelerator is slow at
            joined = join_stacks(levels) if levels else None
            judged = _judge(spectra, joined, numbers, rule=base, factored=factored)
        sizes = [len(pieces[index].spectra.eigenvalues) for index in group]
        results |= zip(group, split_stacks(jax.device_get(judged), sizes), strict=True)
    return [results[index] for index in range(len(pieces))]


def measure_values(
    views: Views, values: Mapping[str, Values], rule, fits: Fits
) -> dict[str, Measurement]:
    """Judges the spectra of kernels."""
    pieces = [piece for path in values for piece in split_pieces(path, values[path], views[path])]
    parts: dict[str, list] = {path: [] for path in values}
    for piece, judged in zip(pieces, _judge_pieces(pieces, views, rule, fits), strict=True):
        judged["fits"] = rescale(judged["fits"], piece, back=True)
        parts[piece.path].append(judged)
    measured = {}
    for path, (spectrum, num_exact, live, exponent) in values.items():
        whole: Any = parts[path][0] if len(parts[path]) == 1 else join_stacks(parts[path])
        estimated = bool((num_exact < views[path].full_rank).any())
        finite = np.isfinite(spectrum.eigenvalues).all(axis=-1)
        scaled = on_scale(spectrum, exponent)
        usual = lambda s: np.isfinite(s.eigenvalues[:, 0]) & (s.eigenvalues[:, 0] > 0)
        held = usual(scaled) == usual(spectrum)
        known: Any = {"finite": finite, "held": held, "live": live, "estimated": estimated}
        known["values"] = values[path]
        measured[path] = Measurement(scaled, **whole, **known)
    return measured


def _decides(measured: Measurement, values: Values, view: MatrixView) -> bool:
    """Returns True if an estimated spectrum leaves no doubt about the plan."""
    # Quantiles of a bulk between which there are zeros are not those of the others.
    if (measured.live != (view.rows, view.columns)).any():
        return False
    counted = measured.accepted & (measured.signal <= values.num_exact)
    refused = ~measured.accepted & (measured.fits.distance > _CLEARLY)
    return bool((counted | refused).all())


def _measure_equalized(views: Views, rule, sides: Sides = "both") -> dict[str, Measurement]:
    """Measures kernels over the scales of their noise in rows and columns."""
    even = {path: equalized_view(view, sides) for path, view in views.items()}
    values, measured = spectra(even), {}
    for path, view in even.items():
        # The level depends on the aspect ratio. It is no part of a program.
        level = level_after(rule.level, view.short / view.long)
        measured |= measure_values(
            {path: view}, {path: values[path]}, replace(rule, level=level), {}
        )
    return {path: measured[path]._replace(equalized=True) for path in even}


def _advise(view: MatrixView, rule) -> str:
    """Returns whether a kernel that the law does not fit would fit if it were equalized."""
    for sides, words in _WORDS.items():
        if _measure_equalized({view.path: view}, rule, sides)[view.path].accepted.all():
            return f"; fits after equalizing {words}"
    return "; does not fit after equalizing rows and columns"


def _measure_as_it_is(views: Views, rule, fits: Fits, exact_below: int) -> dict[str, Measurement]:
    """Measures kernels, with the noise levels that are given for some of them."""
    values = estimated_spectra(views, exact_below)
    measured = measure_values(views, values, rule, fits)
    # Where the estimate of a large kernel does not decide, the spectrum is computed.
    measured = {
        path: row for path, row in measured.items() if _decides(row, values[path], views[path])
    }
    rest = {path: view for path, view in views.items() if path not in measured}
    return measured | measure_values(rest, spectra(rest), rule, fits)


def measure(views: Views, rule, fits: Fits, exact_below: int) -> dict[str, Measurement]:
    """Measures kernels as the rule wants them: as they are, or equalized."""
    # A level that is given is that of the kernel as it is.
    even = {p: view for p, view in views.items() if equalizes(rule) and p not in fits}
    as_is = {path: view for path, view in views.items() if path not in even}
    measured = _measure_as_it_is(as_is, rule, fits, exact_below) | _measure_equalized(even, rule)
    for path, view in views.items() if advises(rule) else ():
        row = measured[path]
        if (row.finite & row.noisy).all() and not row.accepted.all() and path not in fits:
            measured[path] = row._replace(advice=_advise(view, rule))
    return {path: measured[path] for path in views}


def _check_paths(name: str, by_path: Any, params: PyTree) -> None:
    """Raises ValueError if an option by path has one that is not in the tree."""
    # A table of `rmtjax.linen`, also a function, may know leaves that were stacked since.
    if isinstance(by_path, Mapping) and not callable(by_path):
        unknown = min(by_path.keys() - leaves_by_path(params).keys(), default=None)
        if unknown is not None:
            raise ValueError(
                f"`{name}` has {unknown!r}, which is no path of `params`: give it for this tree."
            )


def given_fits(fits: Any, kernels: Mapping[str, KernelLeaf]) -> dict[str, BulkFit]:
    """Returns the noise levels that are known, as NumPy numbers."""
    levels = jax.tree.map(np.asarray, fetch(dict(fits or {})))
    # 0 at a distance of 1, and an edge below 0, are how a state says NaN.
    none = lambda fit: (fit.threshold == 0) & (fit.distance == 1)
    known = lambda fit: np.all(np.isfinite(fit.threshold) & ~none(fit))
    floored = lambda fit: fit._replace(edge=np.where(fit.edge < 0, np.nan, fit.edge))
    given = {path: floored(fit) for path, fit in levels.items() if known(fit)}
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
      others: Leaves that may be kernels under another name, and were not chosen.
      fixed_shapes: Why some kernels may be truncated, and not factorized.
    """

    kernels: dict[str, KernelLeaf]
    rows: dict[str, LayerPlan]
    measured: dict[str, Measurement]
    losses: dict[str, OutputLosses]
    others: dict[str, KernelLeaf]
    fixed_shapes: dict[str, str] = {}  # noqa: RUF012 - never changed


def merge_findings(one: Findings, other: Findings) -> Findings:
    """Returns the findings of two trees as those of one."""
    parts: Any = ({**ours, **theirs} for ours, theirs in zip(one, other, strict=True))
    return Findings(*parts)


def _parts(views: Views, step: Step | None) -> Iterator[Views]:
    """Yields kernels that are measured together, after a word on the first: large ones alone."""
    if step is None:
        yield views
        return
    paths, size = list(views), 1 if any(view.short >= 2048 for view in views.values()) else 32
    for place in range(0, len(paths), size):
        step(place, len(paths), paths[place])
        yield {path: views[path] for path in paths[place : place + size]}


@in_usual_modes
def study(params: PyTree, options: PlanOptions, step: Step | None = None) -> Findings:
    """Measures the kernels of a tree."""
    check_tree(params)
    # Without a word, the kernel that is meant would be fitted anew, or seen along other axes.
    _check_paths("axes", options.axes, params)
    _check_paths("fits", options.fits, params)
    _check_paths("moments", options.moments, params)
    check_patterns(options.where, params)
    kernels = find_kernels(params, options.where, options.axes)
    check_chosen(kernels, params, options.where)
    others = unchosen(params, kernels) if options.where is None else {}
    rows_by_path(options.batch, kernels)  # raises an error for other paths before the work
    given = given_fits(options.fits, kernels)
    rows: dict[str, LayerPlan] = {}
    views = {}
    for path, kernel in kernels.items():
        cause = obstacle(kernel, options.min_size)
        # What a factorization has left out cannot be fitted any more.
        needs_noise = options.rule.needs_noise and options.budget is None
        if not cause and kernel.is_factored and needs_noise and path not in given:
            cause = "factorized, and `fits` has no noise level for it"
        if not cause and path in given and (given[path].threshold < 0).any():
            cause = left_alone(given[path])
        if cause or not isinstance(kernel, MatrixView):
            rows[path] = Kept(f"kept: {cause}", kernel.shape, getattr(kernel, "axes", None))
        else:
            views[path] = kernel
    check_values(views)
    measured = {}
    for part in _parts(views, step):
        measured |= measure(part, options.rule, given, options.exact_below)
    losses = all_losses(views, options.moments, leaves_by_path(params))
    return Findings(kernels, rows, measured, losses, others)
