"""Fades what lies beyond the ranks of kernels, as far as the loss allows.

A kernel that fades keeps its full rank. What lies beyond the rank of the rule gets weaker at each
pruning step, while training moves what it knows to the rest. Gradients weigh the directions: with
E[G G^T] of rows and E[G^T G] of columns, a cut removes what the loss feels least. The moments are
gathered from one batch a period, also before the first pruning step.

A cut may set training back by one period: it may raise the loss by what training gained in one.
Kernels fade for which all of the cut costs less, the cheapest first. The others are left alone.
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
from rmtjax.spectra import compose, decompose, lift, matmul
from rmtjax.training._cuts import bisect, is_cut, Move
from rmtjax.training._pruning_step import landing_norm, map_alike

_STEPS = 6  # of the bisection. One more pass asks for the loss before the update.
_FORGETS = 0.9  # of the moments, at each look
# Of the mean of the eigenvalues. One batch has no gradient in most directions of a wide kernel.
_DAMPING = 0.1
# Share of the squares beyond the rank below which the rest is removed at once: training has moved
# what it needed. What a period adds is then removed at each step.
_WEAK = 0.01


class Curvature(NamedTuple):
    """Moments of the gradients of a kernel: sums over its columns, and over its rows."""

    rows: Float[Array, "b m m"]
    columns: Float[Array, "b n n"]


def no_curvature(view: MatrixView) -> Curvature:
    """Returns the moments before the first gradient."""
    square = lambda size: jnp.zeros((view.stack, size, size), jnp.float32)
    return Curvature(square(view.rows), square(view.columns))


def _add(old: Curvature, kernel: Array, axes: KernelAxes) -> Curvature:
    gradient = MatrixView("", kernel.astype(jnp.float32), axes).matrices()
    scale = jnp.maximum(jnp.max(jnp.abs(gradient)), jnp.finfo(jnp.float32).tiny)
    gradient = jnp.where(jnp.isfinite(gradient), gradient / scale, 0)
    across = gradient.swapaxes(1, 2)
    new = matmul(gradient, across), matmul(across, gradient)
    # Each batch counts alike, so that no product overflows.
    new = (square / jnp.maximum(jnp.trace(square, 0, 1, 2).max(), 1e-30) for square in new)
    return Curvature(*(_FORGETS * was + square for was, square in zip(old, new, strict=True)))


def gathered(views: list[MatrixView], old: list[Curvature], gradients: list[Array]):
    """Returns the moments of kernels with one more gradient of each."""
    of_each = zip(old, gradients, views, strict=True)
    return [by_compiler(partial(_add, axes=view.axes), *arrays) for *arrays, view in of_each]


def _roots(square: Float[Array, "b p p"]) -> tuple[Array, Array]:
    """Returns the weights of a side, the fourth roots of its moments, and their inverses.

    A moment has two gradients in it, so that this is the root of the curvature of its side.
    """
    values, vectors = jnp.linalg.eigh(square)
    mean = jnp.mean(values, axis=1, keepdims=True)
    values = jnp.maximum(values, 0) / jnp.maximum(mean, jnp.finfo(values.dtype).tiny)
    powers = ((values + _DAMPING) ** power for power in (0.25, -0.25))
    root, inverse = (matmul(vectors * p[:, None], vectors.swapaxes(1, 2)) for p in powers)
    return root, inverse


def _cut(arrays, axes: KernelAxes) -> Array:
    """Returns a kernel cut to a rank, with nothing left that the gradients feel least."""

    def cut(kernel, curvature: Curvature, rank):
        view = MatrixView("", lift(kernel), axes)
        (rows, back), (columns, forth) = map(_roots, curvature)
        weighted = matmul(matmul(rows, view.matrices()), columns)
        lower = compose(*decompose(weighted), rank)
        return view.from_matrices(matmul(matmul(back, lower), forth)).astype(kernel.dtype)

    return by_compiler(cut, *arrays, out=typed_sharding(arrays[0]))


def ends_of(views, whole: list[Array], curvatures: list[Curvature], ranks: list[Array]):
    """Returns kernels with nothing left beyond their ranks."""
    inputs = list(zip(whole, curvatures, ranks, strict=True))
    return map_alike(_cut, inputs, tuple(view.axes for view in views))


def _chosen(view: MatrixView, before: Move, after: Move, whole, end, goes, fade) -> Move:
    """Returns the update of a kernel that fades, or its update as it was; and its state.

    The floor lets a plan cut it or not. The rank stays full: the tail may still be there.
    """
    (same, old), (faded, new) = before, after
    beyond = new.removed + new.refused
    left = jnp.where(beyond < _WEAK, 0, fade)
    start, stop = (kernel.astype(jnp.float32) for kernel in (whole, end))
    kernel = (start + (1 - left) * (stop - start)).astype(whole.dtype)
    move = jnp.where(goes, (kernel - view.leaf).astype(same.dtype), same)
    removed = jnp.where(goes, beyond * (1 - jnp.square(left)), 0)
    state = new._replace(
        fit=jax.tree.map(partial(jnp.where, goes), new.fit, old.fit),
        removed=removed,
        refused=beyond - removed,
        floor=jnp.where(goes, new.floor, -1),
        norm=jnp.where(goes, landing_norm(view.leaf, move), 0),
    )
    state = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), state, new)
    return jax.tree.map(partial(jnp.where, is_cut(new)), (move, state), (faded, new))


def fade_within(
    views: list[MatrixView],
    rise_of: Callable[[list[Array]], Array],
    kernels: tuple[list[Array], list[Array]],
    rise: tuple[Float[Array, ""], Float[Array, ""]],
    moves: tuple[list[Move], list[Move]],
    fade: Any,
) -> list[Move]:
    """Returns updates and states of kernels that fade, as long as the loss allows their cuts.

    `rise_of` is what kernels add to the loss. `kernels` are those without and with their cuts, and
    `rise` is what all cuts add, and the most that they may.
    """
    (whole, ends), (before, after), (rise_of_all, most) = kernels, moves, rise
    costs = jnp.stack([state.cost.astype(jnp.float32) for _, state in after])
    changes = jnp.stack([is_cut(state) for _, state in after])
    places = jnp.argsort(
        jnp.argsort(jnp.where(changes, jnp.nan_to_num(costs, nan=jnp.inf), jnp.inf))
    )

    def first(number) -> list[Bool[Array, ""]]:
        return list((places < number) & changes)

    def fine(number: Int[Array, ""]) -> Bool[Array, ""]:
        return rise_of(list(map(jnp.where, first(number), ends, whole))) <= most

    count = jnp.sum(changes, dtype=jnp.int32)
    number = lax.cond(rise_of_all <= most, lambda: count, lambda: bisect(fine, count, _STEPS))
    of_each = zip(views, before, after, whole, ends, first(number), strict=True)
    return [_chosen(*kernel, fade=jnp.asarray(fade)) for kernel in of_each]
