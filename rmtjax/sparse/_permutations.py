"""Orders of inputs in which a pattern N:M keeps more, and how a network takes such an order."""

import itertools
import operator
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int, PyTree

from rmtjax._sharding import by_compiler, typed_sharding
from rmtjax.planning import leaves_by_path, map_kernels
from rmtjax.sparse._masks import check_pattern, Pattern


class Permutation(NamedTuple):
    """An order of inputs, and what a pattern keeps in it.

    Attributes:
      order: Indices of the inputs: `kernel[order]` is the kernel in the new order.
      before: Sum of the scores that the pattern keeps in the given order.
      after: The same in the new order, at least `before`.

    Examples:
      >>> import numpy as np, rmtjax
      >>> matrix = np.array([[9.0], [8.0], [7.0], [6.0], [1.0], [1.0], [1.0], [1.0]])
      >>> found = rmtjax.patterns.permute_inputs(matrix, (2, 4))
      >>> sorted(map(int, found.order)), found.after > found.before
      ([0, 1, 2, 3, 4, 5, 6, 7], True)
    """

    order: Int[np.ndarray, " inputs"]
    before: float
    after: float


def _kept(groups: Float[np.ndarray, "g m c"], n: int) -> Float[np.ndarray, " g"]:
    """Returns the sum of the n largest scores of each column, for each group."""
    m = groups.shape[1]
    return np.partition(groups, m - n, axis=1)[:, m - n :].sum(axis=(1, 2))


def _interleaved(scores: np.ndarray, m: int) -> np.ndarray:
    """Returns inputs sorted by importance and dealt to the groups: each gets of all sizes."""
    ranked = np.argsort(-scores.sum(axis=1), kind="stable")
    return ranked.reshape(m, -1).T.reshape(-1)


def _swap_two(scores: np.ndarray, one: np.ndarray, other: np.ndarray, n: int) -> float:
    """Swaps, in place, the two inputs of two groups that gain most; returns the gain."""
    m = len(one)
    pairs = [(i, j) for i in range(m) for j in range(m)]
    left, right = np.tile(one, (len(pairs), 1)), np.tile(other, (len(pairs), 1))
    for k, (i, j) in enumerate(pairs):
        left[k, i], right[k, j] = other[j], one[i]
    sums = _kept(scores[np.concatenate([left, right])], n).reshape(2, -1).sum(axis=0)
    before = _kept(scores[np.stack([one, other])], n).sum()
    best = int(sums.argmax())
    # Rounding alone is no gain, and could swap for ever.
    if sums[best] <= before * (1 + 1e-12):
        return 0.0
    one[:], other[:] = left[best], right[best]
    return float(sums[best] - before)


