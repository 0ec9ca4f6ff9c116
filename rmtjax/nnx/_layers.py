"""The layers of `flax.nnx` that hold kernels: along which axes, and what two stand for one."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rmtjax._axes import factored_axes, Factors, is_factors, kernel_shape, KernelAxes
from rmtjax.models import check_names, einsum_axes, registered, split_einsum
from rmtjax.spectra import multiply

Shape = tuple[int, ...]
Stages = tuple[nnx.Module, nnx.Module]
# A subclass is another layer: it may do anything with its kernel.
NAMES = {
    nnx.Linear: "kernel",
    nnx.LinearGeneral: "kernel",
    nnx.Einsum: "kernel",
    nnx.Conv: "kernel",
    nnx.ConvTranspose: "kernel",
    nnx.Embed: "embedding",
    nnx.LoRALinear: "kernel",
}


class Pair(NamedTuple):
    """The variables of the two factors of one kernel."""

    left: nnx.Param
    right: nnx.Param


class Product(nnx.Param):
    """The kernel of a thin layer, multiplied out for who reads it."""

    def set_value(self, value, **options):
        """Refuses what would be lost: the layer keeps its factors alone."""
        raise TypeError(
            "The kernel of a thin layer is a product: write to its factors (`left_factor` and "
            "`right_factor`, in a registered layer `left` and `right`), or give the model another "
            "kernel by `rmtjax.nnx.replace`."
        )

    value: Any = property(nnx.Param.value.fget, set_value)  # older Flax writes to it

    def __setitem__(self, key, value):
        self.set_value(value)


class FactorPair(nnx.Module):
    """Two factors in the place of a kernel of a registered layer.

    Who reads it from outside of the layer finds what the kernel would have, multiplied out.

    Attributes:
      left: The left factor.
      right: The right factor.
    """

    def __init__(self, left: nnx.Param, right: nnx.Param):
        self.left, self.right = left, right

    def _product(self) -> Product:
        return Product(multiply(Factors(read(self.left), read(self.right))))

    value = property(
        lambda self: self._product().value, lambda self, value: self._product().set_value(value)
    )

    def __getattr__(self, name: str):
        if name[0] == "_" or name in ("left", "right"):
            raise AttributeError(name)
        return getattr(self._product(), name)

    def __getitem__(self, key):
        return self._product()[key]

    def __setitem__(self, key, value):
        self._product()[key] = value

    def __jax_array__(self):
        return read(self._product())


def read(variable: nnx.Variable) -> Any:
    """The value of a variable, by the name that this version of Flax has for it."""
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def write(variable: nnx.Variable, value: Any) -> None:
    """Gives a variable a value, of any shape."""
    if hasattr(variable, "set_value"):
        variable.set_value(value)
    else:
        variable.value = value


def is_single(value: Any) -> bool:
    """Whether the value of a variable is one array, or its factors: not a tree, not nothing."""
    return is_factors(value) or jax.tree.structure(value) == jax.tree.structure(0)


def _dot_axes(batch: Shape, inputs: Shape, outputs: Shape) -> tuple[KernelAxes, Shape]:
    """The axes and the shape of a kernel whose axes come in this order."""
    first, last = len(batch), len(batch) + len(inputs)
    axes = tuple(range(last + len(outputs)))
    return KernelAxes(axes[first:last], axes[last:], axes[:first]), (*batch, *inputs, *outputs)


def _call_axes(layer: Any) -> tuple[KernelAxes | None, Shape]:
    """The axes and the shape of the kernel of one of Flax's layers, as a call of it needs it."""
    match layer:
        case nnx.Linear():
            return _dot_axes((), (layer.in_features,), (layer.out_features,))
        case nnx.Embed():
            return _dot_axes((), (layer.num_embeddings,), (layer.features,))
        case nnx.LinearGeneral():
            return _dot_axes(
                tuple(layer.batch_axis.values()), layer.in_features, layer.out_features
            )
        case nnx.Einsum():
            return einsum_axes(layer.einsum_str), tuple(layer.kernel_shape)
    *window, rows, columns = layer.kernel_shape
    axes, shape = _dot_axes((), (*window, rows), (columns,))
    grouped = getattr(layer, "feature_group_count", 1) > 1
    turned = getattr(layer, "transpose_kernel", False)
    return None if grouped or turned or layer.mask is not None else axes, shape


