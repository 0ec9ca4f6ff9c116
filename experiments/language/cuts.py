"""Ways to a smaller model: those of the package, and the formulas of its rivals in NumPy."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import rmtjax
from experiments.language.model import in_block

Tree = Any


class Known(NamedTuple):
    """Holds what a cut may use."""

    params: Tree
    moments: Any  # with gradients


def plain(known: Known) -> Any:
    """The moments without the gradients."""
    return rmtjax.moments.Moments(known.moments.groups, {}, known.moments.names)


def rank_for(shape: tuple[int, ...], share: float) -> int:
    """The rank whose factors have a share of the parameters of a matrix."""
    rows, columns = shape
    return max(int(share * rows * columns / (rows + columns)), 1)


def each(known: Known, share: float, cut: Callable[[np.ndarray, str, int], tuple]) -> Tree:
    """The tree with each kernel of a block cut alone to the same share."""

    def visit(key, leaf):
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        if not in_block(path, leaf):
            return leaf
        left, right = cut(np.asarray(leaf, np.float64), path, rank_for(leaf.shape, share))
        return rmtjax.Factors(*(jax.numpy.asarray(half, leaf.dtype) for half in (left, right)))

    return jax.tree_util.tree_map_with_path(visit, known.params)


def thin(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors of the nearest matrix of a rank."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank], vt[:rank]


def second_of(known: Known, path: str) -> np.ndarray:
    """The raw second moments of the inputs of a kernel."""
    moment = known.moments[path]
    return np.asarray(moment.second[0], np.float64) / np.asarray(moment.rows)[0]


def by_weights(known: Known, share: float) -> Tree:
    """The largest singular values of each kernel."""
    return each(known, share, lambda kernel, path, rank: thin(kernel, rank))


def by_scales(known: Known, share: float) -> Tree:
    """Inputs scaled by the root of their size, as in ASVD (arXiv 2312.05821, with alpha 0.5)."""

    def cut(kernel, path, rank):
        scale = np.diag(second_of(known, path)) ** 0.25
        left, right = thin(scale[:, None] * kernel, rank)
        return left / scale[:, None], right

    return each(known, share, cut)


def whitened(known: Known, share: float) -> Tree:
    """Inputs whitened by a Cholesky factor, as in SVD-LLM (arXiv 2403.07378)."""

    def cut(kernel, path, rank):
        moment = second_of(known, path)
        lowest = np.linalg.eigvalsh(moment)[0]
        # Singular moments have no such factor. So their code adds to the diagonal.
        shift = 1e-6 - lowest if lowest <= 1e-9 else 0.0
        root = np.linalg.cholesky(moment + shift * np.eye(len(moment)))
        left, right = thin(root.T @ kernel, rank)
        return np.linalg.solve(root.T, left), right

    return each(known, share, cut)


def one_share(known: Known, share: float) -> Tree:
    """Each kernel by the energy of its outputs, to the same share."""
    moments, rule = plain(known), rmtjax.ranks.size(share)
    options: dict[str, Any] = {"where": in_block, "moments": moments, "multiple": 1, "min_size": 1}
    plan = rmtjax.plan(known.params, rule=rule, **options)
    return rmtjax.factorize(known.params, plan, moments=moments)


def budget(known: Known, share: float, moments: Any) -> Tree:
    """One budget for all kernels."""
    options: dict[str, Any] = {"where": in_block, "moments": moments, "multiple": 1, "min_size": 1}
    plan = rmtjax.plan(known.params, budget=share, **options)
    return rmtjax.factorize(known.params, plan, moments=moments)


METHODS: Mapping[str, Callable[[Known, float], Tree]] = {
    "weights, one share": by_weights,
    "scaled inputs (ASVD), one share": by_scales,
    "whitened (SVD-LLM), one share": whitened,
    "output, one share": one_share,
    "weights, budget": lambda known, share: budget(known, share, None),
    "output, budget": lambda known, share: budget(known, share, plain(known)),
    "output, budget, gradients": lambda known, share: budget(known, share, known.moments),
}
REPAIRED = ("weights, budget", "output, budget, gradients")
TUNED = ("weights, budget", "output, budget", "output, budget, gradients")


def repair(known: Known, tree: Tree) -> Tree:
    """The right factors and the biases by least squares, with the mean of the inputs known."""
    moments = plain(known).with_options(centred=True)
    return rmtjax.refit(known.params, tree, moments)


def kept(known: Known, tree: Tree) -> float:
    """The share of the parameters of the kernels of the blocks that a tree has."""
    count = lambda one: sum(
        leaf.size
        for key, leaf in jax.tree_util.tree_leaves_with_path(one)
        if "kernel" in jax.tree_util.keystr(key) and "block_" in jax.tree_util.keystr(key)
    )
    return count(tree) / count(known.params)
