"""Decides what is done to one kernel, from its measurement, with the reason in words."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmtjax._axes import MatrixView
from rmtjax._types import Spectrum
from rmtjax.moments import Moments
from rmtjax.noise import kept_rank, Shrink
from rmtjax.planning._budget import (
    allocate,
    Budget,
    check_reach,
    Choices,
    choices_of,
    ranks_of,
    size_of,
)
from rmtjax.planning._cost import Clock, hindrance, is_timed, nanoseconds, time_ranks, Timed
from rmtjax.planning._measure import Findings, Measurement
from rmtjax.planning._options import PlanOptions
from rmtjax.planning._rows import Factorized, Kept, LayerPlan, Truncated
from rmtjax.spectra import shrink_values

# One program in the place of several small ones.
_kept_rank = jax.jit(kept_rank)


def _broken(measured: Measurement) -> str | None:
    """Returns why a kernel cannot be cut at all, or None."""
    if not measured.finite.all():
        return "not finite"
    if not measured.held.all():
        return "squares of its entries leave the range of float64"
    return None if measured.spectra.eigenvalues.any() else "all zero"


def _refusal(measured: Measurement, min_size: int) -> str | None:
    """Returns why the rule may not be believed, or None."""
    if broken := _broken(measured):
        return broken
    # A matrix of zeros in a stack has no law, and no signal either.
    size = int(measured.live.min())
    if 0 < size < min(min_size, measured.spectra.eigenvalues.shape[-1]):
        return f"short side {size} under {min_size} without rows and columns of zeros"
    if not measured.accepted.all():
        if not measured.noisy.all():
            return "no noise above rounding; of a truncated kernel `fits` must tell it"
        if (measured.fits.num_spikes >= size // 2).any():
            words = f"half of the {size} directions stand out, and leave no bulk to fit"
        else:
            words = f"law does not fit (distance {measured.fits.distance.max():.3f})"
        return words + measured.advice
    # Nothing stands out, as before training; to cut to nothing would destroy the network.
    return None if measured.signal.any() else "no signal stands out of the noise"


def _unshrinkable(measured: Measurement, shrink: Shrink, view: MatrixView) -> str | None:
    """Returns why the values that are kept may not be shrunk, or None."""
    spectra, (variance, edge, threshold, *_) = measured.spectra, measured.fits
    if not (np.isfinite(variance) & measured.noisy).all():
        return "no noise level to shrink by"
    if (np.isnan(edge) & np.isfinite(threshold)).any():
        return "shrinkage would remove what had to stay while training"
    values = np.sqrt(view.long * spectra.eigenvalues)
    rows, columns = np.where(measured.live > 0, measured.live, (view.rows, view.columns)).T
    shrunken = shrink_values(jnp.asarray(values), shrink, variance, (rows, columns))
    return None if shrunken.any(axis=-1).all() else "shrinkage would leave nothing"


def _zeros(view: MatrixView, measured: Measurement) -> str:
    """Returns how many rows and columns are zero, the most of a stack, in words."""
    live = measured.live[measured.live.all(axis=1)]  # a matrix of zeros has its own reason
    rows, columns = ((view.rows, view.columns) - live).max(axis=0, initial=0)
    counts = {"rows": rows, "columns": columns}
    words = " and ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f" ({words} are zero)" if words else ""


def _losses(found: Findings, path: str) -> np.ndarray:
    """Returns the share of energy that a kernel loses at each rank: of outputs, or of squares."""
    if path in found.losses:
        lost = np.asarray(found.losses[path].weighted, np.float64)
    else:
        eigenvalues = np.asarray(found.measured[path].spectra.eigenvalues, np.float64)
        from_rank = np.cumsum(eigenvalues[:, ::-1], axis=1)[:, ::-1]
        lost = np.pad(from_rank, ((0, 0), (0, 1)))
    lost = lost.reshape(-1, lost.shape[-1]).sum(axis=0)
    return np.clip(lost / lost[0], 0, 1)


def _weights(found: Findings, moments: Moments | None) -> dict[str, float]:
    """Returns how much the share of energy that each kernel loses counts, 1 on average.

    With the gradients of a model's outputs, the energy itself is comparable: it is the change of
    these outputs to first order. Neither the energy nor the share alone is best for deep cuts, so
    the weight of a share is the root of the energy. Without gradients all shares count alike.
    """
    energies = {
        path: float(np.sum(np.asarray(moments.gradients[path].rows) * loss.weighted[..., 0]))
        for path, loss in found.losses.items()
        if moments is not None and moments.weighs(path)
    }
    roots = {path: np.sqrt(energy) for path, energy in energies.items() if energy > 0}
    mean = np.mean([*roots.values()]) if roots else 1.0
    return {path: float(roots.get(path, mean) / mean) for path in found.measured}


def _may_be_cut(found: Findings, path: str, whole: Collection[str]) -> bool:
    """Returns True for a kernel that a budget may cut; those of `whole` stay as they are."""
    kernel = found.kernels[path]
    fixed_form = path in whole or getattr(kernel, "in_parts", None)
    known = path in found.measured and not fixed_form and isinstance(kernel, MatrixView)
    return known and not _broken(found.measured[path])


def time_kernels(
    found: Findings, options: PlanOptions, rows: Mapping[str, int], clock: Clock
) -> dict[str, Timed]:
    """Returns the times of each kernel with rows, at the ranks that a budget of time may choose."""
    timed = {}
    for path, kernel in found.kernels.items():
        if path in rows and is_timed(kernel):
            may = _may_be_cut(found, path, ())
            ranks = ranks_of(kernel, options.multiple, options.min_rank) if may else []
            timed[path] = time_ranks(kernel, rows[path], ranks, clock)
    return timed


def choices(
    found: Findings,
    options: PlanOptions,
    rows: Mapping[str, int],
    whole: Collection[str] = (),
    timed: Mapping[str, Timed] | None = None,
) -> tuple[dict[str, Choices], dict[str, int]]:
    """Returns the choices of the kernels that a budget may cut, and the sizes of the others.

    `whole` are kernels that stay as they are; `timed` is given for a budget of time.
    """
    budget: Any = options.budget or Budget(share=1.0)
    able, fixed, weights = {}, {}, _weights(found, options.moments)
    for path, kernel in found.kernels.items():
        count, one, times = rows.get(path, 1), None, None
        if timed is not None:
            unknown: dict[int | None, int] = {kernel.rank: 0}
            stack = getattr(kernel, "stack", 1)
            times = nanoseconds(timed[path], stack) if path in timed else unknown
        if _may_be_cut(found, path, whole):
            view: Any = kernel
            losses = weights[path] * _losses(found, path)
            ranks = ranks_of(view, options.multiple, options.min_rank)
            one = choices_of(view, losses, budget, count, ranks, times)
        if one is None or len(one.ranks) == 1:
            fixed[path] = times[kernel.rank] if times else size_of(kernel, budget, count)
        else:
            able[path] = one
    return able, fixed


def give_ranks(
    found: Findings,
    options: PlanOptions,
    rows: Mapping[str, int],
    whole: Collection[str] = (),
    timed: Mapping[str, Timed] | None = None,
) -> dict[str, int | None] | None:
    """Returns the rank of each kernel under a budget, None for one that stays; None without one."""
    budget: Any = options.budget
    if budget is None:
        return None
    able, fixed = choices(found, options, rows, whole, timed)
    size = sum(fixed.values()) + sum(int(one.sizes[-1]) for one in able.values())
    limit = budget.limit(size)
    check_reach(budget, limit, able, fixed)
    return dict.fromkeys(found.measured) | allocate(able, sum(fixed.values()), limit)


def _rank_by_rule(
    view: MatrixView, measured: Measurement, options: PlanOptions, by: str
) -> tuple[int, str]:
    """Returns the rank by the rule, and in words: what it counts, or that it asks for a size."""
    # One rank for a stack: that of its richest member.
    populated = int(measured.populated.max())
    count = min(int(measured.signal.max()), populated)
    rank = int(_kept_rank(count, populated, options.keep, options.min_rank))
    size = view.full_rank
    rank = min(-(-rank // options.multiple) * options.multiple, size)  # rounded up
    shrunk = ", shrunk" if options.shrink else ""
    if not options.rule.needs_noise:  # it was told how much to keep, and has not looked for signal
        asked = "as asked by the rule" if rank == count else f"where the rule asks for {count}"
        return rank, f"rank {rank} of {size}{by}, {asked}{shrunk}"
    return rank, f"{count} of {size} are signal, rank {rank}{shrunk}{by}"


def _whole(path: str, view: MatrixView, options: PlanOptions) -> str:
    """Returns why a kernel is whole under a budget."""
    budget: Any = options.budget
    timed = not isinstance(options.batch, Mapping) or path in options.batch
    if budget.milliseconds is not None and not (timed and is_timed(view)):
        return "not timed, so that a budget of time does not cut it"
    return "whole under the budget"


def decide(
    found: Findings, path: str, options: PlanOptions, ranks: Mapping[str, int | None] | None
) -> LayerPlan:
    """Returns the row of a kernel: by the signal in its weights, or by a rank that is given."""
    if path in found.rows:
        return found.rows[path]
    view: Any = found.kernels[path]
    measured, loss, shrink = found.measured[path], found.losses.get(path), options.shrink
    size = view.full_rank
    # A kernel that is not a stack has one matrix, and its row no leading axis.
    unstack = lambda tree: tree if view.axes.batch else jax.tree.map(lambda leaf: leaf[0], tree)
    eigenvalues, ratio = measured.spectra
    spectrum = Spectrum(unstack(eigenvalues), ratio[0])
    known: Any = {"shape": view.shape, "axes": view.axes, "spectrum": spectrum}
    known |= {"fit": unstack(measured.fits), "loss": unstack(loss)}
    known |= {"equalized": measured.equalized}
    note = " (spectrum estimated)" if measured.estimated else ""
    note += _zeros(view, measured)
    note += " (rows and columns equalized)" if measured.equalized else ""
    note += " (no moments: by weights)" if options.moments is not None and not loss else ""
    by = " by output" if loss else ""
    if ranks is None:
        refusal = _refusal(measured, options.min_size) or (
            shrink and _unshrinkable(measured, shrink, view)
        )
        rank, words = _rank_by_rule(view, measured, options, by)
    else:
        refusal = _broken(measured) or (None if ranks[path] else _whole(path, view, options))
        rank = ranks[path] or size
        words = f"rank {rank} of {size} under the budget{by}"
    if view.in_parts:
        refusal = refusal or f"held as {view.in_parts} ({words.partition(', ')[0]})"
    if refusal:
        return Kept(f"kept: {refusal}{note}", rank=size, **known)
    if rank == size and shrink is None:
        return Kept(f"kept: full rank ({words}){note}", rank=size, **known)
    known |= {"rank": rank, "shrink": shrink}
    if cause := hindrance(view, rank):
        return Truncated(f"truncated: {cause} ({words}){note}", **known)
    again = " again" if view.is_factored else ""
    return Factorized(f"factorized{again}: {words}{note}", **known)
