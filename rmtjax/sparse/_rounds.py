"""Rounds of `prune_entries`: prune, perhaps beyond the target, train what has gone, restore a part.

A round without restoration prunes to its target. One with it, spectral edge reallocation, prunes
further by the share `restore`. In the steps of its selection the removed entries, which start at
zero, train alone. Then those that have moved most come back until the target is reached.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rmtjax._axes import KernelAxes
from rmtjax.sparse._masks import count_removed, Masks, one_group, order_keys, without_smallest
from rmtjax.sparse.patterns import largest_of_groups
from rmtjax.spectra import lift


class Round(NamedTuple):
    """Tells where a round stands.

    Attributes:
      masks: Path to booleans, True where an entry stays.
      selecting: Steps of the selection that are left; 0 outside it.
      goal: Number of entries that the round removes in the end.
    """

    masks: Masks
    selecting: Int[Array, ""]
    goal: Int[Array, ""]


class RoundNumbers(NamedTuple):
    """Options that may be traced."""

    sparsity: ArrayLike
    restore: ArrayLike
    select: ArrayLike
    magnitude_until: ArrayLike


class Chooser(NamedTuple):
    """Says what competes: all entries with one another, or those of a group of N:M.

    Attributes:
      pattern: N and M; None for all entries.
      axes: For a pattern, the axes of each kernel, by its path.
    """

    pattern: tuple[int, int] | None = None
    axes: tuple[tuple[str, KernelAxes], ...] = ()

    def number(self, share: ArrayLike, size: int) -> Int[Array, ""]:
        """Returns the number of entries to remove for a share of all."""
        share = jnp.asarray(share, jnp.float32)
        if self.pattern is None:
            return jnp.round(share * size).astype(jnp.int32)
        n, m = self.pattern
        # As many of each group, so that the number is one of groups.
        of_group = jnp.round(share * m).astype(jnp.int32)
        return jnp.minimum(of_group, m - n) * (size // m)

    def further(self, goal: Int[Array, ""], restore: ArrayLike, size: int) -> Int[Array, ""]:
        """Returns the number of entries to remove first, of which a part comes back."""
        share = jnp.asarray(restore, jnp.float32)
        if self.pattern is None:
            return jnp.minimum(goal + jnp.round(share * size).astype(jnp.int32), size)
        n, m = self.pattern
        more = jnp.where(share > 0, jnp.maximum(jnp.round(share * m), 1), 0).astype(jnp.int32)
        return goal + jnp.minimum(more, n) * (size // m)

    def without_smallest(self, keys: dict[str, Array], count: Int[Array, ""]) -> Masks:
        """Returns masks that are False at the smallest keys."""
        if self.pattern is None:
            return without_smallest(keys, one_group(keys), count[None])
        size, (_, m) = sum(key.size for key in keys.values()), self.pattern
        stays = m - count // (size // m)
        kept = partial(largest_of_groups, size=m, count=stays)
        return {path: kept(keys[path], axes) for path, axes in self.axes}


def _score(kernels, masks: Masks, weights) -> dict[str, Array]:
    """Returns keys in the order of |w| / weight; 0 where a mask is False."""
    dtype = jnp.result_type(*map(lift, kernels.values()))
    key = lambda path: order_keys(kernels[path], masks[path], weights[path], dtype)
    return {path: key(path) for path in masks}


def _prune(landed, state: Round, weights, numbers: RoundNumbers, chooser: Chooser) -> Round:
    """Returns the round after a pruning step; the same if enough entries have gone."""
    size = sum(mask.size for mask in state.masks.values())
    goal = chooser.number(numbers.sparsity, size)
    # Below that sparsity a round is one by magnitude alone.
    plain = numbers.sparsity <= jnp.asarray(numbers.magnitude_until, jnp.float32)
    restore = jnp.where(plain | (jnp.asarray(numbers.select) < 1), 0, numbers.restore)
    weights = {path: jnp.where(plain, 1, weight) for path, weight in weights.items()}

    def begin(state: Round) -> Round:
        keys = _score(landed, state.masks, weights)
        kept = chooser.without_smallest(keys, chooser.further(goal, restore, size))
        masks = {path: state.masks[path] & kept[path] for path in kept}
        selecting = jnp.where(restore > 0, numbers.select, 0).astype(jnp.int32)
        return Round(masks, selecting, goal)

    return jax.lax.cond(goal > count_removed(state.masks), begin, lambda state: state, state)


def _restore(landed, state: Round, weights, chooser: Chooser) -> Round:
    """Returns the round after its selection: removed entries that have moved most are back."""
    gone = {path: ~mask for path, mask in state.masks.items()}
    keys = _score(landed, gone, weights)
    # What was never removed stays: its key is larger than that of any number.
    most = lambda key: np.asarray(np.iinfo(key.dtype).max, key.dtype)
    keys = {path: jnp.where(gone[path], key, most(key)) for path, key in keys.items()}
    masks = chooser.without_smallest(keys, state.goal)
    return state._replace(masks=masks)


# Compiled also for users who call `update` outside `jit`: eager, each step would dispatch some
# sixty sums one by one.
@partial(jax.jit, static_argnames=("chooser", "restores"))
def advance(
    due,
    kernels: dict[str, Float[Array, "..."]],
    updates: dict[str, Float[Array, "..."]],
    state: Round,
    weights: dict[str, Any],
    numbers: RoundNumbers,
    *,
    chooser: Chooser,
    restores: bool,
) -> tuple[dict[str, Array], Round]:
    """Returns updates that land on zero where an entry is removed, and the state of the round."""
    # The order of magnitudes must be that of what lands.
    landed: Any = optax.apply_updates(kernels, updates)
    # p + (0 - p) is exactly 0.
    zero = lambda path: (-kernels[path]).astype(updates[path].dtype)
    land = lambda masks: {path: jnp.where(masks[path], updates[path], zero(path)) for path in masks}

    def plain(state: Round):
        prune = lambda state: _prune(landed, state, weights, numbers, chooser)
        state = jax.lax.cond(due, prune, lambda state: state, state)
        return land(state.masks), state

    def select(state: Round):
        before = state.masks
        state = state._replace(selecting=state.selecting - 1)
        last = state.selecting == 0
        restore = lambda state: _restore(landed, state, weights, chooser)
        state = jax.lax.cond(last, restore, lambda state: state, state)
        # What was kept rests. What was removed moves, until it is known what comes back.
        stays = {path: state.masks[path] | ~last for path in before}
        rest = lambda path, moves: jnp.where(before[path], jnp.zeros_like(moves), moves)
        return {path: rest(path, moves) for path, moves in land(stays).items()}, state

    if not restores:
        return plain(state)
    return jax.lax.cond(state.selecting > 0, select, plain, state)