def permute_inputs(
    matrix: Float[ArrayLike, "m n"],
    pattern: Pattern,
    *,
    power: Float[ArrayLike, " m"] | None = None,
    sweeps: int = 2,
    seed: int = 0,
) -> Permutation:
    """Finds an order of the inputs in which a pattern keeps more of a matrix.

    It starts with the better of the given order and of one in which each group has inputs of all
    sizes. Then each pair of groups swaps the two inputs that gain most, in `sweeps` rounds or until
    nothing gains. It is a search on the host: a local optimum, never worse than the given order.

    An order of the inputs of one layer is one of the outputs of the layer before: see `permute`.

    Args:
      matrix: The kernel as a matrix (inputs, outputs).
      pattern: (N, M). M must divide the inputs.
      power: Mean square of each input; by default 1. The score of an entry is |w| times the root.
      sweeps: Rounds, at least 0. One costs inputs^2 / 2 products of M outputs.
      seed: Of the order in which pairs of groups are visited.

    Returns:
      The order, and the sum of the scores that stay, before and after.

    Raises:
      ValueError, TypeError: An argument is not as described.

    Examples:
      >>> import numpy as np, rmtjax
      >>> matrix = np.array([[9.0], [8.0], [7.0], [6.0], [1.0], [1.0], [1.0], [1.0]])
      >>> order, before, after = rmtjax.patterns.permute_inputs(matrix, (2, 4))
      >>> before, after
      (19.0, 30.0)
    """
    check_pattern(pattern)
    if np.iscomplexobj(matrix):
        raise TypeError("`matrix` must be real, got complex numbers: give their magnitudes.")
    (n, m), scores = pattern, np.abs(np.asarray(matrix, np.float64))
    if scores.ndim != 2 or scores.size == 0 or len(scores) % m:
        raise ValueError(
            f"`matrix` must be (inputs, outputs) with inputs in groups of {m}, got shape "
            f"{scores.shape}."
        )
    if power is not None:
        scores = scores * np.sqrt(np.asarray(power, np.float64))[:, None]
    if not np.isfinite(scores).all():
        raise ValueError("`matrix` must be finite: an order of NaN keeps nothing.")
    if operator.index(sweeps) < 0:
        raise ValueError(f"`sweeps` must be at least 0, got {sweeps}.")
    total = lambda order: float(_kept(scores[order.reshape(-1, m)], n).sum())
    given = np.arange(len(scores))
    order = max(given, _interleaved(scores, m), key=total)
    groups, rng = order.reshape(-1, m).copy(), np.random.default_rng(seed)
    pairs = list(itertools.combinations(range(len(groups)), 2))
    for _ in range(sweeps):
        visits = (pairs[k] for k in rng.permutation(len(pairs)))
        if not sum(_swap_two(scores, groups[a], groups[b], n) for a, b in visits):
            break
    order = groups.reshape(-1)
    return Permutation(order, total(given), total(order))


def permute(params: PyTree, order: Int[ArrayLike, " n"], axes: Mapping[str, int]) -> PyTree:
    """Reorders axes of leaves by one order, so that a network computes what it did before.

    The order of the inputs of a layer is that of the outputs of what feeds it: give the last axis
    of the kernel and the axis of the bias of the layer before, and those of a norm in between. What
    is between them must treat all channels alike, as ReLU or pooling.

    Args:
      params: A tree of arrays.
      order: From `permute_inputs`.
      axes: Path to the axis of that leaf that is reordered.

    Returns:
      The tree with these leaves reordered.

    Raises:
      ValueError: A path is not in the tree, or its axis has another length than the order.

    Examples:
      >>> import jax, jax.numpy as jnp, rmtjax
      >>> draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> params = {"a": {"kernel": draw(0, 3, 8)}, "b": {"kernel": draw(1, 8, 2)}}
      >>> order, before, after = rmtjax.patterns.permute_inputs(params["b"]["kernel"], (2, 4))
      >>> same = rmtjax.patterns.permute(params, order, {"a/kernel": 1, "b/kernel": 0})
      >>> run = lambda params: draw(2, 5, 3) @ params["a"]["kernel"] @ params["b"]["kernel"]
      >>> bool(jnp.allclose(run(params), run(same), atol=1e-5)), after > before
      (True, True)
    """
    order = np.asarray(order)
    if sorted(order.tolist()) != list(range(order.size)):
        raise ValueError(f"`order` must have each index from 0 once, got {order}.")
    leaves = leaves_by_path(params, lambda path, _: path in axes)
    for path, axis in axes.items():
        shape = jnp.shape(leaves[path]) if path in leaves else None
        if shape is None or not -len(shape) <= axis < len(shape) or shape[axis] != order.size:
            raise ValueError(
                f"`axes` must name leaves with an axis of length {order.size}, got axis {axis} of "
                f"{path!r}, {f'of shape {shape}' if shape else 'which is not in the tree'}."
            )

    def take(path, leaf):
        if isinstance(leaf, np.ndarray):  # its byte order and its precision may not be JAX's
            return np.take(leaf, order, axes[path])
        reordered = lambda leaf: jnp.take(leaf, order, axes[path])
        return by_compiler(reordered, leaf, out=typed_sharding(leaf))

    return map_kernels(take, params, axes)
