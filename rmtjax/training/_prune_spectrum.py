"""Prunes the spectrum of kernels in an optax chain: truncates them to their signal."""

from collections.abc import Callable, Iterable
from typing import Any, get_args, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from rmtjax._axes import MatrixView, native
from rmtjax._modes import in_usual_modes
from rmtjax._types import Axes, BulkFit, Where
from rmtjax.noise import check_rule, ranks
from rmtjax.planning import (
    check_count,
    check_share,
    find_kernels,
    is_abstract,
    map_kernels,
    obstacle,
    warn_if_idle,
)
from rmtjax.training._guard import Guard, guard_if
from rmtjax.training._pruning_step import (
    call_if,
    forget_lost,
    is_due,
    is_placeholder,
    KernelState,
    moving_kernels,
    prune_if,
    StepNumbers,
    StepOptions,
    unpruned,
)

Noise = Literal["first", "refit"]
Keep = ArrayLike | Callable[[Any], ArrayLike]


class PruneState(NamedTuple):
    """State of `prune_spectrum`, of arrays.

    Attributes:
      step: Number of updates seen.
      fits: Path to the noise level that is carried, as `rmtjax.noise_levels` returns it.
      ranks: Path to the rank after the last pruning; full before.
      signal: Path to the number of signal directions at the last pruning step; 0 before.
      removed: Path to the share of the squares that it has removed, in [0, 1).
      refused: Path to the share that it would have removed and was not allowed to.
      floors: Path to the eigenvalue down to which directions must stay, since a cut was held back;
        -1 if all must, NaN if the threshold decides.
      costs: Path to what the cut was predicted to add to the loss; NaN without `value_fn`.
      norms: Path to the norm that the last step lands on; NaN if it did not cut.
      previous: Path to the rank before the last step.
      landed: Path to whether the last cut was found in the parameters.
      reference: The parameters one period ago, for `value_fn`; None without `max_rise`.
      fall: By how much `value_fn` fell over the period before the last step; NaN before.
    """

    step: Int[Array, ""]
    fits: dict[str, BulkFit]
    ranks: dict[str, Int[Array, ""]]
    signal: dict[str, Int[Array, ""]]
    removed: dict[str, Float[Array, ""]]
    refused: dict[str, Float[Array, ""]]
    floors: dict[str, Float[Array, "..."]]
    costs: dict[str, Float[Array, ""]]
    norms: dict[str, Float[Array, ""]]
    previous: dict[str, Int[Array, ""]]
    landed: dict[str, Bool[Array, ""]]
    reference: PyTree = None
    fall: PyTree = None


