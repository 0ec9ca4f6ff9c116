"""Keeps what both halves of an epoch agree on, in an optax chain."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from rmtjax._axes import KernelAxes, MatrixView
from rmtjax._modes import in_usual_modes
from rmtjax._sharding import by_compiler, typed_sharding
from rmtjax._types import Axes, Where
from rmtjax.planning import (
    check_count,
    check_share,
    find_kernels,
    is_abstract,
    map_kernels,
    obstacle,
    warn_if_idle,
)
from rmtjax.spectra import cross_validate, times_power, to_unit
from rmtjax.training import (
    by_field,
    is_due,
    is_placeholder,
    map_alike,
    moving_kernels,
    register_state,
    root_mean_square,
)

Rest = ArrayLike | Callable[[Any], ArrayLike]


class AgreeState(NamedTuple):
    """State of `agree`, of arrays.

    Attributes:
      step: Number of updates seen.
      start: Path to the kernel at the start of the period.
      middle: Path to the kernel in the middle of the period.
      kept: Path to the share of the squares of the change that the last merge has kept; 1 before,
        and if it passed unmerged.
      effective_rank: Path to the effective rank of what it has kept, as in `Merged`; 0 likewise.
      seen: Path to whether the kernel was seen from the start of the period on.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> state = rmtjax.agree(every=100).init({"kernel": jnp.ones((80, 60))})
      >>> int(state.step), state.start["kernel"].shape, float(state.kept["kernel"])
      (0, (80, 60), 1.0)
    """

    step: Int[Array, ""]
    start: dict[str, Float[Array, "..."]]
    middle: dict[str, Float[Array, "..."]]
    kept: dict[str, Float[Array, ""]]
    effective_rank: dict[str, Float[Array, ""]]
    seen: dict[str, Bool[Array, ""]]


class _Period(NamedTuple):
    """State of one kernel, in the order of the fields of `AgreeState`."""

    start: Float[Array, "..."]
    middle: Float[Array, "..."]
    kept: Float[Array, ""]
    effective_rank: Float[Array, ""]
    seen: Bool[Array, ""]


def _wide(leaf) -> jnp.dtype:
    """Returns the dtype in which changes are computed: float32 at least."""
    # Not by promotion, which users may have made strict.
    return leaf.dtype if jnp.finfo(leaf.dtype).bits > 32 else jnp.dtype("float32")


def _fresh(kernel) -> _Period:
    """Returns the state of a kernel before the first step."""
    # One array each: a buffer that appears twice in a state cannot be donated to `jit`. Copies
    # keep the sharding.
    kernel = jnp.asarray(kernel)
    numbers = jnp.ones((), _wide(kernel)), jnp.zeros((), _wide(kernel)), jnp.zeros((), bool)
    return _Period(jnp.copy(kernel), jnp.copy(kernel), *numbers)


def _agree(kernel, update, period: _Period, rest, axes: KernelAxes):
    """Returns the update that lands on what both halves agree on, and the state."""
    dtype = _wide(kernel)
    view = MatrixView("", kernel.astype(dtype), axes)
    landed = view.leaf + update.astype(dtype)
    start, middle = period.start.astype(dtype), period.middle.astype(dtype)
    stack = lambda leaf: MatrixView("", leaf, axes).matrices()
    # Squares of very large and very small changes leave the range of float32.
    halves, power = to_unit(jnp.stack([stack(middle - start), stack(landed - middle)]))
    agreed, ranks = cross_validate(halves)
    # Without `jit` it may be an array of NumPy.
    agreed = 2 * jnp.asarray(agreed)  # each half estimates what half a period teaches
    change = jnp.sum(halves, axis=0)
    kept, share = view.from_matrices(times_power(agreed, power)), jnp.asarray(rest, dtype)
    target = start + kept + share * (landed - start - kept)
    # A kernel that is not finite must not hide that, nor a failed decomposition spoil a kernel.
    fine = jnp.isfinite(agreed).all() & period.seen
    update = jnp.where(fine, (target - view.leaf).astype(update.dtype), update)
    norm = root_mean_square(change)
    ratio = root_mean_square(agreed) / jnp.where(norm > 0, norm, 1)
    kept, rank = jnp.where(fine, jnp.square(ratio), 1), jnp.where(fine, jnp.mean(ranks), 0)
    numbers = {"kept": kept.astype(dtype), "effective_rank": rank.astype(dtype)}
    return update, period._replace(**numbers)


# Compiled also for users who call `update` outside `jit`. Without paths among the arguments one
# program serves all trees whose kernels have these shapes.
@partial(jax.jit, static_argnames="axes")
def _advance(step, every, start, kernels, updates, periods, rest, *, axes):
    """Returns updates and states after a step: merged where a period ends."""
    # The parameters as they are, not as an update was to land: they may have been rounded.
    phase = (step - start) % every
    remember = lambda at, new, old: jax.lax.cond(at, lambda: new, lambda: old)
    snapshot = lambda new, old: new.astype(old.dtype)
    starts, middles = ([period[i] for period in periods] for i in (0, 1))
    starts = remember(phase == 0, list(map(snapshot, kernels, starts)), starts)
    middles = remember(phase == every // 2, list(map(snapshot, kernels, middles)), middles)
    periods = [
        period._replace(start=first, middle=middle, seen=period.seen | (phase == 0))
        for first, middle, period in zip(starts, middles, periods, strict=True)
    ]

    def agree_on(arrays, axes):
        out = jax.tree.map(typed_sharding, arrays[1:])
        return by_compiler(partial(_agree, axes=axes), *arrays, rest, out=out)

    def merge(updates, periods):
        merged = map_alike(agree_on, list(zip(kernels, updates, periods, strict=True)), axes)
        return [update for update, _ in merged], [period for _, period in merged]

    return jax.lax.cond(is_due(step + 1, every, start), merge, lambda *same: same, updates, periods)


def _check_start(start: Any, every: Any) -> None:
    """Raises ValueError if the first period would begin before the first step."""
    # Injected numbers may be traced, and are not checked.
    if not any(isinstance(number, jax.Array) for number in (start, every)) and 0 < start < every:
        raise ValueError(
            f"`start` must be 0 or at least `every`, {every}, got {start}: the period that it ends "
            "would have begun before the first step."
        )


def agree(
    every: Int[ArrayLike, ""],
    *,
    start: Int[ArrayLike, ""] = 0,
    rest: Rest = 0.0,
    where: Where | None = None,
    axes: Axes | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps of each epoch's change what its two halves agree on. Put it last in a chain.

    The halves of a period saw other samples, so that what each of them learnt by heart differs.
    With the kernel $W_0$ at the start, $W_1$ in the middle and $W_2$ at the end of the period,
    $\Delta_1 = W_1 - W_0$ and $\Delta_2 = W_2 - W_1$ both estimate what half a period teaches.
    With $\Delta_j = U \Sigma V^T$ and $r_m = u_m^T \Delta_i v_m$ for the other half i, the last
    step of a period lands on

    $$W_0 + \sum_{i \ne j} U \operatorname{diag}(\max(r, 0)) V^T.$$

    Under pure noise the mean of $r_m$ is 0: a half knows nothing of the noise that has shaped
    $u_m$ and $v_m$. There is no noise level and no threshold to choose. Other steps pass unchanged.
    So do all leaves that are not kernels, and the state of the optimizer.

    Set `every` to the steps of an epoch. Each epoch must see each sample once, in a new order, so
    that no sample is in both halves. Shorter periods fail: momentum carries the gradients of one
    half into the other, which looks like agreement, and the second half trains on what the first
    one has left. So half a period must be long beside the memory of momentum: some 10 steps for
    0.9. The first period passes unmerged by default. In it the halves differ because training
    moves fast, and not because of noise.

    Replicas that train beside one another are more independent than halves, and end a little
    higher: see `rmtjax.merge_replicas`. This transform needs no change of a training loop.

    Args:
      every: Steps in a period, at least 2: those of an epoch. The middle is after `every // 2`.
      start: First step that merges, at the end of the first merged period. 0 stands for
        `2 * every`; `every` merges the first period too. The next are `start + every` and so on.
      rest: Share of the other change of a period that stays, in [0, 1]; or an optax schedule of it,
        called with the number of steps before this one. 0.1 learns faster on clean labels, and
        learns wrong labels by heart in long runs.
      where, axes: As in `rmtjax.plan`. Each matrix of a stack is merged alone. `Factors`, leaves
        that are no matrices, and those of fewer than 16 bits pass unchanged.

    Returns:
      A transformation with an `AgreeState`, which has two copies of each kernel. It takes any tree
      that optax takes, needs `params` in `update` and ignores extra arguments. It works inside
      `masked`, `partition`, `MultiSteps` and `inject_hyperparams` (with callables as
      `static_args`). Under `vmap` with a batched state every step costs a decomposition. A kernel
      whose change is not finite passes unchanged.

    Warns:
      UserWarning: `init` finds no kernel that can be merged.

    Raises:
      ValueError: A number is out of range, or `update` was called without `params` or with a kernel
        that `init` did not get.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, rmtjax
      >>> noise = lambda seed: jax.random.normal(jax.random.key(seed), (80, 60))
      >>> signal = jnp.outer(noise(0)[:, 0], noise(1)[0])
      >>> optimizer = optax.chain(optax.sgd(1.0), rmtjax.agree(every=2, start=2))
      >>> params = {"Dense_0": {"kernel": jnp.zeros((80, 60))}}
      >>> state = optimizer.init(params)
      >>> for seed in (3, 4):
      ...     gradients = {"Dense_0": {"kernel": signal + noise(seed)}}
      ...     updates, state = optimizer.update(gradients, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> error = lambda change: jnp.linalg.norm(change + 2 * signal) / jnp.linalg.norm(2 * signal)
      >>> print(f"error {error(params['Dense_0']['kernel']):.2f}")
      error 0.13
      >>> print(f"error of the plain sum {error(-2 * signal - noise(3) - noise(4)):.2f}")
      error of the plain sum 0.68

    References:
      The estimator is a cross-validation of singular values, in the line of Bun, Allez, Bouchaud
      and Potters (2016), https://arxiv.org/abs/1502.06736, and Bartz (2016),
      https://arxiv.org/abs/1611.00798. That agreement of gradients tells signal from what is learnt
      by heart is from Chatterjee (2020), https://arxiv.org/abs/2002.10657.
    """
    check_count("every", every, 2)
    check_count("start", start, 0)
    _check_start(start, every)
    if not callable(rest):
        check_share("rest", rest, "the change that both halves do not agree on and stays")

    def find(params: PyTree) -> dict[str, MatrixView]:
        """Returns the kernels that can be merged: factors are left alone."""
        views = find_kernels(params, where, axes)
        fine = lambda view: not (view.is_factored or obstacle(view, 1))
        return {p: view for p, view in views.items() if isinstance(view, MatrixView) and fine(view)}

    @in_usual_modes
    def init_fn(params: PyTree) -> AgreeState:
        if is_abstract(params):
            return jax.eval_shape(init_fn, params)
        step = jnp.zeros((), jnp.int32)
        if is_placeholder(params):
            return AgreeState._make([step] * len(AgreeState._fields))
        views = find(params)
        warn_if_idle("agree", views, params, where, axes)
        periods = {path: _fresh(view.leaf) for path, view in views.items()}
        return AgreeState(step, *by_field(_Period, periods))

    @in_usual_modes
    def update_fn(updates, state, params: Any = None, **extra_args):
        del extra_args
        views, chosen = moving_kernels(updates, params, find, state.start)
        step = jnp.asarray(state.step)
        share = rest(step) if callable(rest) else rest
        period, begin = (jnp.asarray(number).astype(step.dtype) for number in (every, start))
        first = jnp.where(begin > 0, begin, 2 * period)
        kernels, shapes = [v.leaf for v in views.values()], tuple(v.axes for v in views.values())
        old = [_Period(*(field[path] for field in state[1:])) for path in views]
        moves, new = _advance(
            step, period, first, kernels, list(chosen.values()), old, share, axes=shapes
        )
        # Kernels without an update, and those that were factorized since, keep their state. A
        # period in which one rests has no start, so that it passes unmerged.
        fields = by_field(_Period, dict(zip(views, new, strict=True)))
        fields = [old | new for old, new in zip(state[1:], fields, strict=True)]
        fields[-1] |= {path: jnp.zeros((), bool) for path in state.seen if path not in views}
        moved = dict(zip(views, moves, strict=True))
        updates = map_kernels(lambda path, _: moved[path], updates, moved)
        return updates, AgreeState._make([optax.safe_increment(step), *fields])

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


register_state(
    AgreeState,
    lambda state: {"kept": state.kept, "effective_rank": state.effective_rank},
)
