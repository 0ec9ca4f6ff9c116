"""Prunes the spectrum of kernels in an optax chain: truncates them to their signal."""

from collections.abc import Callable, Iterable
from typing import Any, get_args, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from rmtjax._axes import MatrixView
from rmtjax._types import Axes, BulkFit, Where
from rmtjax.noise import check_rule, ranks
from rmtjax.planning import check_count, find_kernels, obstacle
from rmtjax.training._pruning_step import KernelState, prune_if, StepNumbers, StepOptions, unpruned
from rmtjax.training._updates import is_due, is_placeholder, moving_kernels, replaced

Noise = Literal["first", "refit"]
Keep = ArrayLike | Callable[[Any], ArrayLike]


class PruneState(NamedTuple):
    """State of `prune_spectrum`, of arrays.

    Attributes:
      step: Number of updates seen.
      fits: Path to the noise level that is carried for that kernel; NaN before the first cut.
        For a stack of matrices an array with an entry each. See `rmtjax.noise_levels`.
      ranks: Path to the rank after the last pruning; full before.
      signal: Path to the number of signal directions at the last pruning step, whether the kernel
        was pruned then or not; 0 before.
      removed: Path to the share of the sum of squares that the last pruning step has removed, in
        [0, 1); 0 before, and for a kernel that was left alone.
      refused: Path to the share that the last pruning step would have removed, if `max_removed` did
        not allow it; 0 otherwise.
    """

    step: Int[Array, ""]
    fits: dict[str, BulkFit]
    ranks: dict[str, Int[Array, ""]]
    signal: dict[str, Int[Array, ""]]
    removed: dict[str, Float[Array, ""]]
    refused: dict[str, Float[Array, ""]]


def _check(every, start, keep, noise, settled, max_removed, min_rank, min_size) -> None:
    """Raises an error if an option is out of range. Arrays may be traced and are not checked."""
    check_count("every", every)
    check_count("start", start, 0)
    check_count("min_rank", min_rank)
    if isinstance(min_size, jax.Array):
        raise TypeError(
            "`min_size` must be a Python integer, since it decides which kernels have a state, got "
            "an array. Use optax.inject_hyperparams(prune_spectrum, "
            'static_args=("rule", "min_size", "where", "axes")).'
        )
    check_count("min_size", min_size)
    if not callable(keep) and not isinstance(keep, jax.Array) and not 0 <= keep <= 1:
        raise ValueError(
            f"`keep` must be in [0, 1] or a schedule, got {keep}: the share of the directions "
            "that are not signal and stay."
        )
    if not isinstance(max_removed, jax.Array) and not 0 <= max_removed <= 1:
        raise ValueError(
            f"`max_removed` must be in [0, 1], got {max_removed}: the largest share of its sum of "
            "squares that a kernel may lose in one cut."
        )
    if noise not in get_args(Noise):
        raise ValueError(f"`noise` must be one of {get_args(Noise)}, got {noise!r}.")
    if settled is not None and not isinstance(settled, jax.Array) and not 0 <= settled < 1:
        raise ValueError(
            f"`settled` must be None or in [0, 1), got {settled}: the relative change of the "
            "number of signal directions up to which a kernel is ready to be pruned."
        )


def _matrices(params: PyTree, where, axes, min_size: int) -> dict[str, MatrixView]:
    """Returns the kernels that can be pruned: factors and small ones cannot."""
    return {
        path: view
        for path, view in find_kernels(params, where, axes).items()
        if isinstance(view, MatrixView) and not view.is_factored and not obstacle(view, min_size)
    }


def _by_field(paths: Iterable[str], states: Iterable[KernelState]) -> list[dict[str, Any]]:
    """Returns states of kernels as dictionaries by path, one for each field of `PruneState`."""
    by_path = dict(zip(paths, states, strict=True))
    fields = range(len(KernelState._fields))
    return [{path: state[field] for path, state in by_path.items()} for field in fields]