def _check(every, start, keep, noise, settled, max_removed, max_rise, min_rank, min_size) -> None:
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
    if not callable(keep):
        check_share("keep", keep, "the directions that are not signal and stay")
    if max_removed is not None:
        check_share("max_removed", max_removed, "its squares that a kernel may lose in one cut")
    if max_rise is not None:
        check_share("max_rise", max_rise, "what training has gained that a step may undo")
    if noise not in get_args(Noise):
        raise ValueError(f"`noise` must be one of {get_args(Noise)}, got {noise!r}.")
    if settled is not None:
        meaning = "its signal directions by which a kernel that is ready for a cut may change"
        check_share("settled", settled, meaning, below_one=True)


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
    max_removed: Float[ArrayLike, ""] | None = None,
    max_rise: Float[ArrayLike, ""] | None = 0.003,
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

    Give `update` the loss of the batch as `value_fn`, a function of `params` alone. The cuts of a
    step then raise it by at most `max_rise` of the gain, which is how far it lies below the loss
    of zeros. The cheapest come first, the others are made smaller or left. A kernel waits with its
    first cut until a period, in the mean of two, brings less than 2 % of the gain. It is cut again
    at the pruning steps number 2, 4, 8 and so on, counted from `start`, or at each with a schedule
    of `keep`. All takes 15 forward passes at most.

    A kernel carries the noise level of its first cut, since a truncated spectrum cannot be fitted.
    It is left alone, and tried again later, if its fit is refused, if nothing stands out of the
    noise, or if the cut would take too much. The level of the rule holds over all looks together:
    at look j it is $level / (j (j + 1))$.

    Wrappers that mix updates again, such as `optax.contrib.schedule_free`, `optax.lookahead`,
    `optax.contrib.mechanize` and `optax.contrib.sam`, belong into the chain before it. Inside of
    them a cut does not land. The next update notices that and forgets it, see `rmtjax.metrics`.

    Args:
      every: Pruning period in steps, at least 1. Steps are counted from 1, as this transform sees
        them: `optax.MultiSteps` counts as one step what it accumulates.
      start: First pruning step; 0 stands for `every`. The next are `start + every` and so on.
      rule: A rank rule of `rmtjax.ranks`; None stands for `rmtjax.ranks.bema()`.
      keep: Share of the directions that are not signal and stay, in [0, 1]; or an optax schedule of
        it, called with the number of steps before this one. The papers have 0.45, or
        `optax.linear_schedule(1.0, 0.0, N * steps_per_epoch)` with N of 200, 300 and 1000.
      noise: "first" carries the noise level of the first cut. "refit" fits the ranks that the last
        pruning has left, if `keep` leaves enough: it follows a scale that weight decay changes.
      settled: In [0, 1). `settled=0.2` waits with the first pruning of a kernel until its number of
        signal directions changes by at most 20 % between two checks; `start` is the first. Set
        `every` to about one epoch: if checks are more frequent, it seems stable too soon.
      max_removed: Largest share of its squares that a kernel may lose in one cut, in [0, 1]. A cut
        that would take more is refused, as `rmtjax.metrics` tells, and tried again later. 1 allows
        every cut, and so do rules without a noise level. None is 1 with `value_fn`, else 0.5.
      max_rise: Share of the gain by which a pruning step may raise `value_fn`, in [0, 1]. None
        does not ask for the loss: the state then needs no copy of `params`.
      where, axes: As in `rmtjax.plan`. The matrices of a stack get one rank, the largest needed.
      min_rank: Smallest rank, at least 1.
      min_size: Kernels with a shorter short side are left alone.

    Returns:
      A transformation with a `PruneState`. It takes any tree that optax takes, needs `params` in
      `update`, and of extra arguments reads `value_fn` alone. It works inside `masked`,
      `partition`, `MultiSteps` and `inject_hyperparams` (with callables and `min_size` as
      `static_args`). Under `vmap` with a batched state every step costs a decomposition.

    Warns:
      UserWarning: `init` finds no kernel that can be pruned.

    Raises:
      ValueError: A number is out of range, `update` was called without `params` or with a kernel
        that `init` did not get, or `value_fn` returns no number or cannot see all parameters.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"Dense_0": {"kernel": 1 + jax.random.normal(jax.random.key(0), (80, 60))}}
      >>> keep = optax.linear_schedule(0.5, 0.0, 100)
      >>> optimizer = optax.chain(optax.sgd(0.1, 0.9), rmtjax.prune_spectrum(every=2, keep=keep))
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
    _check(every, start, keep, noise, settled, max_removed, max_rise, min_rank, min_size)
    # Not the default of the signature: `optax.inject_hyperparams` calls a callable as a schedule.
    rule = ranks.bema() if rule is None else rule
    check_rule(rule)
    options = StepOptions(rule, noise, waits=settled is not None)

    def find(params: PyTree) -> dict[str, MatrixView]:
        """Returns the kernels that can be pruned: factors and small ones cannot."""
        views = find_kernels(params, where, axes)
        fine = lambda view: not (view.is_factored or obstacle(view, min_size))
        return {p: view for p, view in views.items() if isinstance(view, MatrixView) and fine(view)}

    @in_usual_modes
    def init_fn(params: PyTree) -> PruneState:
        if is_abstract(params):
            return jax.eval_shape(init_fn, params)
        step = jnp.zeros((), jnp.int32)
        if is_placeholder(params):
            kept = (None, None) if max_rise is None else (params, step)
            return PruneState._make([step, *[step] * len(KernelState._fields), *kept])
        views = find(params)
        if not views:
            warn_if_idle("prune_spectrum", find_kernels(params, where, axes), params, min_size)
        # A copy, since the parameters may be donated.
        copy = lambda: (
            jax.tree.map(lambda leaf: jnp.copy(native(leaf)), params),
            jnp.full((), jnp.nan, jnp.float32),
        )
        kept = (None, None) if max_rise is None else copy()
        return PruneState._make([step, *_by_field(views, map(unpruned, views.values())), *kept])

    def numbers_at(step: Array, guarded: bool) -> StepNumbers:
        """Returns the options in force at a step, which is the number of those before it."""
        first = jnp.where(jnp.asarray(start) > 0, start, every)
        look = jnp.asarray((step + 1 - first) // every + 1, jnp.int32)
        share = keep(step) if callable(keep) else keep
        # The loss says more than the squares.
        loses = (1.0 if guarded else 0.5) if max_removed is None else max_removed
        return StepNumbers(look, share, min_rank, 0.0 if settled is None else settled, loses)

    @in_usual_modes
    def update_fn(updates, state, params: Any = None, *, value_fn: Any = None, **extra_args):
        del extra_args
        views, chosen = moving_kernels(updates, params, find, state.ranks)
        guarded = value_fn is not None and max_rise is not None and len(views) > 0
        kernels, shapes = [v.leaf for v in views.values()], tuple(v.axes for v in views.values())
        _, *fields, reference, fall = state
        old = [KernelState(*(field[path] for field in fields)) for path in views]
        old = forget_lost(is_due(jnp.asarray(state.step), every, start), kernels, old, axes=shapes)
        step = jnp.asarray(optax.safe_increment(state.step))
        due, numbers = is_due(step, every, start), numbers_at(jnp.asarray(state.step), guarded)
        moves = list(chosen.values())
        new = prune_if(due, kernels, moves, old, numbers, axes=shapes, options=options)
        if guarded:
            trees = params, updates, reference
            # A schedule of `keep` asks for a smaller rank at each step; else at 2, 4, 8 and so on.
            look = jnp.asarray(numbers.look)
            again = callable(keep) or look & (look - 1) == 0
            guard = Guard(value_fn, *trees, fall, again, max_rise)
            pairs = [list(zip(*side, strict=True)) for side in ((moves, old), new)]
            cuts, fall = guard_if(due, guard, list(views.values()), *pairs)
            new = zip(*cuts, strict=True)
        moves, states = new
        # Kernels without an update, and those that were factorized since, keep their state.
        fields = (old | new for old, new in zip(fields, _by_field(views, states), strict=True))
        rewritten = dict(zip(views, moves, strict=True))
        updates = map_kernels(lambda path, _: rewritten[path], updates, rewritten)
        if guarded:
            # Also before the first pruning step, which compares with the period before it.
            ends = (step - start) % every == 0
            land = lambda: optax.apply_updates(params, updates)
            reference = call_if(ends, land, reference)
        return updates, PruneState._make([step, *fields, reference, fall])

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
