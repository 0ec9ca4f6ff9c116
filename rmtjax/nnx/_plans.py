"""Plans of models of `flax.nnx`: `plan`, `analyze`, and what a plan does to a model."""

from collections.abc import Mapping
from dataclasses import replace as replace_options
from typing import Any

import jax
from flax import nnx

from rmtjax import planning
from rmtjax._progress import Progress, showing, Step
from rmtjax._types import Axes, BulkFit, Where
from rmtjax.moments import Moments
from rmtjax.nnx._trees import axes_of, Gates, obstacles, open_layers, params, replace, to_tree
from rmtjax.nnx._variables import read
from rmtjax.noise import ranks, Shrink
from rmtjax.planning import (
    Budget,
    check_plan,
    count_others,
    decide_all,
    Findings,
    Plan,
    PlanOptions,
    study,
    without_values,
)
from rmtjax.report import Extra, Report


def _study(
    opened: nnx.Module, options: PlanOptions, step: Step | None = None
) -> tuple[Findings, PlanOptions]:
    """Measures the kernels of a model; returns what is found, and the options for its tree."""
    known = axes_of(opened)
    # `nnx.Optimizer` keeps its state in variables.
    is_box = lambda leaf: isinstance(leaf, nnx.Variable)
    unbox = lambda leaf: read(leaf) if is_box(leaf) else leaf
    fits = jax.tree.map(unbox, options.fits, is_leaf=is_box)
    axes = known if options.axes is None else options.axes
    options = replace_options(options, fits=fits, axes=axes)
    found = study(to_tree(opened), options, step)
    # The plan of a tree cannot know which layers can run with factors.
    unknown = "its layer is not known, unless `rmtjax.register_layer` registers it"
    causes = {path: unknown for path in found.kernels if not known.get(path)} | obstacles(opened)
    causes = {path: cause for path, cause in causes.items() if path in found.kernels}
    return found._replace(fixed_shapes=causes), options


def plan(
    model: nnx.Module,
    *,
    gates: Gates = "fused",
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
    """Decides the rank of each kernel of a model; changes nothing.

    Args:
      model, gates: As in `rmtjax.nnx.params`.
      rule, keep, shrink, where, min_rank, multiple, min_size, exact_below: As in `rmtjax.plan`.
      batch, moments, budget, progress: As in `rmtjax.plan`.
      axes: As in `rmtjax.plan`. By default those of `rmtjax.nnx.kernel_axes`.
      fits: Noise levels as in `rmtjax.plan`. Those that `rmtjax.prune_spectrum` carries in an
        `nnx.Optimizer` are `rmtjax.noise_levels(optimizer.opt_state)`.

    Returns:
      A `Plan` for `truncate` and `factorize`. Kernels that another module than a known layer
      holds or rewrites, such as `nnx.WeightNorm`, are truncated instead of factorized.

    Examples:
      >>> import flax.nnx as nnx, rmtjax
      >>> model = nnx.Sequential(nnx.Linear(80, 60, rngs=nnx.Rngs(0)), nnx.relu)
      >>> print(rmtjax.nnx.plan(model, rule=rmtjax.ranks.fixed(16)))
      layers/0/kernel  factorized: rank 16 of 60, as asked by the rule
    """
    sizes = min_rank, multiple, min_size, exact_below
    options = PlanOptions(rule, keep, shrink, where, axes, fits, *sizes, batch, moments, budget)
    with showing(progress, "plan") as step:
        return decide_all(*_study(open_layers(model, gates), options, step if progress else None))


def analyze(
    model: nnx.Module,
    *,
    gates: Gates = "fused",
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
    """Reports the spectrum, the noise fit and the rank of every kernel of a model.

    Args:
      model, gates, axes, fits: As in `rmtjax.nnx.plan`.
      rule, where, min_size, exact_below, batch, moments, randomized, aspect, seed, progress: As in
        `rmtjax.analyze`.

    Examples:
      >>> import flax.nnx as nnx, rmtjax
      >>> report = rmtjax.nnx.analyze(nnx.Embed(300, 60, rngs=nnx.Rngs(0)))
      >>> report.rows[0].path, report.rows[0].shape
      ('embedding', (300, 60))
    """
    # A report shows the rank that was found, not one rounded up.
    sizes: dict[str, Any] = {"multiple": 1, "min_size": min_size, "exact_below": exact_below}
    known: dict[str, Any] = {"where": where, "axes": axes, "fits": fits, "moments": moments}
    opened = open_layers(model, gates)
    options, extra = (
        PlanOptions(rule, batch=batch, **known, **sizes),
        Extra(randomized, aspect, seed),
    )
    with showing(progress, "analyze") as step:
        found, options = _study(opened, options, step if progress else None)
        rows, extras = decide_all(found, options), extra.of(found, options)
    others = count_others(to_tree(opened), rows)
    return Report(rows, others, False, without_values(found), options, extras)


def truncate(
    model: nnx.Module, plan: Plan, *, moments: Moments | None = None, progress: Progress = None
) -> nnx.Module:
    """Returns a model with the kernels truncated as planned; layers, shapes and dtypes stay.

    Args:
      model: The model that the plan was made from, or one of the same shapes.
      plan: From `rmtjax.nnx.plan`.
      moments: Those that the plan was made with, if any.
      progress: As in `rmtjax.truncate`.

    Raises:
      ValueError, TypeError: The plan is for another model, or an argument has another type.

    Examples:
      >>> import flax.nnx as nnx, jax, rmtjax
      >>> model = nnx.Linear(80, 60, rngs=nnx.Rngs(0))
      >>> lower = rmtjax.nnx.truncate(model, rmtjax.nnx.plan(model, rule=rmtjax.ranks.fixed(16)))
      >>> int(jax.numpy.linalg.matrix_rank(lower.kernel[...]))
      16
    """
    check_plan(plan)
    options: dict[str, Any] = {"moments": moments, "progress": progress}
    tree = planning.truncate(to_tree(open_layers(model, plan)), plan, **options)
    return replace(model, tree)


def factorize(
    model: nnx.Module, plan: Plan, *, moments: Moments | None = None, progress: Progress = None
) -> nnx.Module:
    """Returns a model with thin layers where the plan factorizes their kernels.

    Its outputs are those of `truncate(model, plan)` up to rounding. Thin layers become thinner.

    Args:
      model, plan, moments, progress: As in `truncate`, which raises the same errors.

    Examples:
      >>> import flax.nnx as nnx, jax.numpy as jnp, rmtjax
      >>> model = nnx.Linear(80, 60, rngs=nnx.Rngs(0))
      >>> thin = rmtjax.nnx.factorize(model, rmtjax.nnx.plan(model, rule=rmtjax.ranks.fixed(16)))
      >>> thin(jnp.ones((2, 80))).shape
      (2, 60)
    """
    check_plan(plan)
    options: dict[str, Any] = {"moments": moments, "progress": progress}
    tree = planning.factorize(to_tree(open_layers(model, plan)), plan, **options)
    return replace(model, tree)


def merge(model: nnx.Module) -> nnx.Module:
    """Returns a model with all factors multiplied out, with the layers before `factorize`.

    Examples:
      >>> import flax.nnx as nnx, rmtjax
      >>> model = nnx.Linear(80, 60, rngs=nnx.Rngs(0))
      >>> thin = rmtjax.nnx.factorize(model, rmtjax.nnx.plan(model, rule=rmtjax.ranks.fixed(16)))
      >>> rmtjax.nnx.merge(thin).kernel.shape
      (80, 60)
    """
    return replace(model, planning.merge(params(model)))
