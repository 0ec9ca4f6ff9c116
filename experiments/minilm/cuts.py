"""Kernels that have lost directions: the small ones, and controls of the same rank or norm."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import rmtjax


class Directions(NamedTuple):
    """The singular value decomposition of a kernel seen as a matrix."""

    left: Float[np.ndarray, "m p"]
    values: Float[np.ndarray, " p"]
    right: Float[np.ndarray, "p n"]
    shape: tuple[int, ...]

    def kernel(self, values: Float[np.ndarray, " p"]) -> Float[Array, "..."]:
        """The kernel with other singular values."""
        return jnp.asarray(((self.left * values) @ self.right).reshape(self.shape))


Cut = Callable[[Directions, int, np.random.Generator], Float[Array, "..."]]


def keep_top(kernel: Directions, rank: int, draw: np.random.Generator) -> Float[Array, "..."]:
    """Truncation: the `rank` largest directions."""
    del draw
    return kernel.kernel(np.where(np.arange(kernel.values.size) < rank, kernel.values, 0))


def keep_random(kernel: Directions, rank: int, draw: np.random.Generator) -> Float[Array, "..."]:
    """As many directions, drawn at random."""
    return kernel.kernel(np.where(draw.permutation(kernel.values.size) < rank, kernel.values, 0))


def keep_bottom(kernel: Directions, rank: int, draw: np.random.Generator) -> Float[Array, "..."]:
    """As many directions, the smallest: truncation takes off the others instead."""
    del draw
    first = kernel.values.size - rank
    return kernel.kernel(np.where(np.arange(kernel.values.size) < first, 0, kernel.values))


def add_noise(kernel: Directions, rank: int, draw: np.random.Generator) -> Float[Array, "..."]:
    """All directions, and white noise of the norm that truncation takes off."""
    noise = draw.standard_normal(kernel.shape, np.float32)
    size = np.linalg.norm(kernel.values[rank:]) / np.linalg.norm(noise)
    return kernel.kernel(kernel.values) + jnp.asarray(size * noise)


# Beside `keep_top`; those of them that draw.
CONTROLS: dict[str, Cut] = {"random": keep_random, "bottom": keep_bottom, "noise": add_noise}
DRAWN = {keep_random, add_noise}


def path_of(key: tuple[Any, ...]) -> str:
    """A leaf's place as a string."""
    return jax.tree_util.keystr(key, simple=True, separator="/")


def by_path(params: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return {path_of(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(params)}


def replace(params: Any, kernels: Mapping[str, Any]) -> Any:
    """The tree with other leaves at some paths."""
    take = lambda key, leaf: kernels.get(path_of(key), leaf)
    return jax.tree_util.tree_map_with_path(take, params)


def decompose(params: Any, plan: rmtjax.Plan) -> dict[str, Directions]:
    """The directions of each kernel that has a spectrum in a plan."""
    leaves, found = by_path(params), {}
    for path, row in plan.items():
        if row.spectrum is not None and row.axes is not None:
            # The inputs are the leading axes in all layers of `Bert`.
            rows = math.prod(row.shape[axis] for axis in row.axes.inputs)
            matrix = np.asarray(leaves[path]).reshape(rows, -1)
            found[path] = Directions(*np.linalg.svd(matrix, full_matrices=False), row.shape)
    return found


def apply_cut(
    cut: Cut, params: Any, directions: Mapping[str, Directions], ranks: Mapping[str, int], seed: int
) -> Any:
    """The tree with the kernels at the paths of `ranks` cut."""
    draw = np.random.default_rng(seed)
    kernels = {path: cut(directions[path], rank, draw) for path, rank in ranks.items()}
    return replace(params, kernels)


def shuffle(params: Any, plan: rmtjax.Plan, seed: int) -> Any:
    """The tree with the entries of each kernel in random order.

    What was correlated no longer is, and the law of the entries stays: a spectrum that follows
    Marchenko-Pastur now and did not before was not refused for heavy tails.
    """
    draw, leaves = np.random.default_rng(seed), by_path(params)
    mix = lambda leaf: jnp.asarray(draw.permutation(np.ravel(leaf)).reshape(leaf.shape))
    return replace(params, {path: mix(leaves[path]) for path in plan})
