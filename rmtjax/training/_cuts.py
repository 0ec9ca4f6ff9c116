"""Kernels on the way of the cuts of a step: what they and their states are at each place of it.

Kernels that were cut before go down all at once. Then one goes after the other, the one of the
least cost first, each from its full rank down to the rank of its rule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from rmtjax._axes import KernelAxes, MatrixView
from rmtjax._sharding import by_compiler, typed_sharding
from rmtjax.spectra import compose, times_power
from rmtjax.training._prune_state import KernelState, landing_norm
from rmtjax.training._pruning_step import removed_share

Move = tuple[Array, KernelState]  # the update of a kernel, and its state

# Two losses with their gradients, of about three forward passes each, and those of the last
# pruning step and of zeros are eight passes. With the steps of the bisection they are 15.
STEPS = 7


def bisect(fine_at: Callable[[Array], Array], end: Array, steps: int = STEPS) -> Int[Array, ""]:
    """Returns the last step that is fine, between 0, which is, and `end`, which is not."""

    def narrow(state):
        low, high, count = state
        middle = (low + high) // 2
        fine = fine_at(middle)
        return jnp.where(fine, middle, low), jnp.where(fine, high, middle), count + 1

    unsure = lambda state: (state[1] - state[0] > 1) & (state[2] < steps)
    zero = jnp.zeros((), jnp.int32)
    return lax.while_loop(unsure, narrow, (zero, end.astype(jnp.int32), zero))[0]


@dataclass(frozen=True)
class Cut:
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

    @classmethod
    def of(cls, arrays: tuple, vectors: tuple, axes: KernelAxes, steps: int) -> "Cut":
        """Returns the cut of a kernel from the arrays that make it."""
        kernel, whole, before, after, waits, begin = arrays
        view = MatrixView("", kernel, axes)
        return cls(view, before, after, whole, vectors, waits, begin, steps)

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
        last, next_ = (times_power(value, -new.exponent) for value in (last, next_))
        floor = jnp.where(self.waits, last * next_, jnp.square(last * 0.75)) / self.view.long
        floor = jnp.maximum(floor, jnp.finfo(floor.dtype).tiny)  # 0 would stand for none
        # The noise is that of the first cut: a kernel that is not cut remembers nothing.
        fit = jax.tree.map(lambda new, old: jnp.where(is_lower, new, old), new.fit, old.fit)
        state = new._replace(
            fit=fit,
            rank=jnp.where(is_lower, rank, old.rank),
            removed=removed,
            refused=jnp.maximum(new.removed - removed, 0),
            floor=jnp.where(is_lower, floor, -1).reshape(new.floor.shape),
            norm=jnp.where(is_lower, landing_norm(self.view.leaf, move), 0),
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


def with_cost(after: Move, start: Array, end: Array, first: Array, last: Array) -> Move:
    r"""Returns a cut with what it adds to the loss, from the gradients at both ends.

    $\Delta L \approx \frac12 \langle g_0 + g_1, W' - W \rangle$ is exact for a loss that is
    quadratic in between. Its terms are those of the kernels.
    """
    start, end, first, last = (a.astype(jnp.float32) for a in (start, end, first, last))
    cost = jnp.sum((first + last) / 2 * (end - start))
    # A cut without a finite cost is the dearest.
    largest = jnp.finfo(cost.dtype).max
    cost = jnp.nan_to_num(cost, nan=largest, posinf=largest)
    move, state = after
    return move, state._replace(cost=cost.astype(state.cost.dtype))


def without_cut(before: Move, after: Move, floor: Array) -> Move:
    """Returns an update without its cut, and a state with a floor for plans."""
    (move, old), new = before, after[1]
    none = jnp.zeros_like(new.removed)
    state = new._replace(
        fit=old.fit, rank=old.rank, floor=floor, removed=none, norm=jnp.zeros_like(new.norm)
    )
    return move, state._replace(refused=new.refused + new.removed)


def told(wait: Bool[Array, ""], before: Move, after: Move) -> Move:
    """Returns a kernel that waits with its next cut as it is; its floor stays for plans."""
    (move, old), new = before, after[1]
    none = jnp.zeros_like(new.removed)
    left = move, new._replace(rank=old.rank, removed=none, norm=jnp.zeros_like(new.norm))
    return jax.tree.map(partial(jnp.where, wait), left, after)


def begins_of(states: list[KernelState], is_first: Array, steps: int):
    """Returns the step at which each cut begins, and the last step of all."""
    changes = jnp.stack([*map(is_cut, states)])
    costs = jnp.stack([state.cost.astype(jnp.float32) for state in states])
    # The cheapest is the first, and those that are not cut come last.
    order = jnp.argsort(jnp.where(changes & is_first, costs, jnp.inf))
    first = steps * jnp.any(changes & ~is_first)
    begins = jnp.where(is_first, first + steps * jnp.argsort(order), 0)
    return begins, first + steps * jnp.sum(changes & is_first)
