"""Fades what lies beyond the ranks of kernels, as far as the loss allows.

A kernel that fades keeps its full rank. Its singular values beyond the rank of the rule get smaller
at each pruning step, while training moves what they know to the others. All steps together may
undo a share of what training has gained, and the cut that a plan makes at the end a smaller one.

A kernel fades the less, the more its cut would cost. A search finds how far the loss lets all of
them go, and a second one how many of them a plan may cut, the one of the least cost first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rmtjax._axes import MatrixView
from rmtjax.training._cuts import is_cut, Move
from rmtjax.training._pruning_step import landing_norm

_FADE_PASSES, _CUT_PASSES = 5, 2  # of the two searches: with what is known before, 15 in all
_PARTS = 64  # of the way on which kernels fade
# All steps may raise the loss by as much as this many cuts, and one by a third of what is left:
# those after it cost about half of it each.
_CUTS, _SPENDS = 7, 1 / 3
# Costs are known to first order alone. A kernel that seems to cost nothing counts as a quarter of
# the dearest, since it would else hold up all others, should it cost too much.
_CHEAPEST = 1 / 4


class Fades(NamedTuple):
    """Holds what decides how far kernels fade.

    Attributes:
      views: The kernels before their updates.
      whole, ends: Where the updates land without a fade, and with nothing left beyond the rank.
      fade: What is left of a value beyond the rank after a step.
      most: By how much one cut may raise the loss.
      spent: By how much the steps before have raised it.
    """

    views: list[MatrixView]
    whole: list[Array]
    ends: list[Array]
    fade: Any
    most: Float[Array, ""]
    spent: Float[Array, ""]


def end_of_fade(fade: Any, whole: Array, landed: Array) -> Array:
    """Returns a kernel with nothing left beyond its rank, from where a part of it has gone."""
    start, part = (kernel.astype(jnp.float32) for kernel in (whole, landed))
    return (start + (part - start) / (1 - fade)).astype(whole.dtype)


def _between(whole: Array, end: Array, share: Array) -> Array:
    """Returns a kernel without a share of what lies beyond its rank."""
    start, stop = (kernel.astype(jnp.float32) for kernel in (whole, end))
    return jnp.where(share > 0, (start + share * (stop - start)).astype(whole.dtype), whole)


def _furthest(rise_at: Callable[[Array], Array], end: Array, high: Array, most: Array, passes: int):
    """Returns the last step below `high` that raises the loss by at most `most`, and by how much.

    If `high` is beyond the end of the way, the end comes first: in most steps all may go there.
    """

    def narrow(state):
        low, high, rise, count = state
        step = jnp.where(high > end, end, (low + high) // 2)
        found = rise_at(step)
        fine = found <= most
        pick = lambda yes, no: jnp.where(fine, yes, no)
        return pick(step, low), pick(high, step), pick(found, rise), count + 1

    unsure = lambda state: (state[1] - state[0] > 1) & (state[3] < passes)
    zero = jnp.zeros_like(end)
    low, _, rise, _ = lax.while_loop(unsure, narrow, (zero, high, jnp.zeros_like(most), zero))
    return low, rise


def _costs(after: list[Move]) -> tuple[Float[Array, " k"], Bool[Array, " k"]]:
    """Returns what cuts of kernels cost, positive and finite, and which of them fade."""
    costs = jnp.stack([state.cost.astype(jnp.float32) for _, state in after])
    changes = jnp.stack([is_cut(state) for _, state in after])
    limits = jnp.finfo(jnp.float32)
    return jnp.clip(jnp.nan_to_num(costs, nan=jnp.inf), limits.tiny, limits.max), changes


def _chosen(view: MatrixView, before: Move, after: Move, kernel: Array, share, cut) -> Move:
    """Returns the update that lands on a kernel without a share of what lies beyond its rank.

    And its state, with a floor that lets a plan cut or not. The rank is full, as nothing is cut.
    """
    (same, old), (faded, new) = before, after
    begun = share > 0
    move = jnp.where(begun, (kernel - view.leaf).astype(same.dtype), same)
    beyond = new.removed + new.refused
    removed = beyond * (1 - jnp.square(1 - share))
    state = new._replace(
        fit=jax.tree.map(partial(jnp.where, begun), new.fit, old.fit),
        removed=removed,
        refused=beyond - removed,
        floor=jnp.where(cut, new.floor, -1),
        norm=jnp.where(begun, landing_norm(view.leaf, move), 0),
    )
    state = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), state, new)
    return jax.tree.map(partial(jnp.where, is_cut(new)), (move, state), (faded, new))


def fade_within(
    fades: Fades,
    rise_of: Callable[[list[Array]], Array],
    end_rise: Array,
    before: list[Move],
    after: list[Move],
) -> tuple[list[Move], Array]:
    """Returns updates and states that have faded as far as the loss allows, and its rise.

    `rise_of` is what kernels add to the loss, and `end_rise` what all ends together add.
    """
    costs, changes = _costs(after)
    left = jnp.maximum(_CUTS * fades.most - fades.spent, 0)
    whole_fade = 1 - jnp.asarray(fades.fade)
    dearest = jnp.max(jnp.where(changes, costs, 0))
    weights = jnp.maximum(costs / jnp.maximum(dearest, jnp.finfo(costs.dtype).tiny), _CHEAPEST)
    faded = lambda step: whole_fade * jnp.minimum(step / _PARTS / weights, 1)
    kernels = lambda shares: list(map(_between, fades.whole, fades.ends, shares))
    end, rise_at = jnp.asarray(_PARTS, jnp.int32), lambda step: rise_of(kernels(faded(step)))
    step, rose = _furthest(rise_at, end, end + 1, _SPENDS * left, _FADE_PASSES)
    shares = faded(step)
    # The cheapest are cut first.
    places = jnp.argsort(jnp.argsort(jnp.where(changes, costs, jnp.inf)))
    count = jnp.sum(changes, dtype=jnp.int32)
    cut = lambda number: rise_of(kernels(jnp.where(places < number, 1, shares)))
    allowed = rose + fades.most
    search = lambda: _furthest(cut, count, count, allowed, _CUT_PASSES)[0]
    number = lax.cond(end_rise <= allowed, lambda: count, search)
    of_each = zip(fades.views, before, after, kernels(shares), shares, places < number, strict=True)
    return [_chosen(*kernel) for kernel in of_each], rose
