"""Models of `flax.nnx` as trees of parameters, and models from trees."""

import functools
from collections.abc import Mapping
from typing import Any, get_args, Literal

import jax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jaxtyping import PyTree

from rmtjax._axes import FactoredKernel, is_factors, kernel_shape, KernelAxes
from rmtjax._types import check_type
from rmtjax.nnx._layers import fold, folded_shape, is_unfolded, kernels, layer_axes, unfold
from rmtjax.nnx._thin import factors_of, make_dense, make_kernel, make_pair, make_thin, pairs_of
from rmtjax.nnx._variables import is_parameter, PartsOfKernel, read, write
from rmtjax.planning import leaves_by_path, Plan, register_container

Gates = Literal["fused", "each"]
# The cells of Flax that compute all gates as one product. Each gate may keep other directions.
_CELLS = (nnx.OptimizedLSTMCell, nnx.GRUCell)
# Modules that normalize the kernels of another one at each call. Older Flax lacks some of them.
_REWRITERS = tuple(getattr(nnx, n) for n in ("WeightNorm", "SpectralNorm") if hasattr(nnx, n))
# JAX takes a model for a tree of parameters, but its layers must change with their kernels.
register_container(nnx.Module, "give `rmtjax.nnx.params(model)`, or use `rmtjax.nnx`.")


def name_of(path: tuple) -> str:
    """Returns a path in a model as a string."""
    return "/".join(map(str, path))


def modules_of(model: nnx.Module) -> list[Any]:
    """Returns the modules of a model, a shared one once."""
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]


def variables_of(model: nnx.Module) -> dict[tuple, nnx.Param]:
    """Returns the parameters of one array each by path, a shared one once."""
    by_identity = {}
    for path, node in nnx.iter_graph(model):
        if is_parameter(node):
            # Flax before 0.12 visits a shared variable more than once. The first path counts.
            by_identity.setdefault(id(node), (path, node))
    return dict(by_identity.values())


def paths_of(model: nnx.Module) -> dict[int, str]:
    """Returns the path of each parameter by its identity."""
    return {id(node): name_of(path) for path, node in variables_of(model).items()}


def open_layers(model: nnx.Module, gates: Gates | Plan = "fused") -> nnx.Module:
    """Returns a copy with dense layers, whose kernels have the values of a tree, also `Factors`."""
    check_type("model", model, nnx.Module, "Give a `flax.nnx.Module`: `rmtjax` takes trees.")
    if not isinstance(gates, Plan) and gates not in get_args(Gates):
        raise ValueError(f"`gates` must be one of {get_args(Gates)}, got {gates!r}.")
    copy, shared = nnx.clone(model), {}
    # All pairs are found first: while they live, no other object can have their identity.
    for layer, pairs in [(layer, pairs_of(layer)) for layer in modules_of(copy)]:
        factors, opened = factors_of(layer), {}
        for name, pair in pairs.items():
            key = pair.identity()  # layers that share their factors get one kernel
            opened[name] = shared.setdefault(key, make_kernel(pair, factors[name]))
        if opened:
            make_dense(layer, opened)
    _unfold_gates(copy, gates)
    return copy


