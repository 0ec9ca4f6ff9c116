"""One pruning step of some kernels: what lands, and what is remembered of each."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rmtjax._axes import from_matrices, KernelAxes, matrix_shape, to_matrices
from rmtjax._sharding import by_compiler, typed_sharding
from rmtjax._types import BulkFit, Spectrum
from rmtjax.noise import kept_rank, ranks
from rmtjax.spectra import (
    compose,
    directions,
    from_singular_values,
    iteration_pays,
    Leading,
    leading_above,
    lift,
    project,
)

Noise = Literal["first", "refit"]
# How a rule is mapped over a stack, whose matrices have one aspect ratio.
_EACH = Spectrum(eigenvalues=0, ratio=None)  # pyright: ignore[reportArgumentType]


class Memory(NamedTuple):
    """What is remembered of one kernel."""

    fits: BulkFit  # an entry for each matrix of a stack
    rank: Int[Array, ""]
    signal: Int[Array, ""]
    removed: Float[Array, ""]


class How(NamedTuple):
    """The options that are no arrays."""

    rule: ranks.RankRule
    noise: Noise
    waits: bool  # until the number of signal directions has settled


def unpruned(kernel, axes: KernelAxes) -> Memory:
    """What is remembered of a kernel before the first step."""
    stack, *sides = matrix_shape(kernel.shape, axes)
    shape = (stack,) if axes.batch else ()
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    # Each its own array: a buffer that appears twice cannot be donated to `jit`.
    nans = (jnp.full(shape, jnp.nan, dtype) for _ in range(4))
    fits = BulkFit(*nans, num_spikes=jnp.zeros(shape, jnp.int32))
    rank, signal = jnp.asarray(min(sides), jnp.int32), jnp.zeros((), jnp.int32)
    return Memory(fits, rank, signal, jnp.zeros((), dtype))


def _known_noise(spectra: Spectrum, memory: Memory, how: How):
    """The fits in force, and whether each is one to rely on."""
    # A spectrum that has been truncated is never fitted as if it were whole.
    fresh = jax.vmap(how.rule.fit, in_axes=(_EACH, None))(spectra, memory.rank)
    accepted = jax.vmap(how.rule.accepts, in_axes=(_EACH, 0))(spectra, fresh)
    known = jnp.isfinite(memory.fits.threshold)
    taken = accepted if how.noise == "refit" else accepted & ~known
    fits = jax.tree.map(lambda new, old: jnp.where(taken, new, old), fresh, memory.fits)
    return fits, known | accepted


def _has_settled(signal: Int[Array, ""], memory: Memory, size: int, settled: ArrayLike):
    """Whether the count of signal directions has stopped moving, or has been pruned before."""
    still = jnp.abs(signal - memory.signal) <= settled * jnp.maximum(signal, memory.signal)
    return (memory.rank < size) | (still & (memory.signal > 0))


def _cut(matrices, s, lower_to, noise, memory: Memory, keep, min_rank, settled, *, how: How):
    """A stack truncated to the signal of its richest member, and whether it is to be.

    Of singular values the first are enough. `lower_to` is the stack of a rank, and `noise` the
    fits in force with whether each is one to rely on.
    """
    (fits, reliable), size = noise, min(matrices.shape[1:])
    spectra = from_singular_values(s, matrices)
    signal = jax.vmap(how.rule, in_axes=(_EACH, 0))(spectra, fits).max()
    # Where nothing stands out, as before training, a cut would destroy the network.
    ready = jnp.all(reliable) & jnp.isfinite(s).all() & (signal > 0)
    if how.waits:
        ready &= _has_settled(signal, memory, size, settled)
        # Until then no noise level is carried: a settled kernel is to be judged by its own.
        waits = ~ready & (memory.rank == size)
        fits = jax.tree.map(lambda new, old: jnp.where(waits, old, new), fits, memory.fits)
    kept = kept_rank(signal, size, keep, min_rank)
    lower = lower_to(kept)
    scale = jnp.maximum(jnp.max(s), jnp.finfo(s.dtype).tiny)  # no square is too large or too small
    squares = lambda stack: jnp.sum(jnp.square(stack / scale))
    changed = ready & (kept < size)
    lost = jnp.where(changed, squares(matrices - lower) / squares(matrices), 0)
    # A kernel that is passed over has been truncated none the less, if it was before.
    rank = jnp.where(ready, kept, memory.rank)
    memory = Memory(fits, rank, signal, lost.astype(memory.removed.dtype))
    return lower, changed, memory


def _signal_block(shape: tuple[int, ...], how: How) -> int | None:
    """Directions to iterate in search of the signal, where that may be cheaper than all."""
    block = min(shape[1:]) // 80 * 8
    # A rule that counts what is above a threshold needs to see no more, and a stack, which is cut
    # to the rank of its richest member, more than the signal of the others.
    counts = type(how.rule) in (ranks.bema, ranks.gavish_donoho) and how.noise == "first"
    return block if counts and shape[0] == 1 and iteration_pays(block, shape[1:]) else None


def _signal(matrix: Float[Array, "m n"], least, enough, block: int) -> Leading:
    """The directions above a singular value; not converged where it is NaN, or they cannot do."""
    matrix = lax.stop_gradient(lift(matrix))  # no derivative goes through an iteration
    finite = jnp.isfinite(matrix).all()
    matrix = jnp.where(finite, matrix, 0)  # under `vmap` it is searched all the same
    least = lax.stop_gradient(least)
    search = lambda: leading_above(matrix, least, block)
    nothing = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(search))
    possible = (least > 0) & enough & finite
    return lax.cond(possible, search, nothing)


def _prune_stack(
    matrices: Float[Array, "b m n"], memory: Memory, keep, min_rank, settled, *, how: How
):
    """A stack truncated to the signal of its richest member, and whether it is to be."""
    # A noise level that is carried is not fitted any more: only what stands out of it counts.
    carried = jnp.where(how.noise == "first", memory.fits.threshold, jnp.nan)
    least = jnp.sqrt(carried * max(matrices.shape[1:]))
    options = memory, keep, min_rank, settled

    def by_all():
        u, s, vt = directions(matrices, least)
        noise = _known_noise(from_singular_values(s, matrices), memory, how)
        return _cut(matrices, s, partial(compose, u, s, vt), noise, *options, how=how)

    block = _signal_block(matrices.shape, how)
    if block is None:
        return by_all()
    kept = partial(kept_rank, size=min(matrices.shape[1:]), keep=keep, min_rank=min_rank)
    enough = kept(block - 1) < block  # with more signal there is less that is kept besides
    found = _signal(matrices[0], least[0], enough, block)

    def by_signal():
        noise = memory.fits, jnp.array(True)
        u, s, vt = (part[None] for part in found[:3])
        lower_to = partial(project, u, s, vt, matrices)
        return _cut(matrices, s, lower_to, noise, *options, how=how)

    signal = jnp.sum(found.s > least[0])
    return lax.cond(found.converged & (kept(signal) <= signal), by_signal, by_all)


def _prune_kernel(kernel, update, memory: Memory, *options, axes: KernelAxes, how: How):
    """The update that lands on the truncated kernel, and what is to be remembered of it."""
    # In the dtype of the fit, whatever that of the update: the state must keep its own.
    landed = (kernel + update).astype(memory.fits.threshold.dtype)
    matrices = to_matrices(landed, axes)
    flat = memory._replace(fits=jax.tree.map(jnp.ravel, memory.fits))
    lower, changed, new = _prune_stack(matrices, flat, *options, how=how)
    lower = from_matrices(lower, landed.shape, axes)
    # A kernel that keeps its full rank keeps its update to the last bit.
    update = jnp.where(changed, (lower - kernel).astype(update.dtype), update)
    return update, jax.tree.map(lambda leaf, old: leaf.reshape(old.shape), new, memory)


def _group(leaves, axes) -> list[tuple[KernelAxes, list[str]]]:
    """The paths of kernels that are alike, with their axes."""
    groups: dict[tuple, list[str]] = {}
    for path, named in axes:
        kernel, update, _ = leaves[path]
        placed = (typed_sharding(leaf) for leaf in jax.tree.leaves(leaves[path]))
        alike = (named, kernel.shape, kernel.dtype, update.dtype, *placed)
        groups.setdefault(alike, []).append(path)
    return [(named, paths) for (named, *_), paths in groups.items()]


def _one_by_one(function, arguments):
    """A function of each of some trees that are alike, by path: compiled once for all of them."""
    if len(arguments) == 1:
        return {path: function(own) for path, own in arguments.items()}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arguments.values())
    found = lax.map(function, stacked)
    at = lambda index: jax.tree.map(lambda leaf: leaf[index], found)
    return {path: at(index) for index, path in enumerate(arguments)}


# Compiled here, so that it is compiled once for those who call `update` outside `jit` too.
@partial(jax.jit, static_argnames=("axes", "how"))
def prune_if(due, kernels, updates, memories, keep, min_rank, settled, *, axes, how: How):
    """Updates and memories by path after a step: pruned if it is due, else the same."""

    def prune(updates, memories):
        pruned = {}
        leaves = {path: (kernels[path], updates[path], memories[path]) for path, _ in axes}
        for named, paths in _group(leaves, axes):
            prune_kernel = partial(_prune_kernel, axes=named, how=how)

            def one(own, prune_kernel=prune_kernel):
                out = jax.tree.map(typed_sharding, own[1:])
                return by_compiler(prune_kernel, *own, keep, min_rank, settled, out=out)

            pruned |= _one_by_one(one, {path: leaves[path] for path in paths})
        both = ({path: pair[i] for path, pair in pruned.items()} for i in (0, 1))
        return tuple(both)

    return lax.cond(due, prune, lambda *same: same, updates, memories)
