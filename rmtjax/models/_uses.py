"""The operations that multiply by a kernel, and the sums over the rows of each."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from rmtjax._axes import KernelAxes
from rmtjax._sharding import by_compiler
from rmtjax.moments import Moment, sums_of_lookups, sums_of_rows

Side = Literal["inputs", "outputs"]


class View(NamedTuple):
    """A kernel, or a member of a stack of kernels, with its axes moved.

    Attributes:
      path: Of the kernel.
      order: Axis `k` of the value is axis `order[k]` of the kernel.
      levels: For each loop around the value, the axis of the kernel along which the loop takes its
        members in turn, or None if each step has the same kernel.
    """

    path: str
    order: tuple[int, ...]
    levels: tuple[int | None, ...] = ()


class Value(NamedTuple):
    """A value of a program.

    Attributes:
      array: Its array, usually traced.
      key: Equal for values that are known to be equal.
      view: The kernel that it is, or None.
    """

    array: Any
    key: Any
    view: View | None = None


class Use(NamedTuple):
    """A product with a kernel.

    Attributes:
      path: Of the kernel.
      side: "inputs" where the rows meet its input axes, "outputs" where they meet its output axes.
      key: Equal for products that have the same rows.
      levels: As in the view of the kernel.
      axes: The axes of the kernel that the leading axes of the sums stand for.
      sums: A `Moment` with these leading axes in place of that of a stack.
      arrange: Makes rows, (*batch, rows, outputs), of the outputs of the product; None if it is
        not known how.
    """

    path: str
    side: Side
    key: Any
    levels: tuple[int | None, ...]
    axes: tuple[int, ...]
    sums: Any
    arrange: Callable[[Array], Array] | None = None


Table = Mapping[str, KernelAxes]


def _side(
    axes: KernelAxes, view: View, contracted: Sequence[int], batch: Sequence[int]
) -> Side | None:
    """Returns the side of a product by the axes of the kernel in it; None if it is another one."""
    taken = [*(axis for axis in view.levels if axis is not None), *batch]
    # The members of a stack have their rows each, or all of them the same rows.
    if taken and sorted(taken) != sorted(axes.batch):
        return None
    sides: dict[Side, tuple[int, ...]] = {"inputs": axes.inputs, "outputs": axes.outputs}
    return next((side for side, of in sides.items() if sorted(of) == sorted(contracted)), None)


def _dot_general(table: Table, params, lhs: Value, rhs: Value) -> Use | None:
    """Returns the use of a kernel in a product of two arrays."""
    (of_lhs, of_rhs), (batch_lhs, batch_rhs) = params["dimension_numbers"]
    if lhs.view and rhs.view:
        return None
    swapped = lhs.view is not None
    if swapped:
        lhs, rhs, of_lhs, of_rhs, batch_lhs, batch_rhs = (
            rhs,
            lhs,
            of_rhs,
            of_lhs,
            batch_rhs,
            batch_lhs,
        )
    view: Any = rhs.view
    contracted = {view.order[axis]: other for axis, other in zip(of_rhs, of_lhs, strict=True)}
    batch = tuple(view.order[axis] for axis in batch_rhs)
    axes = table[view.path]
    side = _side(axes, view, [*contracted], batch)
    if side is None:
        return None
    last = [contracted[axis] for axis in getattr(axes, side)]
    free = [axis for axis in range(lhs.array.ndim) if axis not in (*batch_lhs, *last)]
    order = (*batch_lhs, *free, *last)
    sides = [[lhs.array.shape[axis] for axis in group] for group in (batch_lhs, free, last)]

    shape = [math.prod(group) for group in sides]
    find = lambda rows: sums_of_rows(jnp.transpose(rows, order).reshape(shape))
    sums = by_compiler(find, lax.stop_gradient(lhs.array))
    key = "rows", lhs.key, order, len(batch), len(last)
    arrange = _arrange_product(axes, view, (*of_rhs, *batch_rhs), len(batch), len(free), swapped)
    arrange = arrange if side == "inputs" else None
    return Use(view.path, side, key, view.levels, batch, _unstack(sums, sides[0]), arrange)


def _arrange_product(axes: KernelAxes, view: View, bound, batch: int, free: int, swapped: bool):
    """Returns what makes rows of the outputs of a product, whose axes come batch axes first.

    Args:
      axes, view: Of the kernel.
      bound: The axes of the kernel that are contracted, or batch axes of the product.
      batch, free: The number of batch axes, and of the other axes of the rows.
      swapped: Whether the kernel comes first in the product.
    """
    outputs = [axis for place, axis in enumerate(view.order) if place not in bound]
    if sorted(outputs) != sorted(axes.outputs):
        return None
    start = batch if swapped else batch + free
    last = [start + outputs.index(axis) for axis in axes.outputs]

    def arrange(products):
        others = [axis for axis in range(products.ndim) if axis not in last]
        moved = jnp.transpose(products, (*others, *last))
        return moved.reshape(*moved.shape[:batch], -1, math.prod(moved.shape[len(others) :]))

    return arrange


def _unstack(sums: Moment, batch: Sequence[int]) -> Moment:
    """Returns sums with several leading axes, or none, in place of that of a stack."""
    return jax.tree.map(lambda one: one.reshape(*batch, *one.shape[1:]), sums)


def _gather(table: Table, params, operand: Value, indices: Value) -> Use | None:
    """Returns the use of a table of embeddings in a lookup of its rows."""
    view, numbers = operand.view, params["dimension_numbers"]
    if view is None or numbers.start_index_map != numbers.collapsed_slice_dims:
        return None
    rows, sizes = numbers.start_index_map, operand.array.shape
    whole = [size for axis, size in enumerate(sizes) if axis not in rows]
    taken = [size for axis, size in enumerate(params["slice_sizes"]) if axis not in rows]
    axes = table[view.path]
    side = _side(axes, view, [view.order[axis] for axis in rows], ())
    if len(rows) != 1 or whole != taken or side != "inputs":
        return None
    sums = sums_of_lookups(indices.array[..., 0], sizes[rows[0]])
    last = numbers.offset_dims
    arrange = lambda found: jnp.moveaxis(found, last, range(-len(last), 0)).reshape(
        -1, math.prod(whole)
    )
    key = "lookups", indices.key
    return Use(view.path, side, key, view.levels, (), _unstack(sums, ()), arrange)


def _convolve(table: Table, params, lhs: Value, rhs: Value) -> Use | None:
    """Returns the use of a kernel in a convolution that is not grouped."""
    view, numbers = rhs.view, params["dimension_numbers"]
    if view is None or params["feature_group_count"] * params["batch_group_count"] > 1:
        return None
    axes, (_, features, *window) = table[view.path], numbers.rhs_spec
    inputs = [view.order[axis] for axis in (*window, features)]
    side = _side(axes, view, inputs, ())
    if side is None:
        return None
    order = [inputs.index(axis) for axis in getattr(axes, side)]
    if _takes_pixels([rhs.array.shape[axis] for axis in window], params):
        find = lambda array: sums_of_rows(_pixels(array, params)[None])
    else:
        find = lambda array: _patches(array, rhs.array.shape, order, params)
    sums = _unstack(by_compiler(find, lax.stop_gradient(lhs.array)), ())
    options = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    shape = tuple(rhs.array.shape[axis] for axis in (*window, features))
    key = "patches", lhs.key, shape, tuple(order), str([params[name] for name in options])
    feature = numbers.out_spec[1]
    arrange = lambda maps: jnp.moveaxis(maps, feature, -1).reshape(-1, maps.shape[feature])
    return Use(view.path, side, key, view.levels, (), sums, arrange if side == "inputs" else None)


def _takes_pixels(window: Sequence[int], params) -> bool:
    """Returns whether a convolution multiplies pixels of its images, as one of window 1 x 1."""
    plain = all(factor == 1 for factor in params["lhs_dilation"])
    return plain and {*window, 1} == {1} and all(pad == (0, 0) for pad in params["padding"])


def _pixels(images: Array, params) -> Array:
    """Returns the pixels that a convolution of window 1 x 1 takes, (pixels, features)."""
    batch, features, *space = params["dimension_numbers"].lhs_spec
    images = jnp.transpose(images, (batch, *space, features))
    steps = (slice(None, None, step) for step in params["window_strides"])
    taken = images[(slice(None), *steps)]
    return taken.reshape(-1, taken.shape[-1])


def _patches(images: Array, shape: Sequence[int], order: Sequence[int], params) -> Moment:
    """Returns the sums over the patches that a kernel of this shape is multiplied with.

    Patches are never formed. A convolution with a unit kernel has one entry of each patch as its
    output. The transpose of a convolution, as a function of its kernel, sums the products of
    patches and such outputs. The window is gone through a place at a time.
    """
    out, features, *window = params["dimension_numbers"].rhs_spec
    images = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
    options: Any = {name: params[name] for name in names}
    options |= {"precision": lax.Precision.HIGHEST}
    convolve = lambda images, kernel: lax.conv_general_dilated(images, kernel, **options)
    places = [shape[axis] for axis in window]
    inputs, count = [*places, shape[features]], math.prod(places)
    # From the order (*window, inputs, outputs) to that of the kernel, and back.
    to_kernel = lambda array: jnp.moveaxis(array, range(array.ndim), (*window, features, out))
    from_kernel = lambda array: jnp.moveaxis(array, (*window, features, out), range(array.ndim))

    def project(outputs):
        """Returns the sums of patches times outputs, (*window, inputs, outputs)."""
        like = jnp.zeros((*inputs, outputs.shape[params["dimension_numbers"].out_spec[1]]))
        like = jax.ShapeDtypeStruct(to_kernel(like).shape, images.dtype)
        (sums,) = jax.linear_transpose(lambda kernel: convolve(images, kernel), like)(outputs)
        return from_kernel(sums)

    def column(place):
        eye = jnp.eye(count * shape[features], dtype=images.dtype)
        unit = lax.dynamic_slice_in_dim(eye, place * shape[features], shape[features], axis=1)
        return project(convolve(images, to_kernel(unit.reshape(*inputs, -1))))

    ones = to_kernel(jnp.ones((*inputs, 1), images.dtype))
    norms = convolve(images**2, ones)
    second = lax.map(column, jnp.arange(count))  # (places, *window, inputs, inputs)
    second = jnp.moveaxis(second, 0, -2).reshape(*inputs, *inputs)
    size = len(inputs)
    second = jnp.transpose(second, (*order, *(size + axis for axis in order)))
    flat = lambda sums: jnp.transpose(sums[..., 0], order).reshape(1, -1)
    total, third = flat(project(jnp.ones_like(norms))), flat(project(norms))
    side = math.prod(inputs)
    rows = jnp.full(1, norms.size, jnp.int32)
    return Moment(rows, total, second.reshape(1, side, side), third, jnp.sum(norms**2)[None])


# By the names of primitives. A rule returns None if it does not know the product.
RULES: dict[str, Callable[..., Use | None]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolve,
    "gather": _gather,
}
