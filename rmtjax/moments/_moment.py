"""Sums over the rows that a kernel is multiplied with, in compiled programs."""

import itertools
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from rmtjax._sharding import by_compiler

# From so many columns on, a Gram matrix is made of two blocks of rows, and of three, so that a
# quarter of its products, and a third, are left out: they repeat others.
_WIDE = 256, 512


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "total", "second", "third", "fourth"],
    meta_fields=[],
)
@dataclass(frozen=True, eq=False)
class Moment:
    r"""Sums over the rows $x$ that the matrices of a kernel are multiplied with.

    The sums of two sets of rows are added by `a + b`. Each has a leading axis for the matrices of
    a stack, of length 1 for a kernel that is not a stack.

    Attributes:
      rows: Number of rows $N$.
      total: $\sum x$.
      second: $\sum x x^T$; of a table of embeddings, whose rows $x$ have a single 1, its diagonal.
      third: $\sum |x|^2 x$, from which the shrinkage of centred moments is computed.
      fourth: $\sum |x|^4$, from which the shrinkage of moments is computed.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax
      >>> module, x = nn.Dense(3), jnp.eye(4)
      >>> variables = module.init(jax.random.key(0), x)
      >>> moment = rmtjax.linen.moments(module, variables, [x])["kernel"]
      >>> int(moment.rows[0]), moment.second.shape
      (4, (1, 4, 4))
    """

    # Arrays of JAX or NumPy. JAX also makes such trees of other leaves, as it does of any tree.
    rows: Any  # (stack)
    total: Any  # (stack, m)
    second: Any  # (stack, m, m), or (stack, m) for a diagonal
    third: Any  # (stack, m)
    fourth: Any  # (stack)

    def __add__(self, other: "Moment") -> "Moment":
        """Returns the sums over the rows of both."""
        if not isinstance(other, Moment):
            return NotImplemented
        if np.shape(self.second) != np.shape(other.second):
            raise ValueError(
                f"`+` needs moments of one kernel, got shapes {np.shape(self.second)} and "
                f"{np.shape(other.second)}."
            )
        return jax.tree.map(lambda a, b: a + b, self, other)

    @property
    def is_diagonal(self) -> bool:
        """Returns True for the frequencies of the rows of a table of embeddings."""
        return np.ndim(self.second) == 2

    @property
    def size(self) -> int:
        """The number of inputs $m$ of the kernel."""
        return np.shape(self.total)[-1]

    @property
    def mean(self) -> Float[np.ndarray, "stack m"]:
        r"""The mean $\frac1N \sum x$, in float64."""
        return np.asarray(self.total, np.float64) / np.asarray(self.rows)[:, None]

    def to_host(self) -> "Moment":
        """Returns the sums as NumPy arrays; the rows in 64 bits, since they are added up."""
        arrays: Any = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        return Moment(**arrays | {"rows": arrays["rows"].astype(np.int64)})


def _gram(rows: Float[Array, "n m"]) -> Float[Array, "m m"]:
    """Returns the Gram matrix of rows; products of bfloat16 are exact in float32."""
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    options = {"precision": lax.Precision.HIGHEST, "preferred_element_type": dtype}
    product = lambda first, second: jnp.matmul(first.T, second, **options)
    size = rows.shape[1]
    count = sum(size >= width for width in _WIDE) + 1
    if count == 1:
        return product(rows, rows)
    # The products below the diagonal blocks repeat those above.
    places = [size * place // count for place in range(count + 1)]
    parts = [
        jnp.pad(product(rows[:, begin:end], rows[:, begin:]), ((0, 0), (begin, 0)))
        for begin, end in itertools.pairwise(places)
    ]
    whole = jnp.concatenate(parts)
    return jnp.triu(whole) + jnp.triu(whole, 1).T


def _sums(rows: Float[Array, "n m"]) -> tuple[Array, ...]:
    wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
    norms = jnp.sum(wide**2, axis=1)
    # As a product: fused, the norms would be computed again for each column.
    weights = jnp.stack([jnp.ones_like(norms), norms])
    total, third = jnp.matmul(weights, wide, precision=lax.Precision.HIGHEST)
    return total, _gram(rows), third, jnp.sum(norms**2)


def sums_of_rows(rows: Float[Array, "stack n m"]) -> Moment:
    """Returns the sums over rows; under `jit`, rows may be divided over devices."""

    def find(rows):
        if len(rows) > 1:
            return jax.vmap(_sums)(rows)
        # A product of stacks takes twice as long on CPU.
        return tuple(one[None] for one in _sums(rows[0]))

    stack, count, _ = rows.shape
    return Moment(jnp.full(stack, count, jnp.int32), *by_compiler(find, rows, out=(None,) * 4))


def sums_of_lookups(indices: Int[Array, "..."], size: int) -> Moment:
    """Returns the sums over the lookups of rows of a table with `size` rows."""
    flat = indices.reshape(-1)
    ones = jnp.ones(flat.shape, jnp.float32)
    count = lambda flat, ones: jnp.zeros(size, jnp.float32).at[flat].add(ones, mode="drop")
    counts = by_compiler(count, flat, ones)[None]
    # Rows of a single 1 have length 1, and are their own squares.
    rows = jnp.full(1, flat.size, jnp.int32)
    return Moment(rows, counts, counts, counts, rows.astype(jnp.float32))
