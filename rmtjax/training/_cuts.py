"""Kernels on the way of the cuts of a step: what they and their states are at each place of it.

Kernels that were cut before go down all at once. Then one goes after the other, the one of the
least cost first, each from its full rank down to the rank of its rule.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rmtjax._axes import KernelAxes, MatrixView
from rmtjax._sharding import by_compiler, typed_sharding
from rmtjax.planning import Hold
from rmtjax.spectra import compose, decompose, times_power
from rmtjax.training._prune_state import (
    all_taken,
    KernelState,
    landing_norm,
    removed_share,
    Tall,
)
from rmtjax.training._pruning_step import group_alike, ungroup

Move = tuple[Array, KernelState]  # the update of a kernel, and its state
Moves = tuple[Array, Move, Move]  # a kernel, and its move without a cut and with it
Vectors = tuple[Array, Array, Array]  # (u, s, vt)

# Two losses with their gradients, of about three forward passes each, and those of the last
# pruning step and of zeros are eight passes. With the steps of the bisection they are 15.
STEPS = 7


class Stacks:
    """Kernels with their moves without cuts and with them, those that are alike as one stack.

    Attributes:
      groups: The arrays of a kernel are its values, and both moves, as tall matrices.
      forms: What turns each kernel into tall matrices.
    """

    def __init__(self, views: list[MatrixView], before: list, after: list):
        self.forms, self._states = list(map(Tall, views)), [state for _, state in before]
        each = zip(self.forms, views, before, after, strict=True)
        inputs = [
            (form.stack(view.leaf), form.stacked(old), form.stacked(new))
            for form, view, old, new in each
        ]
        self.groups = group_alike(inputs, tuple(form.axes for form in self.forms))

    def at_once(self, function: Callable, *numbers: Array) -> "Stacks":
        """Returns them with other arrays; each kernel gets its numbers."""
        new = copy.copy(self)
        of_group = lambda group: group.at_once(function, *map(group.of, numbers))
        new.groups = [group._replace(arrays=of_group(group)) for group in self.groups]
        return new

    def join(self, trees: list) -> list:
        """Returns what belongs to each kernel for the maps over groups."""
        stack = lambda *leaves: jnp.stack(leaves)
        of_group = lambda first, *others: jax.tree.map(stack, first, *others) if others else first
        return [of_group(*(trees[index] for index in group.indices)) for group in self.groups]

    def groups_of(self, kernels: list[Array]) -> list[Array]:
        """Returns kernels as the groups hold them."""
        return self.join([form.stack(one) for form, one in zip(self.forms, kernels, strict=True)])

    def kernels(self, outputs: list[Array]) -> list[Array]:
        """Returns kernels with their own axes, from those of the groups."""
        return list(map(Tall.kernel, self.forms, ungroup(self.groups, outputs)))

    def moves(self, outputs: list) -> list[tuple[Array, KernelState]]:
        """Returns moves of kernels with their own axes, from those of the groups."""
        return list(map(Tall.restored, self.forms, ungroup(self.groups, outputs), self._states))


def bisect(
    fine_at: Callable[[Array], Array], end: Array, steps: int = STEPS, first: Any = None
) -> Int[Array, ""]:
    """Returns the last step that is fine, between 0, which is, and `end`, which is not.

    The middle is asked for, or `first` at first.
    """

    def narrow(state):
        low, high, count = state
        middle = (low + high) // 2
        middle = middle if first is None else jnp.where(count == 0, first, middle)
        fine = fine_at(middle)
        return jnp.where(fine, middle, low), jnp.where(fine, high, middle), count + 1

    unsure = lambda state: (state[1] - state[0] > 1) & (state[2] < steps)
    zero = jnp.zeros((), jnp.int32)
    return lax.while_loop(unsure, narrow, (zero, end.astype(jnp.int32), zero))[0]


class Way(NamedTuple):
    """The way of all cuts, in numbers of all kernels.

    Attributes:
      short: Their short sides.
      even: The ranks at which factors are as large as the kernels.
      ranks: Those of the rule.
      changes: Whether they are cut.
      begins: The steps from which on they are cut.
      steps: The number of steps on which each is cut.
    """

    short: Int[Array, " k"]
    even: Float[Array, " k"]
    ranks: Int[Array, " k"]
    changes: Bool[Array, " k"]
    begins: Int[Array, " k"]
    steps: int

    def ranks_at(self, step: Int[Array, ""]) -> Int[Array, " k"]:
        """Returns the ranks at a step of the way: they fall by one factor in each."""
        done = jnp.clip(step - self.begins, 0, self.steps) / self.steps
        # From the rank on at which factors are smaller than the kernel, if the cut goes so far.
        start = jnp.where(self.ranks < self.even, self.even, self.short)
        ranks = jnp.round(start * (self.ranks / start) ** done).astype(jnp.int32)
        # In float32 the last power may be off by one rank.
        ranks = jnp.where(done == 1, self.ranks, ranks)
        return jnp.where(self.changes & (done > 0), ranks, self.short)

    def ended(self, step: Int[Array, ""]) -> Bool[Array, " k"]:
        """Returns True for kernels that a later step does not change."""
        return (step >= self.begins + self.steps) | ~self.changes


def land(arrays: Moves) -> Array:
    """Returns where the update of a kernel lands without its cut, in its dtype."""
    kernel, (update, _), _ = arrays
    return (kernel + update).astype(kernel.dtype)


def vectors_of(arrays: Moves, decomposes: Bool[Array, ""], axes: KernelAxes) -> Vectors:
    """Returns the directions of where an update lands without its cut, or of ones."""
    find = lambda whole: decompose(MatrixView("", whole, axes).matrices())
    return by_compiler(find, jnp.where(decomposes, land(arrays), 1))


def lower_at(arrays: Moves, vectors: Vectors, rank: Array, axes: KernelAxes) -> Array:
    """Returns a kernel cut to a rank."""
    whole = land(arrays)

    def multiply(vectors: Vectors, rank, like):
        u, s, vt = vectors
        return MatrixView("", like, axes).from_matrices(compose(u, s, vt, rank))

    kernel = by_compiler(multiply, vectors, rank, whole, out=typed_sharding(whole))
    short = vectors[1].shape[1]
    return jnp.where(rank < short, kernel.astype(whole.dtype), whole)


def chosen_at(
    arrays: Moves, vectors: Vectors, rank: Array, ended: Array, waits: Array, axes: KernelAxes
) -> Move:
    """Returns the update and the state at a rank, to the last bit those given at both ends.

    With `waits` a plan is told how far it may go, and nothing is cut.
    """
    (kernel, before, after), is_lower = arrays, rank < vectors[1].shape[1]
    move = (lower_at(arrays, vectors, rank, axes) - kernel).astype(before[0].dtype)
    move = jnp.where(is_lower, move, before[0])
    norm = jnp.where(is_lower, landing_norm(kernel, move), 0)
    # Of tall matrices, or of a kernel as it is on a mesh.
    view = MatrixView("", kernel, axes)
    state = _state_at(before[1], after[1], vectors[1], rank, waits, norm, view.long)
    pick = lambda end, part: jnp.where(ended, end, part)
    return jax.tree.map(pick, after, (move, state))


def _state_at(
    old: KernelState, new: KernelState, s: Array, rank: Array, waits: Array, norm: Array, long: int
) -> KernelState:
    """Returns the state of a kernel that is cut to a rank."""
    is_lower = rank < s.shape[1]
    removed = jnp.where(is_lower, removed_share(s, s, rank), 0)
    taken = all_taken(old.taken, removed - removed_share(s, s, old.rank))
    places = jnp.minimum(jnp.stack([rank, rank + 1]), s.shape[1]) - 1
    # After a cut, far from the directions that stay and from those that training will add. Without
    # one, between those that must stay and the others, which are still there.
    last, next_ = times_power(jnp.take(s, places, axis=1), -new.exponent).T
    floor = jnp.where(waits, last * next_, jnp.square(last * 0.75)) / long
    floor = jnp.maximum(floor, jnp.finfo(floor.dtype).tiny)  # 0 would stand for none
    # The noise is that of the first cut: a kernel that is not cut remembers nothing.
    fit = jax.tree.map(lambda new, old: jnp.where(is_lower, new, old), new.fit, old.fit)
    state = new._replace(
        fit=fit,
        rank=jnp.where(is_lower, rank, old.rank),
        removed=removed,
        refused=jnp.maximum(new.removed - removed, 0),
        floor=jnp.where(is_lower, floor, -1).reshape(new.floor.shape),
        norm=norm,
        reason=jnp.where(is_lower, Hold.NONE, Hold.LOSS),
        taken=jnp.where(is_lower, taken, old.taken),
    )
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), state, new)


def is_cut(state: KernelState) -> Bool[Array, ""]:
    """Returns True if a step has made a kernel smaller."""
    return state.removed > 0


def cost_of(start: Array, end: Array, first: Array, last: Array) -> Float[Array, ""]:
    r"""Returns what a cut adds to the loss, from the gradients at both ends.

    $\Delta L \approx \frac12 \langle g_0 + g_1, W' - W \rangle$ is exact for a loss that is
    quadratic in between. Its terms are those of the kernels.
    """
    start, end, first, last = (a.astype(jnp.float32) for a in (start, end, first, last))
    return jnp.sum((first + last) / 2 * (end - start))


def finite_costs(costs: list[Array]) -> Float[Array, " k"]:
    """Returns costs of all kernels; a cut without a finite cost is the dearest."""
    largest = jnp.finfo(jnp.float32).max
    costs_of = jnp.nan_to_num(jnp.stack(costs), nan=largest, posinf=largest)
    # A cost of 0 in a state says that none was measured.
    return jnp.where(costs_of == 0, jnp.finfo(jnp.float32).tiny, costs_of)


def without_cut(before: Move, after: Move, floor: Array, hold: Array) -> Move:
    """Returns an update without its cut, and a state with a floor for plans and the reason."""
    (move, old), new = before, after[1]
    none = jnp.zeros_like(new.removed)
    state = new._replace(
        fit=old.fit,
        rank=old.rank,
        floor=floor,
        removed=none,
        norm=jnp.zeros_like(new.norm),
        taken=old.taken,
        reason=jnp.asarray(hold, new.reason.dtype),
    )
    return move, state._replace(refused=new.refused + new.removed)


def told(wait: Bool[Array, ""], before: Move, after: Move) -> Move:
    """Returns a kernel that waits with its next cut as it is; its floor stays for plans."""
    (move, old), new = before, after[1]
    none = jnp.zeros_like(new.removed)
    hold = jnp.where(new.reason == Hold.NONE, Hold.WAITING, new.reason).astype(new.reason.dtype)
    left = new._replace(rank=old.rank, removed=none, norm=jnp.zeros_like(new.norm))
    left = move, left._replace(reason=hold, taken=old.taken)
    return jax.tree.map(partial(pick, wait), left, after)


def pick(condition: Array, one: Array, other: Array) -> Array:
    """Returns one array or the other; one and the same is not compared with itself."""
    return one if one is other else jnp.where(condition, one, other)


def begins_of(changes: Array, costs: Array, is_first: Array, steps: int):
    """Returns the step at which each cut begins, and the last step of all."""
    # The cheapest is the first, and those that are not cut come last.
    order = jnp.argsort(jnp.where(changes & is_first, costs, jnp.inf))
    first = steps * jnp.any(changes & ~is_first)
    begins = jnp.where(is_first, first + steps * jnp.argsort(order), 0)
    return begins, first + steps * jnp.sum(changes & is_first)
