"""Computes how much the outputs of changed layers change on data, exactly, from moments."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, PyTree

from rmtjax._axes import MatrixView
from rmtjax._types import Axes, Where
from rmtjax.moments import Moments
from rmtjax.planning import along, find_kernels, leaves_by_path, merge


class OutputChange(NamedTuple):
    r"""Holds the change of the outputs of a layer, as means over the rows of its moments.

    Attributes:
      change: $E\,|y - y'|^2$, for a stack an array with an entry for each matrix.
      energy: $E\,|x W|^2$, the mean square of the outputs without the bias. Of a kernel that the
        model also multiplies by its transpose it is 2: the change is the sum over both uses, each
        over its energy.

    Examples:
      >>> import flax.linen as nn, jax, rmtjax
      >>> module, x = nn.Dense(6), jax.random.normal(jax.random.key(0), (50, 8))
      >>> variables = module.init(jax.random.key(0), x)
      >>> params, moments = variables["params"], rmtjax.linen.moments(module, variables, [x])
      >>> doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
      >>> found = rmtjax.certificate.output_changes(params, doubled, moments)["kernel"]
      >>> print(f"{found.change / found.energy:.3f}")
      1.000
    """

    change: Float[np.ndarray, "*stack"]
    energy: Float[np.ndarray, "*stack"]


def _second(moment: Any, matrices: np.ndarray) -> np.ndarray:
    r"""Returns $\operatorname{tr}(A^T C A)$ for each matrix A of a stack."""
    rows = np.asarray(moment.rows, np.float64)
    sums = np.asarray(moment.second, np.float64)
    if moment.is_diagonal:
        return np.einsum("bi,bij,bij->b", sums / rows[:, None], matrices, matrices)
    return np.sum(matrices * (sums / rows[:, None, None] @ matrices), axis=(1, 2))


def _bias_change(old: Mapping[str, Any], new: Mapping[str, Any], view: MatrixView) -> np.ndarray:
    """Returns the change of the bias beside a kernel as a stack of rows; zeros without one."""
    parent, slash, _ = view.path.rpartition("/")
    path = f"{parent}{slash}bias"
    if path not in old or path not in new or np.size(old[path]) != view.stack * view.columns:
        return np.zeros((view.stack, view.columns))
    change = np.asarray(old[path], np.float64) - np.asarray(new[path], np.float64)
    return change.reshape(view.stack, view.columns)


def output_changes(
    before: PyTree,
    after: PyTree,
    moments: Moments,
    *,
    where: Where | None = None,
    axes: Axes | None = None,
) -> dict[str, OutputChange]:
    r"""Returns how much a change of kernels and biases changes the outputs of each layer.

    $E\,|x R + r|^2 = \operatorname{tr}(R^T C R) + 2 \bar x R r^T + |r|^2$ for the changes R of a
    kernel and r of its bias: an equality on the data of the moments, whatever has changed the
    kernels. It is that of each layer on the inputs that it had before any other layer changed.

    Args:
      before: Nested dictionaries of arrays.
      after: The changed tree, dense or with `Factors`.
      moments: Of the inputs of the kernels, collected before the change.
      where, axes: As in `rmtjax.plan`.

    Returns:
      A dictionary from the path of each kernel with moments to its `OutputChange`.

    Raises:
      ValueError: The trees or the moments do not fit each other.

    Examples:
      >>> import flax.linen as nn, jax, rmtjax
      >>> module, x = nn.Dense(60), jax.random.normal(jax.random.key(0), (500, 80))
      >>> variables = module.init(jax.random.key(0), x)
      >>> params, moments = variables["params"], rmtjax.linen.moments(module, variables, [x])
      >>> plan = rmtjax.plan(params, moments=moments, budget=0.5)
      >>> lower = rmtjax.truncate(params, plan, moments=moments)
      >>> change = rmtjax.certificate.output_changes(params, lower, moments)["kernel"].change
      >>> moved = module.apply({"params": lower}, x) - module.apply(variables, x)
      >>> print(f"{change / (moved**2).sum(axis=1).mean():.3f}")
      1.000
    """
    old, new = (merge(tree) for tree in (before, after))
    kernels, others = find_kernels(old, where, axes), find_kernels(new, where, axes)
    leaves, changed = leaves_by_path(old), leaves_by_path(new)
    found = {}
    for path, view in kernels.items():
        other = others.get(path)
        if path not in moments or not isinstance(view, MatrixView):
            continue
        if not isinstance(other, MatrixView) or other.shape != view.shape:
            found_shape = other.shape if isinstance(other, MatrixView) else None
            raise ValueError(
                f"`after` must have {path!r} of shape {view.shape}, as `before` has, got "
                f"{found_shape}. Take both trees from the same module."
            )
        moment, view = moments[path], along(moments, view)
        other = replace(other, axes=view.axes)
        if moment.size != view.rows:
            raise ValueError(
                f"`moments` is of another model: it has {moment.size} inputs for {path!r}, whose "
                f"kernel of shape {view.shape} has {view.rows}. Collect them with this model."
            )
        matrices, moved = (np.asarray(v.matrices(), np.float64) for v in (view, other))
        bias = _bias_change(leaves, changed, view)
        shift = np.einsum(
            "bi,bij,bj->b", np.broadcast_to(moment.mean, matrices.shape[:2]), matrices - moved, bias
        )
        change = _second(moment, matrices - moved) + 2 * shift + np.sum(bias**2, axis=1)
        energy = _second(moment, matrices)
        if path in moments.transposed:
            both, turned = moments.transposed[path], lambda stack: stack.transpose(0, 2, 1)
            other = _second(both, turned(matrices - moved)) / _second(both, turned(matrices))
            change, energy = change / energy + other, np.full(view.stack, 2.0)
        unstack = lambda array, view=view: array if view.axes.batch else array[0]
        found[path] = OutputChange(unstack(change), unstack(energy))
    return found
