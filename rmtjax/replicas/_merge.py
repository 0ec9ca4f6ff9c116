"""Merges replicas by cross-validation: vectors from some, singular values from another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from rmtjax._axes import is_factors, MatrixView, native
from rmtjax._modes import in_usual_modes
from rmtjax._sharding import place_like
from rmtjax._types import Axes, Where
from rmtjax.planning import check_share, find_kernels, obstacle, path_name
from rmtjax.replicas._agreed import merge_dense, merge_factors
from rmtjax.replicas._stacked import check_arrays, stack_replicas
from rmtjax.spectra import lift


class Merged(NamedTuple):
    r"""Holds merged parameters, and how much of what the replicas learnt they hold.

    Attributes:
      params: A tree like `start`.
      kept: Path to the share of the squares of a kernel's mean change that is agreed on: 1 if all
        replicas are equal, 0 if nothing has changed, NaN if a replica is not finite.
      rank: Path to the effective rank of the agreed change: $\exp(H)$, with the entropy $H$ of the
        values $\max(r, 0)$ over their sum. It is the mean over the replicas and over the matrices
        of a stack; 0 if nothing is agreed on.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> start = {"kernel": jnp.zeros((60, 40))}
      >>> merged = rmtjax.merge_replicas(start, {"kernel": jnp.ones((4, 60, 40))})
      >>> print(f"{merged.kept['kernel']:.2f} {merged.rank['kernel']:.1f}")  # all replicas agree
      1.00 1.0
    """

    params: PyTree
    kept: dict[str, Float[Array, ""]]
    rank: dict[str, Float[Array, ""]]


def _average(leaf: Any, replicas: Any) -> Any:
    """Returns the mean of a leaf that is not a kernel; the first replica of what has no mean."""
    if replicas.size == 0:  # on a mesh with explicit axes JAX takes no part of such an array
        return jnp.asarray(leaf, replicas.dtype)
    dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return replicas[0]
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    lifted = replicas if jnp.issubdtype(dtype, jnp.complexfloating) else lift(replicas)
    return jnp.mean(lifted, axis=0).astype(dtype)


def _merge_leaf(leaf: Any, replicas: Any) -> Any:
    merged = jax.tree.map(_average, leaf, replicas)
    return jax.tree.map(place_like, merged, leaf)


@in_usual_modes
def merge_replicas(
    start: PyTree,
    replicas: PyTree | Sequence[PyTree],
    *,
    rest: ArrayLike = 0.0,
    where: Where | None = None,
    axes: Axes | None = None,
) -> Merged:
    r"""Merges replicas that were trained from one point on disjoint parts of the data.

    What a replica learns from its part alone differs from replica to replica. What the data
    support is common. For each kernel, $\Delta_i = W_i - W_0$ is the change of replica i, and
    $U_i \Sigma_i V_i^T$ is the mean change of all other replicas. Then

    $$r_{im} = u_{im}^T \Delta_i v_{im}, \qquad
    \hat S = \frac1k \sum_i U_i \operatorname{diag}(\max(r_i, 0)) V_i^T, \qquad
    W = W_0 + \hat S + \lambda (\bar\Delta - \hat S).$$

    Noise of replica i has no part in the directions that measure it. So r is an unbiased estimate
    of the common signal in a direction, whatever the law of the noise, and there is no threshold.

    Do not average the states of the optimizers. Keep them apart in each replica, or reset them.
    An averaged state carries the same gradients into all replicas, and these then agree on them.

    Args:
      start: The parameters from which all replicas started: any tree that optax takes. Kernels may
        be `Factors`. Their product is merged, and cut to the rank that it had.
      replicas: A tree like `start` whose leaves have a leading axis of k replicas, or a list or
        tuple of k trees. At least 2, usually 2 to 16.
      rest: The share $\lambda$ in [0, 1] of the change not agreed on that is kept; may be traced. 1
        gives the mean of the replicas.
      where, axes: Choose the kernels and name their axes, as in `rmtjax.plan`. Kernels of any size
        are merged. Other leaves are averaged, also stacks whose axes cannot be guessed: `kept` does
        not have them. Integers, booleans and keys have no mean: those of the first replica are
        taken.

    Returns:
      `Merged(params, kept, rank)`. Arithmetic is in float32 at least, and leaves keep their dtypes.
      A kernel is NaN where its matrix is not finite in any replica, as its mean would be. Its
      `kept` is NaN, and no other kernel changes. Find out which replica it was, and merge the
      others.

    Raises:
      ValueError: There are fewer than 2 replicas, or one has another structure or other shapes.
      TypeError: `start` or a replica is a model, or its leaves are not arrays.

    Notes:
      Works under `jit`. Derivatives take the directions for constants. Trees of a list may lie on
      devices of their own. If the leading axis is divided over a mesh, each device makes the folds
      of its replicas, and only sums are communicated. This needs a call outside `jit`, or a mesh
      with explicit axes: in a program with automatic axes the compiler divides the work.

    Examples:
      >>> import jax, jax.numpy as jnp, rmtjax
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> noise = jax.vmap(lambda key: jax.random.normal(key, (60, 40)))(keys)
      >>> start = {"kernel": jnp.zeros((60, 40))}
      >>> merged = rmtjax.merge_replicas(start, {"kernel": noise + 1.0})
      >>> print(f"{merged.kept['kernel']:.2f}")  # four fifths of the mean are common
      0.78

    References:
      Bartz, Cross-validation based nonlinear shrinkage (2016).
      Benaych-Georges, Bouchaud and Potters, Ann. Appl. Probab. 33 (2023), for the noise that is
      white. Lamrani, Bongiorno and Potters (2025), https://arxiv.org/abs/2503.15186.
    """
    check_share("rest", rest, "the change not agreed on that is kept")
    views = find_kernels(start, where, axes)
    check_arrays("start", start)
    start = jax.tree.map(native, start)
    stacked = stack_replicas(start, replicas)
    merged, kept, rank = [], {}, {}
    leaves, structure = jax.tree_util.tree_flatten_with_path(start, is_leaf=is_factors)
    for (key, leaf), group in zip(leaves, structure.flatten_up_to(stacked), strict=True):
        view = views.get(path := path_name(key))
        if not isinstance(view, MatrixView) or obstacle(view, 1) is not None:
            merged.append(_merge_leaf(leaf, group))
            continue
        if view.in_parts:
            raise ValueError(
                f"`start` holds {path!r} as {view.in_parts}, which cannot be merged: give "
                "`rmtjax.merge(start)`, and the replicas alike."
            )
        merge = merge_factors if view.is_factored else merge_dense
        new, kept[path], rank[path] = merge(view, group, rest)
        merged.append(new)
    return Merged(jax.tree.unflatten(structure, merged), kept, rank)
