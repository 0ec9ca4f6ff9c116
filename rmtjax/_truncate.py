"""What a plan does to a parameter tree: truncate, factorize; and merge, the way back."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import PyTree

from rmtjax import _kernels
from rmtjax._cost import Cost
from rmtjax._directions import first_directions
from rmtjax._factors import (
    factored_axes,
    Factors,
    is_factors,
    kernel_shape,
    multiply,
    shrink_values,
    split,
)
from rmtjax._host_directions import host_directions, host_without_last, Read
from rmtjax._kernels import map_kernels
from rmtjax._placing import place_factors, place_like
from rmtjax._plan import check_plan, LayerPlan, Plan
from rmtjax._typing import KernelAxes
from rmtjax._values import on_host


def _mismatch(leaf: Any, row: LayerPlan) -> str | None:
    """What makes a leaf another one than that of the row, or None."""
    if kernel_shape(leaf) != row.shape:
        return f"has shape {kernel_shape(leaf)}"
    if is_factors(leaf) and factored_axes(leaf) != row.axes:
        return "is factorized along other axes"
    if is_factors(leaf) and leaf.left.shape[-1] < (row.rank or 0):
        return "is factorized with a lower rank"
    return None


def _check_plan(params: PyTree, plan: Plan) -> None:
    """Refuses what is no plan, and one that was made for another tree."""
    check_plan(plan)
    _kernels.check_tree(params)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_factors)
    found = {_kernels.path_name(key): leaf for key, leaf in leaves}
    for path, row in plan.items():
        seen = _mismatch(found[path], row) if path in found else "is not there"
        if row.action != "keep" and seen:
            raise ValueError(
                f"`plan` is for another tree: it has {path!r} of shape {row.shape}, which "
                f"{seen} in `params`. Make the plan from this tree with `rmtjax.plan`."
            )


class _Cut(NamedTuple):
    """A kernel that is to be cut, and how.

    Attributes:
      read: Gives the kernel, at each call.
      like: It, or what has its shape, dtype and place.
      row: What is planned for it.
      axes: Of the row.
      rank: Of the row.
    """

    read: Read
    like: Any
    row: LayerPlan
    axes: KernelAxes
    rank: int


def _cut(read: Read, like: Any, row: LayerPlan) -> _Cut:
    assert row.axes is not None  # for the type checker: with an action come both
    assert row.rank is not None
    return _Cut(read, like, row, row.axes, row.rank)


def _by_host(cut: _Cut) -> bool:
    """Whether the host cuts a kernel, and no compiled program."""
    if not (on_host(cut.like) and jax.default_backend() == "cpu"):
        return False
    # A kernel may be a constant of a program, in which new arrays are traced.
    return not isinstance(jnp.zeros(()), jax.core.Tracer)


def _split(cut: _Cut) -> Factors:
    """The factors of each matrix of a kernel, shrunk as planned."""
    row, axes, rank = cut.row, cut.axes, cut.rank
    if _by_host(cut):
        u, s, vt = host_directions(cut.read, axes, rank)
    else:
        u, s, vt = first_directions(cut.read(), axes, rank)
    if row.shrink is not None and row.fit is not None:
        sides = _kernels.matrix_shape(row.shape, axes)[1:]
        s = shrink_values(jnp.asarray(s), row.shrink, jnp.ravel(row.fit.variance), sides)
    return split(u, s, vt)


def _fold(factors: Factors, cut: _Cut) -> Factors:
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
    return _kernels.from_matrices(multiply(factors), shape, axes).astype(dtype)


def _lower(cut: _Cut) -> jax.Array:
    """A kernel of lower rank, in its shape and dtype."""
    row, axes, rank = cut.row, cut.axes, cut.rank
    dtype = jax.dtypes.canonicalize_dtype(cut.like.dtype)
    short = min(_kernels.matrix_shape(row.shape, axes)[1:])
    if row.shrink is None and short / 2 < rank < short and _by_host(cut):
        lower = jnp.asarray(host_without_last(cut.read, axes, rank))
        return _kernels.from_matrices(lower, row.shape, axes).astype(dtype)
    return _unfold(_split(cut), shape=row.shape, axes=axes, dtype=dtype)


def _truncate_kernel(cut: _Cut):
    if not is_factors(cut.like):
        return place_like(_lower(cut), cut.like)
    left, right = _split(cut)
    pad = (0, cut.like.left.shape[-1] - cut.rank)
    left, right = jnp.pad(left, ((0, 0), (0, 0), pad)), jnp.pad(right, ((0, 0), pad, (0, 0)))
    return _fold(Factors(left, right), cut)


def _factorize_kernel(cut: _Cut):
    return _fold(_split(cut), cut) if cut.row.action == "factorize" else _truncate_kernel(cut)


def change_leaf(read: Read, like: Any, row: LayerPlan) -> Any:
    """What is planned for one kernel, read where it is needed: it may not lie in memory.

    Args:
      read: Gives the kernel, or factors, at each call.
      like: Its shape and dtype.
      row: Its row of a plan, with an action.
    """
    return _factorize_kernel(_cut(read, like, row))


def in_place(row: LayerPlan, cause: str | None = None) -> LayerPlan:
    """What is planned for a kernel, but that it keeps its shape."""
    if row.action != "factorize":
        return row
    reason = row.reason.replace("factorized", "truncated", 1)
    if cause:
        head, words = reason.split(": ", 1)
        reason = f"{head}: {cause} ({words})"
    cost = row.cost and Cost(*row.cost[:3], *row.cost[:3])
    return row._replace(action="truncate", reason=reason, cost=cost)


def _map_planned(change: Callable[[_Cut], Any], params: PyTree, plan: Plan) -> PyTree:
    """Applies `change` to the kernels that the plan changes."""
    _check_plan(params, plan)
    chosen = {path for path, row in plan.items() if row.action != "keep"}
    visit = lambda path, kernel: change(_cut(lambda: kernel, kernel, plan[path]))
    return map_kernels(visit, params, chosen, is_leaf=is_factors)


def truncate(params: PyTree, plan: Plan) -> PyTree:
    """Lowers the rank of each kernel as planned; shapes and dtypes stay.

    Factors keep their shapes too. Their last directions become 0 in both, which no gradient
    moves again.

    Args:
      params: The tree that the plan was made from, or one of the same shapes.
      plan: From `rmtjax.plan`. Works under `jit` with the plan held fixed; derivatives do not go
        through it.

    Returns:
      The tree; leaves that are kept are the same objects.

    Raises:
      ValueError: The plan is for another tree.
      TypeError: It is no plan.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(16))
      >>> lower = rmtjax.truncate(params, plan)
      >>> lower["kernel"].shape, int(jax.numpy.linalg.matrix_rank(lower["kernel"]))
      ((80, 60), 16)
    """
    return _map_planned(_truncate_kernel, params, plan)


def factorize(params: PyTree, plan: Plan) -> PyTree:
    """Replaces each kernel by two thin factors where the plan says they are smaller.

    The tree computes what `truncate(params, plan)` computes: kernels whose factors would
    not be smaller are truncated in place. Factors are replaced by thinner ones. Run it with
    `rmtjax.linen.apply`.

    Args:
      params: The tree that the plan was made from, or one of the same shapes.
      plan: From `rmtjax.plan`.

    Returns:
      The smaller tree, with `Factors(left, right)` in the place of a kernel, and of its box where
      it had one of `nn.with_partitioning`.

    Raises:
      ValueError: The plan is for another tree.
      TypeError: It is no plan.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(16))
      >>> rmtjax.factorize(params, plan)["kernel"].left.shape
      (80, 16)
    """
    # The box of `nn.with_partitioning` names the axes of the kernel, which are no longer there.
    boxed = lambda node: hasattr(node, "replace_boxed") and is_factors(node.value)
    thin = _map_planned(_factorize_kernel, params, plan)
    unbox = lambda node: node.value if boxed(node) else node
    return jax.tree.map(unbox, thin, is_leaf=lambda node: boxed(node) or is_factors(node))


def merge(params: PyTree) -> PyTree:
    """Multiplies all factors out: dense kernels again, batch and input axes first.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> factors = rmtjax.factorize_matrix(jnp.ones((6, 4)), 1)
      >>> rmtjax.merge({"kernel": factors})["kernel"].shape
      (6, 4)
    """
    dense = lambda leaf: multiply(leaf) if is_factors(leaf) else leaf
    return jax.tree.map(dense, params, is_leaf=is_factors)
