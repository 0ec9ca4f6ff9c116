"""Kernels seen as stacks of matrices: which axes are the rows, and which are the columns.

A matrix is a kernel with its input axes merged into rows and its output axes into columns. A
kernel may be stored as the product of two thin factors, in the same place of the tree.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

Kernel = Float[Array, "..."] | Float[np.ndarray, "..."]


class KernelAxes(NamedTuple):
    """Names the axes of a kernel that are rows of its matrix, and those that are columns.

    Attributes:
      inputs: Axes that are contracted with the inputs, in order: the rows.
      outputs: Axes that the outputs carry, in order: the columns.
      batch: Axes over which the kernel is a stack of matrices, as under `nn.scan`.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """All axes, in the order of a stack of matrices."""
        return (*self.batch, *self.inputs, *self.outputs)


class Factors(NamedTuple):
    """Holds a kernel as the product of two thinner ones, in the kernel's place of a tree.

    Attributes:
      left: The input axes of the kernel, then the rank; batch axes first.
      right: The rank, then the output axes of the kernel; batch axes first.
    """

    left: Float[Array, "*inputs r"]
    right: Float[Array, "*r_outputs"]


def is_factors(leaf: Any) -> TypeGuard[Factors]:
    """Returns True for `Factors`: the `is_leaf` of `jax.tree.map` for parameter trees."""
    return isinstance(leaf, Factors)


def factored_axes(factors: Factors) -> KernelAxes:
    """Returns the axes of the dense kernel that `factors` stand for, batch axes first."""
    left, right = factors
    # Both factors have three axes or more only if a batch comes first in both, or if the kernel
    # has several input and several output axes. The place of the rank distinguishes these.
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
    """Returns the shape of a kernel; of factors, the shape of their product."""
    if not is_factors(kernel):
        return tuple(kernel.shape) if hasattr(kernel, "shape") else np.shape(kernel)
    return kernel.left.shape[:-1] + kernel.right.shape[1 + len(factored_axes(kernel).batch) :]


def check_axes(path: str, axes: KernelAxes, ndim: int) -> None:
    """Raises ValueError if `axes` do not name each axis of a leaf once."""
    if sorted(axes.order) != list(range(ndim)):
        raise ValueError(f"`axes` must name each of the {ndim} axes of {path!r} once, got {axes}.")


def matrix_shape(shape: tuple[int, ...], axes: KernelAxes) -> tuple[int, int, int]:
    """Returns the shape (stack, rows, columns) of a kernel seen as a stack of matrices."""
    side = lambda group: math.prod(shape[axis] for axis in group)
    return side(axes.batch), side(axes.inputs), side(axes.outputs)


def to_matrices(kernel: Kernel, axes: KernelAxes) -> Any:
    """Returns a kernel as a stack (stack, rows, columns), in JAX or NumPy as it was given."""
    return kernel.transpose(axes.order).reshape(matrix_shape(kernel.shape, axes))


def to_stack(kernel: Any, axes: KernelAxes):
    """Returns a kernel as a JAX stack of matrices, or as `Factors` of stacks."""
    if not is_factors(kernel):
        return to_matrices(jnp.asarray(kernel), axes)
    stack, rows, columns = matrix_shape(kernel_shape(kernel), axes)
    left, right = (jnp.asarray(factor) for factor in kernel)
    rank = left.shape[-1]
    return Factors(left.reshape(stack, rows, rank), right.reshape(stack, rank, columns))


def join_stacks(stacks: Sequence[Any]) -> Any:
    """Returns one stack of the matrices of several: trees of NumPy arrays with a leading axis."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *stacks)


def split_stacks(joined: PyTree, sizes: Sequence[int]) -> list[Any]:
    """Returns the stacks, of these sizes, that `join_stacks` has joined."""
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [jax.tree.map(operator.itemgetter(part), joined) for part in parts]


@dataclass(frozen=True, eq=False)
class KernelLeaf:
    """A leaf of a parameter tree that was chosen as a kernel."""

    path: str  # its place in the tree, such as "Dense_0/kernel"
    # A JAX or NumPy array, `Factors`, a `jax.ShapeDtypeStruct`, or any object with `shape`, `dtype`
    # and `__array__`, such as a tensor that is still in a file.
    leaf: Any

    @property
    def is_factored(self) -> bool:
        """Returns True if the leaf is `Factors`."""
        return is_factors(self.leaf)

    @property
    def rank(self) -> int | None:
        """The rank of factors; None for a dense kernel."""
        return self.leaf.left.shape[-1] if is_factors(self.leaf) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense kernel."""
        return kernel_shape(self.leaf)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the leaf; of factors, the one that both promote to."""
        factors = self.leaf if is_factors(self.leaf) else (self.leaf, self.leaf)
        dtypes = (getattr(leaf, "dtype", None) or jnp.result_type(leaf) for leaf in factors)
        return np.dtype(jnp.promote_types(*dtypes))


@dataclass(frozen=True, eq=False)
class MatrixView(KernelLeaf):
    """A kernel seen as a stack of matrices, each of shape (rows, columns)."""

    axes: KernelAxes  # of the dense kernel

    def __post_init__(self):
        check_axes(self.path, self.axes, len(self.shape))

    @property
    def stack(self) -> int:
        """The number of matrices: 1 if the kernel is not a stack."""
        return matrix_shape(self.shape, self.axes)[0]

    @property
    def rows(self) -> int:
        """The number of inputs of each matrix."""
        return matrix_shape(self.shape, self.axes)[1]

    @property
    def columns(self) -> int:
        """The number of outputs of each matrix."""
        return matrix_shape(self.shape, self.axes)[2]

    @property
    def short(self) -> int:
        """The shorter side: the number of singular values of each matrix."""
        return min(self.rows, self.columns)

    @property
    def long(self) -> int:
        """The longer side."""
        return max(self.rows, self.columns)

    @property
    def full_rank(self) -> int:
        """The largest rank the kernel can have: the short side, or less if it is factored."""
        return min(self.short, self.rank or self.short)

    def matrices(self) -> Any:
        """Returns the stack (stack, rows, columns), or `Factors` of stacks, in JAX."""
        return to_stack(self.leaf, self.axes)

    def from_matrices(self, matrices: Float[Array, "b m n"]) -> Float[Array, "..."]:
        """Returns the dense kernel whose stack of matrices is given."""
        moved = matrices.reshape([self.shape[axis] for axis in self.axes.order])
        return jnp.transpose(moved, np.argsort(self.axes.order).tolist())


Views = Mapping[str, MatrixView]  # by the path of the kernel
