"""The layers of `flax.linen` that hold kernels: their axes, and the two thin layers for each."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from rmtjax._axes import Factors, is_factors, KernelAxes
from rmtjax.linen._boxes import unbox
from rmtjax.models import einsum_axes, split_einsum

# By the exact type. A subclass may do anything with its kernel, so it is not a known layer.
KNOWN = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Embed)
# These cells read the kernels of layers that they do not call, and multiply by several at once.
# Their layers cannot be intercepted. The other cell computes the same from the same tree, and
# calls its layers.
CELLS: dict[type[nn.Module], type[nn.Module]] = {nn.OptimizedLSTMCell: nn.LSTMCell}


def call_inputs(module: nn.Module, args, kwargs) -> tuple[Any, str | None] | None:
    """Returns the inputs of a layer's call and its einsum equation; None for other calls."""
    values = [*args, *kwargs.values()]
    equation = getattr(module, "einsum_str", None)
    if type(module) is nn.Einsum:
        equations = [value for value in values if isinstance(value, str)]
        values = [value for value in values if not isinstance(value, str) and value is not None]
        equation = (*equations, equation)[0]
    return (values[0], equation) if len(values) == 1 else None


def layer_axes(module: nn.Module, ndim: int, equation: str | None) -> KernelAxes | None:
    """Returns the axes of the kernel of a layer of Flax; None if it is not a matrix."""
    first = ndim - 1
    if type(module) is nn.Einsum:
        return einsum_axes(equation) if equation else None
    if type(module) is nn.DenseGeneral:
        batch = np.size(module.batch_dims)
        first = batch + np.size(module.axis)
        ends = ((batch, first), (first, ndim), (0, batch))
        return KernelAxes(*(tuple(range(*end)) for end in ends))
    # `ConvLocal` has another matrix at each position of the window.
    if type(module) is nn.ConvLocal or type(module) not in KNOWN:
        return None
    grouped = getattr(module, "feature_group_count", 1) > 1
    transposed = getattr(module, "transpose_kernel", False)
    masked = getattr(module, "mask", None) is not None
    return None if grouped or transposed or masked else KernelAxes(tuple(range(first)), (first,))


def has_variables(module: nn.Module) -> bool:
    """Returns True if the product of a layer is a module, with variables beside `params`."""
    products = ("dot_general", "conv_general_dilated")
    classes = any(getattr(module, f"{name}_cls", None) is not None for name in products)
    modules = any(isinstance(getattr(module, name, None), nn.Module) for name in products)
    return classes or modules or not {*module.variables} <= {"params"}


def _stages(module: nn.Module, factors: Factors, equation: str | None):
    """Returns the two layers that stand for one; None if the factors do not fit it."""
    left, right = factors
    batch = np.size(getattr(module, "batch_dims", ()))
    axes = layer_axes(module, left.ndim + right.ndim - 2 - batch, equation)
    if axes is None or len(axes.batch) + len(axes.inputs) != left.ndim - 1:
        return None
    if equation is not None:
        one, other = split_einsum(equation, axes)
        first = module.clone(parent=None, einsum_str=one, shape=left.shape, use_bias=False)
        return first, module.clone(parent=None, einsum_str=other, shape=right.shape)
    first = module.clone(parent=None, features=left.shape[-1], use_bias=False)
    if type(module) is nn.Dense:
        return first, module.clone(parent=None)
    if type(module) is nn.DenseGeneral:
        return first, module.clone(parent=None, axis=-1, batch_dims=tuple(range(batch)))
    same = ("features", "use_bias", "dtype", "param_dtype", "precision")
    return first, nn.Dense(**{name: getattr(module, name) for name in same}, parent=None)


def run_layer(module: nn.Module, params: Mapping[str, Any], inputs, equation: str | None):
    """Runs a layer whose kernel is `Factors` as two layers; None if the factors do not fit it."""
    factors = params["kernel"]
    stages = _stages(module, factors, equation)
    if stages is None:
        return None
    first, second = stages
    hidden = first.apply({"params": {"kernel": factors.left}}, inputs)
    return second.apply({"params": {**params, "kernel": factors.right}}, hidden)


def run_embed(module: nn.Embed, params: Mapping[str, Any], inputs, method: str):
    """Looks up rows of the left factor and multiplies by the right one; `attend` reversed."""
    left, right = params["embedding"]
    table = module.clone(parent=None, features=left.shape[-1])
    rows = {"params": {"embedding": left}}
    attend = method == "attend"
    kernel = right.T if attend else right
    same = {name: getattr(module, name) for name in ("dtype", "param_dtype")}
    dense = nn.Dense(kernel.shape[-1], use_bias=False, parent=None, **same)
    multiply = lambda inputs: dense.apply({"params": {"kernel": kernel}}, inputs)
    look_up = lambda inputs: table.apply(rows, inputs, method=method)
    return look_up(multiply(inputs)) if attend else multiply(look_up(inputs))


def run_cell(module: nn.Module, params: Mapping[str, Any], args, kwargs):
    """Runs a cell of `CELLS` with factors by the cell that calls layers; None for other cells."""
    if type(module) not in CELLS:
        return None
    layers = [layer for layer in params.values() if isinstance(layer, Mapping)]
    if not any(is_factors(unbox(leaf)) for layer in layers for leaf in layer.values()):
        return None
    return call_layers(module, params, args, kwargs)


def call_layers(module: nn.Module, params: Mapping[str, Any], args, kwargs):
    """Runs a cell of `CELLS` by the cell that calls its layers."""
    names = (f for f in module.__dataclass_fields__ if f not in ("parent", "name"))
    fields = {name: getattr(module, name) for name in names}
    return CELLS[type(module)](**fields, parent=None).apply({"params": params}, *args, **kwargs)