def prune_spectrum(
    every: Int[ArrayLike, ""],
    *,
    start: Int[ArrayLike, ""] = 0,
    rule: ranks.RankRule | None = None,
    keep: Keep = 0.0,
    noise: Noise = "first",
    settled: Float[ArrayLike, ""] | None = None,
    max_removed: Float[ArrayLike, ""] = 0.8,
    where: Where | None = None,
    axes: Axes | None = None,
    min_rank: Int[ArrayLike, ""] = 1,
    min_size: int = 50,
) -> optax.GradientTransformationExtraArgs:
    r"""Truncates kernels to their signal every few steps. Put it last in a chain.

    A pruning step rewrites the update of a kernel so that `optax.apply_updates` lands on the
    truncated kernel. All other updates pass unchanged. With $K$ signal directions of $p$ the rank
    is $r = K + \lfloor keep \cdot (p - K) \rfloor$. Arrays keep their shapes, so that nothing is
    compiled again as ranks change; `rmtjax.factorize` makes them smaller after training.

    A kernel carries the noise level of its first cut. A truncated spectrum, fitted as if it were
    complete, would seem to have little noise and many spikes. A kernel is left alone, and tried
    again later, if its fit is refused, if nothing stands out of the noise, or if the cut would take
    most of it. The level of the rule holds over all looks together: at look j it is
    $level / (j (j + 1))$. Noise whose rows or columns differ in scale is no signal.

    Choose a late `start`, or let `settled` find it. Training must first lift the directions that a
    network needs above its initial noise. An earlier cut removes what it would have learnt with.

    Args:
      every: Pruning period in steps, at least 1. Steps are counted from 1, as this transform sees
        them: `optax.MultiSteps` counts as one step what it accumulates.
      start: First pruning step; 0 stands for `every`. The next are `start + every` and so on.
      rule: A rank rule of `rmtjax.ranks`; None stands for `rmtjax.ranks.bema()`.
      keep: Share of the directions that are not signal and stay, in [0, 1]; or an optax schedule of
        it, called with the number of steps before this one. The papers have 0.45, or
        `optax.linear_schedule(1.0, 0.0, N * steps_per_epoch)` with N of 200, 300 and 1000.
      noise: "first" carries the noise level of the first cut. "refit" replaces it at each pruning
        step by an accepted fit of the ranks that the last pruning has left, if they are enough. It
        follows a scale that weight decay or normalization changes. It needs `keep` above 0.
      settled: In [0, 1). `settled=0.2` waits with the first pruning of a kernel until its number of
        signal directions changes by at most 20 % between two checks; `start` is the first. Set
        `every` to about one epoch: if checks are more frequent, it seems stable too soon.
      max_removed: Largest share of its sum of squares that a kernel may lose in one cut, in [0, 1].
        A cut that would take more is refused: the kernel is left alone, and tried again later. 1
        allows every cut; so do rules without a noise level. `rmtjax.metrics` tells what was refused.
      where: Chooses the kernels, as in `rmtjax.plan`: a function `where(path, leaf)`, a regular
        expression for paths, or a mask with the structure of `params`.
      axes: Names the axes that make a kernel a matrix, as in `rmtjax.plan`. The matrices of a stack
        get one rank, the largest that one of them needs.
      min_rank: Smallest rank, at least 1.
      min_size: Kernels with a shorter short side are left alone.

    Returns:
      A transformation with a `PruneState`. It takes any tree that optax takes, needs `params` in
      `update` and ignores extra arguments. It works inside `masked`, `partition`, `MultiSteps` and
      `inject_hyperparams` (with callables and `min_size` as `static_args`). Under
      `vmap` with a batched state every step costs a decomposition.

    Raises:
      ValueError: A number is out of range, or `update` was called without `params` or with a kernel
        that `init` did not get.
      TypeError: `rule` is not a rank rule.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"Dense_0": {"kernel": 1 + jax.random.normal(jax.random.key(0), (80, 60))}}
      >>> optimizer = optax.chain(
      ...     optax.sgd(0.1, momentum=0.9),
      ...     rmtjax.prune_spectrum(every=2, keep=optax.linear_schedule(0.5, 0.0, 100)),
      ... )
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int(rmtjax.metrics(state)["rank/Dense_0/kernel"])
      30

    References:
      Shmalo, Jenkins and Krupchytskyi (2023), https://arxiv.org/abs/2303.08986. They refit a kernel
      at each pruning; this function carries the noise level of the first cut.
    """
    _check(every, start, keep, noise, settled, max_removed, min_rank, min_size)
    # Not the default of the signature: `optax.inject_hyperparams` calls a callable as a schedule.
    rule = ranks.bema() if rule is None else rule
    check_rule(rule)
    options = StepOptions(rule, noise, waits=settled is not None)
    find = lambda params: _matrices(params, where, axes, min_size)

    def init_fn(params: PyTree) -> PruneState:
        step = jnp.zeros((), jnp.int32)
        if is_placeholder(params):
            return PruneState(step, *[step] * 5)  # pyright: ignore[reportArgumentType]
        views = find(params)
        return PruneState(step, *_by_field(views, map(unpruned, views.values())))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        views, chosen = moving_kernels(updates, params, find, state.ranks)
        step = jnp.asarray(optax.safe_increment(state.step))
        look = (step - jnp.where(jnp.asarray(start) > 0, start, every)) // every + 1
        share = keep(state.step) if callable(keep) else keep
        _, *fields = state
        new, states = prune_if(
            is_due(step, every, start),
            [view.leaf for view in views.values()],
            list(chosen.values()),
            [KernelState(*(field[path] for field in fields)) for path in views],
            StepNumbers(look, share, min_rank, 0.0 if settled is None else settled, max_removed),
            axes=tuple(view.axes for view in views.values()),
            options=options,
        )
        # Kernels without an update, and those that were factorized since, keep their state.
        fields = (old | new for old, new in zip(fields, _by_field(views, states), strict=True))
        new = dict(zip(views, new, strict=True))
        return replaced(updates, new), PruneState(step, *fields)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
