"""Kernels seen as stacks of matrices: which axes are the rows, and which are the columns.

A matrix is a kernel with its input axes merged into rows and its output axes into columns. A
kernel may be stored as the product of two thin factors, or of other parts, in the same place of
the tree.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from rmtjax._text import brief_fields, InParts

Kernel = Float[Array, "..."] | Float[np.ndarray, "..."]
_is_numpy = lambda leaf: isinstance(leaf, np.ndarray)


class KernelAxes(NamedTuple):
    """Names the axes of a kernel that are rows of its matrix, and those that are columns.

    Attributes:
      inputs: Axes that are contracted with the inputs, in order: the rows.
      outputs: Axes that the outputs carry, in order: the columns.
      batch: Axes over which the kernel is a stack of matrices, as under `nn.scan`.

    Examples:
      >>> import rmtjax
      >>> rmtjax.KernelAxes(inputs=(0, 1, 2), outputs=(3,)).order  # a convolution
      (0, 1, 2, 3)
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """All axes, in the order of a stack of matrices."""
        return (*self.batch, *self.inputs, *self.outputs)


class _Factors(NamedTuple):
    left: Float[Array, "*inputs r"]
    right: Float[Array, "*r_outputs"]


class Factors(InParts, _Factors):
    """Holds a kernel as the product of two thinner ones, in the kernel's place of a tree.

    Attributes:
      left: The input axes of the kernel, then the rank; batch axes first.
      right: The rank, then the output axes of the kernel; batch axes first.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> rmtjax.factorize_matrix(jnp.ones((6, 4)), 1).right.shape
      (1, 4)
    """

    __slots__ = ()
    __repr__ = brief_fields


class FactoredKernel(InParts):
    """A kernel held as other parts than two factors, in the kernel's place of a tree: a protocol.

    A subclass is a pytree whose leaves are its parts, with the batch axes first in each. Its other
    fields describe it: JSON holds them. The dense kernel has its axes in the order batch, inputs,
    outputs. Layers of linen and nnx run it as `factors` if it has these. Else each product with it
    is a call of `contract`, and each convolution one of `convolve`.
    """

    kinds: ClassVar[dict[str, type["FactoredKernel"]]] = {}  # by name, for checkpoints

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        FactoredKernel.kinds[cls.__name__] = cls

    @property
    def axes(self) -> KernelAxes:
        """The axes of the dense kernel."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense kernel."""
        raise NotImplementedError

    @property
    def rank(self) -> int | None:
        """The rank that the parts allow; None if they do not bound it."""
        raise NotImplementedError

    @property
    def multiply_adds(self) -> int:
        """Those for one row of inputs."""
        raise NotImplementedError

    def factors(self) -> Factors | None:
        """Returns two factors with the same product; None if two are not thin."""
        raise NotImplementedError

    def multiply(self) -> Array:
        """Returns the dense kernel, in the dtype of the parts."""
        raise NotImplementedError

    def contract(self, inputs: Array, dot: Callable, *, transposed: bool = False) -> Array | None:
        """Returns the product with inputs, whose last axes are the rows; None to multiply it out.

        `dot(lhs, rhs, axes)` multiplies. A transposed product is one with the columns.
        """
        del inputs, dot, transposed

    def convolve(self, inputs: Array, convolve: Callable, dot: Callable) -> Array | None:
        """Convolves inputs (samples, channels, *window axes); None to multiply the kernel out.

        `convolve(inputs, kernel, axes)` convolves along some of the window axes, with a kernel of
        these axes, inputs and outputs.
        """
        del inputs, convolve, dot

    def describe(self) -> dict[str, Any]:
        """Returns what `restore` needs besides the parts, as JSON has it."""
        raise NotImplementedError

    @classmethod
    def restore(cls, description: Mapping[str, Any], parts: Sequence[Any]) -> "FactoredKernel":
        """Returns the kernel with these parts, in the order of its leaves."""
        raise NotImplementedError


