"""The layers of `flax.linen` that hold kernels: along which axes, and how two run for one."""

import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rmtjax._axes import Factors, is_factors, KernelAxes
from rmtjax.models import check_names, einsum_axes, registered, split_einsum
from rmtjax.planning import NAMES
from rmtjax.spectra import multiply

KNOWN = (
    nn.Dense,
    nn.DenseGeneral,
    nn.Einsum,
    nn.Conv,
    nn.ConvLocal,
    nn.ConvTranspose,
    nn.Embed,
)
# Read kernels that have a place of their own, and multiply with several at once. The cell
# beside it computes the same of the same tree, by layers.
CELLS: dict[type[nn.Module], type[nn.Module]] = {nn.OptimizedLSTMCell: nn.LSTMCell}


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def call_inputs(module: nn.Module, args, kwargs) -> tuple[Any, str | None] | None:
    """The one input of a layer's call, and the equation of an einsum; None for other calls."""
    values = [*args, *kwargs.values()]
    equation = getattr(module, "einsum_str", None)
    if type(module) is nn.Einsum:
        told = [value for value in values if isinstance(value, str)]
        values = [value for value in values if not isinstance(value, str) and value is not None]
        equation = (*told, equation)[0]
    return (values[0], equation) if len(values) == 1 else None


def layer_axes(module: nn.Module, ndim: int, equation: str | None) -> KernelAxes | None:
    """The axes of the kernel of one of Flax's layers; None where it is no matrix."""
    first = ndim - 1
    if type(module) is nn.Einsum:
        return einsum_axes(equation) if equation else None
    if type(module) is nn.DenseGeneral:
        batch = len(_as_tuple(module.batch_dims))
        first = batch + len(_as_tuple(module.axis))
        return KernelAxes(
            tuple(range(batch, first)), tuple(range(first, ndim)), tuple(range(batch))
        )
    if type(module) is nn.ConvLocal:  # has another matrix at each place
        return None
    if type(module) is nn.Conv and (module.feature_group_count > 1 or module.mask is not None):
        return None
    if type(module) is nn.ConvTranspose and (module.transpose_kernel or module.mask is not None):
        return None
    return KernelAxes(tuple(range(first)), (first,)) if type(module) in KNOWN else None


def own_kernels(module: nn.Module, args, kwargs) -> dict[str, tuple[KernelAxes | None, tuple]]:
    """The kernels of a layer by name, as it is called: axes and shape."""
    shape = lambda name: jnp.shape(nn.unbox(module.get_variable("params", name)))
    mine = registered(type(module))
    if mine is not None:
        held = module.variables.get("params", {})
        names = [name for name, leaf in held.items() if not isinstance(leaf, Mapping)]
        missing, others = mine.keys() - set(names), [name for name in names if name not in mine]
        slip = any(difflib.get_close_matches(name, others) for name in missing)
        if slip or len(missing) == len(mine):  # else it may be there in other configurations
            check_names(type(module), names)
        return {name: (axes, shape(name)) for name, axes in mine.items() if has(module, name)}
    if type(module) not in KNOWN:
        return {}
    call = call_inputs(module, args, kwargs)
    equation = call[1] if call else None
    axes = lambda name: layer_axes(module, len(shape(name)), equation)
    return {name: (axes(name), shape(name)) for name in NAMES if has(module, name)}


def has(module: nn.Module, name: str) -> bool:
    """Whether a module has a parameter of this name."""
    return module.has_variable("params", name)


