"""What a network stores and computes, and how large its parts may be for a level."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

import rmtjax
from experiments.neighbours import tracks
from experiments.neighbours.tracks import Track
from experiments.neighbours.trainer import Training

FLOAT = 4  # bytes


class Thin(NamedTuple):
    """The network that an arm has made.

    Attributes:
      training: Its parameters, and the seconds that they took.
      module: The network, if it is not that of the track.
      sparse: Whether zeros of the kernels are not stored.
      bits: Of each entry of all kernels, if they are on a grid; else None.
      repeats: How often the network runs for one sample.
    """

    training: Training
    module: nn.Module | None = None
    sparse: bool = False
    bits: int | None = None
    repeats: int = 1


class Size(NamedTuple):
    """The cost of a network.

    Attributes:
      parameters: Numbers that are stored: entries of factors and cores, and entries that are not 0.
      bytes: Of them, with the places of entries in sparse kernels, and the scales of grids.
      multiply_adds: For one sample, of a recurrent network for one letter.
    """

    parameters: int
    bytes: int
    multiply_adds: int


def leaves_by_path(params: Any) -> dict[str, Any]:
    """Returns the leaves of a tree, kernels in parts as one leaf."""
    in_parts = lambda leaf: isinstance(leaf, rmtjax.Factors) or hasattr(leaf, "multiply_adds")
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=in_parts)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def numbers(leaf: Any) -> int:
    """Returns the numbers in a leaf, or in the parts of a kernel."""
    return sum(math.prod(part.shape) for part in jax.tree.leaves(leaf))


def _products(path: str, leaf: Any) -> int:
    """Returns multiply-adds of one row of inputs."""
    if hasattr(leaf, "multiply_adds"):
        return leaf.multiply_adds
    # Names of products end in "kernel". Biases and leaks are not counted.
    return numbers(leaf) if path.endswith("kernel") else 0


def _stored(thin: Thin, path: str, leaf: Any, kernels: tuple[str, ...]) -> Size:
    size, products = numbers(leaf), _products(path, leaf)
    if thin.bits and path.endswith("kernel"):
        scales = leaf.shape[-1]
        return Size(size, -(-size * thin.bits // 8) + FLOAT * scales, products)
    if path not in kernels:
        return Size(size, FLOAT * size, products)
    if thin.sparse:
        alive = int(np.count_nonzero(leaf))
        # Places as a bit for each entry, or as two bytes for each that is not 0.
        places = min(2 * alive, -(-size // 8))
        return Size(alive, FLOAT * alive + places, alive)
    return Size(size, FLOAT * size, products)


def size_of(thin: Thin, track: Track) -> Size:
    """Returns what a network costs."""
    positions, total = dict(track.positions), np.zeros(3, np.int64)
    for path, leaf in leaves_by_path(thin.training.params).items():
        one = _stored(thin, path, leaf, track.kernels)
        times = thin.repeats * positions.get(path, 1)
        total += (one.parameters, one.bytes, one.multiply_adds * times)
    return Size(*map(int, total))


def dense_size(track: Track) -> Size:
    """Returns the cost of the dense network."""
    return size_of(Thin(Training(tracks.dense(track.module, track).shapes)), track)


def shapes(track: Track) -> dict[str, tuple[int, int]]:
    """Returns inputs and outputs of the kernels that are made smaller."""
    leaves = leaves_by_path(tracks.dense(track.module, track).shapes)
    return {
        path: (math.prod(leaves[path].shape[:-1]), leaves[path].shape[-1]) for path in track.kernels
    }


def budget(track: Track, level: float) -> int:
    """Returns the numbers that the kernels may have together, if all else stays."""
    total = dense_size(track).parameters
    kernels = sum(m * n for m, n in shapes(track).values())
    return int(level * kernels) if track.of_kernels else int(level * total) - (total - kernels)


def share(track: Track, level: float) -> float:
    """Returns the share of the numbers of the kernels that stays."""
    return budget(track, level) / sum(m * n for m, n in shapes(track).values())


def narrow(track: Track, level: float) -> nn.Module:
    """Returns the network whose width has the largest size within the level."""
    limit, low, high = level * dense_size(track).parameters, 1, track.module.width
    fits = lambda width: (
        numbers(tracks.dense(track.module.clone(width=width), track).shapes) <= limit
    )
    while high - low > 1:  # `low` fits, `high` does not
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return track.module.clone(width=low)


def best_bits(track: Track, level: float) -> int:
    """Returns the most bits an entry of all kernels may have within the bytes of a level."""
    dense = tracks.dense(track.module, track).shapes
    whole = dense_size(track).bytes
    fits = lambda bits: size_of(Thin(Training(dense), bits=bits), track).bytes <= level * whole
    return max((bits for bits in range(1, 9) if fits(bits)), default=1)


def ranked(
    track: Track, level: float, values: Mapping[str, np.ndarray], taken: int = 0
) -> dict[str, int]:
    """Returns ranks by one order over all kernels: the largest values first, within the budget.

    Each kernel has rank 1 at least. A direction costs as many numbers as its kernel has inputs and
    outputs; where it does not fit, the next one is tried. `taken` numbers are not to be had.
    """
    cost = {path: sum(pair) for path, pair in shapes(track).items()}
    left, ranks = budget(track, level) - taken - sum(cost.values()), dict.fromkeys(cost, 1)
    order = sorted(((v, p) for p, one in values.items() for v in one[1:]), reverse=True)
    for _, path in order:
        if cost[path] <= left:
            left, ranks[path] = left - cost[path], ranks[path] + 1
    return ranks