def is_factors(leaf: Any) -> TypeGuard[Factors | FactoredKernel]:
    """Returns True for a kernel in parts: the `is_leaf` of `jax.tree.map` for parameter trees."""
    return isinstance(leaf, Factors | FactoredKernel)


def as_pair(leaf: Any) -> Any:
    """Returns a kernel in other parts as two thin factors, if it has these; other leaves as is."""
    return (leaf.factors() or leaf) if isinstance(leaf, FactoredKernel) else leaf


def factored_axes(factors: Factors | FactoredKernel) -> KernelAxes:
    """Returns the axes of the dense kernel that `factors` stand for, batch axes first."""
    if isinstance(factors, FactoredKernel):
        return factors.axes
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
    if not isinstance(kernel, Factors):
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


def to_stack(kernel: Any, axes: KernelAxes) -> Any:
    """Returns a kernel as a JAX stack of matrices, or as `Factors` of stacks."""
    kernel = as_pair(kernel)
    if isinstance(kernel, FactoredKernel):
        kernel = kernel.multiply()
    if not isinstance(kernel, Factors):
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


def native(leaf: Any) -> Any:
    """Returns a NumPy array or number in the byte order and the precisions of JAX."""
    if not isinstance(leaf, np.ndarray | np.generic) or leaf.dtype.kind not in "fiuc":
        return leaf
    known = {"g": "f8", "G": "c16"}.get(leaf.dtype.char, leaf.dtype.newbyteorder("="))
    return leaf.astype(known, copy=False)


@dataclass(frozen=True, eq=False)
class KernelLeaf:
    """A leaf of a parameter tree that was chosen as a kernel."""

    path: str  # its place in the tree, such as "Dense_0/kernel"
    # A JAX or NumPy array, `Factors`, a `jax.ShapeDtypeStruct`, or any object with `shape`, `dtype`
    # and `__array__`, such as a tensor that is still in a file.
    leaf: Any

    def __post_init__(self):
        # JAX has neither other byte orders, as in files of HDF5 and FITS, nor long doubles.
        arrays = jax.tree.leaves(self.leaf, is_leaf=_is_numpy)
        if any(native(array) is not array for array in arrays):
            object.__setattr__(self, "leaf", jax.tree.map(native, self.leaf, is_leaf=_is_numpy))

    @property
    def is_factored(self) -> bool:
        """Returns True if the leaf is `Factors`, or a kernel in other parts."""
        return is_factors(self.leaf)

    @property
    def in_parts(self) -> str | None:
        """The kind of a kernel in other parts than `Factors`, which is left as it is; or None."""
        return type(self.leaf).__name__ if isinstance(self.leaf, FactoredKernel) else None

    @property
    def rank(self) -> int | None:
        """The rank of factors; None for a dense kernel, and for parts that do not bound it."""
        if isinstance(self.leaf, FactoredKernel):
            return self.leaf.rank
        return self.leaf.left.shape[-1] if isinstance(self.leaf, Factors) else None

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense kernel."""
        return kernel_shape(self.leaf)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the leaf; of factors, the one that all promote to."""
        parts = jax.tree.leaves(self.leaf) if is_factors(self.leaf) else [self.leaf]
        dtypes = [getattr(part, "dtype", None) or jnp.result_type(part) for part in parts]
        return np.dtype(functools.reduce(jnp.promote_types, dtypes))


@dataclass(frozen=True, eq=False)
class MatrixView(KernelLeaf):
    """A kernel seen as a stack of matrices, each of shape (rows, columns)."""

    axes: KernelAxes  # of the dense kernel

    def __post_init__(self):
        super().__post_init__()
        check_axes(self.path, self.axes, len(self.shape))

    @functools.cached_property
    def stack(self) -> int:
        """The number of matrices: 1 if the kernel is not a stack."""
        return matrix_shape(self.shape, self.axes)[0]

    @functools.cached_property
    def rows(self) -> int:
        """The number of inputs of each matrix."""
        return matrix_shape(self.shape, self.axes)[1]

    @functools.cached_property
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
