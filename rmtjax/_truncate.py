"""What a plan does to a parameter tree: truncate, factorize; and merge, the way back."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rmtjax import _kernels
from rmtjax._factors import compose, factorize_stack, Factors, is_factors, multiply, svd
from rmtjax._kernels import map_kernels
from rmtjax._plan import Plan
from rmtjax._typing import KernelAxes


def _check_plan(params: PyTree, plan: Plan) -> None:
    """Refuses a plan that was made for another tree."""
    found = {
        _kernels.path_name(key): "is factorized" if is_factors(leaf) else jnp.shape(leaf)
        for key, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_factors)
    }
    for path, row in plan.items():
        seen = found.get(path, "is not there")
        if row.action != "keep" and seen != row.shape:
            seen = seen if isinstance(seen, str) else f"has shape {seen}"
            raise ValueError(
                f"`plan` is for another tree: it has {path!r} of shape {row.shape}, which "
                f"{seen} in `params`. Make the plan from this tree with `rmtjax.plan`."
            )


def _truncate_kernel(kernel, axes: KernelAxes, rank: int):
    matrices = _kernels.to_matrices(kernel, axes)
    lower = compose(*svd(matrices), rank)
    return _kernels.from_matrices(lower, kernel.shape, axes).astype(kernel.dtype)


def _factorize_kernel(kernel, axes: KernelAxes, rank: int) -> Factors:
    left, right = factorize_stack(_kernels.to_matrices(kernel, axes), rank)
    batch, inputs, outputs = (
        [kernel.shape[axis] for axis in group] for group in (axes.batch, axes.inputs, axes.outputs)
    )
    return Factors(left.reshape(*batch, *inputs, rank), right.reshape(*batch, rank, *outputs))


def _map_planned(change, params: PyTree, plan: Plan) -> PyTree:
    """Applies `change(row)(kernel, axes, rank)` to the kernels that the plan changes."""
    _check_plan(params, plan)

    def visit(path, kernel):
        row = plan[path]
        assert row.axes is not None  # for the type checker: with an action come both
        assert row.rank is not None
        return change(row)(jnp.asarray(kernel), row.axes, row.rank)

    chosen = {path for path, row in plan.items() if row.action != "keep"}
    return map_kernels(visit, params, chosen, is_leaf=is_factors)


def truncate(params: PyTree, plan: Plan) -> PyTree:
    """Lowers the rank of each kernel as planned; shapes and dtypes stay.

    Args:
      params: The tree that the plan was made from, or one of the same shapes.
      plan: From `rmtjax.plan`. Works under `jit` with the plan held fixed.

    Returns:
      The tree; leaves that are kept are the same objects.

    Raises:
      ValueError: The plan is for another tree.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(16))
      >>> lower = rmtjax.truncate(params, plan)
      >>> lower["kernel"].shape, int(jax.numpy.linalg.matrix_rank(lower["kernel"]))
      ((80, 60), 16)
    """
    return _map_planned(lambda row: _truncate_kernel, params, plan)


def factorize(params: PyTree, plan: Plan) -> PyTree:
    """Replaces each kernel by two thin factors where the plan says they are smaller.

    The tree computes what `truncate(params, plan)` computes: kernels whose factors would
    not be smaller are truncated in place. Run it with `rmtjax.linen.apply`.

    Args:
      params: The tree that the plan was made from, or one of the same shapes.
      plan: From `rmtjax.plan`.

    Returns:
      The smaller tree, with `Factors(left, right)` in the place of a kernel.

    Raises:
      ValueError: The plan is for another tree.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(16))
      >>> rmtjax.factorize(params, plan)["kernel"].left.shape
      (80, 16)
    """
    factorized = lambda row: row.action == "factorize"
    change = lambda row: _factorize_kernel if factorized(row) else _truncate_kernel
    return _map_planned(change, params, plan)


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
