"""Guards a network by its loss: cuts that would raise it too much are made smaller.

All cuts of a step lie on one way. It cuts kernel after kernel, the one of the least cost first,
each from its full rank down to the rank of its rule. A bisection finds how far the loss allows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, PyTree

from rmtjax._axes import KernelAxes, MatrixView
from rmtjax._sharding import by_compiler, typed_sharding
from rmtjax.planning import map_kernels
from rmtjax.spectra import compose, decompose
from rmtjax.training._pruning_step import KernelState, landing_norm, map_alike, removed_share

# Two losses with their gradients, of about three forward passes each, and those of the last
# pruning step and of zeros are eight passes. With the steps of the bisection they are 15.
_STEPS = 7
_RANKS = 32  # the most ranks at which one kernel may end
# Of the gain over zeros: the least that a period counts for, as where training has converged.
_LEAST_GAIN = 0.003

Moves = tuple[list[Array], list[KernelState]]


class Guard(NamedTuple):
    """Holds what decides how far the cuts of a step go.

    Attributes:
      value_fn: The loss of a tree of parameters.
      params, updates: The whole trees, without cuts.
      reference: The parameters one period ago.
      max_rise: Share of the fall of the loss since then that the cuts may undo.
    """

    value_fn: Any
    params: PyTree
    updates: PyTree
    reference: PyTree
    max_rise: Any


@dataclass(frozen=True)
class _Cut:
    """One kernel on the way of all cuts.

    Attributes:
      view: The kernel before the update.
      before, after: Its update and its state, without the cut and with it.
      whole: Where the update lands without the cut.
      vectors: (u, s, vt) of the matrices of `whole`.
      place: Number of kernels that are cut before it.
      steps: Number of steps of the way on which it is cut.
    """

    view: MatrixView
    before: tuple[Array, KernelState]
    after: tuple[Array, KernelState]
    whole: Array
    vectors: tuple[Array, Array, Array]
    place: Int[Array, ""]
    steps: int

    def rank(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """Returns the rank at a step of the way: it falls by one factor in each."""
        size, state = self.view.short, self.after[1]
        done = jnp.clip(step - self.place * self.steps, 0, self.steps)
        rank = jnp.round(size * (state.rank / size) ** (done / self.steps)).astype(jnp.int32)
        # In float32 the last power may be off by one rank.
        rank = jnp.where(done == self.steps, state.rank, rank)
        return jnp.where(is_cut(state), rank, size)

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
        # Far from the directions that stay, and from those that training will add.
        floor = jnp.square(jnp.take(s, rank - 1, axis=1) / 2) / self.view.long
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
        done = step >= (self.place + 1) * self.steps
        pick = lambda end, part: jnp.where(done | ~is_cut(self.after[1]), end, part)
        return jax.tree.map(pick, self.after, (move, self.state(step, move)))


def is_cut(state: KernelState) -> Bool[Array, ""]:
    """Returns True if a step has made a kernel smaller."""
    return state.removed > 0


def _costs(loss: Callable, whole: list[Array], cut: list[Array]) -> tuple[Array, Array, list]:
    r"""Returns the loss of both, and what the cut of each kernel adds to it.

    $\Delta L \approx \frac12 \langle g_0 + g_1, W' - W \rangle$, with the gradients at both ends,
    is exact for a loss that is quadratic in between. Its terms are those of the kernels.
    """
    start, first = jax.value_and_grad(loss)(whole)
    end, last = jax.value_and_grad(loss)(cut)

    def cost(before, after, g0, g1):
        before, after, g0, g1 = (a.astype(jnp.float32) for a in (before, after, g0, g1))
        return jnp.sum((g0 + g1) / 2 * (after - before))

    return start, end, list(map(cost, whole, cut, first, last))


def _gain(value_fn: Callable, reference: PyTree, tree: PyTree, start: Array) -> Array:
    """Returns by how much the loss has fallen over the last period."""
    empty = lambda leaf: jnp.zeros_like(leaf) if jnp.ndim(leaf) > 1 else leaf
    gains = value_fn(reference) - start, value_fn(jax.tree.map(empty, tree)) - start
    period, whole = (jnp.where(jnp.isfinite(gain), jnp.maximum(gain, 0), 0) for gain in gains)
    return jnp.maximum(period, _LEAST_GAIN * whole)


def _places(costs: list[Array], states: list[KernelState]) -> list[Array]:
    """Returns how many cuts come before that of each kernel: the cheapest is the first."""
    largest = jnp.finfo(jnp.float32).max
    known = jnp.nan_to_num(jnp.stack(costs), nan=largest, posinf=largest)
    # Those that are not cut come last.
    order = jnp.argsort(jnp.where(jnp.stack([*map(is_cut, states)]), known, jnp.inf))
    return list(jnp.argsort(order))


def _bisect(fine_at: Callable[[Array], Bool[Array, ""]], end: Int[Array, ""]) -> Int[Array, ""]:
    """Returns the last step that is fine, between 0, which is, and `end`, which is not."""

    def narrow(state):
        low, high, count = state
        middle = (low + high) // 2
        fine = fine_at(middle)
        return jnp.where(fine, middle, low), jnp.where(fine, high, middle), count + 1

    unsure = lambda state: (state[1] - state[0] > 1) & (state[2] < _STEPS)
    zero = jnp.zeros((), jnp.int32)
    return lax.while_loop(unsure, narrow, (zero, end, zero))[0]


def _find_vectors(arrays: tuple[Array], axes: KernelAxes) -> tuple[Array, Array, Array]:
    find = lambda kernel: decompose(MatrixView("", kernel, axes).matrices())
    return by_compiler(find, *arrays)


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


def _within_rise(guard: Guard, views: list[MatrixView], before: Moves, after: Moves) -> Moves:
    """Returns updates and states of kernels whose cuts raise the loss by no more than allowed."""
    value_fn = _scalar(guard.value_fn)
    tree = optax.apply_updates(guard.params, guard.updates)

    def loss(kernels):
        by_path = dict(zip((view.path for view in views), kernels, strict=True))
        return value_fn(map_kernels(lambda path, _: by_path[path], tree, by_path))

    land = lambda view, move: (view.leaf + move).astype(view.leaf.dtype)
    whole, cut = (list(map(land, views, moves)) for moves, _ in (before, after))
    start, end, costs = _costs(loss, whole, cut)
    limit = start + guard.max_rise * _gain(value_fn, guard.reference, tree, start)
    is_fine = lambda value: (value <= limit) & jnp.isfinite(value)
    moves, states = after
    states = [s._replace(cost=c.astype(s.cost.dtype)) for s, c in zip(states, costs, strict=True)]
    steps = max(2, min(_RANKS, 2**_STEPS // len(views)))

    def lessen():
        # The decompositions wait for those before: under `vmap` both are computed.
        arrays = [(jnp.where(is_fine(end), 1, kernel),) for kernel in whole]
        vectors = map_alike(_find_vectors, arrays, tuple(view.axes for view in views))
        pairs = zip(*before, strict=True), zip(moves, states, strict=True)
        of_each: Any = (views, *pairs, whole, vectors, _places(costs, states))
        cuts = [_Cut(*kernel, steps=steps) for kernel in zip(*of_each, strict=True)]
        last = steps * jnp.sum(jnp.stack([*map(is_cut, states)]), dtype=jnp.int32)
        step = _bisect(lambda step: is_fine(loss([cut.lower(step) for cut in cuts])), last)
        chosen = [cut.chosen(step) for cut in cuts]
        return [move for move, _ in chosen], [state for _, state in chosen]

    return lax.cond(is_fine(end), lambda: (moves, states), lessen)


def guard_if(due, guard: Guard, views: list[MatrixView], before: Moves, after: Moves) -> Moves:
    """Makes the cuts of a step that is due smaller: between the states `before` and `after`."""
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
    return call_if(due, lambda: _within_rise(guard, views, before, after), after)


def call_if(condition, function: Callable[[], PyTree], otherwise: PyTree) -> PyTree:
    """Returns what a function returns if a condition holds, else a value of the same form."""
    if isinstance(condition, Tracer):
        return lax.cond(condition, function, lambda: otherwise)
    # Outside `jit`, `lax.cond` would compile each new function, needed or not.
    return function() if condition else otherwise
