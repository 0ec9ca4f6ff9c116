"""Decides the rank of each kernel, and gives the reason, before anything is changed."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from rmtjax._axes import KernelLeaf
from rmtjax._modes import in_usual_modes
from rmtjax._progress import Progress, showing
from rmtjax._types import Axes, BulkFit, Where
from rmtjax.moments import Moments
from rmtjax.noise import equalizes, ranks, Shrink
from rmtjax.planning._budget import Budget, path_of
from rmtjax.planning._cost import Clock, remember, rows_by_path, time_products, weigh
from rmtjax.planning._decide import choices, decide, give_ranks, time_kernels
from rmtjax.planning._measure import Findings, given_fits, measure_values, study
from rmtjax.planning._options import PlanOptions
from rmtjax.planning._rows import Factorized, in_place, Kept, LayerPlan, Plan, UNNAMED


def _weigh(row: LayerPlan, kernel: KernelLeaf, rows: int | None, clock: Clock) -> LayerPlan:
    """Returns the row with its cost. Where factors would not win, the kernel keeps its shape."""
    rank = row.rank if isinstance(row, Factorized) else kernel.rank
    cost, slow = weigh(kernel, rank, rows, clock)
    return replace(in_place(row, slow) if slow else row, cost=cost)


def _unchosen_row(leaf: KernelLeaf) -> Kept:
    """Returns the row of a leaf that may be a kernel, and is not one by its name."""
    cost, _ = weigh(leaf, None, None, time_products)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return Kept(f"kept: not floating ({leaf.dtype})", leaf.shape, cost=cost)
    return Kept(f"{UNNAMED}, unless `where` chooses it", leaf.shape, cost=cost)


@in_usual_modes
def decide_all(found: Findings, options: PlanOptions, clock: Clock | None = None) -> Plan:
    """Returns the plan of kernels that were measured."""
    clock, rows = clock or cache(time_products), rows_by_path(options.batch, found.kernels)
    slow: set[str] = set()
    timed = None
    if options.budget_is_time:
        timed = time_kernels(found, options, rows, clock)
        clock = remember(clock, timed.values())
    while True:
        ranks = give_ranks(found, options, rows, slow, timed)
        decided = {path: decide(found, path, options, ranks) for path in found.kernels}
        plan = Plan(
            {p: _weigh(row, found.kernels[p], rows.get(p), clock) for p, row in decided.items()}
        )
        # What saves no time must not save parameters either, so the others give more.
        again = {p for p in ranks or () if p not in slow and plan[p].action != decided[p].action}
        if not again:
            shaped = {path: in_place(plan[path], why) for path, why in found.fixed_shapes.items()}
            return Plan(plan | shaped | {p: _unchosen_row(a) for p, a in found.others.items()})
        slow |= again


def make_plan(params: PyTree, options: PlanOptions, clock: Clock | None = None) -> Plan:
    """Returns the plan of a tree; a clock that is shared times equal products once."""
    return decide_all(study(params, options), options, clock)


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
    moments: Moments | None = None,
    budget: Budget | float | None = None,
    progress: Progress = None,
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
      where: Chooses the kernels: a glob of complete paths such as "encoder/*/kernel", a regular
        expression that is compiled or begins with "re:", a list of these, a function
        `where(path, leaf)`, or a tree of booleans as optax's masks. By default the leaves named
        `kernel` or `embedding`, and with two axes or more `weight` of Torch and Equinox, `w` and
        `embeddings` of Haiku. Other floating leaves of two axes or more are kept, with a reason;
        vectors such as biases have no row.
      axes: The axes that make a kernel a matrix, as `rmtjax.KernelAxes`: a function
        `axes(path, leaf)`, or a dictionary by path, whose leaves are chosen too. By default they
        follow from names and shapes. Where these could also be those of a stack, they are not
        known: see `rmtjax.linen.kernel_axes`.
      fits: Noise levels in the place of new fits, by path, such as
        `rmtjax.noise_levels(opt_state)`. A truncated spectrum must not be fitted as if it were
        whole. So a factorized kernel without a level is kept, if the rule needs one. Dense kernels
        without one, or with a threshold of 0 or NaN, are fitted.
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
      moments: What the data feed to each kernel, from `rmtjax.linen.moments` or
        `rmtjax.nnx.moments`. The rule counts signal directions of the weights as before. The
        directions that stay are then those of the outputs with most energy, and each row tells
        what the cut does to the outputs. Kernels without moments are cut by their weights.
      budget: A size to reach, in place of the ranks that the rule finds: the share of the
        parameters of the chosen kernels, in (0, 1], or a `rmtjax.Budget`. All kernels share it.
        The sum of the shares of energy that they lose is smallest: of outputs with moments, of
        squared entries without. The size is at most one step of a rank below it. The rule is only
        reported, and one that asks for ranks, as `ranks.fixed(16)`, is an error. Kernels whose
        factors are too slow, by `batch`, stay as they are. For
        `Budget(milliseconds=...)` each kernel is timed at up to 16 ranks, which takes seconds.
      progress: True shows the progress on stderr. A function `progress(done, total, path)` is
        called before each group of kernels that is measured.

    Returns:
      A `Plan`: path to `Kept`, `Truncated` or `Factorized`, with a reason for every kernel chosen.

    Raises:
      ValueError, TypeError: An option is not as described, or does not fit the tree. Or no leaf is
        chosen as a kernel, or the budget is below the size of the smallest plan.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> params = {"Dense_0": {"kernel": noise.at[:, :3].add(5.0)}}
      >>> print(rmtjax.plan(params))
      Dense_0/kernel  factorized: 1 of 200 are signal, rank 8
    """
    sizes = min_rank, multiple, min_size, exact_below
    options = PlanOptions(rule, keep, shrink, where, axes, fits, *sizes, batch, moments, budget)
    with showing(progress, "plan") as step:
        return decide_all(study(params, options, step if progress else None), options)


