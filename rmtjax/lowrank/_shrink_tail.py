"""Shrinks the tail of spectra in an optax chain: a proximal step beyond the signal."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from rmtjax._axes import KernelAxes, MatrixView
from rmtjax._modes import in_usual_modes
from rmtjax._sharding import by_compiler, typed_sharding
from rmtjax._types import Axes, BulkFit, from_state, no_fit, to_state, Where
from rmtjax.lowrank._judge import EACH
from rmtjax.lowrank._tail import beyond, check_strength, shrink_beyond
from rmtjax.noise import check_rule, fit_live, ranks
from rmtjax.planning import (
    check_count,
    find_kernels,
    is_abstract,
    map_kernels,
    obstacle,
    warn_if_idle,
)
from rmtjax.spectra import decompose, from_singular_values, times_power, to_unit
from rmtjax.training import (
    by_field,
    is_due,
    is_placeholder,
    map_alike,
    moving_kernels,
    on_true_scale,
    register_state,
)

Strength = ArrayLike | Callable[[Any], ArrayLike]


class ShrinkState(NamedTuple):
    """State of `shrink_tail`, of arrays. A stack has an entry for each matrix.

    Attributes:
      step: Number of updates seen.
      fits: Path to the noise level that is carried. Before, and for rules without one, all is 0,
        and the distance 1.
      ranks: Path to the cut of the last shrinking step: the directions that it left. Full before,
        and where nothing was shrunk.
      removed: Path to the share of the squares that the last shrinking step has removed.
      exponents: Path to that of the power of two over which the noise level is that of the kernel;
        0 unless its squares could leave the range of float32.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> shrink = rmtjax.lowrank.shrink_tail(every=100, strength=0.5)
      >>> state = shrink.init({"kernel": jnp.ones((80, 60))})
      >>> int(state.step), state.ranks["kernel"].tolist()
      (0, 60)
    """

    step: Int[Array, ""]
    fits: dict[str, BulkFit]
    ranks: dict[str, Int[Array, "..."]]
    removed: dict[str, Float[Array, "..."]]
    exponents: dict[str, Int[Array, "..."]]


class _Kernel(NamedTuple):
    """State of one kernel, in the order of the fields of `ShrinkState`."""

    fit: BulkFit
    rank: Int[Array, "..."]
    removed: Float[Array, "..."]
    exponent: Int[Array, "..."]


def _fresh(view: MatrixView) -> _Kernel:
    """Returns the state of a kernel before the first step."""
    shape = (view.stack,) if view.axes.batch else ()
    dtype = jax.dtypes.canonicalize_dtype(jnp.promote_types(view.dtype, jnp.float32))
    full, exponent = jnp.full(shape, view.short, jnp.int32), jnp.zeros(shape, jnp.int32)
    return _Kernel(no_fit(shape, dtype), full, jnp.zeros(shape, dtype), exponent)


def _find_cut(s, matrices, fit: BulkFit, rule: ranks.RankRule, least: int):
    """Returns the cut of each matrix by its values, whether it holds, and the noise level."""
    spectra, reliable = from_singular_values(s, matrices), jnp.isfinite(s).all(axis=-1)
    if rule.needs_noise:
        # What a step has shrunk is no noise of the law any more, so the first level is carried.
        known = jnp.isfinite(fit.threshold)
        fresh, accepted = fit_live(rule, least, spectra, matrices)
        pick = lambda new, old: jnp.where(accepted & ~known, new, old)
        fit, reliable = jax.tree.map(pick, fresh, fit), reliable & (known | accepted)
    rank = jax.vmap(rule, in_axes=(EACH, 0))(spectra, fit)
    # If nothing stands out, as before training, all would be shrunk.
    return rank, reliable & (rank > 0), fit


def _shrink_stack(matrices: Float[Array, "b m n"], state: _Kernel, strength, **how):
    """Returns a stack after a proximal step, which matrices it changes, and the new state."""
    # Each matrix on its scale: squares of very large and small values leave float32.
    known, fresh = jnp.isfinite(state.fit.threshold), jax.vmap(to_unit)(matrices)[1]
    exponent = jnp.where(known, state.exponent, fresh)
    matrices = times_power(matrices, -exponent[:, None, None])
    strength = times_power(jnp.asarray(strength, matrices.dtype), -exponent)[:, None]
    directions = decompose(matrices)
    s = directions[1]
    rank, ready, fit = _find_cut(s, matrices, state.fit, **how)
    ready &= rank < s.shape[-1]
    rank = jnp.where(ready, rank, s.shape[-1])
    lower = times_power(
        shrink_beyond(matrices, directions, rank, strength), exponent[:, None, None]
    )
    # Relative to the largest value no square overflows or underflows, and their sum is at least 1.
    largest = jnp.maximum(s[:, :1], jnp.finfo(s.dtype).tiny)
    before, after = (s / largest) ** 2, (jnp.maximum(s - strength, 0) / largest) ** 2
    lost = jnp.sum(jnp.where(beyond(s, rank), before - after, 0), axis=-1)
    removed = jnp.where(ready, lost / jnp.maximum(jnp.sum(before, axis=-1), 1), 0)
    return lower, ready, _Kernel(fit, rank, removed, exponent)


def _shrink_kernel(kernel, update, state: _Kernel, strength, axes: KernelAxes, **how):
    """Returns the update that lands on the shrunk kernel, and the new state of the kernel."""
    # In the dtype of the fit, whatever that of the update: the state must keep its dtypes.
    view = MatrixView("", (kernel + update).astype(state.removed.dtype), axes)
    matrices = view.matrices()
    flat = jax.tree.map(jnp.ravel, state._replace(fit=from_state(state.fit)))
    lower, ready, new = _shrink_stack(matrices, flat, strength, **how)
    changed = view.from_matrices(jnp.where(ready[:, None, None], jnp.ones_like(matrices), 0)) > 0
    landing = (view.from_matrices(lower) - kernel).astype(update.dtype)
    restore = lambda leaf, old: leaf.reshape(old.shape).astype(old.dtype)
    # A matrix that is left alone keeps its update to the last bit.
    return jnp.where(changed, landing, update), jax.tree.map(
        restore, new._replace(fit=to_state(new.fit)), state
    )


# Compiled also for users who call `update` outside `jit`. Without paths among the arguments one
# program serves all trees whose kernels have these shapes.
@partial(jax.jit, static_argnames=("axes", "rule", "least"))
def _shrink_if(due, kernels, updates, states, strength, *, axes, rule, least):
    """Returns updates and states of kernels, in one order: shrunk if it is due, else the same."""

    def shrink_one(arrays, axes):
        out = jax.tree.map(typed_sharding, arrays[1:])
        shrink = partial(_shrink_kernel, axes=axes, rule=rule, least=least)
        return by_compiler(shrink, *arrays, strength, out=out)

    def shrink(updates, states):
        shrunk = map_alike(shrink_one, list(zip(kernels, updates, states, strict=True)), axes)
        return [update for update, _ in shrunk], [state for _, state in shrunk]

    return lax.cond(due, shrink, lambda *same: same, updates, states)


def shrink_tail(
    every: Int[ArrayLike, ""],
    *,
    strength: Strength,
    start: Int[ArrayLike, ""] = 0,
    rule: ranks.RankRule | None = None,
    where: Where | None = None,
    axes: Axes | None = None,
    min_size: int = 50,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks the singular values beyond the signal every few steps. Put it last in a chain.

    A shrinking step rewrites the update of a kernel so that `optax.apply_updates` lands on
    `prox_tail(landed, rank, strength)`. It minimises the loss plus a multiple of the tail sum
    $T_h$, the regulariser of LocalDrop. There the cut $h$ is chosen by hand. Here it is the number
    of singular values above the Marchenko-Pastur edge by default, so that only noise is shrunk. All
    other updates pass unchanged.

    A kernel carries the noise level of its first fit, since a shrunk bulk does not follow the law.
    It is left alone, and tried again later, if its fit is refused or if nothing stands out.

    Args:
      every: Period of the shrinking steps, at least 1, as in `rmtjax.prune_spectrum`. Each costs a
        decomposition of every kernel.
      strength: $\tau$ of one step, at least 0, on the scale of the singular values; or an optax
        schedule of it, called with the number of steps before this one. For the penalty
        $\lambda T_h$ at a learning rate $\eta$ it is $\eta \lambda \cdot every$.
      start: First shrinking step; 0 stands for `every`. The next are `start + every` and so on.
      rule: A rank rule of `rmtjax.ranks`, such as `rmtjax.ranks.fixed(16)` for a cut by hand. None
        stands for `rmtjax.ranks.bema()`.
      where, axes: As in `rmtjax.plan`. Each matrix of a stack is shrunk alone. Factored kernels are
        left alone.
      min_size: Kernels with a shorter short side are left alone.

    Returns:
      A transformation with a `ShrinkState`. It takes any tree that optax takes, needs `params` in
      `update` and ignores extra arguments. It works inside `masked`, `partition`, `MultiSteps` and
      `inject_hyperparams` (with callables and `min_size` as `static_args`). `rmtjax.metrics` and
      `rmtjax.noise_levels` read its state. Under `vmap` with a batched state every step costs a
      decomposition.

    Warns:
      UserWarning: `init` finds no kernel that can be shrunk.

    Raises:
      ValueError: A number is out of range, or `update` was called without `params` or with a kernel
        that `init` did not get.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"Dense_0": {"kernel": 1 + jax.random.normal(jax.random.key(0), (80, 60))}}
      >>> shrink = rmtjax.lowrank.shrink_tail(every=2, strength=0.5)
      >>> optimizer = optax.chain(optax.sgd(0.1, 0.9), shrink)
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int(rmtjax.metrics(state)["cut/Dense_0/kernel"])
      1

    References:
      Lu, Xu, Du, Ishida, Zhang and Sugiyama, LocalDrop (2021), https://arxiv.org/abs/2103.00719.
    """
    check_count("every", every)
    check_count("start", start, 0)
    if isinstance(min_size, jax.Array):
        raise TypeError(
            "`min_size` must be a Python integer, since it decides which kernels have a state, got "
            "an array. Use optax.inject_hyperparams(shrink_tail, "
            'static_args=("rule", "min_size", "where", "axes")).'
        )
    check_count("min_size", min_size)
    if not callable(strength):
        check_strength(strength)
    # Not the default of the signature: `optax.inject_hyperparams` calls a callable as a schedule.
    rule = ranks.bema() if rule is None else rule
    check_rule(rule)

    def find(params: PyTree) -> dict[str, MatrixView]:
        """Returns the kernels that can be shrunk: factors and small ones cannot."""
        views = find_kernels(params, where, axes)
        fine = lambda view: not (view.is_factored or obstacle(view, min_size))
        return {p: view for p, view in views.items() if isinstance(view, MatrixView) and fine(view)}

    @in_usual_modes
    def init_fn(params: PyTree) -> ShrinkState:
        if is_abstract(params):
            return jax.eval_shape(init_fn, params)
        step = jnp.zeros((), jnp.int32)
        if is_placeholder(params):
            return ShrinkState._make([step] * len(ShrinkState._fields))
        views = find(params)
        warn_if_idle("shrink_tail", views, params, where, axes, min_size)
        return ShrinkState(step, *by_field(_Kernel, {p: _fresh(view) for p, view in views.items()}))

    @in_usual_modes
    def update_fn(updates, state, params: Any = None, **extra_args):
        del extra_args
        views, chosen = moving_kernels(updates, params, find, state.ranks)
        taken = strength(state.step) if callable(strength) else strength
        step = jnp.asarray(optax.safe_increment(state.step))
        kernels, shapes = [v.leaf for v in views.values()], tuple(v.axes for v in views.values())
        old = [_Kernel(*(field[path] for field in state[1:])) for path in views]
        due, moves = is_due(step, every, start), list(chosen.values())
        moves, new = _shrink_if(
            due, kernels, moves, old, taken, axes=shapes, rule=rule, least=min_size
        )
        # Kernels without an update, and those that were factorized since, keep their state.
        fields = by_field(_Kernel, dict(zip(views, new, strict=True)))
        fields = [old | new for old, new in zip(state[1:], fields, strict=True)]
        moved = dict(zip(views, moves, strict=True))
        updates = map_kernels(lambda path, _: moved[path], updates, moved)
        return updates, ShrinkState(step, *fields)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


register_state(
    ShrinkState,
    lambda state: {"cut": state.ranks, "shrunk": state.removed},
    levels=lambda state: on_true_scale(state.fits, state.exponents),
)
