"""Truncates stacks in a compiled program, until `spectra` has it."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from rmtjax.spectra import compose, directions, iteration_pays, leading_above, lift, project


def _search(matrix, floor, search, block):
    matrix = lax.stop_gradient(lift(matrix))
    finite = jnp.isfinite(matrix).all()
    matrix = jnp.where(finite, matrix, 0)
    floor = lax.stop_gradient(floor)
    look = lambda: leading_above(matrix, floor, block)
    nothing = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(look))
    return lax.cond((floor > 0) & search & finite, look, nothing)


def truncate_by(matrices, rank_of, floor, search):
    """Truncates a stack to the rank that its singular values give."""

    def by_all():
        u, s, vt = directions(matrices, floor)
        rank, extra = rank_of(s, True)
        return compose(u, s, vt, rank), s, extra

    block = min(matrices.shape[1:]) // 80 * 8
    if search is False or len(matrices) > 1 or not iteration_pays(block, matrices.shape[1:]):
        return by_all()
    leading = _search(matrices[0], floor[0], search, block)
    u, s, vt = (part[None] for part in leading[:3])
    padded = jnp.pad(s, ((0, 0), (0, min(matrices.shape[1:]) - block)))

    def by_signal():
        rank, extra = rank_of(padded, False)
        return partial(project, u, s, vt, matrices)(rank), padded, extra

    count = jnp.sum(leading.s > floor[0])
    return lax.cond(leading.converged & (rank_of(padded, False)[0] <= count), by_signal, by_all)
