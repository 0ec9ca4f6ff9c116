"""Models of `flax.nnx` as trees of parameters, and back."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, get_args, Literal

import jax
from flax import nnx
from jaxtyping import PyTree

from rmtjax._axes import Factors, is_factors, kernel_shape, KernelAxes
from rmtjax.nnx._layers import (
    fold,
    folded_shape,
    is_single,
    kernels,
    layer_axes,
    make_kernel,
    make_pair,
    Pair,
    read,
    unfold,
    write,
)
from rmtjax.nnx._thin import make_dense, make_thin
from rmtjax.planning import path_name, Plan

Gates = Literal["fused", "each"]
_CELLS = (nnx.OptimizedLSTMCell, nnx.GRUCell)


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _modules(model: nnx.Module) -> list[Any]:
    """The modules of a model, a shared one once."""
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]


def _variables(model: nnx.Module) -> dict[tuple, nnx.Param]:
    """The parameters of a model by path, a shared one once; those of one array each."""
    found = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param) and is_single(read(node)):
            found.setdefault(id(node), (path, node))  # older Flax comes by more than once
    return dict(found.values())


def _paths(model: nnx.Module) -> dict[int, str]:
    """The path of each parameter, by its identity."""
    return {id(node): _name(path) for path, node in _variables(model).items()}


def open_layers(model: nnx.Module) -> nnx.Module:
    """A copy with dense layers, where the kernels of those that are thin hold `Factors`."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be a `flax.nnx.Module`, got {type(model).__name__}. For a tree of "
            "parameters call the function of this name in `rmtjax` itself."
        )
    copy, made = nnx.clone(model), {}

    def make(name: str, pair: Pair, factors: Factors) -> nnx.Param:
        del name  # layers that share their factors shall share their kernel
        key = tuple(map(id, pair))
        if key not in made:  # with the pair, so that no other gets its place in memory
            made[key] = make_kernel(pair, factors), pair
        return made[key][0]

    for layer in _modules(copy):
        make_dense(layer, make)
    return copy


def num_gates(opened: nnx.Module) -> dict[str, int]:
    """How many gates a kernel of a recurrent cell holds side by side, by path."""
    found, paths = {}, _paths(opened)
    for cell in _modules(opened):
        for layer in (cell.dense_i, cell.dense_h) if type(cell) in _CELLS else ():
            for kernel in kernels(layer).values() if type(layer) is nnx.Linear else ():
                found[paths[id(kernel)]] = layer.out_features // cell.hidden_features
    return found


def apart(opened: nnx.Module, gates: Gates) -> dict[str, int]:
    """Of `num_gates` the kernels whose gates an option wants apart."""
    if gates not in get_args(Gates):
        raise ValueError(f"`gates` must be one of {get_args(Gates)}, got {gates!r}.")
    return num_gates(opened) if gates == "each" else {}


def to_tree(opened: nnx.Module, gates: Mapping[str, int]) -> dict:
    """The parameters as nested dictionaries, with the gates of some kernels apart."""
    tree: dict = {}
    for path, variable in _variables(opened).items():
        value, name = read(variable), _name(path)
        if name in gates and not is_factors(value):
            value = unfold(value, gates[name])
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def kernel_axes(opened: nnx.Module, gates: Mapping[str, int]) -> dict[str, KernelAxes | None]:
    """The axes of the kernels by path, with the gates of some of them apart."""
    paths, found = _paths(opened), {}
    for layer in _modules(opened):
        held = kernels(layer)
        for name, axes in layer_axes(layer).items():
            path = paths[id(held[name])]
            if axes and path in gates and not is_factors(read(held[name])):
                gate = len(axes.batch)  # comes last of what the kernel is a stack of
                axes = KernelAxes((gate + 1,), (gate + 2,), (*axes.batch, gate))
            # Layers that share a kernel must agree on what it is.
            found[path] = axes if found.get(path, axes) == axes else None
    return found


def _rewriters(opened: nnx.Module) -> list[Any]:
    """The modules of Flax that normalize the kernels of another at each call; newer Flax's."""
    names = [name for name in ("WeightNorm", "SpectralNorm") if hasattr(nnx, name)]
    kinds = tuple(getattr(nnx, name) for name in names)
    return [module for module in _modules(opened) if isinstance(module, kinds)]


