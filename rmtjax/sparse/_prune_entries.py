"""Prunes entries in an optax chain: an entry that was set to zero stays zero."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PyTree

from rmtjax._types import Where
from rmtjax.planning import check_count, map_kernels
from rmtjax.sparse._masks import check_sparsity, find_floating, pick, pick_masks, shrink
from rmtjax.training import is_due, is_placeholder, moving_kernels, register_state

Sparsity = ArrayLike | Callable[[Any], ArrayLike]
Weights = Mapping[str, ArrayLike] | Callable[[Any], Mapping[str, ArrayLike]]


class PruneEntriesState(NamedTuple):
    """State of `prune_entries`, of arrays.

    Attributes:
      step: Number of updates seen.
      masks: Path to the booleans of that kernel, True where an entry stays.
    """

    step: Int[Array, ""]
    masks: dict[str, Bool[Array, "..."]]


# Compiled also for users who call `update` outside `jit`: eager, each step would dispatch some
# sixty sums one by one.
@jax.jit
def _prune_if(due, kernels, updates, masks, weights, sparsity):
    """Returns updates that land on zero where a mask is False, and the masks, shrunk if due."""

    def shrink_landed(masks):
        # The order of magnitudes must be that of what lands.
        landed: Any = optax.apply_updates(kernels, updates)
        return shrink(landed, masks, weights, sparsity)

    masks = jax.lax.cond(due, shrink_landed, lambda masks: masks, masks)
    # p + (0 - p) is exactly 0.
    zero = lambda path: (-kernels[path]).astype(updates[path].dtype)
    return {path: jnp.where(masks[path], updates[path], zero(path)) for path in masks}, masks


def prune_entries(
    sparsity: Sparsity = 0.0,
    *,
    every: Int[ArrayLike, ""] = 1,
    start: Int[ArrayLike, ""] = 0,
    mask: PyTree | None = None,
    weights: Weights | None = None,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Sets entries of kernels to zero and keeps them there. Put it last in a chain.

    A pruning step removes the entries that would land on the smallest magnitudes, until `sparsity`
    is reached, as `rmtjax.sparsity.magnitude_mask` does. Every step rewrites the update of a
    removed entry so that `optax.apply_updates` lands on zero exactly. No entry comes back.

    - Once, at step 1,000: `prune_entries(0.9, start=1000)`.
    - Gradually: a schedule, as `optax.polynomial_schedule(0.0, 0.9, power=3,
      transition_steps=5000)`, and `every=100`.

    After `rmtjax.prune_spectrum`, kernels are sparse and only nearly of low rank.

    Args:
      sparsity: Share of the entries of all chosen kernels together that are zero, in [0, 1); or an
        optax schedule of it, called with the number of steps before this one.
      every: Pruning period in steps, at least 1, as in `rmtjax.prune_spectrum`. A pruning step
        costs some sixty sums over the entries, or next to nothing if enough entries have gone.
      start: First pruning step; 0 stands for `every`.
      mask: Tree of booleans to begin with, from `rmtjax.sparsity`. Entries that it removes are zero
        from the first step on, and count. By default no entry is removed.
      weights: Path to the weight that divides the magnitudes of a kernel, or a function of the
        sparsity such as `functools.partial(rmtjax.sparsity.edge_weights, plan)`.
      where: Chooses the kernels, as in `rmtjax.plan`. By default biases are not pruned. `Factors`
        and leaves that are not floating are never pruned.

    Returns:
      A transformation with a `PruneEntriesState`. It takes any tree that optax takes, needs
      `params` in `update` and ignores extra arguments. It works inside `masked`, `partition`,
      `MultiSteps` and `inject_hyperparams` (callables as `static_args`). Inside `masked` and
      `partition` the sparsity is that of their share of the tree. Updates keep their dtype: if it
      has fewer bits than that of the parameters, zeros are exact after a few steps.

    Raises:
      ValueError: A number is out of range, `mask` or `weights` is for another tree, or `update` was
        called without `params` or with a kernel that `init` did not get.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"Dense_0": {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}}
      >>> optimizer = optax.chain(optax.adam(1e-3), rmtjax.prune_entries(0.9, start=2))
      >>> state = optimizer.init(params)
      >>> for _ in range(3):
      ...     updates, state = optimizer.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{(params['Dense_0']['kernel'] == 0).mean():.2f}")
      0.90

    References:
      Zhu and Gupta (2017), https://arxiv.org/abs/1710.01878, for the schedule. Without a mask
      removed entries grow again, as in https://arxiv.org/abs/2310.03165.
    """
    check_count("every", every)
    check_count("start", start, 0)
    if not callable(sparsity):
        check_sparsity(sparsity)

    def init_fn(params: PyTree) -> PruneEntriesState:
        step = jnp.zeros((), jnp.int32)
        if is_placeholder(params):
            return PruneEntriesState(step, masks=step)  # pyright: ignore[reportArgumentType]
        masks = pick_masks(mask, find_floating(params, where))
        # The user's mask must outlive a state that is donated to `jit`.
        return PruneEntriesState(step, jax.tree.map(jnp.copy, masks))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        find = lambda params: find_floating(params, where)
        kernels, chosen = moving_kernels(updates, params, find, state.masks)
        step = jnp.asarray(optax.safe_increment(state.step))
        share = sparsity(state.step) if callable(sparsity) else sparsity
        divisors = weights(share) if callable(weights) else weights
        divisors = None if divisors is None else pick("weights", divisors, kernels)
        masks = {path: state.masks[path] for path in kernels}
        due = is_due(step, every, start)
        chosen, masks = _prune_if(due, kernels, chosen, masks, divisors, share)
        updates = map_kernels(lambda path, _: chosen[path], updates, chosen)
        return updates, PruneEntriesState(step, {**state.masks, **masks})

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _numbers(state: PruneEntriesState) -> dict[str, dict[str, Array]]:
    """Returns the numbers that `metrics` has of this transform."""
    # In the state of an `nnx.Optimizer` the leaves are variables, which JAX takes for trees.
    share = lambda mask: 1 - jnp.mean(jnp.asarray(mask), dtype=jnp.float32)
    return {"sparsity": {path: share(mask) for path, mask in state.masks.items()}}


register_state(PruneEntriesState, _numbers)
