"""Steps that prune: when they are due, which updates they rewrite, and what becomes of kernels."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from rmtjax._axes import KernelAxes, MatrixView
from rmtjax._sharding import by_compiler, typed_sharding
from rmtjax._types import from_state, Spectrum, to_state
from rmtjax.noise import fit_live, kept_rank, ranks
from rmtjax.planning import Hold, leaves_by_path
from rmtjax.spectra import from_singular_values, lift, times_power, to_unit, truncate_by
from rmtjax.training._prune_state import (
    all_taken,
    floor_under,
    KernelState,
    landing_norm,
    removed_share,
    Tall,
)
from rmtjax.training._stands_out import stands_out

# How a rule is mapped over a stack: its matrices have one aspect ratio.
_EACH = Spectrum(eigenvalues=0, ratio=None)  # pyright: ignore[reportArgumentType]
# Rules that count what is above a threshold. The leading singular values are enough for them; a
# subclass may ask for more.
_COUNTING_RULES = (ranks.bema, ranks.gavish_donoho)


def is_due(
    step: Int[Array, ""], every: Int[ArrayLike, ""], start: Int[ArrayLike, ""]
) -> Bool[Array, ""]:
    """Returns True at the steps `start`, `start + every`, ...; 0 as `start` stands for `every`."""
    return jnp.asarray((step > 0) & (step >= start) & ((step - start) % every == 0))


def call_if(condition, function: Callable[[], PyTree], otherwise: PyTree) -> PyTree:
    """Returns what a function returns if a condition holds, else a value of the same form."""
    if isinstance(condition, Tracer):
        return lax.cond(condition, function, lambda: otherwise)
    # Outside `jit`, `lax.cond` would compile each new function, needed or not.
    return function() if condition else otherwise


def moving_kernels(updates: PyTree, params: PyTree, find, known: Mapping[str, Any]):
    """Returns what `find(params)` has for each kernel that has an update, and these updates."""
    if params is None:
        raise ValueError(
            "`params` must be given to `update`: it decides where the updates land. Call "
            "`optimizer.update(updates, state, params)`."
        )
    kernels = find(params)
    by_path = leaves_by_path(updates, lambda path, _: path in kernels)
    kernels = {path: kernel for path, kernel in kernels.items() if path in by_path}
    unknown = min(kernels.keys() - known.keys(), default=None)
    if unknown is not None:
        raise ValueError(
            f"`params` has the kernel {unknown!r}, which is not in the state. Call "
            "`optimizer.init(params)` again, or choose the same kernels as before by `where`."
        )
    return kernels, {path: by_path[path] for path in kernels}


class StepOptions(NamedTuple):
    """Options that are not arrays. Another value is another program."""

    rule: ranks.RankRule
    noise: str  # "first" or "refit"
    waits: bool  # until the number of signal directions has settled
    min_size: int  # of what rows and columns of zeros leave


class StepNumbers(NamedTuple):
    """Options that may be traced: schedules and `optax.inject_hyperparams` change them."""

    look: ArrayLike  # the number of this pruning step, from 1 on
    keep: ArrayLike
    min_rank: ArrayLike
    settled: ArrayLike
    max_removed: ArrayLike
    fade: ArrayLike | None  # what is left of a value beyond the rank; None if it is removed


def _noise_levels(spectra: Spectrum, matrices, state: KernelState, options: StepOptions):
    """Returns the fits in force, and whether each of them is reliable."""
    # The fit gets the rank: a truncated spectrum must not be fitted as if it were complete.
    rule, least = options.rule, options.min_size
    fresh, accepted = fit_live(rule, least, spectra, matrices, state.rank)
    known = jnp.isfinite(state.fit.threshold)
    replaced = accepted if options.noise == "refit" else accepted & ~known
    fit = jax.tree.map(lambda new, old: jnp.where(replaced, new, old), fresh, state.fit)
    return fit, known | accepted


def _has_settled(signal, state: KernelState, size: int, settled: ArrayLike) -> Bool[Array, ""]:
    """Returns True if the number of signal directions is stable, or the kernel was pruned."""
    change = jnp.abs(signal - state.signal)
    stable = change <= settled * jnp.maximum(signal, state.signal)
    pruned = (state.rank < size) | jnp.isfinite(state.fit.threshold).any()
    return pruned | (stable & (state.signal > 0))


def _judge(s, complete: bool, matrices, state: KernelState, numbers: StepNumbers, options):
    """Returns the rank by singular values; and what decides on the cut and the state."""
    size = min(matrices.shape[1:])
    spectra = from_singular_values(s, matrices)
    # The leading values alone cannot be fitted. They are only searched with a known noise level.
    fit, reliable = (
        _noise_levels(spectra, matrices, state, options) if complete else (state.fit, True)
    )
    signal = jax.vmap(options.rule, in_axes=(_EACH, 0))(spectra, fit).max()
    # If nothing stands out, as before training, a cut would destroy the network.
    reason = _unless(jnp.all(reliable) & jnp.isfinite(s).all(), Hold.LAW)
    reason = _unless(signal > 0, Hold.NOTHING, reason)
    asked = reason == Hold.NONE
    if options.waits:
        settled = _has_settled(signal, state, size, numbers.settled)
        reason = _unless(settled, Hold.UNSETTLED, reason)
    rank = kept_rank(signal, size, numbers.keep, numbers.min_rank)
    was_cut = jnp.isfinite(state.fit.threshold).any()
    if complete and options.rule.needs_noise:
        test = lambda: stands_out(matrices, spectra, fit, jnp.asarray(numbers.look), options.rule)
        first = (reason == Hold.NONE) & (rank < size) & ~was_cut
        stands = lax.cond(first, test, lambda: jnp.array(True))
        reason = _unless(stands, Hold.NOTHING, reason)
    goes = (reason == Hold.NONE) & (rank < size)
    beyond = share = jnp.where(goes, removed_share(s, matrices, rank), 0)
    floor, taken = jnp.zeros_like(s[:, 0]), state.taken
    if numbers.fade is None:
        # What training has added beyond the rank since the last cut does not count.
        added = removed_share(s, matrices, state.rank)
        taken = all_taken(taken, beyond - added)
        # A kernel that has lost what it may keeps its rank.
        stays = options.rule.needs_noise & goes & was_cut & (taken > numbers.max_removed)
        floor = jnp.where(stays, floor_under(s[:, state.rank - 1], matrices), floor)
        old, new = (state.rank, added, state.taken), (rank, share, taken)
        rank, share, taken = (jnp.where(stays, *pair) for pair in zip(old, new, strict=True))
    if options.rule.needs_noise or numbers.fade is not None:
        reason = _unless(share <= numbers.max_removed, Hold.SQUARES, reason)
    ready = reason == Hold.NONE
    # The noise is that of the first cut. Until then nothing is remembered.
    carry = (ready & (rank < size)) | was_cut
    fit = jax.tree.map(lambda new, old: jnp.where(carry, new, old), fit, state.fit)
    return rank, (fit, signal, rank, reason, asked, (share, beyond, floor, taken))


def _unless(fine: Array, hold: Hold, reason: Any = Hold.NONE) -> Int[Array, ""]:
    """Returns the reason to leave a kernel alone: the first that holds."""
    return jnp.where((reason == Hold.NONE) & ~fine, hold, reason).astype(jnp.int32)


def _prune_stack(matrices: Float[Array, "b m n"], state: KernelState, numbers, options):
    """Returns a truncated stack, whether it differs from the given one, and the new state."""
    # The scale is that of the first cut, as the noise level is.
    exponents = jax.vmap(lambda matrix: to_unit(matrix)[1])(matrices)
    # One for the stack: 0, unless all of its matrices are very large or all very small.
    exponent = jnp.clip(0, exponents.min(), exponents.max())
    exponent = jnp.where(jnp.isfinite(state.fit.threshold).any(), state.exponent, exponent)
    state = state._replace(exponent=exponent)
    # A carried noise level is not fitted again. Only directions above it are then needed.
    carried = jnp.where(options.noise == "first", state.fit.threshold, jnp.nan)
    floor = jnp.sqrt(carried * max(matrices.shape[1:]))
    size = min(matrices.shape[1:])
    # Directions that stay without being signal are not found by a search for the signal. The count
    # of the last step predicts whether there will be any.
    kept = kept_rank(state.signal, size, numbers.keep, numbers.min_rank)
    counts = type(options.rule) in _COUNTING_RULES and options.noise == "first"
    search = kept <= state.signal if counts else False
    # Squares of very large and very small entries leave the range of float32.
    matrices = times_power(lift(matrices), -exponent)
    judge = partial(_judge, matrices=matrices, state=state, numbers=numbers, options=options)
    lower, _, (fit, signal, rank, reason, asked, shares) = truncate_by(
        matrices, judge, floor, search
    )
    ready = reason == Hold.NONE
    changed = ready & (rank < size)
    share, beyond, floor, taken = (a.astype(state.removed.dtype) for a in shares)
    removed = jnp.where(changed, share, 0)
    if numbers.fade is not None:
        lower, rank = lower + numbers.fade * (matrices - lower), size
        removed = removed * (1 - jnp.square(jnp.asarray(numbers.fade, removed.dtype)))
    new = state._replace(
        fit=fit,
        # A kernel that is left alone still has the rank of an earlier pruning.
        rank=jnp.where(ready, rank, state.rank),
        signal=signal,
        removed=removed,
        refused=beyond - removed,
        # A kernel that is held back must not be cut by a plan either: no level lies below -1.
        floor=jnp.where(ready, floor, jnp.where(asked, -1, state.floor)),
        cost=jnp.zeros_like(state.cost),
        previous=state.rank,
        reason=reason,
        taken=jnp.where(changed, taken, state.taken),
    )
    return times_power(lower, exponent), changed, new


def _prune_kernel(kernel, update, state: KernelState, numbers, axes: KernelAxes, options):
    """Returns the update that lands on the truncated kernel, and the new state of the kernel."""
    # In the dtype of the fit, whatever that of the update: the state must keep its dtypes.
    landed = (kernel + update).astype(state.fit.threshold.dtype)
    view = MatrixView("", landed, axes)
    fit = from_state(jax.tree.map(jnp.ravel, state.fit))
    flat = state._replace(fit=fit, floor=jnp.ravel(state.floor))
    lower, changed, new = _prune_stack(view.matrices(), flat, numbers, options)
    lower = view.from_matrices(lower)
    # A kernel that keeps its full rank keeps its update to the last bit.
    update = jnp.where(changed, (lower - kernel).astype(update.dtype), update)
    norm = jnp.where(changed, landing_norm(kernel, update), 0)
    new = new._replace(fit=to_state(new.fit), norm=norm)
    restore = lambda leaf, old: leaf.reshape(old.shape).astype(old.dtype)
    return update, jax.tree.map(restore, new, state)


def _same_programs(inputs: list[tuple], axes: tuple[Any, ...]) -> list[list[int]]:
    """Returns the indices of kernels in groups, each of which one program serves."""
    groups: dict[tuple, list[int]] = {}
    for index, arrays in enumerate(inputs):
        types = ((leaf.shape, leaf.dtype, typed_sharding(leaf)) for leaf in jax.tree.leaves(arrays))
        groups.setdefault((axes[index], *types), []).append(index)
    return list(groups.values())


class Alike(NamedTuple):
    """Kernels that one program serves.

    Attributes:
      indices: Their places among all kernels.
      axes: What makes them matrices.
      arrays: The arrays of each kernel, stacked; of a lone kernel as they are.
    """

    indices: list[int]
    axes: Any
    arrays: Any

    def map(self, function: Callable, *more: PyTree) -> PyTree:
        """Applies `function(arrays, *more, axes=axes)` to each kernel; `more` is from such maps."""
        call = partial(function, axes=self.axes)
        if len(self.indices) == 1:
            return call(self.arrays, *more)
        # A loop in the program: a decomposition compiles for seconds, each time it appears.
        return lax.map(lambda arrays: call(*arrays), (self.arrays, *more))

    def at_once(self, function: Callable, *more: PyTree) -> PyTree:
        """Applies `function(arrays, *more)`, which decomposes nothing, to all of them together."""
        call = function if len(self.indices) == 1 else jax.vmap(function)
        return call(self.arrays, *more)

    def of(self, numbers: Array) -> Array:
        """Returns those numbers of all kernels that are of these, as the maps take them."""
        alone = len(self.indices) == 1
        return numbers[self.indices[0]] if alone else numbers[jnp.asarray(self.indices)]


def group_alike(inputs: list[tuple], axes: tuple[Any, ...]) -> list[Alike]:
    """Returns kernels in groups, from the arrays of each."""

    def join(indices: list[int]) -> Alike:
        first, *others = (inputs[index] for index in indices)
        stack = lambda *leaves: jnp.stack(leaves)
        return Alike(
            indices, axes[indices[0]], jax.tree.map(stack, first, *others) if others else first
        )

    return list(map(join, _same_programs(inputs, axes)))


def ungroup(groups: list[Alike], outputs: list[PyTree]) -> list[Any]:
    """Returns for each kernel what maps over groups have returned."""
    results: dict[int, Any] = {}
    for group, output in zip(groups, outputs, strict=True):
        for place, index in enumerate(group.indices):
            alone = len(group.indices) == 1
            one = lambda leaf, place=place: leaf[place]
            results[index] = output if alone else jax.tree.map(one, output)
    return [results[index] for index in range(len(results))]


def map_alike(function: Callable, inputs: list[tuple], axes: tuple[Any, ...]) -> list[Any]:
    """Applies `function(arrays, axes)` to the arrays of each kernel; one program serves a shape."""
    groups = group_alike(inputs, axes)
    return ungroup(groups, [group.map(function) for group in groups])


# Compiled also for users who call `update` outside `jit`. Without paths among the arguments one
# program serves all trees whose kernels have these shapes.
@partial(jax.jit, static_argnames=("axes", "options"))
def prune_if(due, kernels, updates, states, numbers: StepNumbers, *, axes, options: StepOptions):
    """Returns updates and states of kernels, in one order: pruned if it is due, else the same."""

    def prune_one(arrays, axes):
        out = jax.tree.map(typed_sharding, arrays[1:])
        prune_kernel = partial(_prune_kernel, axes=axes, options=options)
        return by_compiler(prune_kernel, *arrays, numbers, out=out)

    def prune(updates, states):
        forms = [Tall(MatrixView("", *kernel)) for kernel in zip(kernels, axes, strict=True)]
        moves = zip(forms, kernels, updates, states, strict=True)
        inputs = [(form.stack(kernel), *form.stacked(tuple(move))) for form, kernel, *move in moves]
        pruned = map_alike(prune_one, inputs, tuple(form.axes for form in forms))
        pruned = list(map(Tall.restored, forms, pruned, states))
        return [update for update, _ in pruned], [state for _, state in pruned]

    return lax.cond(due, prune, lambda *same: same, updates, states)
