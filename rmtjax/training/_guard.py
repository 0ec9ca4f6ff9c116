"""Guards a network by its loss: cuts that would raise it too much are made smaller.

All cuts of a step lie on one way. It starts with kernels that were cut before, all at once. Then
it cuts kernel after kernel, the one of the least cost first, each from its full rank down to the
rank of its rule. A bisection finds how far the loss allows.

A kernel that was cut waits with the next cut, so that what training adds can grow out of the
noise. Looks in between only tell a plan how far it may go.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from rmtjax._axes import MatrixView
from rmtjax._sharding import by_compiler, typed_sharding
from rmtjax.planning import map_kernels
from rmtjax.spectra import compose, decompose
from rmtjax.training._pruning_step import (
    call_if,
    KernelState,
    landing_norm,
    map_alike,
    removed_share,
)

# Two losses with their gradients, of about three forward passes each, and those of the last
# pruning step and of zeros are eight passes. With the steps of the bisection they are 15.
_STEPS = 7
_RANKS = 32  # the most ranks at which one kernel may end
# Share of the gain over zeros. A network that learns more in a period is not cut for the first
# time: what it needs has not grown out of the noise.
_RIPE = 0.02
Move = tuple[Array, KernelState]  # the update of a kernel, and its state


class Guard(NamedTuple):
    """Holds what decides how far the cuts of a step go.

    Attributes:
      value_fn: The loss of a tree of parameters.
      params, updates: The whole trees, without cuts.
      reference: The parameters one period ago.
      fall: The fall of the loss over the period before that; NaN if there was none.
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


class _Kernels(NamedTuple):
    """Holds what is known of all kernels before their cuts.

    Attributes:
      views: The kernels before their updates.
      whole: Where the updates land without cuts.
      is_first: Whether a kernel was never cut.
      waits: Whether a kernel was cut and waits with the next cut.
    """

    views: list[MatrixView]
    whole: list[Array]
    is_first: Bool[Array, " k"]
    waits: Bool[Array, " k"]


@dataclass(frozen=True)
class _Cut:
    """One kernel on the way of all cuts.

    Attributes:
      view: The kernel before the update.
      before, after: Its update and its state, without the cut and with it.
      whole: Where the update lands without the cut.
      vectors: (u, s, vt) of the matrices of `whole`.
      waits: Whether a plan is told how far it may go, and nothing is cut.
      begin: Step of the way from which on it is cut.
      steps: Number of steps on which it is cut.
    """

    view: MatrixView
    before: Move
    after: Move
    whole: Array
    vectors: tuple[Array, Array, Array]
    waits: Bool[Array, ""]
    begin: Int[Array, ""]
    steps: int

    def rank(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """Returns the rank at a step of the way: it falls by one factor in each."""
        view, state = self.view, self.after[1]
        done = jnp.clip(step - self.begin, 0, self.steps) / self.steps
        # From the rank on at which factors are smaller than the kernel, if the cut goes so far.
        even = view.rows * view.columns / (view.rows + view.columns)
        start = jnp.where(state.rank < even, even, view.short)
        rank = jnp.round(start * (state.rank / start) ** done).astype(jnp.int32)
        # In float32 the last power may be off by one rank.
        rank = jnp.where(done == 1, state.rank, rank)
        return jnp.where(is_cut(state) & (done > 0), rank, view.short)

    def lower(self, step: Int[Array, ""]) -> Array:
        """Returns the kernel at a step of the way."""

        def multiply(vectors, rank, like):
            u, s, vt = vectors
            return MatrixView("", like, self.view.axes).from_matrices(compose(u, s, vt, rank))

        rank, out = self.rank(step), typed_sharding(self.whole)
        kernel = by_compiler(multiply, self.vectors, rank, self.whole, out=out)
        return jnp.where(rank < self.view.short, kernel.astype(self.whole.dtype), self.whole)

    def state(self, step: Int[Array, ""], move: Array) -> KernelState:
        """Returns the state at a step that is not the last of the kernel."""
        old, new, s, rank = self.before[1], self.after[1], self.vectors[1], self.rank(step)
        is_lower = rank < self.view.short
        removed = jnp.where(is_lower, removed_share(s, s, rank), 0)
        last, next_ = (
            jnp.take(s, jnp.minimum(r, s.shape[1]) - 1, axis=1) for r in (rank, rank + 1)
        )
        # After a cut, far from the directions that stay and from those that training will add.
        # Without one, between those that must stay and the others, which are still there.
        floor = jnp.where(self.waits, last * next_, jnp.square(last * 0.75)) / self.view.long
        # The noise is that of the first cut: a kernel that is not cut remembers nothing.
        fit = jax.tree.map(lambda new, old: jnp.where(is_lower, new, old), new.fit, old.fit)
        state = new._replace(
            fit=fit,
            rank=jnp.where(is_lower, rank, old.rank),
            removed=removed,
            refused=jnp.maximum(new.removed - removed, 0),
            floor=jnp.where(is_lower, floor, -1).reshape(new.floor.shape),
            norm=jnp.where(is_lower, landing_norm(self.view.leaf, move), jnp.nan),
        )
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), state, new)

    def chosen(self, step: Int[Array, ""]) -> tuple[Array, KernelState]:
        """Returns the update and the state at a step, to the last bit those given at both ends."""
        move = (self.lower(step) - self.view.leaf).astype(self.before[0].dtype)
        move = jnp.where(self.rank(step) < self.view.short, move, self.before[0])
        done = step >= self.begin + self.steps
        pick = lambda end, part: jnp.where(done | ~is_cut(self.after[1]), end, part)
        return jax.tree.map(pick, self.after, (move, self.state(step, move)))


