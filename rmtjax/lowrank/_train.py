"""Kernels held as tensor trains: operators (MPO) and states (MPS)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from rmtjax._axes import FactoredKernel, Factors, KernelAxes
from rmtjax.spectra import lift

Modes = tuple[tuple[int, int], ...]


def _einsum(equation: str, *arrays: Array) -> Array:
    return jnp.einsum(equation, *arrays, precision=lax.Precision.HIGHEST)


def _expand(cores: Sequence[Array]) -> Array:
    """Returns the product (*batch, r, rows, columns, r') of cores that follow one another."""
    product, *others = map(lift, cores)
    for core in others:
        *batch, first, rows, columns, _ = product.shape
        product = _einsum("...aNMr,...rnmb->...aNnMmb", product, core)
        *_, n, m, last = core.shape
        product = product.reshape(*batch, first, rows * n, columns * m, last)
    return product


def _sweep(hidden: Array, cores: Sequence[Array], dot) -> Array:
    """Contracts (samples, rows, bond) with one core after another; returns (samples, columns)."""
    hidden = hidden.reshape(len(hidden), *(core.shape[1] for core in cores), hidden.shape[-1])
    for core in cores:
        # The rows that are left come first, then the columns so far, then the bond.
        hidden = dot(hidden, core, ((1, hidden.ndim - 1), (1, 0)))
    return hidden.reshape(len(hidden), -1)


def _reverse(array: Array, modes: Sequence[int]) -> Array:
    """Returns (samples, size) with the modes of the size in reverse order."""
    places = range(len(modes), 0, -1)
    return array.reshape(len(array), *modes).transpose(0, *places).reshape(len(array), -1)


@dataclass(frozen=True, eq=False)
class TensorTrain(FactoredKernel):
    r"""Holds a kernel as a chain of cores, in the kernel's place of a tree.

    $W_{(i_1 \dots i_d), (j_1 \dots j_d)} = A_1[i_1, j_1] A_2[i_2, j_2] \cdots A_d[i_d, j_d]$, a
    product of matrices whose sides are the bonds. Core k has a mode $n_k$ of the rows and a mode
    $m_k$ of the columns; the first modes are the slowest. As an operator (MPO) a core has both. As
    a state (MPS) it has one, and those of the rows come first. The bond between rows and columns
    of a state is the rank of the matrix, and the halves are two thin factors.

    The window of a convolution is one mode of the rows, of the first core.

    Attributes:
      cores: Arrays (bond, row mode, column mode, next bond); batch axes first. The outer bonds
        are 1.
      inputs: Sizes of the input axes of the kernel.
      outputs: Sizes of its output axes.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> modes = rmtjax.lowrank.operator_modes((2, 2), (2, 2))
      >>> train = rmtjax.lowrank.tensor_train(jnp.eye(4), modes).train
      >>> train.bonds, train.shape
      ((4,), (4, 4))
    """

    cores: tuple[Any, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def modes(self) -> Modes:
        """The modes of rows and columns of each core."""
        return tuple((core.shape[-3], core.shape[-2]) for core in self.cores)

    @property
    def bonds(self) -> tuple[int, ...]:
        """The bonds between the cores."""
        return tuple(core.shape[-1] for core in self.cores[:-1])

    @property
    def _batch(self) -> tuple[int, ...]:
        return tuple(self.cores[0].shape[:-4])

    @property
    def _middle(self) -> int | None:
        """The number of cores of the rows; None for an operator."""
        first = next((k for k, (_, m) in enumerate(self.modes) if m > 1), len(self.cores))
        return first if all(n == 1 for n, _ in self.modes[first:]) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense kernel."""
        return (*self._batch, *self.inputs, *self.outputs)

    @property
    def axes(self) -> KernelAxes:
        """The axes of the dense kernel."""
        batch, last = len(self._batch), len(self.shape)
        first, axes = batch + len(self.inputs), tuple(range(last))
        return KernelAxes(axes[batch:first], axes[first:], axes[:batch])

    @property
    def rank(self) -> int | None:
        """The bond between rows and columns; None for an operator."""
        middle = self._middle
        return None if middle is None else (1, *self.bonds, 1)[middle]

    @property
    def multiply_adds(self) -> int:
        """Those of one row of inputs: by the two factors of a state, or core by core."""
        if self.rank is not None:
            return self.rank * (math.prod(self.inputs) + math.prod(self.outputs))
        left, total, done = math.prod(self.inputs), 0, 1
        for core in self.cores:
            left //= core.shape[-3]
            total += left * done * math.prod(core.shape[-4:])
            done *= core.shape[-2]
        return total

    def factors(self) -> Factors | None:
        """Returns the two halves of a state, each multiplied out; None for an operator."""
        middle = self._middle
        if middle is None:
            return None
        batch, rank, dtype = self._batch, self.rank, self.cores[0].dtype
        eye = jnp.ones((*batch, 1, 1, 1, 1), dtype)  # for a half without cores
        left = _expand(self.cores[:middle] or [eye]).reshape(*batch, *self.inputs, rank)
        right = _expand(self.cores[middle:] or [eye]).reshape(*batch, rank, *self.outputs)
        return Factors(left.astype(dtype), right.astype(dtype))

    def multiply(self) -> Array:
        """Returns the dense kernel."""
        return _expand(self.cores).reshape(self.shape).astype(self.cores[0].dtype)

    def contract(self, inputs, dot, *, transposed: bool = False) -> Array | None:
        """Returns the product with inputs, core by core. The matrix is not formed."""
        sides, modes = (self.inputs, self.outputs), list(zip(*self.modes, strict=True))
        lead = inputs.shape[: inputs.ndim - len(sides[transposed])]
        flat = inputs.reshape(math.prod(lead), -1)
        if not transposed:
            outputs = _sweep(flat[..., None], self.cores, dot)
        else:  # from the last core to the first, so that a state ends in its smallest bonds too
            cores = [core.transpose(3, 2, 1, 0) for core in reversed(self.cores)]
            turned = _reverse(flat, modes[1])
            outputs = _reverse(_sweep(turned[..., None], cores, dot), modes[0][::-1])
        return outputs.reshape(*lead, *sides[not transposed])

    def convolve(self, inputs, convolve, dot) -> Array | None:
        """Returns a convolution: each channel with the window, then the product of channels."""
        *window, channels = self.inputs
        (head, *cores), size = self.cores, math.prod(window)
        if head.shape[1:3] != (size, 1):
            if size > 1 or len(self.outputs) > 1:
                return None
            head, cores = jnp.ones((1, 1, 1, 1), head.dtype), self.cores
        samples, bond = len(inputs), head.shape[-1]
        each = inputs.reshape(samples * channels, 1, *inputs.shape[2:])
        part = head.reshape(*window, 1, bond)
        hidden = convolve(each, part, tuple(range(len(window))))
        hidden = hidden.reshape(samples, channels, bond, *hidden.shape[2:])
        hidden = jnp.moveaxis(hidden, (1, 2), (-2, -1))
        lead = hidden.shape[:-2]
        outputs = _sweep(hidden.reshape(math.prod(lead), channels, bond), cores, dot)
        return jnp.moveaxis(outputs.reshape(*lead, -1), -1, 1)

    def describe(self) -> dict[str, Any]:
        """Returns the sizes of the axes of the kernel."""
        return {"inputs": list(self.inputs), "outputs": list(self.outputs)}

    @classmethod
    def restore(cls, description: Mapping[str, Any], parts: Sequence[Any]) -> "TensorTrain":
        """Returns the kernel with these cores; raises ValueError if they do not fit."""
        train = cls(tuple(parts), *(tuple(description[side]) for side in ("inputs", "outputs")))
        shapes = [tuple(core.shape) for core in parts]
        sides = [math.prod(side) for side in (train.inputs, train.outputs)]
        modes = [math.prod(shape[axis] for shape in shapes if len(shape) > 3) for axis in (-3, -2)]
        chain = [1, *(shape[-1] for shape in shapes)]
        firsts = [*(shape[-4] for shape in shapes if len(shape) > 3), 1]
        if {len(shape) for shape in shapes} - {4, 5} or sides != modes or chain != firsts:
            raise ValueError(f"cores of shapes {shapes} do not give {dict(description)!r:.60}")
        return train


jax.tree_util.register_dataclass(TensorTrain, ("cores",), ("inputs", "outputs"))
