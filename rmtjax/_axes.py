"""A kernel seen as a stack of matrices, and back."""

import math
from typing import Any, NamedTuple, TypeGuard

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Kernel = Float[Array, "..."] | Float[np.ndarray, "..."]


class KernelAxes(NamedTuple):
    """Which axes of a kernel are rows of its matrix, and which are columns.

    Attributes:
      inputs: Axes that are contracted with the inputs, in order: the rows.
      outputs: Axes that the outputs carry, in order: the columns.
      batch: Axes over which the kernel is a stack of matrices, as under `nn.scan`.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()


class Factors(NamedTuple):
    """A kernel as the product of two thinner ones, in the kernel's place of a tree.

    Attributes:
      left: The input axes of the kernel, then the rank; batch axes first.
      right: The rank, then the output axes of the kernel; batch axes first.
    """

    left: Float[Array, "*inputs r"]
    right: Float[Array, "*r_outputs"]


def is_factors(leaf: Any) -> TypeGuard[Factors]:
    """Tells where to stop, as `is_leaf` of `jax.tree.map`."""
    return isinstance(leaf, Factors)


def factored_axes(factors: Factors) -> KernelAxes:
    """The axes of the dense kernel that `factors` stand for, batch axes first.

    Both factors have three axes or more only where a batch comes first in both, or where
    a kernel has several input and several output axes; the rank tells which.
    """
    left, right = factors
    stacked = (
        left.ndim >= 3
        and right.ndim >= 3
        and left.shape[0] == right.shape[0]
        and left.shape[-1] == right.shape[1]
    )
    first, last = left.ndim - 1, left.ndim + right.ndim - 2 - stacked
    axes = tuple(range(last))
    return KernelAxes(axes[stacked:first], axes[first:], axes[:stacked])


def kernel_shape(kernel: Any) -> tuple[int, ...]:
    """The shape of a kernel, also where factors stand for it."""
    if not is_factors(kernel):
        return jnp.shape(kernel)
    return kernel.left.shape[:-1] + kernel.right.shape[1 + len(factored_axes(kernel).batch) :]


def check_axes(path: str, axes: KernelAxes, ndim: int) -> None:
    """Refuses axes that are not those of the leaf, each once."""
    if sorted((*axes.batch, *axes.inputs, *axes.outputs)) != list(range(ndim)):
        raise ValueError(f"`axes` must name each of the {ndim} axes of {path!r} once, got {axes}.")


def matrix_shape(shape: tuple[int, ...], axes: KernelAxes) -> tuple[int, int, int]:
    """The shape (batch, inputs, outputs) of a kernel seen as a stack of matrices."""
    batch, rows, columns = (
        math.prod(shape[axis] for axis in group)
        for group in (axes.batch, axes.inputs, axes.outputs)
    )
    return batch, rows, columns


def to_matrices(kernel: Kernel, axes: KernelAxes) -> Any:
    """A kernel as a stack of shape (batch, inputs, outputs), in JAX or NumPy as it was."""
    order = (*axes.batch, *axes.inputs, *axes.outputs)
    return kernel.transpose(order).reshape(matrix_shape(kernel.shape, axes))


def from_matrices(
    matrices: Float[Array, "b m n"], shape: tuple[int, ...], axes: KernelAxes
) -> Float[Array, "..."]:
    """The kernel of the given shape that `to_matrices` turns into `matrices`."""
    order = (*axes.batch, *axes.inputs, *axes.outputs)
    moved = matrices.reshape([shape[axis] for axis in order])
    return jnp.transpose(moved, sorted(range(len(order)), key=order.__getitem__))


def to_stack(kernel: Any, axes: KernelAxes):
    """A kernel as a stack of matrices of shape (inputs, outputs), or as `Factors` of stacks."""
    if not is_factors(kernel):
        return to_matrices(jnp.asarray(kernel), axes)
    batch, rows, columns = matrix_shape(kernel_shape(kernel), axes)
    rank = kernel.left.shape[-1]
    return Factors(
        jnp.reshape(kernel.left, (batch, rows, rank)),
        jnp.reshape(kernel.right, (batch, rank, columns)),
    )
