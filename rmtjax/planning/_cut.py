"""How one kernel is cut: by the host, by a compiled program, or where it lies on many devices."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from rmtjax._axes import Factors, from_matrices, is_factors, KernelAxes, matrix_shape
from rmtjax._sharding import place_factors, place_like
from rmtjax.planning._plan import LayerPlan
from rmtjax.spectra import (
    first_directions,
    host_directions,
    host_without_last,
    multiply,
    on_host,
    Read,
    sharded_directions,
    sharded_product,
    shrink_values,
    split,
)


class Cut(NamedTuple):
    """A kernel that is to be cut, and how.

    Attributes:
      read: Gives the kernel, at each call.
      like: It, or what has its shape, dtype and place.
      row: What is planned for it.
      axes: Of the row.
      rank: Of the row.
      short: Vectors of the shorter side, of a kernel that is divided over several devices.
    """

    read: Read
    like: Any
    row: LayerPlan
    axes: KernelAxes
    rank: int
    short: np.ndarray | None = None


def cut_of(read: Read, like: Any, row: LayerPlan) -> Cut:
    assert row.axes is not None  # for the type checker: with an action come both
    assert row.rank is not None
    return Cut(read, like, row, row.axes, row.rank)


def is_eager() -> bool:
    """Whether no program is traced: a kernel may be its constant, and new arrays are not."""
    return not isinstance(jnp.zeros(()), jax.core.Tracer)


def _by_host(cut: Cut) -> bool:
    """Whether the host cuts a kernel, and no compiled program."""
    if not (on_host(cut.like) and jax.default_backend() == "cpu"):
        return False
    # Several hosts would each cut their own, and may round otherwise.
    return getattr(cut.like, "is_fully_addressable", True) and is_eager()


def _directions(cut: Cut) -> tuple[Any, ...]:
    """The directions (u, s, vt) of a kernel, as matrices or with its axes."""
    if cut.short is not None:
        return sharded_directions(cut.read(), cut.axes, cut.short)
    if _by_host(cut):
        return host_directions(cut.read, cut.axes, cut.rank)
    return first_directions(cut.read(), cut.axes, cut.rank)


def _split(cut: Cut) -> Factors:
    """The factors of each matrix of a kernel, shrunk as planned."""
    row, (u, s, vt) = cut.row, _directions(cut)
    if row.shrink is not None and row.fit is not None:
        sides = matrix_shape(row.shape, cut.axes)[1:]
        variance = jnp.reshape(row.fit.variance, s.shape[:-1])
        s = shrink_values(jnp.asarray(s), row.shrink, variance, sides)
    return split(u, s, vt)


def _fold(factors: Factors, cut: Cut) -> Factors:
    """Factors of stacks of matrices, with the axes and the dtype of the kernel."""
    axes, shape, rank = cut.axes, cut.row.shape, factors.left.shape[-1]
    batch, inputs, outputs = (
        [shape[axis] for axis in group] for group in (axes.batch, axes.inputs, axes.outputs)
    )
    left = factors.left.reshape(*batch, *inputs, rank)
    right = factors.right.reshape(*batch, rank, *outputs)
    dtypes = [jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in jax.tree.leaves(cut.like)]
    dtype = jnp.result_type(*dtypes)
    thin = Factors(left.astype(dtype), right.astype(dtype))
    if is_factors(cut.like):
        return jax.tree.map(place_like, thin, cut.like)
    return Factors(*place_factors(*thin, cut.like, axes))


@partial(jax.jit, static_argnames=("shape", "axes", "dtype"))
def _unfold(factors: Factors, shape: tuple[int, ...], axes: KernelAxes, dtype):
    """The kernel of a shape that factors of stacks of matrices stand for."""
    return from_matrices(multiply(factors), shape, axes).astype(dtype)


def _lower(cut: Cut) -> jax.Array:
    """A kernel of lower rank, in its shape and dtype."""
    row, axes, rank = cut.row, cut.axes, cut.rank
    dtype = jax.dtypes.canonicalize_dtype(cut.like.dtype)
    short = min(matrix_shape(row.shape, axes)[1:])
    if row.shrink is None and short / 2 < rank < short and _by_host(cut):
        lower = jnp.asarray(host_without_last(cut.read, axes, rank))
        return from_matrices(lower, row.shape, axes).astype(dtype)
    factors = _split(cut)
    if cut.short is not None:
        return sharded_product(*factors, axes=axes, dtype=dtype, sharding=cut.like.sharding)
    return _unfold(factors, shape=row.shape, axes=axes, dtype=dtype)


def truncate_kernel(cut: Cut):
    if not is_factors(cut.like):
        return place_like(_lower(cut), cut.like)
    left, right = _split(cut)
    pad = (0, cut.like.left.shape[-1] - cut.rank)
    left, right = jnp.pad(left, ((0, 0), (0, 0), pad)), jnp.pad(right, ((0, 0), pad, (0, 0)))
    return _fold(Factors(left, right), cut)


def factorize_kernel(cut: Cut):
    return _fold(_split(cut), cut) if cut.row.action == "factorize" else truncate_kernel(cut)


def change_leaf(read: Read, like: Any, row: LayerPlan) -> Any:
    """What is planned for one kernel, read where it is needed: it may not lie in memory.

    Args:
      read: Gives the kernel, or factors, at each call.
      like: Its shape and dtype.
      row: Its row of a plan, with an action.
    """
    return factorize_kernel(cut_of(read, like, row))
