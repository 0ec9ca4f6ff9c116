"""Kernels as sums of Tucker terms (2010.04963), in the kernel's place of a tree."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

import jax
import jax.numpy as jnp
import opt_einsum

from rmtjax import KernelAxes
from rmtjax._axes import FactoredKernel


@dataclass(frozen=True, eq=False)
class BlockTerm(FactoredKernel):
    r"""Holds a kernel as $W = \sum_c G_c \times_1 A_c^{(1)} \cdots \times_d A_c^{(d)}$.

    The authors' code for three modes returns inside its loop over blocks, and so uses the first
    block only. Here all of them count.

    Attributes:
      core: (blocks, rank, ..., rank).
      sides: Of each mode (blocks, row mode, column mode, rank).
      inputs: Sizes of the input axes of the kernel.
      outputs: Sizes of its output axes.
    """

    core: Any
    sides: tuple[Any, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense kernel."""
        return (*self.inputs, *self.outputs)

    @property
    def axes(self) -> KernelAxes:
        """The axes of the dense kernel."""
        axes, first = tuple(range(len(self.shape))), len(self.inputs)
        return KernelAxes(axes[:first], axes[first:])

    @property
    def rank(self) -> None:
        """A sum of Tucker terms does not bound the rank of the matrix."""
        return None

    @property
    def multiply_adds(self) -> int:
        """Those of one row of inputs, in the cheapest order of products."""
        rows, shapes = [side.shape[1] for side in self.sides], self._shapes()
        path = opt_einsum.contract_path(
            self._equation(True), (1, *rows), *shapes, shapes=True, optimize="optimal"
        )[1]
        sizes = path.size_dict
        terms = [term.partition("->")[0] for _, _, term, *_ in path.contraction_list]
        return sum(math.prod(sizes[i] for i in set(term) - {","}) for term in terms)

    def _shapes(self) -> list[tuple[int, ...]]:
        return [tuple(self.core.shape), *(tuple(side.shape) for side in self.sides)]

    def _equation(self, with_inputs: bool) -> str:
        """Returns the equation of the kernel, or that of a product with inputs z."""
        d = len(self.sides)
        rows, columns, bonds = (ascii_letters[2 + k * d : 2 + (k + 1) * d] for k in range(3))
        modes = zip(rows, columns, bonds, strict=True)
        terms = ["a" + bonds, *("a" + "".join(mode) for mode in modes)]
        if with_inputs:
            return f"b{rows},{','.join(terms)}->b{columns}"
        return f"{','.join(terms)}->{rows}{columns}"

    def factors(self) -> None:
        """Returns None: two factors are not thin."""
        return None

    def multiply(self) -> jax.Array:
        """Returns the dense kernel."""
        return jnp.einsum(
            self._equation(False), self.core, *self.sides, optimize="optimal"
        ).reshape(self.shape)

    def contract(self, inputs, dot, *, transposed: bool = False) -> jax.Array | None:
        """Returns the product with inputs; the matrix is not formed."""
        del dot
        if transposed:
            return None
        lead = inputs.shape[: inputs.ndim - len(self.inputs)]
        flat = inputs.reshape(math.prod(lead), *(side.shape[1] for side in self.sides))
        outputs = jnp.einsum(self._equation(True), flat, self.core, *self.sides, optimize="optimal")
        return outputs.reshape(*lead, *self.outputs)

    def convolve(self, inputs, convolve, dot) -> jax.Array:
        """Returns a convolution with the kernel, which is multiplied out: it has no thin form."""
        del dot
        return convolve(inputs, self.multiply(), tuple(range(len(self.inputs) - 1)))

    def describe(self) -> dict[str, Any]:
        """Returns the sizes of the axes of the kernel."""
        return {"inputs": list(self.inputs), "outputs": list(self.outputs)}

    @classmethod
    def restore(cls, description: Mapping[str, Any], parts: Sequence[Any]) -> "BlockTerm":
        """Returns the kernel with this core and these sides."""
        core, *sides = parts
        return cls(core, tuple(sides), tuple(description["inputs"]), tuple(description["outputs"]))


jax.tree_util.register_dataclass(BlockTerm, ("core", "sides"), ("inputs", "outputs"))


def count(modes: Sequence[tuple[int, int]], rank: int, blocks: int) -> int:
    """Returns C (R sum n_k m_k + R^d), the numbers of a kernel."""
    return blocks * (rank * sum(n * m for n, m in modes) + rank ** len(modes))


def best_blocks(modes: Sequence[tuple[int, int]], size: int) -> tuple[int, int]:
    """Returns the rank, up to 4, and the number of blocks that use most of a size."""
    blocks = {rank: max(1, size // count(modes, rank, 1)) for rank in range(1, 5)}
    fits = [rank for rank in blocks if count(modes, rank, blocks[rank]) <= size]
    rank = max(fits or [1], key=lambda rank: (count(modes, rank, blocks[rank]), rank))
    return rank, blocks[rank]


def random_block_term(
    key: jax.Array,
    modes: Sequence[tuple[int, int]],
    rank: int,
    blocks: int,
    inputs: Sequence[int] | None = None,
) -> BlockTerm:
    """Returns a kernel of normal numbers whose product has the variance 2 / inputs, for ReLU.

    Args:
      key: Of the numbers.
      modes: The pair (rows, columns) of each mode.
      rank, blocks: R and C.
      inputs: The input axes of the kernel; by default one.
    """
    rows, columns = (math.prod(side) for side in zip(*modes, strict=True))
    d = len(modes)
    deviation = (2 / rows / (blocks * rank**d)) ** (0.5 / (d + 1))
    draw = lambda i, *shape: deviation * jax.random.normal(jax.random.fold_in(key, i), shape)
    sides = tuple(draw(i, blocks, n, m, rank) for i, (n, m) in enumerate(modes))
    core = draw(d, blocks, *[rank] * d)
    return BlockTerm(core, sides, tuple(inputs or (rows,)), (columns,))
