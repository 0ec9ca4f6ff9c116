"""Guards a network by its loss: cuts that would raise it too much are made smaller.

All cuts of a step lie on one way. It starts with kernels that were cut before, all at once. Then
it cuts kernel after kernel, the one of the least cost first, each from its full rank down to the
rank of its rule. A bisection finds how far the loss allows.

A kernel that was cut waits with the next cut, so that what training adds can grow out of the
noise. Looks in between only tell a plan how far it may go. Kernels that fade are judged by what a
period of training gains, see `_fades`.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, PyTree

from rmtjax._axes import MatrixView
from rmtjax.models import fast_convolutions
from rmtjax.planning import Hold, map_kernels
from rmtjax.training._cuts import (
    begins_of,
    bisect,
    chosen_at,
    cost_of,
    finite_costs,
    is_cut,
    lower_at,
    Move,
    Moves,
    pick,
    Stacks,
    STEPS,
    told,
    vectors_of,
    Way,
    without_cut,
)
from rmtjax.training._pruning_step import call_if

_RANKS = 32  # the most ranks at which one kernel may end
# Share of the gain over zeros. A network that learns more in a period is not cut for the first
# time: what it needs has not grown out of the noise.
RIPE = 0.02
UNKNOWN = float(np.finfo(np.float32).max)  # a fall that was not measured: above every limit


class Guard(NamedTuple):
    """Holds what decides how far the cuts of a step go.

    Attributes:
      value_fn: The loss of a tree of parameters.
      params, updates: The whole trees, without cuts.
      reference: The parameters one period ago.
      fall: The fall of the loss over the period before that; `UNKNOWN` if there was none.
      again: Whether kernels that were cut are cut again.
      max_rise: Share of the gain over a network of zeros that the cuts may undo.
    """

    value_fn: Any
    params: PyTree
    updates: PyTree
    reference: PyTree
    fall: Float[Array, ""]
    again: Any
    max_rise: Any


def losses(guard: Guard, *trees: PyTree) -> Array:
    """Returns the losses of trees of parameters, one after the other: it is compiled once."""
    loss = fast_convolutions(_scalar(guard.value_fn))
    choose = lambda index: lambda *leaves: lax.select_n(index, *map(jnp.asarray, leaves))
    at = lambda index: loss(jax.tree.map(choose(index), *trees))
    return lax.map(at, jnp.arange(len(trees), dtype=jnp.int32))


def zeros_of(guard: Guard) -> PyTree:
    """Returns the parameters of a network that has learnt nothing."""
    # Zeros that the compiler cannot know: it folds constants, and for a convolution in a branch it
    # was seen to make a loss of 0 of them.
    zero = lambda leaf: (0 * jnp.nan_to_num(leaf)).astype(leaf.dtype)
    empty = lambda leaf: zero(leaf) if jnp.ndim(leaf) > 1 else leaf
    return jax.tree.map(empty, optax.apply_updates(guard.params, guard.updates))


def fell(zeros: Array, start: Array) -> Array:
    """Returns by how much the loss has fallen from that of zeros."""
    whole = zeros - start
    # A fall that is not finite is above every limit, and the next look does not count it.
    return jnp.maximum(jnp.where(jnp.isfinite(whole), whole, 0), 0)


def slopes(
    guard: Guard,
    views: list[MatrixView],
    whole: list[Array],
    then: Callable[[Array, list[Array]], tuple[list[Array], PyTree]],
    facts: PyTree = (),
    count: Any = 2,
):
    """Returns losses with gradients at the kernels without cuts, and at those with them.

    `then(loss, gradients)` makes the kernels with cuts of the first of both, and new facts in place
    of `facts`, which only give their types. Both are returned last. With a `count` of 1 nothing is
    cut, and the first result is also the second. The loss is compiled once for both.
    """
    slope = fast_convolutions(jax.value_and_grad(loss_of(guard, views)))
    none = jnp.zeros(()), list(map(jnp.zeros_like, whole))

    def visit(index, state):
        (kernels, known), first, _ = state
        loss, gradients = slope(kernels)
        result = loss.astype(none[0].dtype), gradients
        first = jax.tree.map(lambda was, now: jnp.where(index == 0, now, was), first, result)
        goes_on = (index == 0) & (count > 1)
        moved = lax.cond(goes_on, lambda: then(*result), lambda: (kernels, known))
        return moved, first, result

    after, first, last = lax.fori_loop(0, count, visit, ((whole, facts), none, none))
    return first, last, after


def _scalar(value_fn: Callable[[PyTree], Any]) -> Callable[[PyTree], Array]:
    """Returns a loss in float32 at least, which says what is wrong with its value."""

    def loss(params: PyTree) -> Array:
        value = value_fn(params)
        is_array = isinstance(value, jax.Array)
        if not is_array or value.ndim or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                "`value_fn` must return one floating number for a tree of parameters, got "
                f"{value}. Of (loss, aux) return the loss alone."
            )
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))

    return loss


def _lessen(fine: Callable, stacks: Stacks, way: Way, end: Array, waits: Array, done: Array):
    """Returns updates and states as far on the way of all cuts as the loss allows."""
    groups = stacks.groups
    # The decompositions wait for those before: under `vmap` both are computed.
    vectors = [
        group.map(vectors_of, group.of(jnp.broadcast_to(~done, waits.shape))) for group in groups
    ]
    each = list(zip(groups, vectors, strict=True))

    def lower(step: Array) -> list[Array]:
        ranks = way.ranks_at(step)
        return stacks.kernels(
            [group.map(lower_at, known, group.of(ranks)) for group, known in each]
        )

    step = bisect(lambda step: fine(lower(step)), end)
    numbers = way.ranks_at(step), way.ended(step), waits
    return [group.map(chosen_at, known, *map(group.of, numbers)) for group, known in each]


def _candidate(arrays: Moves, held: Array, left: Array) -> Moves:
    """Returns the moves of a kernel, with its cut only if it is neither held nor left."""
    kernel, before, after = arrays
    hold = jnp.where(left, Hold.WAITING, Hold.LEARNING)
    uncut = without_cut(before, after, jnp.where(left, before[1].floor, -1), hold)
    return kernel, before, jax.tree.map(partial(pick, held | left), uncut, after)


def loss_of(guard: Guard, views: list[MatrixView]) -> Callable[[list[Array]], Array]:
    """Returns the loss of the network with other kernels in it."""
    value_fn = _scalar(guard.value_fn)
    tree = optax.apply_updates(guard.params, guard.updates)

    def loss(kernels: list[Array]) -> Array:
        by_path = dict(zip((view.path for view in views), kernels, strict=True))
        return value_fn(map_kernels(lambda path, _: by_path[path], tree, by_path))

    return loss


def land_view(view: MatrixView, move: Move) -> Array:
    """Returns where an update lands, in the dtype of its kernel."""
    return (view.leaf + move[0]).astype(view.leaf.dtype)


def mean_fall(guard: Guard, period: Array) -> Array:
    """Returns the fall of the loss in a period: one batch says little of it, several say more."""
    mean = guard.fall + (period - guard.fall) / 2
    return jnp.where(guard.fall < UNKNOWN, mean, period)


def known_fall(fall: Array) -> Array:
    """Returns a fall as the state holds it, which is finite."""
    return jnp.where(jnp.isfinite(fall), fall, UNKNOWN)


def _within_rise(guard: Guard, views: list[MatrixView], before: list[Move], after: list[Move]):
    """Returns updates and states of kernels whose cuts raise the loss by no more than allowed.

    And the fall of the loss over the last period.
    """
    whole, lands = (list(map(land_view, views, moves)) for moves in (before, after))
    short = jnp.asarray([view.short for view in views])
    changes = jnp.stack([is_cut(state) for _, state in after])
    is_first = jnp.stack([state.rank for _, state in before]) >= short
    waits = ~is_first & ~jnp.asarray(guard.again)

    def skips(period: Array, gain: Array) -> tuple[Array, Array]:
        # First cuts only if the network is ripe. Kernels that wait are then left as they are: a
        # cut that is not made must not hide what the others cost.
        ripe = mean_fall(guard, period) <= RIPE * gain
        return is_first & changes & ~ripe, waits & jnp.any(is_first & changes) & ripe

    def cut_of(start: Array, _):
        was, zeros = losses(guard, guard.reference, zeros_of(guard))
        facts = (was - start).astype(start.dtype), fell(zeros, start).astype(start.dtype)
        return list(map(jnp.where, jnp.logical_or(*skips(*facts)), whole, lands)), facts

    no_facts = jnp.zeros(()), jnp.zeros(())
    (start, first), (end, last), (cut, facts) = slopes(guard, views, whole, cut_of, facts=no_facts)
    (period, gain), (held, left) = facts, skips(*facts)
    stacks = Stacks(views, before, after).at_once(_candidate, held, left)
    skipped = held | left
    costs = finite_costs(list(map(cost_of, whole, cut, first, last)))
    loss = fast_convolutions(loss_of(guard, views))
    is_fine = lambda rise: (rise <= guard.max_rise * gain) & jnp.isfinite(rise)
    done, fine = is_fine(end - start), lambda kernels: is_fine(loss(kernels) - start)
    way, last_step = _way(views, after, changes & ~skipped, costs, is_first)
    rest = lambda: _lessen(fine, stacks, way, last_step, waits, done)
    moves = lax.cond(done, lambda: [group.arrays[2] for group in stacks.groups], rest)

    def end_of(arrays: Moves, move: Move, wait: Array, cost: Array) -> Move:
        update, state = told(wait, arrays[1], move)
        return update, state._replace(cost=cost.astype(state.cost.dtype))

    ends = [
        group.at_once(end_of, move, group.of(waits), group.of(costs))
        for group, move in zip(stacks.groups, moves, strict=True)
    ]
    return stacks.moves(ends), known_fall(period).astype(guard.fall.dtype)


def _way(views: list[MatrixView], after: list[Move], changes: Array, costs: Array, is_first: Array):
    """Returns the way of all cuts, and its last step."""
    steps = max(2, min(_RANKS, 2**STEPS // len(views)))
    begins, last = begins_of(changes, costs, is_first, steps)
    even = [view.rows * view.columns / (view.rows + view.columns) for view in views]
    short, ranks = jnp.asarray([v.short for v in views]), jnp.stack([s.rank for _, s in after])
    return Way(short, jnp.asarray(even, jnp.float32), ranks, changes, begins, steps), last


def _check_value_fn(value_fn: Any) -> None:
    """Raises TypeError for a value in place of a function, or for one of other arguments."""
    if not callable(value_fn):
        kind = "an array" if hasattr(value_fn, "dtype") else repr(value_fn)
        raise TypeError(
            f"`value_fn` must be a function of the parameters, got {kind}: pass `loss`, not "
            "`loss(params)`."
        )
    try:
        signature = inspect.signature(value_fn)
    except ValueError:  # of functions of C
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise TypeError(
            f"`value_fn` is called with the parameters alone, got a function of {signature}: "
            "close over the batch, `value_fn=lambda params: loss(params, batch)`."
        ) from error


def check(guard: Guard) -> None:
    """Raises an error for another loss, if it cannot see all parameters, or for another copy."""
    _check_value_fn(guard.value_fn)
    hidden = lambda node: isinstance(node, optax.MaskedNode)
    if any(map(hidden, jax.tree.leaves(guard.params, is_leaf=hidden))):
        raise ValueError(
            "`value_fn` needs all parameters, and `optax.masked` or `optax.partition` hide some. "
            "Choose the kernels of `prune_spectrum` by `where` instead, or pass `max_rise=None`."
        )
    if jax.tree.structure(guard.reference) != jax.tree.structure(guard.params):
        raise ValueError(
            "the state of `prune_spectrum` has a copy of other parameters than `params`. After "
            "`rmtjax.factorize` carry it over by `rmtjax.transfer_opt_state`."
        )


def guard_if(due, guard: Guard, views: list[MatrixView], before: list[Move], after: list[Move]):
    """Makes the cuts of a step that is due smaller: between `before` and `after`.

    Returns updates with states, and the fall of the loss over the last period.
    """
    check(guard)
    return call_if(due, lambda: _within_rise(guard, views, before, after), (after, guard.fall))
