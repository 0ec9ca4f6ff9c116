"""Analyzes a parameter tree: measures its kernels, plans, and reports on both."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import PyTree

from rmtjax._progress import Progress, showing
from rmtjax._types import Axes, BulkFit, Where
from rmtjax.moments import Moments
from rmtjax.noise import ranks
from rmtjax.planning import count_others, decide_all, PlanOptions, study, without_values
from rmtjax.report._extra import Extra
from rmtjax.report._report import Report


def analyze(
    params: PyTree,
    *,
    rule: ranks.RankRule = ranks.bema(),  # noqa: B008 - a frozen value
    where: Where | None = None,
    axes: Axes | None = None,
    fits: Mapping[str, BulkFit] | None = None,
    min_size: int = 50,
    exact_below: int = 4096,
    batch: int | Mapping[str, int] | None = None,
    moments: Moments | None = None,
    randomized: int = 0,
    aspect: float | None = None,
    seed: int = 0,
    progress: Progress = None,
) -> Report:
    """Analyzes every kernel of a parameter tree; changes nothing.

    Args:
      params: Nested dictionaries of arrays, as `module.init(...)["params"]`.
      rule, where, axes, fits, min_size, exact_below, batch, moments, progress: As in `rmtjax.plan`.
      randomized: Number of random orders of the entries of each kernel, for the columns of
        the group "traps". Each costs a spectrum. Five are usual; 0 leaves the columns out.
      aspect: Aspect ratio, in (0, 1], of the blocks for the columns of the group "pooled", as in
        `rmtjax.pooled_spectrum`; None leaves them out.
      seed: Of the random orders. Equal seeds and paths give equal orders.

    Returns:
      A `Report`. Ranks are not rounded up to a multiple, and kernels under `min_size` have rows
      without a fit.

    Raises:
      ValueError: An option is out of range, or `axes` or `batch` does not fit the tree.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> report = rmtjax.analyze({"Dense_0": {"kernel": noise.at[:, 0].add(5.0)}})
      >>> report.rows[0].spikes, report.rows[0].reason
      (1, 'factorized: 1 of 200 are signal, rank 1')
      >>> params = {"kernel": noise.at[3, 4].set(90.0)}
      >>> print(rmtjax.analyze(params, randomized=5).table("traps"))
      path    spikes  shuffled_spikes  shuffled_rate  shuffled_top
      kernel  1       1                1              6.565
    """
    sizes: dict[str, Any] = {"multiple": 1, "min_size": min_size, "exact_below": exact_below}
    known: dict[str, Any] = {"where": where, "axes": axes, "fits": fits, "moments": moments}
    options = PlanOptions(rule, batch=batch, **known, **sizes)
    extra = Extra(randomized, aspect, seed)
    with showing(progress, "analyze") as step:
        found = study(params, options, step if progress else None)
        plan = decide_all(found, options)
        extras = extra.of(found, options)
    others = count_others(params, plan)
    return Report(plan, others, False, without_values(found), options, extras)
