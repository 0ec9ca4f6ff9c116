"""What a plan does to a parameter tree: truncate, factorize; and merge, the way back."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from rmtjax._axes import factored_axes, is_factors, kernel_shape
from rmtjax.planning._cost import Cost
from rmtjax.planning._cut import Cut, cut_of, factorize_kernel, is_eager, truncate_kernel
from rmtjax.planning._kernels import check_tree, map_kernels, path_name
from rmtjax.planning._plan import check_plan, LayerPlan, Plan
from rmtjax.spectra import is_spread, multiply, short_vectors


def _mismatch(leaf: Any, row: LayerPlan) -> str | None:
    """What makes a leaf another one than that of the row, or None."""
    if kernel_shape(leaf) != row.shape:
        return f"has shape {kernel_shape(leaf)}"
    if is_factors(leaf) and factored_axes(leaf) != row.axes:
        return "is factorized along other axes"
    if is_factors(leaf) and leaf.left.shape[-1] < (row.rank or 0):
        return "is factorized with a lower rank"
    return None


def _check_plan(params: PyTree, plan: Plan) -> dict[str, Any]:
    """The leaves by their paths; refuses what is no plan, and one made for another tree."""
    check_plan(plan)
    check_tree(params)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_factors)
    found = {path_name(key): leaf for key, leaf in leaves}
    for path, row in plan.items():
        seen = _mismatch(found[path], row) if path in found else "is not there"
        if row.action != "keep" and seen:
            raise ValueError(
                f"`plan` is for another tree: it has {path!r} of shape {row.shape}, which "
                f"{seen} in `params`. Make the plan from this tree with `rmtjax.plan`."
            )
    return found


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


def _is_divided(kernel: Any) -> bool:
    """Whether a kernel is to be cut where it lies; one that is whole is cut on each device."""
    return is_spread(kernel) and is_eager()


def _map_planned(change: Callable[[Cut], Any], params: PyTree, plan: Plan) -> PyTree:
    """Applies `change` to the kernels that the plan changes."""
    leaves = _check_plan(params, plan)
    chosen = {path for path, row in plan.items() if row.action != "keep"}
    # In the order of the tree, in which they are visited.
    divided = {p: leaf for p, leaf in leaves.items() if p in chosen and _is_divided(leaf)}
    rows: Any = plan  # those with an action have axes and a rank
    kernels = {path: (leaf, rows[path].axes) for path, leaf in divided.items()}
    short = short_vectors(kernels, {path: rows[path].rank for path in divided})

    def visit(path, kernel):
        cut = cut_of(lambda: kernel, kernel, plan[path])
        return change(cut._replace(short=next(short)) if path in divided else cut)

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
    return _map_planned(truncate_kernel, params, plan)


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
    thin = _map_planned(factorize_kernel, params, plan)
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
