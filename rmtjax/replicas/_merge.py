"""Merges replicas by cross-validation: vectors from some, singular values from another."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from rmtjax._axes import MatrixView
from rmtjax._types import Axes, Where
from rmtjax.planning import find_kernels, leaves_by_path, map_kernels
from rmtjax.spectra import decompose, lift, matmul


class Merged(NamedTuple):
    """Holds merged parameters, and how much of what the replicas learnt they hold.

    Attributes:
      params: A tree like `start`.
      kept: Path to the share of the squares of the mean change of a kernel that is kept.
      rank: Path to the effective rank of the change that is kept: $exp(H)$, with the entropy $H$ of
        its normalised singular values. 0 if nothing is kept.
    """

    params: PyTree
    kept: dict[str, Float[Array, ""]]
    rank: dict[str, Float[Array, ""]]


def agreed_change(changes: Float[Array, "k b m n"]) -> Float[Array, "b m n"]:
    r"""Returns the change that k replicas agree on, for a stack of matrices.

    $\hat S = \frac1k \sum_i U_i \operatorname{diag}(\max(r_i, 0)) V_i^T$, with the singular vectors
    of the mean change of all replicas but i, and $r_{im} = u_m^T \Delta_i v_m$.
    """
    changes, count = lift(changes), len(changes)
    total = jnp.sum(changes, axis=0)

    def fold(change):
        u, _, vt = decompose((total - change) / (count - 1))
        r = jnp.sum(matmul(jnp.swapaxes(u, 1, 2), change) * vt, axis=2)
        return matmul(u * jnp.maximum(r, 0)[:, None], vt)

    return jnp.mean(jax.lax.map(fold, changes), axis=0)


def merge_replicas(
    start: PyTree,
    replicas: PyTree | Sequence[PyTree],
    *,
    where: Where | None = None,
    axes: Axes | None = None,
) -> Merged:
    """Merges replicas that were trained from one point on disjoint parts of the data."""
    if isinstance(replicas, list | tuple):
        replicas = jax.tree.map(lambda *leaves: jnp.stack(leaves), *replicas)
    views = find_kernels(start, where, axes)
    found = {path: view for path, view in views.items() if isinstance(view, MatrixView)}
    stacked = leaves_by_path(replicas)
    params = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), replicas)
    merged, kept, rank = {}, {}, {}
    for path, view in found.items():
        matrices = lambda leaf, view=view: MatrixView("", leaf, view.axes).matrices()
        changes = lift(jax.vmap(matrices)(stacked[path])) - lift(view.matrices())[None]
        change = agreed_change(changes)
        merged[path] = (view.leaf + view.from_matrices(change)).astype(view.dtype)
        mean = jnp.sum(jnp.square(jnp.mean(changes, axis=0)))
        kept[path] = jnp.sum(jnp.square(change)) / mean
    return Merged(map_kernels(lambda path, _: merged[path], params, merged), kept, rank)
