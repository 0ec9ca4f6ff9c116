"""Pruning in an optax chain: the last word on the updates."""

from collections.abc import Callable
from typing import Any, get_args, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from rmtjax._axes import KernelAxes, MatrixView
from rmtjax._types import Axes, BulkFit, Where
from rmtjax.noise import check_rule, ranks
from rmtjax.planning import find_kernels, map_kernels, obstacle
from rmtjax.training._pruning_step import How, Memory, Noise, prune_if, unpruned
from rmtjax.training._schedule import check_count, is_due, NO_PARAMS

Keep = ArrayLike | Callable[[Any], ArrayLike]


class PruneState(NamedTuple):
    """What `prune_spectrum` remembers, all arrays.

    Attributes:
      step: Number of updates seen.
      fits: Path to the noise of that kernel as last accepted; NaN before. For a stack of
        matrices an array with an entry each. `rmtjax.plan` takes it as `fits`.
      ranks: Path to the rank after the last pruning; full before.
      signal: Path to the number of signal directions at the last pruning step, whether the
        kernel was pruned then or not; 0 before.
      removed: Path to the share of the squares of its entries that the last pruning step has
        taken from the kernel, in [0, 1); 0 before, and where it was passed over.
    """

    step: Int[Array, ""]
    fits: dict[str, BulkFit]
    ranks: dict[str, Int[Array, ""]]
    signal: dict[str, Int[Array, ""]]
    removed: dict[str, Float[Array, ""]]


def _check(every, start, keep, noise, settled, min_rank, min_size) -> None:
    check_count("every", every, 1)
    check_count("start", start, 0)
    check_count("min_rank", min_rank, 1)
    if isinstance(min_size, jax.Array):
        raise TypeError(
            "`min_size` decides which kernels have a state and must be a Python integer. Use "
            'optax.inject_hyperparams(prune_spectrum, static_args=("min_size", "rule", '
            '"where", "axes")).'
        )
    check_count("min_size", min_size, 1)
    if not callable(keep) and not isinstance(keep, jax.Array) and not 0 <= keep <= 1:
        raise ValueError(
            f"`keep` must be in [0, 1] or a schedule, got {keep}: the share of the directions "
            "that are no signal and stay all the same."
        )
    if noise not in get_args(Noise):
        raise ValueError(f"`noise` must be one of {get_args(Noise)}, got {noise!r}.")
    if settled is not None and not isinstance(settled, jax.Array) and not 0 <= settled < 1:
        raise ValueError(
            f"`settled` must be None or in [0, 1), got {settled}: the relative change of the "
            "number of signal directions under which a kernel is ready to be pruned."
        )


def _matrices(params: PyTree, where, axes, min_size: int) -> dict[str, tuple[Any, KernelAxes]]:
    """The kernels that can be pruned, with the axes that make them matrices."""
    found = find_kernels(params, where, axes)
    return {
        path: (view.leaf, view.axes)
        for path, view in found.items()
        if isinstance(view, MatrixView) and not view.is_factored and not obstacle(view, min_size)
    }


def _by_field(memories: dict[str, Memory]) -> list[dict[str, Any]]:
    """Memories by path as dictionaries by path, one for each field."""
    return [{path: memory[i] for path, memory in memories.items()} for i in range(4)]


