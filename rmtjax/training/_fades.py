"""Fades what lies beyond the ranks of kernels, as far as the loss allows.

A kernel that fades keeps its full rank. What lies beyond the rank of the rule gets weaker at each
pruning step, while training moves what it knows to the rest. Gradients weigh the directions: with
A = E[G G^T] of rows and B = E[G^T G] of columns, a cut D costs about |A^1/2 D B^1/2|^2 up to a
factor (Morwani et al., 2024, https://arxiv.org/abs/2406.17748). It removes what the loss feels
least. The moments are gathered once a period, also before the first pruning step.

All cuts together may cost what some periods of training gain. Each kernel has a share of it, by its
number of entries: small kernels that the loss needs cost more and save little. Kernels that cost
more than their share are left alone for good.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rmtjax._axes import KernelAxes, MatrixView
from rmtjax._sharding import by_compiler, typed_sharding
from rmtjax.models import fast_convolutions
from rmtjax.planning import Hold
from rmtjax.spectra import compose, decompose, lift, matmul
from rmtjax.training._cuts import (
    bisect,
    cost_of,
    finite_costs,
    is_cut,
    land,
    Move,
    Moves,
    pick,
    Stacks,
)
from rmtjax.training._guard import (
    check,
    fell,
    Guard,
    known_fall,
    land_view,
    loss_of,
    losses,
    mean_fall,
    RIPE,
    slopes,
    zeros_of,
)
from rmtjax.training._prune_state import landing_norm
from rmtjax.training._pruning_step import call_if, ungroup

# Of the bisection, with the one that asks for all cuts at once. Two losses with their gradients, of
# about three forward passes each, and three other losses make 15 of them.
_STEPS = 6
_FORGETS = 0.9  # of the moments, at each look
# Of the mean of the eigenvalues. One batch has no gradient in most directions of a wide kernel.
_DAMPING = 0.01
# Share of the squares beyond the rank below which the rest is removed at once: training has moved
# what it needed. What a period adds is then removed at each step.
_WEAK = 0.01
_PERIODS = 2.5  # of training, whose gain all cuts may cost


class Curvature(NamedTuple):
    """Moments of the gradients of a kernel: sums over its columns, and over its rows."""

    rows: Float[Array, "b m m"]
    columns: Float[Array, "b n n"]


def no_curvature(view: MatrixView) -> Curvature:
    """Returns the moments before the first gradient."""
    square = lambda size: jnp.zeros((view.stack, size, size), jnp.float32)
    return Curvature(square(view.rows), square(view.columns))


def _add(_, old: Curvature, gradient: Array, axes: KernelAxes) -> Curvature:
    """Returns moments with those of one more gradient."""

    def add(old: Curvature, gradient: Array) -> Curvature:
        gradient = MatrixView("", gradient.astype(jnp.float32), axes).matrices()
        scale = jnp.maximum(jnp.max(jnp.abs(gradient)), jnp.finfo(jnp.float32).tiny)
        gradient = jnp.where(jnp.isfinite(gradient), gradient / scale, 0)
        across = gradient.swapaxes(1, 2)
        new = matmul(gradient, across), matmul(across, gradient)
        # Each batch counts alike, so that no product overflows.
        new = (square / jnp.maximum(jnp.trace(square, 0, 1, 2).max(), 1e-30) for square in new)
        return Curvature(*(_FORGETS * was + square for was, square in zip(old, new, strict=True)))

    return by_compiler(add, old, gradient)


def _turned(stacks: Stacks, curvatures: list[Curvature]) -> list[Curvature]:
    """Returns moments of kernels as those of tall matrices, or back."""
    turn = lambda form, moments: Curvature(*moments[::-1]) if form.turned else moments
    return list(map(turn, stacks.forms, curvatures))


def gathered(stacks: Stacks, old: list[Curvature], gradients: list[Array]) -> list[Curvature]:
    """Returns the moments of kernels with one more gradient of each."""
    known = stacks.join(_turned(stacks, old))
    of_each = zip(stacks.groups, known, stacks.groups_of(gradients), strict=True)
    new = [group.map(_add, *arrays) for group, *arrays in of_each]
    return _turned(stacks, ungroup(stacks.groups, new))


def _roots(square: Float[Array, "b p p"]) -> tuple[Array, Array]:
    """Returns the weights of a side, the square roots of its moments, and their inverses."""
    values, vectors = jnp.linalg.eigh(square)
    mean = jnp.mean(values, axis=1, keepdims=True)
    values = jnp.maximum(values, 0) / jnp.maximum(mean, jnp.finfo(values.dtype).tiny)
    powers = ((values + _DAMPING) ** power for power in (0.5, -0.5))
    root, inverse = (matmul(vectors * p[:, None], vectors.swapaxes(1, 2)) for p in powers)
    return root, inverse


def _cut(arrays: Moves, curvature: Curvature, rank: Array, axes: KernelAxes) -> Array:
    """Returns a kernel cut to a rank, with nothing left that the gradients feel least."""

    def cut(kernel, curvature: Curvature, rank):
        view = MatrixView("", lift(kernel), axes)
        (rows, back), (columns, forth) = map(_roots, curvature)
        weighted = matmul(matmul(rows, view.matrices()), columns)
        lower = compose(*decompose(weighted), rank)
        return view.from_matrices(matmul(matmul(back, lower), forth)).astype(kernel.dtype)

    whole = land(arrays)
    return by_compiler(cut, whole, curvature, rank, out=typed_sharding(whole))


def ends_of(stacks: Stacks, curvatures: list[Curvature], ranks: list[Array]) -> list[Array]:
    """Returns the kernels of each group with nothing left beyond their ranks."""
    known, ranks_of = stacks.join(_turned(stacks, curvatures)), jnp.stack(ranks)
    return [
        group.map(_cut, moments, group.of(ranks_of))
        for group, moments in zip(stacks.groups, known, strict=True)
    ]


def _chosen(arrays: Moves, end: Array, goes: Array, cost: Array, *, fade: Any, hold: Any) -> Move:
    """Returns the update of a kernel that fades, or its update as it was; and its state.

    The floor lets a plan cut it or not. The rank stays full: the tail may still be there.
    """
    kernel, (same, old), (faded, new) = arrays
    whole, new = land(arrays), new._replace(cost=cost.astype(new.cost.dtype))
    beyond = new.removed + new.refused
    left = jnp.where(beyond < _WEAK, 0, fade)
    start, stop = (part.astype(jnp.float32) for part in (whole, end))
    lower = (start + (1 - left) * (stop - start)).astype(whole.dtype)
    move = jnp.where(goes, (lower - kernel).astype(same.dtype), same)
    removed = jnp.where(goes, beyond * (1 - jnp.square(left)), 0)
    state = new._replace(
        fit=jax.tree.map(partial(jnp.where, goes), new.fit, old.fit),
        removed=removed,
        refused=beyond - removed,
        floor=jnp.where(goes, new.floor, -1),
        norm=jnp.where(goes, landing_norm(kernel, move), 0),
        reason=jnp.where(goes, Hold.NONE, hold),
    )
    state = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), state, new)
    return jax.tree.map(partial(pick, is_cut(new)), (move, state), (faded, new))


def _fade_within(
    stacks: Stacks,
    rise_of: Callable[[list[Array]], Array],
    kernels: tuple[list[Array], list[Array]],
    cuts: tuple[Bool[Array, " k"], Float[Array, " k"]],
    most: Float[Array, ""],
    fade: Any,
) -> list[Move]:
    """Returns updates and states of kernels that fade, as long as the loss allows their cuts.

    `rise_of` is what kernels add to the loss. `kernels` are those without cuts, and those with
    them. `cuts` are which kernels have one, and its cost. `most` is what all cuts may
    add, minus infinity while the network still learns fast.
    """
    (whole, lower), (changes, costs) = kernels, cuts
    sizes = jnp.asarray([kernel.size for kernel in whole], jnp.float32)
    changes &= costs <= most * (sizes / sizes.sum())
    places = jnp.argsort(jnp.argsort(jnp.where(changes, costs, jnp.inf)))

    def first(number) -> Bool[Array, " k"]:
        return (places < number) & changes

    def fine(number: Int[Array, ""]) -> Bool[Array, ""]:
        return rise_of(list(map(jnp.where, first(number), lower, whole))) <= most

    count = jnp.sum(changes, dtype=jnp.int32)
    number = bisect(fine, count + 1, _STEPS, first=count)
    hold = jnp.where(most == -jnp.inf, Hold.LEARNING, Hold.LOSS)
    chosen, numbers = partial(_chosen, fade=jnp.asarray(fade), hold=hold), (first(number), costs)
    faded = [
        group.at_once(chosen, end, *map(group.of, numbers))
        for group, end in zip(stacks.groups, stacks.groups_of(lower), strict=True)
    ]
    return stacks.moves(faded)


def fade_if(
    due: tuple[Any, Any],
    guard: Guard,
    views: list[MatrixView],
    moves: tuple[list[Move], list[Move]],
    curvatures: list[Curvature],
    ranks: list[Array],
    fade: Any,
):
    """Fades kernels at a step that is due, and gathers gradients at it and before, once a period.

    Returns updates with states, the fall of the loss over a period, and moments of gradients.
    """
    (ends, prunes), (before, after) = due, moves
    check(guard)

    def look():
        whole, stacks = list(map(land_view, views, before)), Stacks(views, before, after)

        def cut_of(_, gradients: list[Array]):
            new = gathered(stacks, curvatures, gradients)
            # The batch that judges a cut has no say in it, unless there was none before.
            pick = lambda was, now: jnp.where(jnp.any(was > 0), was, now)
            ends = ends_of(stacks, jax.tree.map(pick, curvatures, new), ranks)
            return stacks.kernels(ends), ()

        (start, first), (_, last), (cut, _) = slopes(guard, views, whole, cut_of, count=1 + prunes)
        # Without the update, which has learnt from this very batch.
        now, was, zeros = losses(guard, guard.params, guard.reference, zeros_of(guard))
        period, gain = was - now, fell(zeros, start)
        ripe = guard.fall <= RIPE * gain
        # From the first fade on a period also brings back what the last one took.
        fall = jnp.where(prunes & ripe, guard.fall, mean_fall(guard, period))
        fine = fall <= RIPE * gain

        def step():
            costs = finite_costs(list(map(cost_of, whole, cut, first, last)))
            # What was once too dear stays: as learning ends, all cuts seem cheap.
            dear = [state.reason == Hold.LOSS for _, state in before]
            cuts = jnp.stack([is_cut(state) for _, state in after]) & ~jnp.stack(dear), costs
            loss = fast_convolutions(loss_of(guard, views))
            rise = lambda kernels: loss(kernels) - start
            most = jnp.where(fine, _PERIODS * jnp.maximum(fall, 0), -jnp.inf)
            return _fade_within(stacks, rise, (whole, cut), cuts, most, fade)

        new = gathered(stacks, curvatures, first)
        return lax.cond(prunes, step, lambda: after), known_fall(fall).astype(guard.fall.dtype), new

    return call_if(ends, look, (after, guard.fall, curvatures))
