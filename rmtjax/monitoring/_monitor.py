"""An optax transform that measures spectra while kernels train, and changes no update."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, PyTree

from rmtjax._axes import KernelAxes, MatrixView
from rmtjax._modes import in_usual_modes
from rmtjax._sharding import by_compiler
from rmtjax._types import Axes, Where
from rmtjax.monitoring._look import check_columns, look_at, LookOptions
from rmtjax.monitoring._state import after_look, KernelLook, MonitorState, unseen
from rmtjax.noise import check_rule, ranks
from rmtjax.planning import (
    check_count,
    check_share,
    find_kernels,
    is_abstract,
    obstacle,
    to_number,
    warn_if_idle,
)
from rmtjax.training import is_due, is_placeholder, map_alike, moving_kernels, register_state


@partial(jax.jit, static_argnames=("axes", "options"))
def _look_if(due, kernels, states: list[KernelLook], key, flat, first, *, axes, options):
    """Returns the states of kernels, in one order: after a look if it is due, else the same."""

    def look(states):
        def one(arrays, axes: KernelAxes):
            kernel, state, key = arrays
            found = by_compiler(partial(look_at, axes=axes, options=options), kernel, key)
            return after_look(state, found, flat, first)

        keys = list(jax.random.split(key, len(kernels)))
        return map_alike(one, list(zip(kernels, states, keys, strict=True)), axes)

    return lax.cond(due, look, lambda states: states, states)


def _count_loss(state: MonitorState, value: Any) -> tuple[Array, Array]:
    """Returns sum and number of the losses since the last look, with this one if it is finite."""
    if value is None:
        return state.total, state.counted
    loss = to_number("value", value, state.total.dtype)
    finite = jnp.isfinite(loss)
    return state.total + jnp.where(finite, loss, 0), state.counted + finite.astype(jnp.int32)


def monitor(
    every: int = 100,
    *,
    start: int = 1,
    columns: Sequence[str] = ("spikes", "distance", "stable_rank", "spectral_norm"),
    rule: ranks.RankRule = ranks.bema(),  # noqa: B008 - a frozen value
    shuffles: int = 0,
    flat: float = 0.01,
    where: Where | None = None,
    axes: Axes | None = None,
    min_size: int = 50,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Measures the spectra of kernels every so many steps; changes no update.

    It stands anywhere in a chain, and measures the parameters that `update` is given: those before
    the step. `rmtjax.metrics(opt_state)` has the numbers of the last look, and `rmtjax.History`
    keeps all looks. Three of them are facts that may call for a look by eye:

    - `left_law`: the law fitted the bulk at an earlier look, and does not any more;
    - `traps`: most random orders of the entries have a spike, as single entries are too large;
    - `growing`: the number of looks in a row at which the spikes have grown, while the mean loss
      fell by less than the share `flat` from one period to the next. It needs the loss:
      `optimizer.update(gradients, state, params, value=loss)`.

    A look costs the singular values of each kernel, without vectors, and one more spectrum for each
    shuffle. Other steps cost next to nothing.

    Args:
      every: Steps between looks, at least 1.
      start: First step with a look, at least 1. By default the first, so that the others have
        something to compare with.
      columns: Names of fields of `SpectralMetrics`, of "variance", "edge", "threshold", "spikes"
        and "distance", and with `shuffles` of "shuffled_spikes", "shuffled_rate" and
        "shuffled_top". The exponents, except `hill`, make the program much larger.
      rule: The rank rule that fits the noise, counts spikes and judges the fit.
      shuffles: Number of random orders of the entries at each look, for `traps`. Noise has a spike
        with the probability `level` of the rule in each.
      flat: Share of the mean loss of the last period, in [0, 1].
      where, axes, min_size: Choose the kernels, as in `rmtjax.plan`. Factors are left out.
      seed: Of the random orders.

    Returns:
      A transformation with a `MonitorState`. It takes any tree that optax takes, needs `params` in
      `update`, and works inside `chain`, `masked`, `partition` and `MultiSteps`, under `jit` and
      `scan`. No number of the state is NaN or infinite: one that does not exist is 0.

    Warns:
      UserWarning: `init` finds no kernel that can be measured.

    Raises:
      ValueError: An option is out of range or a column unknown; or `update` was called without
        `params`, with a kernel that `init` did not get, or with a `value` of several numbers.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"Dense_0": {"kernel": 2 + jax.random.normal(jax.random.key(1), (80, 60))}}
      >>> optimizer = optax.chain(optax.sgd(0.1), rmtjax.monitor(every=10))
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> for name, number in rmtjax.metrics(state).items():
      ...     print(f"{name:<36} {number:.3g}")
      monitor/distance/Dense_0/kernel      0.0408
      monitor/spectral_norm/Dense_0/kernel 138
      monitor/spikes/Dense_0/kernel        1
      monitor/stable_rank/Dense_0/kernel   1.24
      monitor/left_law/Dense_0/kernel      0
      monitor/traps/Dense_0/kernel         0
      monitor/growing/Dense_0/kernel       0
    """
    check_count("every", every)
    check_count("start", start)
    check_count("shuffles", shuffles, 0)
    check_count("min_size", min_size)
    check_count("seed", seed, 0)
    check_share("flat", flat, "the mean loss that a period may gain and count as flat")
    check_rule(rule)
    check_columns(tuple(columns), shuffles)
    options = LookOptions(tuple(columns), rule, min_size, shuffles)

    def find(params: PyTree) -> dict[str, MatrixView]:
        kernels = find_kernels(params, where, axes).items()
        able = lambda kernel: not kernel.is_factored and obstacle(kernel, min_size) is None
        return {p: view for p, view in kernels if isinstance(view, MatrixView) and able(view)}

    @in_usual_modes
    def init_fn(params: PyTree) -> MonitorState:
        if is_abstract(params):
            return jax.eval_shape(init_fn, params)
        # One array each: a buffer that appears twice in a state cannot be donated to `jit`.
        step, looks, measured, counted, periods = (jnp.zeros((), jnp.int32) for _ in range(5))
        total, loss = (jnp.zeros((), jnp.float32) for _ in range(2))
        kernels: Any = step
        if not is_placeholder(params):
            views = find(params)
            warn_if_idle("monitor", views, params, where, axes, min_size)
            kernels = {path: unseen(view, options) for path, view in views.items()}
        return MonitorState(step, looks, measured, kernels, total, counted, loss, periods)

    @in_usual_modes
    def update_fn(updates, state: Any, params: Any = None, *, value=None, **extra_args):
        del extra_args
        views, _ = moving_kernels(updates, params, find, state.kernels)
        step = jnp.asarray(optax.safe_increment(state.step))
        due = is_due(step, every, start)
        total, counted = _count_loss(state, value)
        mean = total / jnp.maximum(counted, 1)
        heard = due & (counted > 0)
        is_flat = heard & (state.periods > 0) & (state.loss - mean < flat * jnp.abs(state.loss))
        kernels = dict(state.kernels)
        if views:
            after = _look_if(
                due,
                [jnp.asarray(view.leaf) for view in views.values()],
                [state.kernels[path] for path in views],
                jax.random.fold_in(jax.random.key(seed), step),
                is_flat,
                state.looks == 0,
                axes=tuple(view.axes for view in views.values()),
                options=options,
            )
            kernels |= zip(views, after, strict=True)
        return updates, MonitorState(
            step=step,
            looks=state.looks + due.astype(jnp.int32),
            measured=jnp.where(due, step, state.measured),
            kernels=kernels,
            total=jnp.where(due, 0, total),
            counted=jnp.where(due, 0, counted),
            loss=jnp.where(heard, mean, state.loss),
            periods=state.periods + heard.astype(jnp.int32),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _numbers(state: MonitorState) -> dict[str, dict[str, Any]]:
    """Returns the numbers that `metrics` has of this transform."""
    numbers: dict[str, dict[str, Any]] = {}
    for path, look in state.kernels.items():
        found = {**look.columns, "left_law": look.left_law}
        found |= {"traps": look.traps, "growing": look.growing}
        for name, value in found.items():
            numbers.setdefault(f"monitor/{name}", {})[path] = value
    return numbers


register_state(MonitorState, _numbers)