def is_cut(state: KernelState) -> Bool[Array, ""]:
    """Returns True if a step has made a kernel smaller."""
    return state.removed > 0


def _with_cost(after: Move, start: Array, end: Array, first: Array, last: Array) -> Move:
    r"""Returns a cut with what it adds to the loss, from the gradients at both ends.

    $\Delta L \approx \frac12 \langle g_0 + g_1, W' - W \rangle$ is exact for a loss that is
    quadratic in between. Its terms are those of the kernels.
    """
    start, end, first, last = (a.astype(jnp.float32) for a in (start, end, first, last))
    cost = jnp.sum((first + last) / 2 * (end - start))
    move, state = after
    return move, state._replace(cost=cost.astype(state.cost.dtype))


def _gains(guard: Guard, loss: Callable, tree: PyTree, start: Array) -> tuple[Array, Array]:
    """Returns by how much the loss has fallen over the last period, and from that of zeros."""
    empty = lambda leaf: jnp.zeros_like(leaf) if jnp.ndim(leaf) > 1 else leaf
    period, whole = loss(guard.reference) - start, loss(jax.tree.map(empty, tree)) - start
    # A fall that is not finite is above every limit, and the next look does not count it.
    return period, jnp.maximum(jnp.where(jnp.isfinite(whole), whole, 0), 0)


def _begins(states: list[KernelState], is_first: Array, steps: int):
    """Returns the step at which each cut begins, and the last step of all."""
    largest, changes = jnp.finfo(jnp.float32).max, jnp.stack([*map(is_cut, states)])
    costs = jnp.stack([state.cost.astype(jnp.float32) for state in states])
    known = jnp.nan_to_num(costs, nan=largest, posinf=largest)
    # The cheapest is the first, and those that are not cut come last.
    order = jnp.argsort(jnp.where(changes & is_first, known, jnp.inf))
    first = steps * jnp.any(changes & ~is_first)
    begins = jnp.where(is_first, first + steps * jnp.argsort(order), 0)
    return begins, first + steps * jnp.sum(changes & is_first)


def _bisect(fine_at: Callable[[Array], Bool[Array, ""]], end: Int[Array, ""]) -> Int[Array, ""]:
    """Returns the last step that is fine, between 0, which is, and `end`, which is not."""

    def narrow(state):
        low, high, count = state
        middle = (low + high) // 2
        fine = fine_at(middle)
        return jnp.where(fine, middle, low), jnp.where(fine, high, middle), count + 1

    unsure = lambda state: (state[1] - state[0] > 1) & (state[2] < _STEPS)
    zero = jnp.zeros((), jnp.int32)
    return lax.while_loop(unsure, narrow, (zero, end.astype(jnp.int32), zero))[0]


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


