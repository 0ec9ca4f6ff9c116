"""Pruning in an optax chain: the last word on the updates."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from rmtjax import _kernels, ranks
from rmtjax._factors import compose, is_factors, svd
from rmtjax._spectrum import from_singular_values
from rmtjax._typing import Axes, BulkFit, KernelAxes, Spectrum, Where

Keep = ArrayLike | Callable[[Any], ArrayLike]


class PruneState(NamedTuple):
    """What `prune_spectrum` remembers, all arrays.

    Attributes:
      step: Number of updates seen.
      fits: Path to the noise of that kernel as first accepted; NaN before. For a stack of
        matrices an array with an entry each. `rmtjax.plan` takes it as `fits`.
      ranks: Path to the rank after the last pruning; full before.
    """

    step: Int[Array, ""]
    fits: dict[str, BulkFit]
    ranks: dict[str, Int[Array, ""]]


def _prune_stack(matrices: Float[Array, "b m n"], fits: BulkFit, rule, keep, min_rank):
    """Truncates a stack of matrices to the signal of its richest member."""
    u, s, vt = svd(matrices)
    spectra = from_singular_values(s, matrices)
    each = Spectrum(eigenvalues=0, ratio=None)  # pyright: ignore[reportArgumentType]
    fresh = jax.vmap(rule.fit, in_axes=(each,))(spectra)
    accepted = jax.vmap(rule.accepts, in_axes=(each, 0))(spectra, fresh)
    # A spectrum that has been truncated is never fitted again as if it were whole.
    known = jnp.isfinite(fits.threshold)
    first = accepted & ~known
    fits = jax.tree.map(lambda new, old: jnp.where(first, new, old), fresh, fits)
    signal = jax.vmap(rule, in_axes=(each, 0))(spectra, fits)
    # Where nothing stands out, as before training, a cut would destroy the network.
    ready = jnp.all(known | accepted) & jnp.isfinite(s).all() & jnp.any(signal > 0)
    size = s.shape[-1]
    rank = jnp.where(ready, ranks.kept_rank(signal.max(), size, keep, min_rank), size)
    return fits, rank, compose(u, s, vt, rank)


def _prune_kernel(kernel, update, fit: BulkFit, axes: KernelAxes, **options):
    """The update that lands on the truncated kernel, the fit in force and the rank."""
    # In the dtype of the fit, whatever that of the update: the state must keep its own.
    landed = (kernel + update).astype(fit.threshold.dtype)
    matrices = _kernels.to_matrices(landed, axes)
    flat = jax.tree.map(jnp.ravel, fit)
    fits, rank, lower = _prune_stack(matrices, flat, **options)
    lower = _kernels.from_matrices(lower, landed.shape, axes)
    # A kernel that keeps its full rank keeps its update to the last bit.
    changed = rank < min(matrices.shape[1:])
    update = jnp.where(changed, (lower - kernel).astype(update.dtype), update)
    return update, jax.tree.map(jnp.reshape, fits, jax.tree.map(jnp.shape, fit)), rank


# Compiled here, so that it is compiled once for those who call `update` outside `jit` too.
@partial(jax.jit, static_argnames=("axes", "rule"))
def _prune_if(due, kernels, updates, fits, ranks, keep, min_rank, *, axes, rule):
    """Updates, fits and ranks by path after a step: pruned if it is due, else the same."""

    def prune(updates, fits, ranks):
        options = {"rule": rule, "keep": keep, "min_rank": min_rank}
        updates, fits, ranks = dict(updates), dict(fits), dict(ranks)
        for path, named in axes:
            updates[path], fits[path], ranks[path] = _prune_kernel(
                kernels[path], updates[path], fits[path], named, **options
            )
        return updates, fits, ranks

    return jax.lax.cond(due, prune, lambda *same: same, updates, fits, ranks)


def _unfitted(kernel, axes: KernelAxes) -> BulkFit:
    """The fit of a kernel that has none yet."""
    stack, _, _ = _kernels.matrix_shape(kernel.shape, axes)
    shape = (stack,) if axes.batch else ()
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    # Each its own array: a buffer that appears twice cannot be donated to `jit`.
    nans = (jnp.full(shape, jnp.nan, dtype) for _ in range(4))
    return BulkFit(*nans, num_spikes=jnp.zeros(shape, jnp.int32))


def _check_count(name: str, value: Any, least: int) -> None:
    """Refuses a wrong number; one injected by `inject_hyperparams` is not looked at."""
    if isinstance(value, jax.Array):
        return
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an integer number of steps, got {value!r}.")
    if operator.index(value) < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def _check(every, start, keep, min_rank, min_size) -> None:
    _check_count("every", every, 1)
    _check_count("start", start, 0)
    _check_count("min_rank", min_rank, 1)
    if isinstance(min_size, jax.Array):
        raise TypeError(
            "`min_size` decides which kernels have a state and must be a Python integer. Use "
            'optax.inject_hyperparams(prune_spectrum, static_args=("min_size", "rule", '
            '"where", "axes")).'
        )
    _check_count("min_size", min_size, 1)
    if not callable(keep) and not isinstance(keep, jax.Array) and not 0 <= keep <= 1:
        raise ValueError(
            f"`keep` must be in [0, 1] or a schedule, got {keep}: the share of the directions "
            "that are no signal and stay all the same."
        )


def prune_spectrum(
    every: Int[ArrayLike, ""],
    *,
    start: Int[ArrayLike, ""] = 0,
    keep: Keep = 0.0,
    rule: ranks.RankRule | None = None,
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
    and many spikes. A kernel whose fit is refused, or in which nothing stands out of the
    noise, is left alone and tried again.

    Choose `start` late enough: until training has lifted the directions that a network
    needs above its initial noise, a cut removes what it would have learnt with.

    Args:
      every: Pruning period in steps, at least 1. Steps are counted from 1, as this
        transform sees them: `optax.MultiSteps` and the like count for it.
      start: First pruning step; 0 stands for `every`. Pruning steps are `start`,
        `start + every`, ...
      keep: Share of the directions that are no signal and stay, in [0, 1]; or an optax
        schedule of it, called with the number of steps before this one.
      rule: A rank rule; `rmtjax.ranks.bema()` by default.
      where: `where(path, leaf)` chooses the kernels, as in `rmtjax.plan`.
      axes: `axes(path, leaf)` names the axes that make a kernel a matrix, as in
        `rmtjax.plan`. The matrices of a stack get one rank, that of the richest.
      min_rank: Smallest rank, at least 1.
      min_size: Kernels with a shorter short side are left alone.

    Returns:
      A transformation whose state is a `PruneState`. It needs `params` in `update`,
      ignores extra arguments, and works inside `masked`, `partition`, `MultiSteps` and
      `inject_hyperparams` (callables and `min_size` as `static_args`).

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
    _check(every, start, keep, min_rank, min_size)
    rule = ranks.bema() if rule is None else rule
    ranks.check_rule(rule)

    def matrices(params: PyTree) -> dict[str, tuple[Any, KernelAxes]]:
        found = _kernels.find_kernels(params, where, axes, is_leaf=is_factors)
        return {
            path: (leaf, named)
            for path, (leaf, named) in found.items()
            if named is not None and _kernels.unmatrixable(leaf, named, min_size) is None
        }

    def init_fn(params: PyTree) -> PruneState:
        kernels = matrices(params)
        full = lambda kernel, named: min(_kernels.matrix_shape(kernel.shape, named)[1:])
        return PruneState(
            step=jnp.zeros((), jnp.int32),
            fits={path: _unfitted(*kernel) for path, kernel in kernels.items()},
            ranks={path: jnp.asarray(full(*kernel), jnp.int32) for path, kernel in kernels.items()},
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "`params` must be given to `update`: pruning depends on where the updates land. "
                "Call `optimizer.update(updates, state, params)`."
            )
        found = matrices(params)
        chosen = {}  # without the kernels whose update is None: they do not move
        _kernels.map_kernels(chosen.setdefault, updates, found)
        step = jnp.asarray(optax.safe_increment(state.step))
        due = (step > 0) & (step >= start) & ((step - start) % every == 0)
        chosen, fits, new_ranks = _prune_if(
            due,
            {path: found[path][0] for path in chosen},
            chosen,
            state.fits,
            state.ranks,
            keep(state.step) if callable(keep) else keep,
            min_rank,
            axes=tuple((path, found[path][1]) for path in chosen),
            rule=rule,
        )
        updates = _kernels.map_kernels(lambda path, _: chosen[path], updates, chosen)
        return updates, PruneState(step, fits, new_ranks)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
