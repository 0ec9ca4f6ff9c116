"""Patterns N:M: of each M consecutive inputs of an output, N entries stay.

Hardware multiplies by kernels of 2:4 directly. The groups lie along the inputs, which a product
sums over: rows of the matrix (inputs, outputs) of a kernel. The order of the inputs decides which
entries share a group, and `permute_inputs` finds an order that keeps more.

References:
  Mishra et al. (2021), https://arxiv.org/abs/2104.08378, for 2:4. Pool and Yu (2021), Channel
  Permutations for N:M Sparsity, NeurIPS, for the search. Berlyand, Bourdais, Owhadi and Shmalo
  (2026), https://arxiv.org/abs/2606.02608, for the cost.
"""

import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PyTree

from rmtjax._axes import KernelAxes, matrix_shape, MatrixView
from rmtjax._sharding import by_compiler, typed_sharding
from rmtjax._types import Axes, Where
from rmtjax.planning import check_chosen, find_kernels
from rmtjax.sparse._masks import (
    check_pattern,
    fill,
    find_floating,
    Masks,
    Pattern,
    pick,
    pick_masks,
)
from rmtjax.sparse._permutations import Permutation, permute, permute_inputs
from rmtjax.spectra import einsum, lift, to_unit

__all__ = ["Permutation", "nm_mask", "permute", "permute_inputs"]

MOST_PATTERNS = 13_000  # those of 8:16 are 12,870


def find_grouped(
    params: PyTree, pattern: Pattern, where: Where | None, axes: Axes | None
) -> dict[str, KernelAxes]:
    """Returns the axes of each chosen kernel, the inputs of which are divided into groups."""
    chosen, found = find_floating(params, where), {}
    for path, view in find_kernels(params, where, axes).items():
        if path not in chosen:
            continue
        if not isinstance(view, MatrixView) or view.rows % pattern[1]:
            inputs = f"{view.rows} inputs" if isinstance(view, MatrixView) else "no known axes"
            raise ValueError(
                f"`pattern` must divide the inputs of each chosen kernel into groups of "
                f"{pattern[1]}, and {path!r} of shape {view.shape} has {inputs}. Leave it out by "
                "`where`, or name its axes by `axes`."
            )
        found[path] = view.axes
    return found


def _from_stack(mask: Array, shape: tuple[int, ...], axes: KernelAxes) -> Bool[Array, "..."]:
    """Returns the mask of a kernel of this shape from that of its stack of matrices."""
    moved = mask.reshape([shape[axis] for axis in axes.order])
    return jnp.transpose(moved, np.argsort(axes.order).tolist())


def largest_of_groups(
    keys: Array, axes: KernelAxes, size: int, count: Int[ArrayLike, ""]
) -> Bool[Array, "..."]:
    """Returns a mask of the `count` largest keys of each group of `size` inputs.

    Of equal keys the first go. The count may be traced.
    """
    stack, rows, columns = matrix_shape(keys.shape, axes)

    def find(keys, count):
        groups = keys.transpose(axes.order).reshape(stack, rows // size, size, columns)
        # The place of each key in the order of its group.
        places = jnp.argsort(jnp.argsort(groups, axis=2, stable=True), axis=2, stable=True)
        return _from_stack(places >= size - count, keys.shape, axes)

    return by_compiler(find, keys, count, out=typed_sharding(keys))


def _costs_of_patterns(removed_of, patterns: np.ndarray, shape: tuple[int, ...]):
    """Returns the index of the pattern of lowest cost for each group and output."""

    def look(index, best):
        cost = removed_of(jnp.asarray(patterns)[index])
        better = cost < best[0]
        return jnp.where(better, cost, best[0]), jnp.where(better, index, best[1])

    start = jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.int32)
    return lax.fori_loop(0, len(patterns), look, start)[1]


@partial(jax.jit, static_argnums=(0,))
def _by_covariance(pattern: Pattern, matrix, moments, prior, strength):
    """Returns the mask of lowest cost of a matrix, over all patterns of each group."""
    n, m = pattern
    groups = to_unit(lift(matrix))[0].reshape(-1, m, matrix.shape[-1])
    blocks = moments.reshape(len(groups), m, len(groups), m)
    blocks = jnp.einsum("gigj->gij", blocks)
    known = prior.reshape(groups.shape)
    diagonal = jnp.einsum("gii->gi", blocks)[..., None]
    unit = strength * jnp.mean(groups**2 * diagonal, axis=(1, 2))[:, None]
    chosen = [[i in kept for i in range(m)] for kept in itertools.combinations(range(m), n)]
    patterns = np.array(chosen)

    def cost(kept):
        kept = kept[None, :, None]
        removed = jnp.where(kept, 0, groups)
        return einsum("gic,gij,gjc->gc", removed, blocks, removed) + unit * jnp.sum(
            kept != known, axis=1
        )

    index = _costs_of_patterns(cost, patterns, (len(groups), matrix.shape[-1]))
    return jnp.moveaxis(jnp.asarray(patterns)[index], -1, 1).reshape(matrix.shape)