def _lessen(fine: Callable, kernels: _Kernels, before: list[Move], after: list[Move]):
    """Returns updates and states as far on the way of all cuts as the loss allows."""
    views, whole, is_first, waits = kernels
    find = lambda kernel, axes: decompose(MatrixView("", kernel, axes).matrices())
    vectors_of = lambda kernels, axes: by_compiler(partial(find, axes=axes), *kernels)
    arrays = [(kernel,) for kernel in whole]
    vectors = map_alike(vectors_of, arrays, tuple(view.axes for view in views))
    steps = max(2, min(_RANKS, 2**_STEPS // len(views)))
    begins, end = _begins([state for _, state in after], is_first, steps)
    of_each: Any = zip(views, before, after, whole, vectors, waits, begins, strict=True)
    cuts = [_Cut(*kernel, steps=steps) for kernel in of_each]
    step = _bisect(lambda step: fine([cut.lower(step) for cut in cuts]), end)
    return [cut.chosen(step) for cut in cuts]


def _without_cut(before: Move, after: Move, floor: Array) -> Move:
    """Returns an update without its cut, and a state with a floor for plans."""
    (move, old), new = before, after[1]
    none, unknown = jnp.zeros_like(new.removed), jnp.full_like(new.norm, jnp.nan)
    state = new._replace(fit=old.fit, rank=old.rank, floor=floor, removed=none, norm=unknown)
    return move, state._replace(refused=jnp.maximum(new.refused, new.removed))


def _candidates(kernels: _Kernels, before: list[Move], after: list[Move], ripe) -> list[Move]:
    """Returns the cuts that a step tries.

    First cuts only if the network is `ripe`. Kernels that wait are then left as they are: a cut
    that is not made must not hide what the others cost.
    """
    begin = kernels.is_first & jnp.stack([is_cut(state) for _, state in after])
    leave = kernels.waits & jnp.any(begin) & ripe
    tried = []
    for old, new, held, left in zip(before, after, begin & ~ripe, leave, strict=True):
        uncut = _without_cut(old, new, jnp.where(left, old[1].floor, -1))
        tried.append(jax.tree.map(partial(jnp.where, held | left), uncut, new))
    return tried


def _told(wait: Bool[Array, ""], before: Move, after: Move) -> Move:
    """Returns a kernel that waits with its next cut as it is; its floor stays for plans."""
    (move, old), new = before, after[1]
    none, unknown = jnp.zeros_like(new.removed), jnp.full_like(new.norm, jnp.nan)
    left = move, new._replace(rank=old.rank, removed=none, norm=unknown)
    return jax.tree.map(partial(jnp.where, wait), left, after)


def _within_rise(guard: Guard, views: list[MatrixView], before: list[Move], after: list[Move]):
    """Returns updates and states of kernels whose cuts raise the loss by no more than allowed.

    And the fall of the loss over the last period.
    """
    value_fn = _scalar(guard.value_fn)
    tree = optax.apply_updates(guard.params, guard.updates)

    def loss(kernels):
        by_path = dict(zip((view.path for view in views), kernels, strict=True))
        return value_fn(map_kernels(lambda path, _: by_path[path], tree, by_path))

    land = lambda view, move: (view.leaf + move[0]).astype(view.leaf.dtype)
    whole = list(map(land, views, before))
    start, first = jax.value_and_grad(loss)(whole)
    period, gain = _gains(guard, value_fn, tree, start)
    # One batch says little of a period: two say more.
    fall = jnp.where(jnp.isfinite(guard.fall), (period + guard.fall) / 2, period)
    is_first = jnp.stack([s.rank >= v.short for v, (_, s) in zip(views, before, strict=True)])
    kernels = _Kernels(views, whole, is_first, ~is_first & ~jnp.asarray(guard.again))
    after = _candidates(kernels, before, after, fall <= _RIPE * gain)
    cut = list(map(land, views, after))
    end, last = jax.value_and_grad(loss)(cut)
    after = list(map(_with_cost, after, whole, cut, first, last))
    is_fine = lambda value: (value <= start + guard.max_rise * gain) & jnp.isfinite(value)
    done, fine = is_fine(end), lambda kernels: is_fine(loss(kernels))
    # The decompositions wait for those before: under `vmap` both are computed.
    rest = kernels._replace(whole=[jnp.where(done, 1, kernel) for kernel in whole])
    after = lax.cond(done, lambda: after, lambda: _lessen(fine, rest, before, after))
    return list(map(_told, kernels.waits, before, after)), period.astype(guard.fall.dtype)


def guard_if(due, guard: Guard, views: list[MatrixView], before: list[Move], after: list[Move]):
    """Makes the cuts of a step that is due smaller: between `before` and `after`.

    Returns updates with states, and the fall of the loss over the last period.
    """
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
    return call_if(due, lambda: _within_rise(guard, views, before, after), (after, guard.fall))
