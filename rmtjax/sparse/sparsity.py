"""Masks of the entries of kernels that are set to zero.

A mask is a tree of booleans like `params`, True where an entry stays. Leaves that are not chosen
are all True, and so are `Factors`: a zero in one of them is not a zero of the kernel.
`jax.tree.map(jax.numpy.multiply, params, mask)` applies a mask once, and `rmtjax.prune_entries` for
the rest of the training.

A threshold for entries keeps few large ones. It removes a direction of signal, which is spread over
all entries; `rmtjax.truncate` keeps it.

References:
  Berlyand, Bourdais, Owhadi and Shmalo (2026), https://arxiv.org/abs/2606.02608, for thresholds and
  weights. Han, Pool, Tran and Dally (2015), https://arxiv.org/abs/1506.02626, for magnitudes; they
  cut kernel by kernel.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from rmtjax._axes import matrix_shape, MatrixView
from rmtjax._modes import in_usual_modes
from rmtjax._types import BulkFit, in_range, Spectrum, Where
from rmtjax.noise import check_rule, ranks
from rmtjax.planning import (
    check_chosen,
    check_concrete,
    check_plan,
    check_plan_fits,
    find_kernels,
    LayerPlan,
    Plan,
)
from rmtjax.sparse._densities import cell_gates, layer_densities, random_mask
from rmtjax.sparse._masks import check_sparsity, fill, find_floating, pick_masks, shrink
from rmtjax.spectra import lift

__all__ = [
    "cell_gates",
    "edge_weights",
    "entry_threshold",
    "layer_densities",
    "magnitude_mask",
    "random_mask",
    "threshold_mask",
]

LEAST_WEIGHT = 0.1  # no kernel is spared more than tenfold


def _spread(values: Float[Array, " b"], row: LayerPlan) -> Array:
    """Returns values of the matrices of a stack, in a shape that broadcasts with the kernel."""
    if row.axes is None or not row.axes.batch:
        return values[0]
    shape = tuple(n if axis in row.axes.batch else 1 for axis, n in enumerate(row.shape))
    return MatrixView("", np.empty(shape), row.axes).from_matrices(values.reshape(-1, 1, 1))


@in_usual_modes
def entry_threshold(
    variance: Float[ArrayLike, "*batch"], shape: tuple[int, ...], delta: float = 0.05
) -> Float[Array, "*batch"]:
    r"""Returns the magnitude that no entry of pure noise passes, with probability 1 - delta.

    $\xi = \sqrt{2 \sigma^2 \log(2 m n / \delta)}$.

    For $W = S + R$ with independent Gaussian noise $R$, with probability at least $1 - \delta$ no
    entry where $S_{ij} = 0$ passes $|W_{ij}| > \xi$, and all where $|S_{ij}| > 2 \xi$ do.

    Args:
      variance: $\sigma^2$ of an entry of the noise, at least 0, as `BulkFit.variance`.
      shape: Of the matrix, (m, n), or of its kernel: entries are counted.
      delta: Bound on the probability that noise passes, in (0, 1).

    Returns:
      $\xi$, in the shape of `variance`.

    Raises:
      ValueError: `delta` or `shape` is out of range.

    Examples:
      >>> import rmtjax
      >>> print(f"{rmtjax.sparsity.entry_threshold(1.0, (784, 1000)):.3f}")
      5.876
    """
    if not 0 < delta < 1:
        raise ValueError(f"`delta` must be in (0, 1), got {delta}: the probability of noise above.")
    if not shape or min(shape) < 1:
        raise ValueError(f"`shape` must be that of a matrix with entries, got {shape}.")
    # Of a very large kernel, the root is in the range of float32, and the variance is not.
    root = jnp.sqrt(variance) if isinstance(variance, jax.Array) else np.sqrt(variance)
    return math.sqrt(2 * math.log(2 * math.prod(shape) / delta)) * jnp.asarray(root)


def _above(path: str, kernel, row: LayerPlan, delta: float, rule) -> Bool[Array, "..."]:
    """Returns a mask of the entries above the threshold; of all if the rule refuses the fit."""
    if row.axes is None or row.spectrum is None or row.fit is None:
        raise ValueError(
            f"`plan` must have the spectrum of {path!r}, got one without, as from a file. Make it "
            "from this tree with `rmtjax.plan`."
        )
    eigenvalues: Any = np.asarray(row.spectrum.eigenvalues)
    ratio: Any = np.asarray(row.spectrum.ratio)
    fits = [BulkFit(*one) for one in zip(*map(np.ravel, row.fit), strict=True)]
    stack = [Spectrum(one, ratio) for one in eigenvalues.reshape(-1, eigenvalues.shape[-1])]
    pairs = [in_range(*pair)[:2] for pair in zip(stack, fits, strict=True)]
    accepted = jax.vmap(rule.accepts)(*jax.tree.map(lambda *leaves: np.stack(leaves), *pairs))
    variances, sides = np.ravel(row.fit.variance), matrix_shape(row.shape, row.axes)[1:]
    threshold = entry_threshold(variances, sides, delta)
    threshold = _spread(jnp.where(accepted, threshold, jnp.nan), row)
    # Not `>`: entries under a threshold of NaN, and entries that are NaN, are kept.
    return ~(jnp.abs(lift(kernel)) <= threshold)


@in_usual_modes
def threshold_mask(
    params: PyTree,
    plan: Plan,
    *,
    delta: float = 0.05,
    rule: ranks.RankRule = ranks.bema(),  # noqa: B008 - a frozen value
) -> PyTree:
    r"""Keeps the entries above `entry_threshold`, by the noise level of each kernel's plan.

    Args:
      params: The tree of the plan.
      plan: From `rmtjax.plan`. All entries of kernels without a fit are kept.
      delta: For each matrix, the bound on the probability that noise passes, in (0, 1).
      rule: The rule of the plan. All entries of a matrix whose fit it refuses are kept.

    Returns:
      A tree of booleans, True where an entry stays.

    Raises:
      ValueError: `delta` is out of range, or the plan is for another tree or from a file.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> params = {"Dense_0": {"kernel": noise.at[:4, :5].add(20.0)}}
      >>> mask = rmtjax.sparsity.threshold_mask(params, rmtjax.plan(params))
      >>> int(mask["Dense_0"]["kernel"].sum())
      20
    """
    check_plan(plan)
    check_rule(rule)
    rows = {path: row for path, row in plan.items() if row.fit is not None}
    kernels = find_floating(params, lambda path, _: path in rows)
    check_plan_fits(plan, kernels, rows)
    masks = {path: _above(path, kernels[path], row, delta, rule) for path, row in rows.items()}
    return fill(params, masks)


def _edges(plan: Plan) -> dict[str, np.ndarray]:
    """Returns the standardized edges of the matrices of each kernel; 0 for an unknown edge."""
    edges = {}
    for path, row in plan.items():
        stack, *sides = matrix_shape(row.shape, row.axes) if row.axes else (1, 0)
        edge = np.full(stack, np.nan) if row.fit is None else np.ravel(row.fit.edge)
        edges[path] = np.sqrt(max(sides) * edge.astype(np.float64))
    known = np.concatenate([np.zeros(0), *edges.values()])
    known = known[np.isfinite(known)]
    mean, deviation = (known.mean(), known.std()) if known.size else (0.0, 0.0)
    # If all edges are equal, the deviation is rounding, and would make weights.
    scale = deviation if deviation > 1e-6 * mean else np.inf
    score = lambda edge: np.where(np.isfinite(edge), edge - mean, 0) / scale
    return {path: score(edge) for path, edge in edges.items()}


@in_usual_modes
def edge_weights(
    plan: Plan,
    sparsity: Float[ArrayLike, ""],
    *,
    strength: float = 1.0,
    until: float = 0.5,
    power: float = 1.0,
) -> dict[str, Array]:
    r"""Returns the weights of spectral edge budgeting, which compare magnitudes across kernels.

    $w = \max(0.1,\; 1 + b\, [1 - sp / sp_d]_+^{a}\, z)$ with $z$ the edge of the noise as a
    singular value, $\sqrt{n \lambda_+}$, standardized over the kernels (population standard
    deviation). Entries go in the order of $|W_{ij}| / w$. Kernels with a higher edge lose more.
    With $b = 0$, and from $sp = sp_d$ on, all weights are exactly 1.

    Args:
      plan: From `rmtjax.plan`. Kernels without a finite edge have $z = 0$. Each matrix of a stack
        counts as one kernel.
      sparsity: $sp$, the share of entries removed, in [0, 1). May be traced by `jit`.
      strength: $b$, at least 0.
      until: $sp_d$, above 0: the sparsity from which on the edges do not count.
      power: $a$ of the decay, above 0.

    Returns:
      Path to weight for each kernel of the plan; for a stack an array that broadcasts.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> plan = rmtjax.plan({"a": {"kernel": noise}, "b": {"kernel": noise / 2}})
      >>> weights = rmtjax.sparsity.edge_weights(plan, 0.25)
      >>> {path: round(float(weight), 3) for path, weight in weights.items()}
      {'a/kernel': 1.5, 'b/kernel': 0.5}

    The defaults are those of the paper for sparsities from 0.2 to 0.4, chosen on vision
    transformers; from 0.4 to 0.55 it has 1.25 and 0.7.
    """
    check_plan(plan)
    check_sparsity(sparsity)
    if strength < 0 or until <= 0 or power <= 0:
        raise ValueError(
            "`strength` must be at least 0 and `until` and `power` above 0, got "
            f"{strength}, {until} and {power}."
        )
    decay = jnp.maximum(1 - jnp.asarray(sparsity) / until, 0) ** power
    weight = lambda edge: jnp.maximum(LEAST_WEIGHT, 1 + strength * decay * jnp.asarray(edge))
    return {path: _spread(weight(edge), plan[path]) for path, edge in _edges(plan).items()}


@in_usual_modes
def magnitude_mask(
    params: PyTree,
    sparsity: Float[ArrayLike, ""],
    *,
    weights: Mapping[str, ArrayLike] | None = None,
    mask: PyTree | None = None,
    where: Where | None = None,
) -> PyTree:
    r"""Removes the entries of smallest magnitude, over all kernels together.

    Of $N$ entries exactly $\mathrm{round}(sp \cdot N)$ go, those with the smallest $|W_{ij}| / w$.
    Of equal entries those that come first in the tree go. NaN goes last.

    Args:
      params: A tree of arrays, as `module.init(...)["params"]`.
      sparsity: $sp$, the share of the entries of all chosen kernels that goes, in [0, 1). Taken as
        a float32. May be traced by `jit`.
      weights: Path to $w > 0$ for each chosen kernel, as from `edge_weights`; by default 1.
      mask: An earlier mask. Entries that it removed stay removed, and count.
      where: Chooses the kernels, as in `rmtjax.plan`.

    Returns:
      A mask.

    Raises:
      ValueError: `sparsity` is out of range, or `weights` or `mask` is for another tree.

    Examples:
      >>> import jax, jax.numpy as jnp, rmtjax
      >>> params = {"kernel": jnp.array([[3.0, -1.0], [0.5, 2.0]]), "bias": jnp.zeros(2)}
      >>> mask = rmtjax.sparsity.magnitude_mask(params, 0.5)
      >>> print(jax.tree.map(jnp.multiply, params, mask)["kernel"])
      [[3. 0.]
       [0. 2.]]
    """
    check_sparsity(sparsity)
    check_concrete(params)
    check_chosen(find_kernels(params, where), params, where)
    kernels = find_floating(params, where)
    masks = shrink(kernels, pick_masks(mask, kernels), weights, sparsity)
    return fill(params, masks)
