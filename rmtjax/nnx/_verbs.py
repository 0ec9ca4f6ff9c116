"""The tree functions, for nnx models."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import PyTree

from rmtjax import planning
from rmtjax._axes import KernelAxes
from rmtjax._types import BulkFit
from rmtjax.nnx import _models
from rmtjax.nnx._layers import read
from rmtjax.nnx._models import Gates
from rmtjax.planning import check_plan, in_place, Plan
from rmtjax.report import Report


def _arrays(fits: Mapping[str, BulkFit] | None) -> Mapping[str, BulkFit] | None:
    """Noise levels as arrays: `nnx.Optimizer` keeps its state in variables."""
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
    unbox = lambda leaf: read(leaf) if is_variable(leaf) else leaf
    return jax.tree.map(unbox, fits, is_leaf=is_variable)


def _planned(model: nnx.Module, plan: Plan) -> dict:
    """The parameters of a model, with gates apart where they were when the plan was made."""
    check_plan(plan)
    opened = _models.open_layers(model)
    return _models.to_tree(opened, _models.planned(opened, plan))


def params(model: nnx.Module, *, gates: Gates = "fused") -> dict:
    """The parameters of a model as a tree, a leaf `Factors` for each kernel that is thin.

    Args:
      model: Any nnx model; what it shares has one entry.
      gates: How the kernels of `nnx.OptimizedLSTMCell` and `nnx.GRUCell` are given, which hold
        several gates side by side: "fused" as they are, (in, gates * h), or "each" as stacks
        (gates, in, h), so that each gate keeps directions of its own.

    Returns:
      Nested dictionaries of the arrays of all `nnx.Param`, by the names in the model. One that
      holds no array, or a tree of them, is left out; `replace` keeps it as it is.

    Raises:
      TypeError: `model` is no module.
      ValueError: `gates` is something else.

    Examples:
      >>> import jax, rmtjax
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(80, 60, rngs=nnx.Rngs(0)), nnx.relu)
      >>> jax.tree.map(lambda array: array.shape, rmtjax.nnx.params(model))
      {'layers': {0: {'bias': (60,), 'kernel': (80, 60)}}}
    """
    opened = _models.open_layers(model)
    return _models.to_tree(opened, _models.apart(opened, gates))


def kernel_axes(model: nnx.Module, *, gates: Gates = "fused") -> dict[str, KernelAxes | None]:
    """The axes of the kernels of a model by path, from the types of its layers.

    Args:
      model: Any nnx model.
      gates: As for `params`.

    Returns:
      The `axes` argument of `rmtjax.plan`, and of `rmtjax.prune_spectrum` under `nnx.Optimizer`
      where `gates` is "fused". None for what is no matrix: grouped and masked convolutions,
      transposed kernels, einsums that sum the kernel alone.

    Examples:
      >>> import rmtjax
      >>> from flax import nnx
      >>> rmtjax.nnx.kernel_axes(nnx.LinearGeneral(8, (4, 5), rngs=nnx.Rngs(0)))
      {'kernel': KernelAxes(inputs=(0,), outputs=(1, 2), batch=())}
    """
    opened = _models.open_layers(model)
    return _models.kernel_axes(opened, _models.apart(opened, gates))


def replace(model: nnx.Module, params: PyTree) -> nnx.Module:
    """A copy of a model with other parameters, its layers thin where these are `Factors`.

    A layer of Flax's own then runs as two, `left_factor` and `right_factor`; a registered one
    runs with two thin products in the place of each product with its kernel. Layers that were
    thin are dense again where the tree has a dense kernel.

    Args:
      model: Any nnx model; it stays as it is.
      params: A tree as `rmtjax.nnx.params(model)` gives it, with the gates fused or apart. A leaf
        of the same shape, or `Factors` of that shape, stands in the place of each.

    Returns:
      The new model. All that is no parameter is as in the given one.

    Raises:
      TypeError: `model` is no module.
      ValueError: `params` has other paths or shapes than the model, or factors for a parameter
        that is no kernel of a layer known.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> from flax import nnx
      >>> model = nnx.Linear(80, 60, rngs=nnx.Rngs(0))
      >>> tree = rmtjax.nnx.params(model)
      >>> tree["kernel"] = rmtjax.factorize_matrix(tree["kernel"], 8)
      >>> thin = rmtjax.nnx.replace(model, tree)
      >>> thin.left_factor.kernel.shape, thin(jnp.ones((2, 80))).shape
      ((80, 8), (2, 60))
    """
    return _models.replace(model, params)


def plan(
    model: nnx.Module,
    *,
    gates: Gates = "fused",
    fits: Mapping[str, BulkFit] | None = None,
    **options: Any,
) -> Plan:
    """Decides the rank of each kernel of a model; changes nothing.

    Args:
      model: Any nnx model, thin or not.
      gates: As for `rmtjax.nnx.params`.
      fits: Noise levels, as for `rmtjax.plan`; the state of an `nnx.Optimizer` has those of
        `rmtjax.prune_spectrum` as `optax.tree.get(optimizer.opt_state, "fits")`.
      **options: Other options of `rmtjax.plan`.

    Returns:
      A `Plan` for `truncate` and `factorize`. Kernels that something else than a known layer
      holds or rewrites, as `nnx.WeightNorm`, can be truncated, but not factorized.

    Examples:
      >>> import rmtjax
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(80, 60, rngs=nnx.Rngs(0)), nnx.relu)
      >>> print(rmtjax.nnx.plan(model, rule=rmtjax.ranks.fixed(16)))
      layers/0/kernel  factorized: 16 of 60 are signal, rank 16
    """
    known = kernel_axes(model, gates=gates)
    tree, options = params(model, gates=gates), {"axes": known, **options}
    found = planning.plan(tree, fits=_arrays(fits), **options)
    unknown = "its layer is not known, unless `rmtjax.register_layer` tells it"
    causes = dict.fromkeys(found.keys() - {path for path in known if known[path]}, unknown)
    causes |= _models.undivided(_models.open_layers(model))
    return Plan({p: in_place(row, causes[p]) if p in causes else row for p, row in found.items()})


def analyze(
    model: nnx.Module,
    *,
    gates: Gates = "fused",
    fits: Mapping[str, BulkFit] | None = None,
    **options: Any,
) -> Report:
    """Looks at every kernel of a model; changes nothing.

    Args:
      model: Any nnx model, thin or not.
      gates: As for `rmtjax.nnx.params`.
      fits: As for `rmtjax.nnx.plan`.
      **options: Other options of `rmtjax.analyze`.

    Returns:
      A `Report`.

    Examples:
      >>> import rmtjax
      >>> from flax import nnx
      >>> report = rmtjax.nnx.analyze(nnx.Embed(300, 60, rngs=nnx.Rngs(0)))
      >>> rows[0].path, rows[0].shape
      ('embedding', (300, 60))
    """
    return Report(plan(model, gates=gates, fits=fits, multiple=1, **options))


def truncate(model: nnx.Module, plan: Plan) -> nnx.Module:
    """Lowers the rank of each kernel of a model as planned; shapes and dtypes stay.

    Args:
      model: The model that the plan was made from, or one of the same shapes.
      plan: From `rmtjax.nnx.plan`.

    Returns:
      The new model, of the same layers.

    Raises:
      ValueError: The plan is for another model.
      TypeError: `plan` is no plan, or `model` no module.

    Examples:
      >>> import jax, rmtjax
      >>> from flax import nnx
      >>> model = nnx.Linear(80, 60, rngs=nnx.Rngs(0))
      >>> lower = rmtjax.nnx.truncate(model, rmtjax.nnx.plan(model, rule=rmtjax.ranks.fixed(16)))
      >>> int(jax.numpy.linalg.matrix_rank(lower.kernel[...]))
      16
    """
    return replace(model, planning.truncate(_planned(model, plan), plan))


def factorize(model: nnx.Module, plan: Plan) -> nnx.Module:
    """Makes each layer of a model thin where the plan says that it becomes smaller.

    The model computes what `truncate(model, plan)` computes. Layers that are thin already become
    thinner.

    Args:
      model: The model that the plan was made from, or one of the same shapes.
      plan: From `rmtjax.nnx.plan`.

    Returns:
      The new model, with layers that run as two, `left_factor` and `right_factor`.

    Raises:
      ValueError: The plan is for another model.
      TypeError: `plan` is no plan, or `model` no module.

    Examples:
      >>> import jax, jax.numpy as jnp, rmtjax
      >>> from flax import nnx
      >>> model = nnx.Linear(80, 60, rngs=nnx.Rngs(0))
      >>> thin = rmtjax.nnx.factorize(model, rmtjax.nnx.plan(model, rule=rmtjax.ranks.fixed(16)))
      >>> thin(jnp.ones((2, 80))).shape
      (2, 60)
      >>> size = lambda model: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
      >>> size(model), size(thin)
      (4860, 2300)
    """
    return replace(model, planning.factorize(_planned(model, plan), plan))


def merge(model: nnx.Module) -> nnx.Module:
    """Multiplies all factors of a model out: dense layers again.

    Args:
      model: Any nnx model, thin or not.

    Returns:
      The new model, of the layers that it had before `factorize`.

    Examples:
      >>> import rmtjax
      >>> from flax import nnx
      >>> model = nnx.Linear(80, 60, rngs=nnx.Rngs(0))
      >>> thin = rmtjax.nnx.factorize(model, rmtjax.nnx.plan(model, rule=rmtjax.ranks.fixed(16)))
      >>> rmtjax.nnx.merge(thin).kernel.shape
      (80, 60)
    """
    return replace(model, planning.merge(params(model)))
