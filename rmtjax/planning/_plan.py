"""Decides the rank of each kernel, and gives the reason, before anything is changed."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rmtjax._axes import KernelLeaf, MatrixView
from rmtjax._sharding import fetch
from rmtjax._types import Axes, BulkFit, Spectrum, Where
from rmtjax.noise import kept_rank, ranks, Shrink
from rmtjax.planning._cost import Clock, hindrance, rows_by_path, time_products, weigh
from rmtjax.planning._kernels import check_tree, find_kernels, leaves_by_path, obstacle
from rmtjax.planning._measure import measure, Measurement
from rmtjax.planning._options import PlanOptions
from rmtjax.planning._rows import Factorized, in_place, Kept, LayerPlan, Plan, Truncated
from rmtjax.spectra import shrink_values

# One program in the place of several small ones.
_kept_rank = jax.jit(kept_rank)


def _refusal(measured: Measurement) -> str | None:
    """Returns why the rule may not be believed, or None."""
    if not np.isfinite(measured.spectra.eigenvalues).all():
        return "not finite"
    if not measured.spectra.eigenvalues.any():
        return "all zero"
    if not measured.accepted.all():
        size = measured.spectra.eigenvalues.shape[-1]
        if not measured.noisy.all():
            return "no noise above rounding; of a truncated kernel `fits` must tell it"
        if (measured.fits.num_spikes >= size // 2).any():
            return f"half of the {size} directions stand out, and leave no bulk to fit"
        return f"law does not fit (distance {measured.fits.distance.max():.3f})"
    # Nothing stands out, as before training; to cut to nothing would destroy the network.
    return None if measured.signal.any() else "no signal stands out of the noise"


def _unshrinkable(measured: Measurement, shrink: Shrink, view: MatrixView) -> str | None:
    """Returns why the values that are kept may not be shrunk, or None."""
    spectra, variance = measured.spectra, measured.fits.variance
    if not (np.isfinite(variance) & measured.noisy).all():
        return "no noise level to shrink by"
    values = np.sqrt(view.long * spectra.eigenvalues)
    shrunken = shrink_values(jnp.asarray(values), shrink, variance, (view.rows, view.columns))
    return None if shrunken.any(axis=-1).all() else "shrinkage would leave nothing"


def _decide(view: MatrixView, measured: Measurement, options: PlanOptions) -> LayerPlan:
    """Returns the row of a kernel from its measurement."""
    size, shrink = view.full_rank, options.shrink
    # One rank for a stack: that of its richest member.
    populated = int(measured.populated.max())
    count = min(int(measured.signal.max()), populated)
    rank = int(_kept_rank(count, populated, options.keep, options.min_rank))
    rank = min(-(-rank // options.multiple) * options.multiple, size)  # rounded up
    words = f"{count} of {size} are signal, rank {rank}" + (", shrunk" if shrink else "")
    note = " (spectrum estimated)" if measured.estimated else ""
    # A kernel that is not a stack has one matrix, and its row no leading axis.
    unstack = lambda tree: tree if view.axes.batch else jax.tree.map(lambda leaf: leaf[0], tree)
    eigenvalues, ratio = measured.spectra
    spectrum = Spectrum(unstack(eigenvalues), ratio[0])
    known: Any = {"shape": view.shape, "axes": view.axes, "spectrum": spectrum}
    known["fit"] = unstack(measured.fits)
    held = view.in_parts and f"held as {view.in_parts} ({count} of {size} are signal)"
    refusal = _refusal(measured) or held or (shrink and _unshrinkable(measured, shrink, view))
    if refusal:
        return Kept(f"kept: {refusal}{note}", rank=size, **known)
    if rank == size and shrink is None:
        return Kept(f"kept: full rank ({words}){note}", rank=size, **known)
    known |= {"rank": rank, "shrink": shrink}
    if cause := hindrance(view, rank):
        return Truncated(f"truncated: {cause} ({words}){note}", **known)
    again = " again" if view.is_factored else ""
    return Factorized(f"factorized{again}: {words}{note}", **known)


def _weigh(row: LayerPlan, kernel: KernelLeaf, rows: int | None, clock: Clock) -> LayerPlan:
    """Returns the row with its cost. Where factors would not win, the kernel keeps its shape."""
    rank = row.rank if isinstance(row, Factorized) else kernel.rank
    cost, slow = weigh(kernel, rank, rows, clock)
    return replace(in_place(row, slow) if slow else row, cost=cost)


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


def make_plan(params: PyTree, options: PlanOptions, clock: Clock | None = None) -> Plan:
    """Returns the plan of a tree; a clock that is shared times equal products once."""
    check_tree(params)
    # Without a word, the kernel that is meant would be fitted anew, or seen along other axes.
    _check_paths("axes", options.axes, params)
    _check_paths("fits", options.fits, params)
    kernels = find_kernels(params, options.where, options.axes)
    given = _given_fits(options.fits, kernels)
    rows, clock = rows_by_path(options.batch, kernels), clock or cache(time_products)
    decided: dict[str, LayerPlan] = {}
    views = {}
    for path, kernel in kernels.items():
        cause = obstacle(kernel, options.min_size)
        # What a factorization has left out cannot be fitted any more.
        if not cause and kernel.is_factored and options.rule.needs_noise and path not in given:
            cause = "factorized, and `fits` has no noise level for it"
        if not cause and path in given and (given[path].threshold < 0).any():
            cause = "pruning left it alone while training"
        if cause or not isinstance(kernel, MatrixView):
            decided[path] = Kept(f"kept: {cause}", kernel.shape, getattr(kernel, "axes", None))
        else:
            views[path] = kernel
    measured = measure(views, options.rule, given, options.exact_below)
    decided |= {path: _decide(view, measured[path], options) for path, view in views.items()}
    return Plan({p: _weigh(decided[p], kernels[p], rows.get(p), clock) for p in kernels})


def plan(
    params: PyTree,
    *,
    rule: ranks.RankRule = ranks.bema(),  # noqa: B008 - a frozen value
    keep: float = 0.0,
    shrink: Shrink | None = None,
    where: Where | None = None,
    axes: Axes | None = None,
    fits: Mapping[str, BulkFit] | None = None,
    min_rank: int = 1,
    multiple: int = 8,
    min_size: int = 50,
    exact_below: int = 4096,
    batch: int | Mapping[str, int] | None = None,
) -> Plan:
    r"""Decides the rank of each kernel of a parameter tree; changes nothing.

    $r = K + \lfloor keep \cdot (p - K) \rfloor$ for $K$ signal directions of $p$, rounded up to a
    multiple. Factors of rank r are smaller than a kernel of m inputs and n outputs if
    $r (m + n) < m n$. A kernel that is already factorized is judged by the spectrum of its
    product. Its p is then the number of directions that it has, so its rank can only go down.

    Args:
      params: Nested dictionaries of arrays, as `module.init(...)["params"]`.
      rule: A rank rule of `rmtjax.ranks`.
      keep: Share of the directions that are not signal and stay, in [0, 1].
      shrink: A function of `rmtjax.shrinkage`, or your own `shrink(y, ratio)`, for the singular
        values that are kept. It takes the variance of the fit; under a rule without a noise level,
        the one that BEMA reports. Values below the edge, kept by `min_rank` or `multiple`, become
        0. Use it once: its result is no longer signal plus noise.
      where: Chooses the kernels: a function `where(path, leaf)` with paths such as
        "Dense_0/kernel", a regular expression that is searched in the path, or a tree of booleans
        as optax's masks. By default the leaves named `kernel` or `embedding`.
      axes: The axes that make a kernel a matrix, as `rmtjax.KernelAxes`: a function
        `axes(path, leaf)`, or a dictionary by path, whose leaves are chosen too. By default they
        are guessed from Flax's names. Stacked kernels need it: see `rmtjax.linen.kernel_axes`.
      fits: Noise levels in the place of new fits, by path, such as
        `rmtjax.noise_levels(opt_state)`. A truncated spectrum must not be fitted as if it were
        whole. So a factorized kernel without a level is kept, if the rule needs one. Dense kernels
        without one, or with a threshold of NaN, are fitted.
      min_rank: Smallest rank, at least 1.
      multiple: Ranks are rounded up to a multiple of it, so that few shapes compile.
      min_size: Kernels with a shorter short side are kept: too few eigenvalues for a law.
      exact_below: Kernels with a shorter short side are decomposed. From this side on, and above
        2,900, the spectrum is estimated in $O(n^2)$: what stands out to rounding, the threshold
        to 1 %. If an estimate does not decide, the spectrum is computed exactly.
      batch: Rows that a kernel multiplies in one call: images, tokens, or images times positions
        for a convolution. If given, each kernel is timed in its dtype on the default device. It
        keeps its shape if factors do not win by 5 %, and its rank goes down all the same. A
        dictionary has the rows by path and leaves other kernels untimed. Each shape and rank
        takes half a second, or five calls if that is longer.

    Returns:
      A `Plan`: path to `Kept`, `Truncated` or `Factorized`, with a reason for every kernel chosen.

    Raises:
      ValueError, TypeError: An option is not as described, or does not fit the tree.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> params = {"Dense_0": {"kernel": noise.at[:, :3].add(5.0)}}
      >>> print(rmtjax.plan(params))
      Dense_0/kernel  factorized: 1 of 200 are signal, rank 8
    """
    options = PlanOptions(
        rule, keep, shrink, where, axes, fits, min_rank, multiple, min_size, exact_below, batch
    )
    return make_plan(params, options)
