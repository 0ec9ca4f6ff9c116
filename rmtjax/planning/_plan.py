"""A plan: the rank of each kernel and the reason, decided before anything is changed."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rmtjax._axes import factored_axes, is_factors, kernel_shape, KernelAxes, matrix_shape
from rmtjax._sharding import fetch
from rmtjax._types import Axes, BulkFit, Spectrum, Where
from rmtjax.noise import ranks, Shrink
from rmtjax.planning._cost import (
    check_batch,
    Clock,
    Cost,
    hindrance,
    Load,
    load_of,
    make_clock,
    weigh,
)
from rmtjax.planning._kernels import find_kernels, unmatrixable
from rmtjax.planning._measure import check_fits, check_paths, measure, Measurement
from rmtjax.spectra import shrink_values

# In one program instead of several.
_kept_rank = jax.jit(ranks.kept_rank)

Action = Literal["factorize", "truncate", "keep"]


class LayerPlan(NamedTuple):
    """What is to happen to one kernel, and why.

    Attributes:
      rank: Rank after truncation; None where the kernel has no spectrum.
      fit: The noise as NumPy numbers, for a stack an array with an entry each; None
        where there is no spectrum, NaN where factors were given no noise level.
      action: "factorize" (the factors are smaller), "truncate" (the rank goes down, but
        factors would not be smaller) or "keep".
      reason: Action and cause in words.
      shape: Of the kernel, where it is factorized of the dense one.
      axes: What makes it a matrix; None where nothing does.
      spectrum: The spectrum as NumPy arrays; None where there is none.
      shrink: What becomes of the singular values that are kept; None where they stay.
      cost: Parameters, multiply-adds and milliseconds, now and after the plan.
    """

    rank: int | None
    fit: BulkFit | None
    action: Action
    reason: str
    shape: tuple[int, ...]
    axes: KernelAxes | None
    spectrum: Spectrum | None
    shrink: Shrink | None = None
    cost: Cost | None = None


class Plan(dict[str, LayerPlan]):
    """The plan of a tree: a dictionary from paths to `LayerPlan`, one for each kernel."""

    @property
    def fits(self) -> dict[str, BulkFit]:
        """The noise levels of its kernels, which a plan that is made after a cut must be given."""
        return {path: row.fit for path, row in self.items() if row.fit is not None}

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{path:<{width}}  {row.reason}" for path, row in self.items())


def check_plan(plan: Any) -> None:
    """Refuses what is no plan, under the name that all functions have for it."""
    if not isinstance(plan, Plan):
        raise TypeError(
            f"`plan` must be a `rmtjax.Plan`, as `rmtjax.plan` makes it, got {type(plan).__name__}."
        )


def _obstacle(leaf: Any, axes: KernelAxes | None, min_size: int, known: bool) -> str | None:
    """Why a kernel has no spectrum to judge by, or None; `known`: no fit is needed."""
    if not is_factors(leaf):
        return unmatrixable(leaf, axes, min_size)
    dense = jax.ShapeDtypeStruct(kernel_shape(leaf), jnp.result_type(*leaf))
    missing = None if known else "factorized, and `fits` has no noise level for it"
    return unmatrixable(dense, axes, min_size) or missing


def _unstack(tree, axes: KernelAxes):
    """Of a kernel that is no stack, the one matrix without its batch axis."""
    return tree if axes.batch else jax.tree.map(lambda a: a[0] if np.ndim(a) else a, tree)


def _refusal(found: Measurement) -> str | None:
    """Why the rule may not be believed, or None."""
    if not np.isfinite(found.spectra.eigenvalues).all():
        return "not finite"
    if not found.spectra.eigenvalues.any():
        return "all zero"
    if not found.accepted.all():
        size = found.spectra.eigenvalues.shape[-1]
        if not found.noisy.all():
            return "no noise above rounding; of a truncated kernel `fits` must tell it"
        if (found.fits.num_spikes >= size // 2).any():
            return f"half of the {size} directions stand out, and leave no bulk to fit"
        return f"law does not fit (distance {found.fits.distance.max():.3f})"
    # Nothing stands out, as before training; to cut to nothing would destroy the network.
    return None if found.signal.any() else "no signal stands out of the noise"


def _unshrinkable(found: Measurement, shrink: Shrink, sides: tuple[int, int]) -> str | None:
    """Why the values that are kept may not be shrunk, or None."""
    spectra, variance = found.spectra, found.fits.variance
    if not (np.isfinite(variance) & found.noisy).all():
        return "no noise level to shrink by"
    values = np.sqrt(max(sides) * spectra.eigenvalues)
    shrunken = shrink_values(jnp.asarray(values), shrink, variance, sides)
    return None if shrunken.any(axis=-1).all() else "shrinkage would leave nothing"


def _decide(
    leaf, axes: KernelAxes, found: Measurement, shrink: Shrink | None, keep, min_rank, multiple
) -> LayerPlan:
    """One kernel's plan from its measurement."""
    shape, thin = kernel_shape(leaf), is_factors(leaf)
    _, rows, columns = matrix_shape(shape, axes)
    size = min(rows, columns, leaf.left.shape[-1] if thin else rows)
    # One rank for a stack: that of its richest member.
    populated = int(found.populated.max())
    count = min(int(found.signal.max()), populated)
    rank = int(_kept_rank(count, populated, keep, min_rank))
    rank = min(-(-rank // multiple) * multiple, size)  # rounded up
    words = f"{count} of {size} are signal, rank {rank}" + (", shrunk" if shrink else "")
    refusal = _refusal(found) or (shrink and _unshrinkable(found, shrink, (rows, columns)))
    action: Action = "keep"
    if refusal:
        rank, reason = size, f"kept: {refusal}"
    elif rank == size and shrink is None:
        reason = f"kept: full rank ({words})"
    elif cause := hindrance(shape, axes, rank, thin):
        action, reason = "truncate", f"truncated: {cause} ({words})"
    else:
        action, reason = "factorize", f"factorized{' again' if thin else ''}: {words}"
    reason += " (spectrum estimated)" if found.estimated else ""
    spectra = Spectrum(found.spectra.eigenvalues, found.spectra.ratio[0])
    fit, one = _unstack(found.fits, axes), _unstack(spectra, axes)
    shrink = None if action == "keep" else shrink
    return LayerPlan(rank, fit, action, reason, shape, axes, one, shrink)


def _weigh(row: LayerPlan, load: Load, clock: Clock) -> LayerPlan:
    """A kernel's plan with its cost; where factors would not win, it keeps its shape."""
    rank = row.rank if row.action == "factorize" else load.rank
    cost, slow = weigh(load, rank, clock)
    if slow:
        reason = f"truncated: {slow} ({row.reason.partition(': ')[2]})"
        row = row._replace(action="truncate", reason=reason)
    return row._replace(cost=cost)


def _check_options(keep: float, shrink, **counts: int) -> None:
    if not 0 <= keep <= 1:
        raise ValueError(
            f"`keep` must be in [0, 1], got {keep}: the share of the directions that are "
            "no signal and stay all the same."
        )
    if shrink is not None and not callable(shrink):
        raise TypeError(
            "`shrink` must be a function such as `rmtjax.shrinkage.frobenius`, or None, got "
            f"{shrink!r}."
        )
    if shrink is not None and keep > 0:
        raise ValueError(
            f"`keep` must be 0 with `shrink`, got {keep}: the directions that are no signal would "
            "be kept and shrunk to 0. Leave one of the two out."
        )
    for name, value in counts.items():
        if not hasattr(value, "__index__") or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value}.")


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
    $r (m + n) < m n$. A kernel that is factorized already is judged by the spectrum of its
    product, and p are then the directions that it has: its rank may only go down.

    Args:
      params: Nested dictionaries of arrays, as `module.init(...)["params"]`.
      rule: A rank rule of `rmtjax.ranks`.
      keep: Share of the directions that are no signal and stay, in [0, 1].
      shrink: A function of `rmtjax.shrinkage`, or one of your own, `shrink(y, ratio)`, for the
        singular values that are kept; by default they stay. It takes the variance of the fit:
        under a rule without a noise level, that which BEMA reports. What `min_rank` or `multiple`
        keeps below the edge is shrunk to 0. Use it once: what it leaves is no signal and noise.
      where: `where(path, leaf)` chooses the kernels, with paths such as "Dense_0/kernel"; by
        default the leaves named `kernel` or `embedding`.
      axes: The axes that make a kernel a matrix, as `rmtjax.KernelAxes`: a function
        `axes(path, leaf)`, or a dictionary by path, whose leaves are chosen too. By default guessed
        from Flax's names; stacked kernels need it: `rmtjax.linen.kernel_axes` finds it.
      fits: Noise levels to use instead of new fits, by path: those that `prune_spectrum`
        carried, `optax.tree.get(opt_state, "fits")`. A spectrum that has been truncated must not
        be fitted as if it were whole: what is factorized is left alone without one, if the rule
        needs it. Dense kernels without one, or with a threshold of NaN, are fitted anew.
      min_rank: Smallest rank, at least 1.
      multiple: Ranks are rounded up to a multiple of it, so that few shapes compile.
      min_size: Kernels with a shorter short side are left alone: too few eigenvalues for a law.
      exact_below: Kernels with a shorter short side are decomposed. From there on, above 2,900, the
        spectrum is estimated at a cost of $O(n^2)$: what stands out to rounding, the threshold to
        1 %. Where an estimate does not decide, as with hundreds of spikes, it is computed exactly.
      batch: Where given, each kernel is timed for so many rows, in its dtype and on the default
        device, and keeps its shape if factors do not win by 5 %; its rank goes down all the same.
        Rows are what it multiplies in one call: images, tokens, or for a convolution, which is
        timed as a product, images times positions. A dictionary has them by path; what it leaves
        out is not timed. Each shape and rank takes half a second, or five calls if that is longer.

    Returns:
      A `Plan`: path to `LayerPlan`, a row with a reason for every kernel chosen.

    Raises:
      ValueError: An option is out of range, or `axes`, `fits` or `batch` does not fit the tree.
      TypeError: `rule` is no rank rule, or `shrink` no function.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> params = {"Dense_0": {"kernel": noise.at[:, :3].add(5.0)}}
      >>> print(rmtjax.plan(params))
      Dense_0/kernel  factorized: 1 of 200 are signal, rank 8
    """
    counts = {"min_rank": min_rank, "multiple": multiple, "min_size": min_size}
    _check_options(keep, shrink, **counts, exact_below=exact_below)
    ranks.check_rule(rule)
    check_paths(params, fits or {})
    levels = fetch(dict(fits or {}))
    given = {path: fit for path, fit in levels.items() if np.isfinite(fit.threshold).all()}
    chosen = find_kernels(params, where, axes, is_leaf=is_factors)
    found = {
        path: (leaf, factored_axes(leaf) if is_factors(leaf) else named)
        for path, (leaf, named) in chosen.items()
    }
    known = lambda path: path in given or not rule.needs_noise
    obstacles = {path: _obstacle(*found[path], min_size, known(path)) for path in found}
    batches = check_batch(batch, found)
    matrices = {
        path: (leaf, named)
        for path, (leaf, named) in found.items()
        if named is not None and obstacles[path] is None
    }
    check_fits(given, matrices)
    measured = measure(matrices, rule, given, exact_below)
    clock = make_clock()
    rows = Plan()
    for path, (leaf, named) in found.items():
        if path in matrices:
            row = _decide(*matrices[path], measured[path], shrink, keep, min_rank, multiple)
        else:
            reason = f"kept: {obstacles[path]}"
            row = LayerPlan(None, None, "keep", reason, kernel_shape(leaf), named, None)
        rows[path] = _weigh(row, load_of(path, leaf, named, batches), clock)
    return rows