def unfold(kernel, gates: int):
    """The kernel of fused gates (in, gates * h) as a stack (gates, in, h)."""
    *stack, rows, columns = kernel.shape
    return jnp.moveaxis(kernel.reshape(*stack, rows, gates, columns // gates), -2, -3)


def fold(kernel):
    """The kernel that `unfold` turns into `kernel`."""
    moved = jnp.moveaxis(kernel, -3, -2)
    return moved.reshape(*moved.shape[:-2], -1)


def is_unfolded(layer: nnx.Module | None, shape: Shape) -> bool:
    """Whether a kernel of this shape has the gates apart that a layer holds side by side."""
    if type(layer) is not nnx.Linear or len(shape) < 3:
        return False
    own = layer.in_features, layer.out_features
    return own != shape[-2:] and own == (shape[-2], shape[-3] * shape[-1])


def folded_shape(layer: nnx.Module | None, shape: Shape) -> Shape:
    """The shape that a layer holds a kernel in."""
    if not is_unfolded(layer, shape):
        return shape
    return (*shape[:-3], shape[-2], shape[-3] * shape[-1])


def kernels(layer: nnx.Module) -> dict[str, nnx.Param]:
    """The kernels that a layer is known to have, by name."""
    kind, values = type(layer), vars(layer)
    names = (NAMES[kind],) if kind in NAMES else registered(kind)
    if kind not in NAMES:  # one that a layer can do without is None
        maybe = lambda value: value is None or isinstance(value, nnx.Variable)
        check_names(kind, [name for name, value in values.items() if maybe(value)])
    held = {name: values.get(name) for name in names or ()}
    found = {name: kernel for name, kernel in held.items() if isinstance(kernel, nnx.Param)}
    return {name: kernel for name, kernel in found.items() if is_single(read(kernel))}


def _stored_axes(layer: nnx.Module, name: str, shape: Shape) -> KernelAxes | None:
    """The axes of a kernel as stored: `nnx.vmap` puts those of a stack before its own."""
    if type(layer) in NAMES:
        axes, own = _call_axes(layer)
        taken = len(shape) - len(own)
        fits = taken >= 0 and shape[taken:] == own
    else:
        axes = (registered(type(layer)) or {})[name]
        taken = len(shape) - sum(map(len, axes))
        fits = taken >= 0
    if axes is None or not fits:
        return None
    moved = KernelAxes(*(tuple(axis + taken for axis in group) for group in axes))
    return moved._replace(batch=(*range(taken), *moved.batch))


def layer_axes(layer: nnx.Module) -> dict[str, KernelAxes | None]:
    """The axes of the kernels of a layer, by name; None for what is no matrix.

    Where the value of a kernel is `Factors`, None too if the layer cannot run with them.
    """
    found = {}
    for name, kernel in kernels(layer).items():
        value = read(kernel)
        axes = _stored_axes(layer, name, kernel_shape(value))
        if is_factors(value):
            named, apart = factored_axes(value), is_unfolded(layer, kernel_shape(value))
            axes = named if apart or axes == named else None
        found[name] = axes
    return found


def _axis_names(metadata: dict[str, Any]) -> str | None:
    """Where the metadata of a variable name the axes for sharding: newer Flax, older Flax."""
    return next((key for key in ("out_sharding", "sharding") if metadata.get(key)), None)


def make_pair(layer: nnx.Module, kernel: nnx.Param, factors: Factors) -> Pair:
    """The variables of two factors, with the metadata of that of the kernel."""
    left, right = factors
    batch, first = len(factored_axes(factors).batch), left.ndim - 1
    of_left = of_right = kernel.get_metadata()
    key, apart = _axis_names(of_left), is_unfolded(layer, kernel_shape(factors))
    if key is not None:
        names = tuple(of_left[key])
        of_left = of_left | {key: None if apart else (*names[:first], None)}
        of_right = of_right | {key: None if apart else (*names[:batch], None, *names[first:])}
    left = jnp.moveaxis(left, 0, -2) if apart else left
    kind: Any = type(kernel)
    return Pair(kind(left, **of_left), kind(right, **of_right))


def make_kernel(pair: Pair, value: Any) -> nnx.Param:
    """The variable of a kernel that two factors have stood for."""
    metadata = pair.left.get_metadata()
    key, batch = _axis_names(metadata), 0
    if key is not None:
        batch = len(factored_axes(Factors(read(pair.left), read(pair.right))).batch)
        names = (*metadata[key][:-1], *pair.right.get_metadata()[key][1 + batch :])
        metadata = metadata | {key: names}
    kind: Any = type(pair.left)
    return kind(value, **metadata)


def _build(kind: type, like: nnx.Module, kernel: nnx.Param, bias=None, **changes) -> Any:
    """A layer of Flax's with a kernel, and the options that it has in common with another."""
    known = inspect.signature(kind.__init__).parameters
    options = {name: value for name, value in vars(like).items() if name in known} | changes
    # Its shapes alone: what would be drawn for it is not wanted.
    layer = nnx.eval_shape(lambda: kind(**options, rngs=nnx.Rngs(0)))
    setattr(layer, NAMES[kind], kernel)
    if bias is not None:
        layer.bias = bias
    return layer


def _einsum_stages(layer: nnx.Einsum, left: nnx.Param, right: nnx.Param, bias) -> Stages:
    """The two einsums that stand for one."""
    axes, own = _call_axes(layer)
    assert axes is not None  # for the type checker: without them nothing is factorized
    one, other = split_einsum(layer.einsum_str, axes)
    batch, (rank, rows, columns) = len(axes.batch), (read(left).shape[-1], *map(len, axes[:2]))
    build = functools.partial(_build, nnx.Einsum, layer)
    first = {"einsum_str": one, "kernel_shape": (*own[: batch + rows], rank), "bias_shape": None}
    second = {"einsum_str": other, "kernel_shape": (*own[:batch], rank, *own[-columns:])}
    return build(left, **first), build(right, bias, **second)


def stages(layer: Any, left: nnx.Param, right: nnx.Param, bias) -> Stages:
    """The two layers that stand for one."""
    rank, kind, biased = read(left).shape[-1], type(layer), bias is not None
    plain = functools.partial(_build, like=layer)
    if kind is nnx.Einsum:
        return _einsum_stages(layer, left, right, bias)
    if kind is nnx.LinearGeneral:
        return (
            plain(kind, kernel=left, out_features=rank, use_bias=False),
            plain(kind, kernel=right, bias=bias, in_features=rank, axis=-1),
        )
    if kind is nnx.Embed:
        first = plain(kind, kernel=left, features=rank)
    else:
        kind = nnx.Linear if kind is nnx.LoRALinear else kind
        first = plain(kind, kernel=left, out_features=rank, use_bias=False)
    columns = read(right).shape[-1]
    sides = {"in_features": rank, "out_features": columns, "use_bias": biased}
    return first, plain(nnx.Linear, kernel=right, bias=bias, **sides)


def gate_stages(layer: nnx.Linear, left: nnx.Param, right: nnx.Param) -> Stages:
    """The two layers that stand for that of fused gates, each with directions of its own."""
    gates, rank, columns = read(right).shape
    general = functools.partial(_build, nnx.LinearGeneral, layer, bias=None, use_bias=False)
    second = {"in_features": rank, "out_features": columns, "batch_axis": {0: gates}}
    return general(left, out_features=(gates, rank)), general(right, **second)