def _stack_axes(stored: tuple[int, ...], used: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that a lifted transformation took away, the leading ones if several fit."""
    ndim = len(stored)
    for taken in itertools.combinations(range(ndim), ndim - len(used)):
        if tuple(stored[axis] for axis in range(ndim) if axis not in taken) == used:
            return taken
    raise ValueError(f"no axes of {stored} can be taken away to leave {used}")


def lift_axes(axes: KernelAxes, stored: tuple[int, ...], used: tuple[int, ...]) -> KernelAxes:
    """Axes of a kernel of the shape used, told as axes of one of the shape stored."""
    taken = _stack_axes(stored, used)
    left = [axis for axis in range(len(stored)) if axis not in taken]
    move = lambda group: tuple(left[axis] for axis in group)
    return KernelAxes(move(axes.inputs), move(axes.outputs), (*taken, *move(axes.batch)))


def form_kernels(module: nn.Module, params: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """The parameters of a module, factors multiplied out; the remedy is for who has odd ones."""
    own = {name: nn.unbox(leaf) for name, leaf in params.items()}
    for name, leaf in own.items():
        if is_factors(leaf) and not jax.tree_util.all_leaves(leaf):  # as qwix holds them
            raise TypeError(
                f"{type(module).__name__} {'/'.join(module.path)!r} cannot multiply out factors "
                f"that are no arrays, got {type(leaf.left).__name__} in {name!r}. {remedy}"
            )
    return {name: multiply(leaf) if is_factors(leaf) else leaf for name, leaf in own.items()}


def _einsum_stages(module: nn.Einsum, factors: Factors, equation: str | None):
    axes = einsum_axes(equation) if equation else None
    if axes is None or len(axes.inputs) + len(axes.batch) != factors.left.ndim - 1:
        return None
    left, right = split_einsum(equation or "", axes)
    first = {"einsum_str": left, "shape": factors.left.shape, "use_bias": False}
    second = {"einsum_str": right, "shape": factors.right.shape}
    return tuple(module.clone(parent=None, **fields) for fields in (first, second))


def _stages(module: nn.Module, factors: Factors, equation: str | None):
    """The two layers that stand for one; None where the factors do not fit it."""
    if type(module) is nn.Einsum:
        return _einsum_stages(module, factors, equation)
    batch = len(_as_tuple(getattr(module, "batch_dims", ())))
    axes = layer_axes(module, factors.left.ndim + factors.right.ndim - 2 - batch, None)
    if axes is None or len(axes.inputs) != factors.left.ndim - 1 - batch:
        return None
    thin = {"parent": None, "features": factors.left.shape[-1], "use_bias": False}
    if type(module) is nn.Dense:
        return module.clone(**thin), module.clone(parent=None)
    if type(module) is nn.DenseGeneral:
        second = module.clone(parent=None, axis=-1, batch_dims=tuple(range(batch)))
        return module.clone(**thin), second
    if type(module) in (nn.Conv, nn.ConvTranspose):
        same = ("features", "use_bias", "dtype", "param_dtype", "precision")
        second = nn.Dense(**{name: getattr(module, name) for name in same}, parent=None)
        return module.clone(**thin), second
    return None


def run_layer(module: nn.Module, params: Mapping[str, Any], inputs, equation: str | None):
    """A layer whose kernel is `Factors`, as two; None where that cannot be."""
    factors = params["kernel"]
    stages = _stages(module, factors, equation)
    if stages is None:
        return None
    first, second = stages
    hidden = first.apply({"params": {"kernel": factors.left}}, inputs)
    return second.apply({"params": {**params, "kernel": factors.right}}, hidden)


def run_embed(module: nn.Embed, params: Mapping[str, Any], inputs, method: str):
    """Rows of the left factor, then the right one; `attend` the other way round."""
    left, right = params["embedding"]
    table = module.clone(parent=None, features=left.shape[-1])
    rows = {"params": {"embedding": left}}
    dense = lambda kernel, x: nn.Dense(
        kernel.shape[-1],
        use_bias=False,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        parent=None,
    ).apply({"params": {"kernel": kernel}}, x)
    if method == "attend":
        return table.apply(rows, dense(right.T, inputs), method=method)
    return dense(right, table.apply(rows, inputs))


def run_cell(module: nn.Module, params: Mapping[str, Any], args, kwargs):
    """A cell that has factors below it, by the cell that is made of layers; None for others."""
    if type(module) not in CELLS:
        return None
    below = [leaf for own in params.values() if isinstance(own, Mapping) for leaf in own.values()]
    if not any(map(is_factors, nn.unbox(below))):
        return None
    names = (f for f in module.__dataclass_fields__ if f not in ("parent", "name"))
    fields = {name: getattr(module, name) for name in names}
    return CELLS[type(module)](**fields, parent=None).apply({"params": params}, *args, **kwargs)
