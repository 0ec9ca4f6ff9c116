"""Prunes the spectrum of kernels in an optax chain: truncates them to their signal."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from rmtjax._axes import MatrixView, native
from rmtjax._modes import in_usual_modes
from rmtjax._types import Axes, Where
from rmtjax.noise import check_rule, kept_rank, ranks
from rmtjax.planning import (
    check_count,
    check_share,
    find_kernels,
    is_abstract,
    map_kernels,
    obstacle,
    warn_if_idle,
)
from rmtjax.training._fades import fade_if, no_curvature
from rmtjax.training._guard import Guard, guard_if, UNKNOWN
from rmtjax.training._prune_state import (
    by_field,
    FIELDS,
    forget_lost,
    is_placeholder,
    KernelState,
    PruneState,
    unpruned,
)
from rmtjax.training._pruning_step import (
    call_if,
    is_due,
    moving_kernels,
    prune_if,
    StepNumbers,
    StepOptions,
)

Noise = Literal["first", "refit"]
Keep = ArrayLike | Callable[[Any], ArrayLike]


@dataclass(frozen=True, eq=False)
class _Pruning:
    """The options of `prune_spectrum`, and what it does with them."""

    every: ArrayLike
    start: ArrayLike
    rule: ranks.RankRule
    keep: Keep
    fade: ArrayLike | None
    noise: Noise
    settled: ArrayLike | None
    max_removed: ArrayLike | None
    max_rise: ArrayLike | None
    where: Where | None
    axes: Axes | None
    min_rank: ArrayLike
    min_size: Any

    def __post_init__(self):
        check_rule(self.rule)
        check_count("every", self.every)
        check_count("start", self.start, 0)
        check_count("min_rank", self.min_rank)
        if isinstance(self.min_size, jax.Array):
            raise TypeError(
                "`min_size` must be a Python integer, since it decides which kernels have a state, "
                "got an array. Use optax.inject_hyperparams(prune_spectrum, "
                'static_args=("rule", "min_size", "where", "axes")).'
            )
        check_count("min_size", self.min_size)
        if self.noise not in get_args(Noise):
            raise ValueError(f"`noise` must be one of {get_args(Noise)}, got {self.noise!r}.")
        if self.fade is not None and self.noise == "refit":
            raise ValueError(
                '`noise` must be "first" with `fade`, got "refit": what fades is no noise to fit.'
            )
        self._check_shares()

    def _check_shares(self) -> None:
        """Raises an error if a share is out of range. Arrays may be traced and are not checked."""
        if not callable(self.keep):
            check_share("keep", self.keep, "the directions that are not signal and stay")
        meanings = {
            "max_removed": "its squares that a kernel may lose",
            "max_rise": "what training has gained that a step may undo",
            "fade": "a value beyond the rank that is left after a step",
            "settled": "its signal directions by which a kernel that is ready for a cut may change",
        }
        for name, meaning in meanings.items():
            if (value := getattr(self, name)) is not None:
                check_share(name, value, meaning, below_one=name in ("fade", "settled"))

    def find(self, params: PyTree) -> dict[str, MatrixView]:
        """Returns the kernels that can be pruned: factors and small ones cannot."""
        views = find_kernels(params, self.where, self.axes)
        fine = lambda view: not (view.is_factored or obstacle(view, self.min_size))
        return {p: view for p, view in views.items() if isinstance(view, MatrixView) and fine(view)}

    @in_usual_modes
    def init(self, params: PyTree) -> PruneState:
        """Returns the state before the first step."""
        if is_abstract(params):
            return jax.eval_shape(self.init, params)
        step, guards = jnp.zeros((), jnp.int32), self.max_rise is not None
        if is_placeholder(params):
            kept = (params, step, step if self.fade is not None else None)
            kept = kept if guards else (None, None, None)
            return PruneState._make([step, *[step] * len(KernelState._fields), *kept])
        views = self.find(params)
        warn_if_idle("prune_spectrum", views, params, self.where, self.axes, self.min_size)
        # A copy, since the parameters may be donated.
        whole = lambda: jax.tree.map(lambda leaf: jnp.copy(native(leaf)), params)
        fades = lambda: {path: no_curvature(view) for path, view in views.items()}
        copy = lambda: (whole(), jnp.full((), UNKNOWN, jnp.float32))
        kept = (*copy(), None if self.fade is None else fades()) if guards else (None, None, None)
        states = {path: unpruned(view) for path, view in views.items()}
        return PruneState._make([step, *by_field(KernelState, states), *kept])

    def numbers_at(self, step: Array, guarded: bool) -> StepNumbers:
        """Returns the options in force at a step, which is the number of those before it."""
        first = jnp.where(jnp.asarray(self.start) > 0, self.start, self.every)
        look = jnp.asarray((step + 1 - first) // self.every + 1, jnp.int32)
        share = self.keep(step) if callable(self.keep) else self.keep
        settled = 0.0 if self.settled is None else self.settled
        # The loss says more than the squares.
        loses = (1.0 if guarded else 0.25) if self.max_removed is None else self.max_removed
        return StepNumbers(look, share, self.min_rank, settled, loses, self.fade)

    def guarded(self, step, state: PruneState, trees, numbers: StepNumbers, views, before, after):
        """Returns updates and states as the loss allows, and what the state keeps of the loss."""
        # A schedule of `keep` asks for a smaller rank at each step; else at 2, 4, 8 and so on.
        look = jnp.asarray(numbers.look)
        again = callable(self.keep) or look & (look - 1) == 0
        guard = Guard._make([*trees, state.reference, state.fall, again, self.max_rise])
        due, kernels = is_due(step, self.every, self.start), [*views.values()]
        if self.fade is None:
            return *guard_if(due, guard, kernels, before, after), state.curvatures
        of_rank = lambda view, move: kept_rank(
            move[1].signal, view.short, numbers.keep, numbers.min_rank
        )
        wanted, known = list(map(of_rank, kernels, after)), [state.curvatures[p] for p in views]
        ends, moves = (step - self.start) % self.every == 0, (before, after)
        *found, new = fade_if((ends, due), guard, kernels, moves, known, wanted, self.fade)
        return *found, state.curvatures | dict(zip(views, new, strict=True))

    @in_usual_modes
    def update(self, updates, state, params: Any = None, *, value_fn: Any = None, **extra_args):
        """Returns the updates that land on pruned kernels, and the new state."""
        del extra_args
        views, moves = moving_kernels(updates, params, self.find, state.ranks)
        step = jnp.asarray(optax.safe_increment(state.step))
        guarded = value_fn is not None and self.max_rise is not None and len(views) > 0
        numbers = self.numbers_at(jnp.asarray(state.step), guarded)
        before, after = self._prune(step, state, views, moves, numbers)
        reference, fall, curvatures = state.reference, state.fall, state.curvatures
        if guarded:
            trees = value_fn, params, updates
            found = self.guarded(step, state, trees, numbers, views, before, after)
            after, fall, curvatures = found
        moves, states = zip(*after, strict=True) if after else ((), ())
        # Kernels without an update, and those that were factorized since, keep their state.
        old = (getattr(state, field) for field in FIELDS)
        new = by_field(KernelState, dict(zip(views, states, strict=True)))
        fields = (old | new for old, new in zip(old, new, strict=True))
        rewritten = dict(zip(views, moves, strict=True))
        updates = map_kernels(lambda path, _: rewritten[path], updates, rewritten)
        if guarded:
            # Also before the first pruning step, which compares with the period before it.
            ends = (step - self.start) % self.every == 0
            reference = call_if(ends, lambda: optax.apply_updates(params, updates), reference)
        return updates, PruneState._make([step, *fields, reference, fall, curvatures])

    def _prune(self, step: Array, state: PruneState, views, moves, numbers: StepNumbers):
        """Returns updates with states of kernels, as they are and as their rules prune them."""
        kernels, axes = [v.leaf for v in views.values()], tuple(v.axes for v in views.values())
        of_path = lambda path: KernelState(*(getattr(state, field)[path] for field in FIELDS))
        was_due = is_due(jnp.asarray(state.step), self.every, self.start)
        old = forget_lost(was_due, kernels, [*map(of_path, views)], axes=axes)
        due, moves = is_due(step, self.every, self.start), [*moves.values()]
        options = StepOptions(self.rule, self.noise, self.settled is not None, int(self.min_size))
        new = prune_if(due, kernels, moves, old, numbers, axes=axes, options=options)
        pairs = lambda moves, states: list(zip(moves, states, strict=True))
        return pairs(moves, old), pairs(*new)


def prune_spectrum(
    every: Int[ArrayLike, ""],
    *,
    start: Int[ArrayLike, ""] = 0,
    rule: ranks.RankRule | None = None,
    keep: Keep = 0.0,
    fade: Float[ArrayLike, ""] | None = None,
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

    `fade` is for rules that ask for a size, such as `ranks.size(0.45)`. What lies beyond the rank
    is not removed. It is multiplied by `fade` at each pruning step, while training moves what it
    knows to the rest; below 1 % of the squares it is removed. Ranks stay full, and `rmtjax.plan`
    with the same rule makes the cut in the end. With `value_fn` gradients decide what goes: with
    $A = E[G G^T]$ and $B = E[G^T G]$, over one gradient a period, the cut is that of
    $A^{1/2} W B^{1/2}$. All cuts may cost what 2.5 periods of training gain. A kernel that costs
    more than its share of it, by its number of entries, is left alone for good. Let `value_fn` be
    the loss of some hundred fixed samples: a batch says too little. The state then holds A and B.
    `max_rise` is not used.

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
      fade: What is left of a singular value beyond the rank after a pruning step, in [0, 1). None
        removes it. `refused/PATH` of `rmtjax.metrics` is the share of the squares that is left.
        Without `value_fn` a kernel with more than `max_removed` beyond its rank does not fade.
      noise: "first" carries the noise level of the first cut. "refit" fits the ranks that the last
        pruning has left, if `keep` leaves enough: it follows a scale that weight decay changes.
      settled: In [0, 1). `settled=0.2` waits with the first pruning of a kernel until its number of
        signal directions changes by at most 20 % between two checks; `start` is the first. Set
        `every` to about one epoch: if checks are more frequent, it seems stable too soon.
      max_removed: Largest share of its squares that a kernel may lose in one cut, and in all cuts
        together, in [0, 1]. A cut that would take more is refused, as `rmtjax.metrics` tells, and
        tried again later. A kernel that was cut before then keeps its rank, and loses only what
        training has added beyond it, which does not count for the sum. 1 allows every cut, and so
        do rules without a noise level, without `fade`. None is 1 with `value_fn`, else 0.25.
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
      ValueError: A number is out of range, a pattern of `where` matches no path, `update` was
        called without `params` or with a kernel that `init` did not get, or `value_fn` returns no
        number or cannot see all parameters.
      TypeError: `value_fn` is not a function of the parameters alone.

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
    # Not the default of the signature: `optax.inject_hyperparams` calls a callable as a schedule.
    rule = ranks.bema() if rule is None else rule
    pruning = _Pruning(
        every, start, rule, keep, fade, noise, settled, max_removed, max_rise, where, axes,
        min_rank, min_size,
    )  # fmt: skip
    return optax.GradientTransformationExtraArgs(pruning.init, pruning.update)