def _params_in(value: Any) -> Iterator[nnx.Param]:
    """The parameters in an attribute of a module, but for those of other modules."""
    if isinstance(value, nnx.Param):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _params_in(part)


def _others(module: nnx.Module) -> Iterator[nnx.Param]:
    """The parameters that a module itself holds, but for the kernels that it is known to have."""
    known, held = kernels(module), vars(module)
    return _params_in([value for name, value in held.items() if name not in known])


def undivided(opened: nnx.Module) -> dict[str, str]:
    """The kernels of known layers that must stay one parameter, by path, and why."""
    paths, modules, found = _paths(opened), _modules(opened), {}
    owned = {id(kernel) for layer in modules for kernel in kernels(layer).values()}
    for module in modules:
        cause = f"`{type(module).__name__}` holds it too, and is no layer known"
        found |= {paths[id(node)]: cause for node in _others(module) if id(node) in owned}
    for module in _rewriters(opened):
        cause = f"`{type(module).__name__}` rewrites it at each call"
        inner = _variables(module.layer_instance).values()
        found |= {paths[id(node)]: cause for node in inner}
    return found


def planned(opened: nnx.Module, plan: Plan) -> dict[str, int]:
    """Of `num_gates` the kernels whose gates were apart when a plan was made."""
    axes = kernel_axes(opened, {})
    ndim = lambda path: sum(map(len, axes[path] or ()))
    more = lambda path: path in plan and len(plan[path].shape) > ndim(path) > 0
    return {path: gates for path, gates in num_gates(opened).items() if more(path)}


def _check_paths(leaves: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    """Refuses a tree of another model."""
    missing, extra = variables.keys() - leaves.keys(), leaves.keys() - variables.keys()
    if missing or extra:
        words = (
            f"lacks {min(missing)!r} of the model"
            if missing
            else f"has {min(extra)!r}, which is not in the model"
        )
        raise ValueError(f"`params` {words}. Change the tree that `rmtjax.nnx.params` gives.")


def _fit(leaf: Any, path: str, variable: nnx.Param, layer: nnx.Module | None) -> Any:
    """A leaf as the value of a parameter, refused if its shape is another."""
    shape, held = kernel_shape(leaf), kernel_shape(read(variable))
    folded = functools.partial(folded_shape, layer)
    if folded(shape) != folded(held):
        raise ValueError(
            f"`params` has shape {shape} for {path!r}, and the model {held}. Change the tree that "
            "`rmtjax.nnx.params` gives."
        )
    return leaf if is_factors(leaf) or shape == folded(shape) else fold(leaf)


def _close_layers(opened: nnx.Module) -> None:
    """Makes layers thin where the value of a kernel is `Factors`."""
    pairs: dict[int, Pair] = {}
    for layer in _modules(opened):
        chosen, held = {}, kernels(layer)
        for name, axes in layer_axes(layer).items():
            kernel, value = held[name], read(held[name])
            if is_factors(value) and axes is not None:
                if id(kernel) not in pairs:
                    pairs[id(kernel)] = make_pair(layer, kernel, value)
                chosen[name] = pairs[id(kernel)]
        if chosen:
            make_thin(layer, chosen)


def _check_closed(model: nnx.Module) -> None:
    """Refuses factors that no layer has taken, or not all that hold the kernel."""
    nodes = dict(nnx.iter_graph(model))
    for path, variable in _variables(model).items():
        if is_factors(read(variable)):
            raise ValueError(
                f"`params` has `Factors` for {_name(path)!r}, and "
                f"{type(nodes[path[:-1]]).__name__} cannot run with them. Leave it out of the plan "
                "with `where`, or tell the axes of its kernel by `rmtjax.register_layer`."
            )


def replace(model: nnx.Module, params: PyTree) -> nnx.Module:
    """A copy with the parameters of a tree, its layers thin where these are `Factors`."""
    copy = open_layers(model)
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_factors)
    leaves = {path_name(path): leaf for path, leaf in found}
    variables = {_name(path): variable for path, variable in _variables(copy).items()}
    _check_paths(leaves, variables)
    owners = {id(kernel): layer for layer in _modules(copy) for kernel in kernels(layer).values()}
    for path, variable in variables.items():
        write(variable, _fit(leaves[path], path, variable, owners.get(id(variable))))
    _close_layers(copy)
    _check_closed(copy)
    return copy