def without_values(found: Findings) -> Findings:
    """Returns findings that hold no kernel in memory: a decision needs shapes and spectra."""
    shape_of = lambda part: jax.ShapeDtypeStruct(part.shape, part.dtype)
    is_array = lambda part: isinstance(part, jax.Array | np.ndarray)
    shapes = lambda leaf: jax.tree.map(lambda a: shape_of(a) if is_array(a) else a, leaf)
    kernels = {p: replace(kernel, leaf=shapes(kernel.leaf)) for p, kernel in found.kernels.items()}
    return found._replace(kernels=kernels)


@in_usual_modes
def judge_again(found: Findings, options: PlanOptions) -> Findings:
    """Returns findings under another rule, from the spectra that are known.

    Raises ValueError for one that equalizes kernels if these were measured as they are, and for one
    that does not if they were equalized.
    """
    values: Any = {path: row.values for path, row in found.measured.items()}
    views: Any = {path: found.kernels[path] for path in values}
    given = given_fits(options.fits, found.kernels)
    before = {path: row.equalized for path, row in found.measured.items()}
    if any(even != equalizes(options.rule) for path, even in before.items() if path not in given):
        raise ValueError(
            f"`rule` must equalize kernels if those of the report were, and not else, got "
            f"{options.rule!r}: call `rmtjax.analyze` again."
        )
    measured = measure_values(views, values, options.rule, given)
    measured = {path: row._replace(equalized=before[path]) for path, row in measured.items()}
    return found._replace(measured=measured)


@dataclass(frozen=True, eq=False)
class TradeOff:
    """The sizes that plans can reach, and what each loses. `rmtjax.trade_off` makes it.

    Attributes:
      sizes: Numbers in the chosen kernels, from all of them to the smallest plan.
      shares: `sizes` as shares of the first.
      removed: Mean over the kernels that can be cut of the share of energy that each loses: of its
        outputs if it has moments, else of its squared entries. With gradients, shares count by what
        they do to the outputs of the model.
      findings: What was measured of the kernels.
      options: The options of the plans.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 80))}
      >>> curve = rmtjax.trade_off(params)
      >>> int(curve.sizes[0]), curve.plan(0.5)["kernel"].rank
      (6400, 16)
    """

    sizes: Int[np.ndarray, " k"]
    shares: Float[np.ndarray, " k"]
    removed: Float[np.ndarray, " k"]
    findings: Findings = field(repr=False)
    options: PlanOptions = field(repr=False)

    def plan(self, budget: float | Budget) -> Plan:
        """Returns the plan for a size, as `rmtjax.plan` makes it, without measuring again."""
        return decide_all(self.findings, replace(self.options, budget=budget))


def trade_off(
    params: PyTree,
    *,
    moments: Moments | None = None,
    where: Where | None = None,
    axes: Axes | None = None,
    min_rank: int = 1,
    multiple: int = 8,
    min_size: int = 50,
    exact_below: int = 4096,
    batch: int | Mapping[str, int] | None = None,
) -> TradeOff:
    """Returns the sizes that plans of a tree can reach, with the energy that each loses.

    The kernels are measured once. Each point is the plan of `rmtjax.plan(params, budget=...)` for
    its size, and `rmtjax.plots.trade_off` draws them.

    Args:
      params, moments, where, axes, min_rank, multiple, min_size, exact_below, batch: As in
        `rmtjax.plan`.

    Returns:
      A `TradeOff`, whose `plan(budget)` makes a plan.

    Raises:
      ValueError, TypeError: As `rmtjax.plan`.

    Examples:
      >>> import jax, rmtjax
      >>> kernels = jax.random.normal(jax.random.key(0), (2, 80, 80))
      >>> curve = rmtjax.trade_off({"a": {"kernel": kernels[0]}, "b": {"kernel": kernels[1] ** 3}})
      >>> print(curve.sizes[:2], curve.removed[:2].round(3))
      [12800 10240] [0.   0.12]
      >>> [*curve.plan(0.75)]
      ['a/kernel', 'b/kernel']
    """
    known: dict[str, Any] = {"where": where, "axes": axes, "min_rank": min_rank}
    known |= {"multiple": multiple, "min_size": min_size, "exact_below": exact_below}
    options = PlanOptions(**known, batch=batch, moments=moments, budget=Budget(share=1.0))
    found = study(params, options)
    able, fixed = choices(found, options, rows_by_path(batch, found.kernels))
    path = path_of(able, sum(fixed.values()))
    whole = max(int(path.sizes[0]), 1)
    return TradeOff(path.sizes, path.sizes / whole, path.losses, found, options)