def prune_spectrum(
    every: Int[ArrayLike, ""],
    *,
    start: Int[ArrayLike, ""] = 0,
    keep: Keep = 0.0,
    rule: ranks.RankRule | None = None,
    noise: Noise = "first",
    settled: Float[ArrayLike, ""] | None = None,
    where: Where | None = None,
    axes: Axes | None = None,
    min_rank: Int[ArrayLike, ""] = 1,
    min_size: int = 50,
) -> optax.GradientTransformationExtraArgs:
    r"""Truncates kernels to their signal every few steps: put it last in a chain.

    At a pruning step the update of a kernel is rewritten so that `optax.apply_updates`
    lands on the truncated kernel; at all other steps updates pass untouched. With
    $K$ signal directions of $p$ the rank is $r = K + \lfloor keep \cdot (p - K) \rfloor$.
    Under `jit` nothing is recompiled as ranks change: arrays keep their shapes, and
    `rmtjax.factorize` cuts them after training.

    The noise level of a kernel is that of its first accepted fit, and is carried from
    then on: a truncated spectrum, fitted as if it were whole, seems to have little noise
    and many spikes. The alternative is a refit that knows the rank of the last pruning, and
    matches only what that has left. A kernel whose fit is refused, or in which nothing
    stands out of the noise, is left alone and tried again.

    Choose `start` late enough, or let `settled` find it: until training has lifted the
    directions that a network needs above its initial noise, a cut removes what it would
    have learnt with.

    Args:
      every: Pruning period in steps, at least 1. Steps are counted from 1, as this
        transform sees them: `optax.MultiSteps` and the like count for it.
      start: First pruning step; 0 stands for `every`. Pruning steps are `start`,
        `start + every`, ...
      keep: Share of the directions that are no signal and stay, in [0, 1]; or an optax
        schedule of it, called with the number of steps before this one. The papers have 0.45,
        and 1 - e / 200, 1 - e / 300 and 1 - e / 1000 at epoch e: for the first of these
        `optax.linear_schedule(1.0, 0.0, 200 * steps_per_epoch)`.
      rule: A rank rule; `rmtjax.ranks.bema()` by default.
      noise: "first" carries the first accepted noise level of a kernel. "refit" replaces it
        at each pruning step by that of the ranks still populated, where these are enough
        for a fit and it is accepted: it follows a scale that weight decay or a
        normalisation moves. With `keep` at 0 nothing is left to refit.
      settled: Where given, a kernel is first pruned when its number of signal directions has
        changed by at most this share since the pruning step before (0.2, say): `start` is
        then the first look, and every kernel finds its own time. In [0, 1). Let `every` be
        long enough for training to move something, an epoch or so: between two looks that
        are too near nothing has changed yet, and a kernel with one direction is cut to it.
      where: `where(path, leaf)` chooses the kernels, as in `rmtjax.plan`.
      axes: `axes(path, leaf)` names the axes that make a kernel a matrix, as in
        `rmtjax.plan`. The matrices of a stack get one rank, that of the richest.
      min_rank: Smallest rank, at least 1.
      min_size: Kernels with a shorter short side are left alone.

    Returns:
      A transformation whose state is a `PruneState`. It needs `params` in `update`,
      ignores extra arguments, and works inside `masked`, `partition`, `MultiSteps` and
      `inject_hyperparams` (what is no number, and `min_size`, as `static_args`). Under `vmap`
      with a batched state every step pays for a decomposition: both branches are taken.

    Raises:
      ValueError: A number is out of range, or `update` was called without `params`.
      TypeError: A number of steps is no integer.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"Dense_0": {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}}
      >>> optimizer = optax.chain(
      ...     optax.sgd(0.1, momentum=0.9),
      ...     rmtjax.prune_spectrum(every=2, keep=optax.linear_schedule(0.5, 0.0, 100)),
      ... )
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int(optax.tree.get(state, "ranks")["Dense_0/kernel"])
      30

    References:
      Shmalo, Jenkins and Krupchytskyi (2023), https://arxiv.org/abs/2303.08986. There a
      kernel is refitted at each pruning; here its first noise level is carried.
    """
    _check(every, start, keep, noise, settled, min_rank, min_size)
    rule = ranks.bema() if rule is None else rule
    check_rule(rule)
    how = How(rule, noise, waits=settled is not None)

    def init_fn(params: PyTree) -> PruneState:
        kernels = _matrices(params, where, axes, min_size)
        memories = {path: unpruned(*kernel) for path, kernel in kernels.items()}
        return PruneState(jnp.zeros((), jnp.int32), *_by_field(memories))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS)
        found = _matrices(params, where, axes, min_size)
        chosen = {}  # without the kernels whose update is None: they do not move
        map_kernels(chosen.setdefault, updates, found)
        step = jnp.asarray(optax.safe_increment(state.step))
        due = is_due(step, every, start)
        parts = state.fits, state.ranks, state.signal, state.removed
        chosen, memories = prune_if(
            due,
            {path: found[path][0] for path in chosen},
            chosen,
            {path: Memory(*(part[path] for part in parts)) for path in chosen},
            keep(state.step) if callable(keep) else keep,
            min_rank,
            0.0 if settled is None else settled,
            axes=tuple((path, found[path][1]) for path in chosen),
            how=how,
        )
        updates = map_kernels(lambda path, _: chosen[path], updates, chosen)
        # Kernels that did not move, or have been factorized since, keep what is known of them.
        parts = (old | new for old, new in zip(parts, _by_field(memories), strict=True))
        return updates, PruneState(step, *parts)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