def _by_power(pattern: Pattern, matrix, power, prior, strength):
    """Returns the mask of lowest cost of a matrix if inputs are not correlated: the largest."""
    n, m = pattern
    # Squares of very large and very small entries leave the range of float32.
    score = to_unit(lift(matrix))[0] ** 2 * power[:, None]
    unit = score.reshape(-1, m, matrix.shape[-1]).mean(axis=(1, 2))
    unit = strength * jnp.repeat(unit, m)[:, None]
    # Each entry adds its cost if it goes, and less the unit if the earlier mask has it.
    score = score + jnp.where(prior, unit, -unit)
    return largest_of_groups(score, KernelAxes((0,), (1,)), m, n)


def _inputs_of(path: str, inputs: Any, rows: int) -> Array:
    """Returns mean squares (rows,) or second moments (rows, rows) of the inputs of a kernel."""
    moments = jnp.ones(rows) if inputs is None else lift(jnp.asarray(inputs))
    if moments.shape not in ((rows,), (rows, rows)):
        raise ValueError(
            f"`inputs` must have shape ({rows},) or ({rows}, {rows}) for {path!r}, got "
            f"{moments.shape}: mean squares, or mean products, of the inputs of its matrix."
        )
    return moments


def nm_mask(
    params: PyTree,
    pattern: Pattern,
    *,
    inputs: Mapping[str, ArrayLike] | None = None,
    prior: PyTree | None = None,
    strength: float = 0.0,
    where: Where | None = None,
    axes: Axes | None = None,
) -> PyTree:
    r"""Keeps N of each M consecutive inputs of an output, those that change its value least.

    For a group with weights $u$ and second moments $C = E[x x^T]$ of its inputs, a pattern $p$
    costs $d^T C d + a\, \bar c\, |p - p_0|_1$ with $d = (1 - p) \circ u$: the mean square by which
    the output changes, and the distance from an earlier mask $p_0$. $\bar c$ is the mean of
    $u_j^2 E[x_j^2]$ over a group and all outputs. The pattern of lowest cost stays.

    Without `inputs` those are the entries of largest magnitude.

    Args:
      params: A tree of arrays.
      pattern: (N, M), such as (2, 4) or (8, 16). M must divide the inputs of each chosen kernel.
      inputs: Path to $E[x_j^2]$ of shape (inputs,), or to $E[x x^T]$ of shape (inputs, inputs),
        which tries all patterns of each group: 6 of 2:4, 70 of 4:8 and 12,870 of 8:16.
      prior: An earlier mask, for $p_0$.
      strength: $a$, at least 0; the paper has 0.5.
      where, axes: As in `rmtjax.plan`.

    Returns:
      A mask.

    Raises:
      ValueError: An argument is not as described, or no leaf is chosen as a kernel.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> params = {"kernel": jnp.array([[4.0, 1.0], [3.0, -3.0], [2.0, 2.0], [1.0, 4.0]])}
      >>> rmtjax.patterns.nm_mask(params, (2, 4))["kernel"].astype(int).tolist()
      [[1, 0], [1, 1], [0, 0], [0, 1]]
    """
    check_pattern(pattern)
    if not 0 <= strength < math.inf:
        raise ValueError(f"`strength` must be at least 0 and finite, got {strength}.")
    check_chosen(find_kernels(params, where), params, where)
    found, kernels = find_grouped(params, pattern, where, axes), find_floating(params, where)
    priors = pick_masks(prior, kernels)
    given = dict.fromkeys(kernels) if inputs is None else pick("inputs", inputs, kernels)
    masks: Masks = {}
    for path, kernel_axes in found.items():
        view = MatrixView(path, kernels[path], kernel_axes)
        moments = _inputs_of(path, given[path], view.rows)
        if moments.ndim == 2 and math.comb(*pattern[::-1]) > MOST_PATTERNS:
            raise ValueError(
                f"`pattern` has {math.comb(*pattern[::-1])} patterns for a group, more than "
                f"{MOST_PATTERNS}. Give mean squares of shape ({view.rows},) as `inputs`."
            )
        choose = partial(_by_power if moments.ndim == 1 else _by_covariance, pattern)
        known = priors[path].transpose(kernel_axes.order)
        known = known.reshape(view.stack, view.rows, view.columns)
        stack = [
            choose(matrix, moments, old, strength if prior is not None else 0.0)
            for matrix, old in zip(view.matrices(), known, strict=True)
        ]
        masks[path] = _from_stack(jnp.stack(stack), view.shape, kernel_axes)
    return fill(params, masks)