def _unfold_gates(opened: nnx.Module, gates: Gates | Plan) -> None:
    """Makes stacks of the gates of recurrent cells; under a plan, those that it has as stacks."""
    planned = gates if isinstance(gates, Plan) else {}
    ndims, paths = {path: len(row.shape) for path, row in planned.items()}, paths_of(opened)
    for cell in modules_of(opened):
        for layer in (cell.dense_i, cell.dense_h) if type(cell) in _CELLS else ():
            for kernel in kernels(layer).values() if type(layer) is nnx.Linear else ():
                value = read(kernel)
                # Factors have separate gates, and a kernel that layers share is unfolded once.
                if is_factors(value) or is_unfolded(layer, value.shape):
                    continue
                if gates == "each" or ndims.get(paths[id(kernel)], 0) > value.ndim:
                    write(kernel, unfold(value, layer.out_features // cell.hidden_features))


def to_tree(opened: nnx.Module) -> dict:
    """Returns the parameters of opened layers as nested dictionaries."""
    return unflatten_dict({path: read(param) for path, param in variables_of(opened).items()})


def axes_of(opened: nnx.Module) -> dict[str, KernelAxes | None]:
    """Returns the axes of the kernels of opened layers by path."""
    paths, by_path = paths_of(opened), {}
    for layer in modules_of(opened):
        for name, kernel in kernels(layer).items():
            path, axes = paths[id(kernel)], layer_axes(layer, name, read(kernel))
            # Layers that share a kernel must agree on its axes.
            by_path[path] = axes if by_path.get(path, axes) == axes else None
    return by_path


def obstacles(opened: nnx.Module) -> dict[str, str]:
    """Returns the kernels of known layers that must stay one parameter, by path, and why."""
    paths, modules, causes = paths_of(opened), modules_of(opened), {}
    owned = {id(kernel) for layer in modules for kernel in kernels(layer).values()}
    is_node = lambda value: isinstance(value, nnx.Variable | nnx.Module)
    # A module that is not a known layer may do anything with a kernel that it holds as well.
    for module in modules:
        cause = f"`{type(module).__name__}` holds it too, and is not a known layer"
        known = kernels(module)
        others = [value for name, value in vars(module).items() if name not in known]
        held = map(id, jax.tree.leaves(others, is_leaf=is_node))
        causes |= {paths[key]: cause for key in held if key in owned}
        if isinstance(module, _REWRITERS):
            cause = f"`{type(module).__name__}` rewrites it at each call"
            causes |= {paths[key]: cause for key in paths_of(module.layer_instance)}
    return causes


def params(model: nnx.Module, *, gates: Gates = "fused") -> dict:
    """Returns the parameters of a model as a tree, with `Factors` for the kernel of a thin layer.

    Args:
      model: Any nnx model, dense or thin. What it shares has one entry.
      gates: The form of the kernels of `nnx.OptimizedLSTMCell` and `nnx.GRUCell`: "fused", side
        by side, (in, gates * h), or "each", stacks (gates, in, h) whose gates keep separate
        directions.

    Returns:
      Nested dictionaries of the arrays of all `nnx.Param`, by the names in the model. A parameter
      that holds no array, or a tree of arrays, is left out; `replace` keeps it unchanged.

    Raises:
      TypeError, ValueError: `model` is not a module, or `gates` has another value.

    Examples:
      >>> import flax.nnx as nnx, jax, rmtjax
      >>> model = nnx.Sequential(nnx.Linear(80, 60, rngs=nnx.Rngs(0)), nnx.relu)
      >>> jax.tree.map(lambda array: array.shape, rmtjax.nnx.params(model))
      {'layers': {0: {'bias': (60,), 'kernel': (80, 60)}}}
    """
    return to_tree(open_layers(model, gates))


def kernel_axes(model: nnx.Module, *, gates: Gates = "fused") -> dict[str, KernelAxes | None]:
    """Returns the axes of the kernels of a model by path, from the types of its layers.

    Args:
      model, gates: As in `params`.

    Returns:
      The `axes` argument of `rmtjax.plan`. If `gates` is "fused", also that of
      `rmtjax.prune_spectrum` in an `nnx.Optimizer`. None for kernels that are not matrices:
      grouped and masked convolutions, transposed kernels, einsums that sum over the kernel alone.

    Examples:
      >>> import flax.nnx as nnx, rmtjax
      >>> rmtjax.nnx.kernel_axes(nnx.LinearGeneral(8, (4, 5), rngs=nnx.Rngs(0)))
      {'kernel': KernelAxes(inputs=(0,), outputs=(1, 2), batch=())}
    """
    return axes_of(open_layers(model, gates))


def _mismatch(opened: nnx.Module, leaves: Mapping[str, Any]) -> str | None:
    """Returns how a tree differs from that of a model in paths or shapes, or None."""
    params = {name_of(path): param for path, param in variables_of(opened).items()}
    other = min(params.keys() ^ leaves.keys(), default=None)
    if other is not None:
        lacks = other in params
        return f"lacks {other!r} of the model" if lacks else f"has {other!r}, not in the model"
    layers = {id(k): layer for layer in modules_of(opened) for k in kernels(layer).values()}
    for path, param in params.items():
        # A parameter alone does not show whether it holds several gates.
        folded = functools.partial(folded_shape, layers.get(id(param)))
        shape, stored = kernel_shape(leaves[path]), kernel_shape(read(param))
        if folded(shape) != folded(stored):
            return f"has shape {shape} for {path!r}, and the model {stored}"
    return None


def _are_gates(layer: nnx.Module, value: Any) -> bool:
    """Returns True for a stack of gates in other parts than `Factors`, which no layer can run."""
    return isinstance(value, FactoredKernel) and is_unfolded(layer, kernel_shape(value))


def _close_layers(opened: nnx.Module) -> None:
    """Makes layers thin that have `Factors`, and fuses stacks of gates; refuses other `Factors`."""
    pairs: dict[int, PartsOfKernel] = {}
    for layer in modules_of(opened):
        chosen = {}
        for name, kernel in kernels(layer).items():
            value = read(kernel)
            if not is_factors(value):
                if is_unfolded(layer, kernel_shape(value)):
                    write(kernel, fold(value))
            elif layer_axes(layer, name, value) is not None and not _are_gates(layer, value):
                # Layers that share a kernel share its factors.
                chosen[name] = pairs.setdefault(id(kernel), make_pair(layer, kernel, value))
        if chosen:
            make_thin(layer, chosen)
    # Every known layer that holds a kernel has taken its factors, so another module is left.
    nodes = dict(nnx.iter_graph(opened))
    for path, variable in variables_of(opened).items():
        if is_factors(value := read(variable)):
            holder, held = type(nodes[path[:-1]]).__name__, type(value).__name__
            raise ValueError(
                f"`params` has `{held}` for {name_of(path)!r}, and {holder} cannot run with them: "
                "leave it out by `where`, or register its axes by `rmtjax.register_layer`."
            )


def replace(model: nnx.Module, params: PyTree) -> nnx.Module:
    """Returns a copy of a model with other parameters, thin where these are `Factors`.

    A thin layer of Flax runs as two layers, `left_factor` and `right_factor`. A registered one
    computes two thin products for each product. With a dense kernel, a thin layer becomes dense.
    Variables that are not parameters, such as BatchNorm statistics, are copied unchanged.

    Args:
      model: Any nnx model.
      params: A tree as `rmtjax.nnx.params(model)` returns it, with the gates fused or as stacks.
        Each leaf has the shape of the parameter, or is `Factors` of that shape.

    Raises:
      TypeError: `model` is not a module.
      ValueError: `params` has other paths or shapes than the model, or factors for a parameter
        that is not the kernel of a known layer.

    Examples:
      >>> import flax.nnx as nnx, rmtjax
      >>> model = nnx.Linear(80, 60, rngs=nnx.Rngs(0))
      >>> tree = rmtjax.nnx.params(model)
      >>> tree["kernel"] = rmtjax.factorize_matrix(tree["kernel"], 8)
      >>> rmtjax.nnx.replace(model, tree).left_factor.kernel.shape
      (80, 8)
    """
    # Layers are made dense first, so that they may become thin at other kernels, or other ranks.
    copy = open_layers(model)
    leaves = leaves_by_path(params)
    if words := _mismatch(copy, leaves):
        raise ValueError(f"`params` {words}. Change the tree that `rmtjax.nnx.params` returns.")
    for path, param in variables_of(copy).items():
        write(param, leaves[name_of(path)])
    _close_layers(copy)
    return copy
