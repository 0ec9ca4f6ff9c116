"""Applies a plan to a parameter tree: truncate, factorize, and merge, the way back."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from rmtjax._axes import Factors, is_factors, KernelAxes, MatrixView, to_stack, Views
from rmtjax._modes import in_usual_modes
from rmtjax._progress import Progress, showing, Step
from rmtjax._sharding import place_factors, place_like
from rmtjax._types import check_type
from rmtjax.moments import Moments
from rmtjax.noise import equalize_stack
from rmtjax.planning._kernels import check_tree, is_abstract, leaves_by_path, map_kernels
from rmtjax.planning._outputs import along, bias_of, in_order, second_of, turn
from rmtjax.planning._rows import check_plan, check_plan_fits, Factorized, Plan, Truncated
from rmtjax.spectra import (
    keeps_most,
    lift,
    live_sides,
    matmul,
    multiply,
    output_factors,
    product,
    shrink_values,
    singular_vectors,
    split,
    without_last,
)

Rows = Mapping[str, Truncated | Factorized]


def _cast(factors: Factors, view: MatrixView) -> Factors:
    """Returns factors in the dtype of a kernel, placed as it is."""
    dtype = jax.dtypes.canonicalize_dtype(view.dtype)
    left, right = (factor.astype(dtype) for factor in factors)
    if isinstance(view.leaf, Factors):
        return Factors(place_like(left, view.leaf.left), place_like(right, view.leaf.right))
    return Factors(*place_factors(left, right, view.leaf, view.axes))


def _pad(factors: Factors, view: MatrixView) -> Factors:
    """Returns factors with zeros up to the rank that a factored kernel has."""
    left, right = factors
    missing = (0, (view.rank or 0) - left.shape[-1])
    widths = lambda array, axis: [missing if i == axis else (0, 0) for i in range(array.ndim)]
    left = jnp.pad(left, widths(left, left.ndim - 1))
    return Factors(left, jnp.pad(right, widths(right, len(view.axes.batch))))


def _new_leaf(factors: Factors, view: MatrixView, row: Truncated | Factorized) -> Any:
    """Returns the leaf of a kernel: factors if the row says so, else its shape stays."""
    if isinstance(row, Factorized):
        return _cast(factors, view)
    if view.is_factored:
        return _cast(_pad(factors, view), view)
    return place_like(product(factors, view), view.leaf)


def _through(rows: Array, leaf: Any, axes: KernelAxes) -> Array:
    """Returns the products of rows (stack, m) with a kernel, or with its two factors in turn."""
    for matrices in jax.tree.leaves(to_stack(leaf, axes)):
        rows = matmul(rows[:, None], lift(matrices))[:, 0]
    return rows


def _shift(bias: Any, mean: Any, view: MatrixView, new_leaf: Any) -> Array:
    """Returns a bias that keeps the mean of the outputs: b + m (W - W')."""
    rows = jnp.broadcast_to(jnp.asarray(mean, jnp.float32), (view.stack, view.rows))
    axes = in_order(view.axes) if isinstance(new_leaf, Factors) else view.axes
    change = _through(rows, view.leaf, view.axes) - _through(rows, new_leaf, axes)
    old = jnp.asarray(bias)
    return place_like((lift(old) + change.reshape(old.shape)).astype(old.dtype), bias)


def _cut_by_output(view: MatrixView, row, moments: Moments, leaves: Mapping[str, Any]):
    """Yields path and new leaf of a kernel, and of its bias if the moments are centred."""
    met = along(moments, view)
    second = second_of(moments, met, leaves)
    factors = output_factors(met, second, row.rank)
    leaf = _new_leaf(factors if met is view else turn(factors, view.axes), view, row)
    yield view.path, leaf
    bias = bias_of(met, leaves)
    if second.mean is not None and bias is not None:
        turned = met is not view and isinstance(leaf, Factors)
        leaf = turn(leaf, view.axes) if turned else leaf
        yield bias, _shift(leaves[bias], second.mean, met, leaf)


def _shrunk(s: Any, view: MatrixView, row: Truncated | Factorized) -> Any:
    """Returns the singular values that stay, shrunk if the row says so."""
    if row.shrink is None:
        return s
    # One variance for each matrix of a stack, in the shape of the batch axes.
    variance = np.reshape(row.fit.variance, s.shape[:-1])
    # Zeros are no noise. A matrix of zeros stays as it is.
    live = jnp.maximum(live_sides(view), 1).reshape(*s.shape[:-1], 2)
    return shrink_values(jnp.asarray(s), row.shrink, variance, (live[..., 0], live[..., 1]))


def _cut_equalized(view: MatrixView, row: Truncated | Factorized) -> Any:
    """Returns the new leaf of a kernel that is cut over the scales of its noise, and scaled back.

    Its squared error, each entry over the variance of the noise in it, is the least at this rank.
    """
    found = equalize_stack(view)
    even = replace(view, leaf=view.from_matrices(found.matrix))
    ((_, (u, s, vt)),) = singular_vectors({view.path: even}, {view.path: row.rank})
    left, right = split(u, _shrunk(s, even, row), vt)
    rows = found.rows.reshape(*left.shape[:-1], 1)
    inner = len(view.axes.batch)
    columns = jnp.expand_dims(
        found.columns.reshape(*right.shape[:inner], *right.shape[inner + 1 :]), inner
    )
    # They were found beside the kernel, which may be divided over devices.
    placed = place_factors(left * rows, columns * right, view.leaf, view.axes)
    return _new_leaf(Factors(*placed), view, row)


def changed_leaves(
    views: Views,
    rows: Rows,
    moments: Moments | None = None,
    leaves: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yields path and new leaf of each kernel, one at a time: a leaf may still be in a file.

    With moments, which need all `leaves` of the tree, those that have any are cut by output.
    """
    rest = dict(views)
    for path in views:
        if moments is not None and path in moments:
            yield from _cut_by_output(rest.pop(path), rows[path], moments, leaves or {})
    for path, view in list(rest.items()):
        row = rows[path]
        if row.equalized:
            yield path, _cut_equalized(rest.pop(path), row)
        elif isinstance(row, Truncated) and row.shrink is None and keeps_most(view, row.rank):
            yield path, place_like(without_last(rest.pop(path), row.rank), view.leaf)
    for path, (u, s, vt) in singular_vectors(rest, {path: rows[path].rank for path in rest}):
        view, row = views[path], rows[path]
        yield path, _new_leaf(split(u, _shrunk(s, view, row), vt), view, row)


def _check_moments(plan: Plan, moments: Moments | None) -> None:
    """Raises an error if a plan by output would be applied without its moments."""
    if moments is not None:
        check_type("moments", moments, Moments, "Give those that the plan was made with.")
    lacks = lambda path: moments is None or path not in moments
    path = next((path for path, row in plan.changes.items() if row.loss and lacks(path)), None)
    if path is not None:
        raise ValueError(
            f"`moments` must have {path!r}, which the plan cuts by output: give those that the "
            "plan was made with."
        )


def _change(params: PyTree, plan: Plan, moments: Moments | None, step: Step) -> PyTree:
    """Returns the tree with the leaves that the plan changes."""
    check_tree(params)
    _check_moments(plan, moments)
    if is_abstract(params):
        return jax.eval_shape(lambda tree: _change(tree, plan, moments, step), params)
    leaves = leaves_by_path(params)
    check_plan_fits(plan, leaves)
    rows = plan.changes
    views = {path: MatrixView(path, leaves[path], row.axes) for path, row in rows.items()}
    changed = {}
    for place, (path, leaf) in enumerate(changed_leaves(views, rows, moments, leaves)):
        step(place, len(views), path)
        changed[path] = leaf
    return map_kernels(lambda path, leaf: changed[path], params, changed)


@in_usual_modes
def truncate(
    params: PyTree, plan: Plan, *, moments: Moments | None = None, progress: Progress = None
) -> PyTree:
    """Lowers the rank of each kernel as planned; shapes and dtypes stay.

    Factors keep their shapes too. Their last directions become 0 in both, and no gradient moves
    them again.

    Args:
      params: The tree that the plan was made from, or one of the same shapes.
      plan: From `rmtjax.plan`. Works under `jit` with the plan held fixed; derivatives do not go
        through it.
      moments: Those that the plan was made with, if any. Kernels with moments keep the directions
        of their outputs with most energy.
      progress: True shows the progress on stderr. A function `progress(done, total, path)` is
        called for each kernel.

    Returns:
      The tree; leaves that are kept are the same objects.

    Raises:
      ValueError, TypeError: The plan is for another tree, or is not a plan.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(16))
      >>> lower = rmtjax.truncate(params, plan)
      >>> lower["kernel"].shape, int(jax.numpy.linalg.matrix_rank(lower["kernel"]))
      ((80, 60), 16)
    """
    check_plan(plan)
    with showing(progress, "truncate") as step:
        return _change(params, plan.in_place(), moments, step)


@in_usual_modes
def factorize(
    params: PyTree, plan: Plan, *, moments: Moments | None = None, progress: Progress = None
) -> PyTree:
    """Replaces each kernel by two thin factors where the plan says they are smaller.

    The tree computes what `truncate(params, plan)` computes. Kernels whose factors would not be
    smaller are truncated in place. Factors are replaced by thinner ones. Run the tree with
    `rmtjax.linen.apply`.

    Args:
      params, plan, moments, progress: As in `truncate`, which also tells the errors.

    Returns:
      The smaller tree, with `Factors(left, right)` in the place of a kernel. They also replace
      the box of `nn.with_partitioning`, if the kernel had one.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(16))
      >>> rmtjax.factorize(params, plan)["kernel"].left.shape
      (80, 16)
    """
    # The box names the axes of the dense kernel, which factors do not have.
    held = lambda node: getattr(node, "value", None) if hasattr(node, "replace_boxed") else None
    unbox = lambda node: held(node) if is_factors(held(node)) else node
    with showing(progress, "factorize") as step:
        thin = _change(params, plan, moments, step)
    return jax.tree.map(unbox, thin, is_leaf=lambda node: is_factors(unbox(node)))


@in_usual_modes
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
