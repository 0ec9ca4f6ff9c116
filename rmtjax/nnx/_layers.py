"""The layers of `flax.nnx` that hold kernels: their axes, and the two layers that replace each."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rmtjax._axes import factored_axes, is_factors, kernel_shape, KernelAxes
from rmtjax.models import check_names, einsum_axes, registered, split_einsum
from rmtjax.nnx._variables import is_parameter, read

Shape = tuple[int, ...]
Stages = tuple[nnx.Module, nnx.Module]
# By the exact type. A subclass may do anything with its kernel, so it is not a known layer.
_LAYERS = nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose, nnx.LoRALinear
NAMES = dict.fromkeys(_LAYERS, "kernel") | {nnx.Embed: "embedding"}


def _dot_axes(batch: Shape, inputs: Shape, outputs: Shape) -> tuple[KernelAxes, Shape]:
    """Returns the axes and the shape of a kernel whose axes come in this order."""
    first, last = len(batch), len(batch) + len(inputs)
    axes = tuple(range(last + len(outputs)))
    return KernelAxes(axes[first:last], axes[last:], axes[:first]), (*batch, *inputs, *outputs)


def _call_axes(layer: Any) -> tuple[KernelAxes | None, Shape]:
    """Returns the axes and the shape of the kernel of a layer of Flax, as its call needs it."""
    match layer:
        case nnx.Linear():
            return _dot_axes((), (layer.in_features,), (layer.out_features,))
        case nnx.Embed():
            return _dot_axes((), (layer.num_embeddings,), (layer.features,))
        case nnx.LinearGeneral():
            batch = tuple(layer.batch_axis.values())
            return _dot_axes(batch, layer.in_features, layer.out_features)
        case nnx.Einsum():
            return einsum_axes(layer.einsum_str), tuple(layer.kernel_shape)
    *window, rows, columns = layer.kernel_shape
    axes, shape = _dot_axes((), (*window, rows), (columns,))
    # These kernels are not one matrix, or not one whose columns are the outputs.
    grouped = getattr(layer, "feature_group_count", 1) > 1
    transposed = getattr(layer, "transpose_kernel", False)
    return None if grouped or transposed or layer.mask is not None else axes, shape


def _apply(change: Callable[[jax.Array], jax.Array], kernel: Any) -> Any:
    """Applies a function to a kernel, or to its shape in a model of `nnx.eval_shape`."""
    abstract = isinstance(kernel, jax.ShapeDtypeStruct)
    return jax.eval_shape(change, kernel) if abstract else change(kernel)


def unfold(kernel: Any, gates: int) -> Any:
    """Returns the kernel of fused gates (in, gates * h) as a stack (gates, in, h)."""
    split = (*kernel.shape[:-1], gates, kernel.shape[-1] // gates)
    return _apply(lambda fused: jnp.moveaxis(fused.reshape(split), -2, -3), kernel)


def fold(kernel: Any) -> Any:
    """Returns the kernel that `unfold` turns into `kernel`."""
    return _apply(lambda stack: jax.lax.collapse(jnp.moveaxis(stack, -3, -2), -2), kernel)


def folded_shape(layer: nnx.Module | None, shape: Shape) -> Shape:
    """Returns the shape in which a layer holds a kernel, which may be that of a stack of gates."""
    if type(layer) is not nnx.Linear or len(shape) < 3:
        return shape
    folded = (*shape[:-3], shape[-2], shape[-3] * shape[-1])
    # A stack of layers has three axes too, but its last two are the sides of the layer.
    return folded if shape[-2:] != (layer.in_features, layer.out_features) == folded[-2:] else shape


def is_unfolded(layer: nnx.Module | None, shape: Shape) -> bool:
    """Returns True for the shape of a stack of gates if the layer holds them side by side."""
    return folded_shape(layer, shape) != shape


def kernels(layer: nnx.Module) -> dict[str, nnx.Param]:
    """Returns the kernels of a known layer by name; empty for other layers."""
    kind, values = type(layer), vars(layer)
    names = (NAMES[kind],) if kind in NAMES else registered(kind)
    if kind not in NAMES:
        # In some configurations a layer has None in place of a kernel. Its name is still right.
        may_be = lambda value: value is None or isinstance(value, nnx.Variable)
        check_names(kind, [name for name, value in values.items() if may_be(value)])
    return {name: values[name] for name in names or () if is_parameter(values.get(name))}


def layer_axes(layer: nnx.Module, name: str, value: Any) -> KernelAxes | None:
    """Returns the axes of a kernel; None if it is not a matrix, or if factors do not fit it."""
    shape = kernel_shape(value)
    if is_unfolded(layer, shape):
        axes, called = _dot_axes(shape[:-2], shape[-2:-1], shape[-1:])
    elif type(layer) in NAMES:
        axes, called = _call_axes(layer)
    else:
        axes = (registered(type(layer)) or {})[name]
        called = shape[max(len(shape) - len(axes.order), 0) :]
    # `nnx.vmap` puts the axes of a stack before those that the layer knows of.
    taken = len(shape) - len(called)
    if axes is None or shape[taken:] != called:
        return None
    moved = KernelAxes(*(tuple(axis + taken for axis in group) for group in axes))
    axes = moved._replace(batch=(*range(taken), *moved.batch))
    return axes if not is_factors(value) or axes == factored_axes(value) else None


def _build(kind: type, like: nnx.Module, kernel: nnx.Param, bias=None, **changes) -> Any:
    """Returns a layer of Flax with a kernel, and with the options that it shares with `like`."""
    known = inspect.signature(kind.__init__).parameters
    fields = vars(like) | changes | {"use_bias": bias is not None}
    options = {name: value for name, value in fields.items() if name in known}
    # `eval_shape` does not draw the random kernel that is replaced on the next line.
    layer = nnx.eval_shape(lambda: kind(**options, rngs=nnx.Rngs(0)))
    setattr(layer, NAMES[kind], kernel)
    if bias is not None:
        layer.bias = bias
    return layer


def stages(layer: Any, left: nnx.Param, right: nnx.Param, bias) -> Stages:
    """Returns the two layers that replace one."""
    rank, columns = read(left).shape[-1], read(right).shape[-1]
    # The adapter of `LoRALinear` stays with the thin layer, so its first stage has none.
    kind: Any = {nnx.LoRALinear: nnx.Linear}.get(type(layer), type(layer))
    if kind is nnx.Einsum:
        axes: Any  # never None: an einsum whose kernel is not a matrix is not factorized
        axes, shape = _call_axes(layer)
        one, other = split_einsum(layer.einsum_str, axes)
        inputs, outputs, batch = (tuple(shape[axis] for axis in group) for group in axes)
        thin, wide = (*batch, *inputs, rank), (*batch, rank, *outputs)
        first = _build(kind, layer, left, einsum_str=one, kernel_shape=thin, bias_shape=None)
        return first, _build(kind, layer, right, bias, einsum_str=other, kernel_shape=wide)
    # `Embed` has `features` where other layers have `out_features`.
    first = _build(kind, layer, left, features=rank, out_features=rank)
    if kind is nnx.LinearGeneral:
        return first, _build(kind, layer, right, bias, in_features=rank, axis=-1)
    return first, _build(nnx.Linear, layer, right, bias, in_features=rank, out_features=columns)


def gate_stages(layer: nnx.Linear, left: nnx.Param, right: nnx.Param) -> Stages:
    """Returns the two layers that replace that of fused gates, with separate factors a gate."""
    gates, rank, columns = read(right).shape
    build = functools.partial(_build, nnx.LinearGeneral, layer)
    second = {"in_features": rank, "out_features": columns, "batch_axis": {0: gates}}
    return build(left, out_features=(gates, rank)), build(right, **second)
