"""Pruning of entries in an optax chain: what is zero stays zero."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PyTree

from rmtjax._types import Where
from rmtjax.planning import map_kernels
from rmtjax.training._masks import check_sparsity, find_floating, pick, pick_masks, shrink
from rmtjax.training._schedule import check_count, is_due, NO_PARAMS

Sparsity = ArrayLike | Callable[[Any], ArrayLike]
Weights = Mapping[str, ArrayLike] | Callable[[Any], Mapping[str, ArrayLike]]


class PruneEntriesState(NamedTuple):
    """What `prune_entries` remembers, all arrays.

    Attributes:
      step: Number of updates seen.
      masks: Path to the booleans of that kernel, True where an entry stays.
    """

    step: Int[Array, ""]
    masks: dict[str, Bool[Array, "..."]]


# Compiled here, so that it is compiled once for those who call `update` outside `jit` too.
@jax.jit
def _prune(due, kernels, updates, masks, weights, sparsity):
    """Updates that land on zero where a mask says so, and the masks, shrunk if it is due."""

    def shrink_landed(masks):
        # What `optax.apply_updates` would land on.
        landed = {
            path: (kernels[path] + updates[path]).astype(kernels[path].dtype) for path in masks
        }
        return shrink(landed, masks, weights, sparsity)

    masks = jax.lax.cond(due, shrink_landed, lambda masks: masks, masks)
    # p + (0 - p) is exactly 0.
    zero = lambda path: (-kernels[path]).astype(updates[path].dtype)
    return {path: jnp.where(masks[path], updates[path], zero(path)) for path in masks}, masks


def prune_entries(
    sparsity: Sparsity = 0.0,
    every: Int[ArrayLike, ""] = 1,
    *,
    start: Int[ArrayLike, ""] = 0,
    mask: PyTree | None = None,
    weights: Weights | None = None,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Sets entries of kernels to zero and keeps them there: put it last in a chain.

    At a pruning step the entries of smallest magnitude, of where the updates land, are
    removed from the masks until `sparsity` is reached, as by
    `rmtjax.sparsity.magnitude_mask`. At every step the update of a removed entry is
    rewritten so that `optax.apply_updates` lands on zero exactly, whatever momentum or
    weight decay would do. Masks only shrink: no entry ever comes back.

    - Once, at step 1,000: `prune_entries(0.9, start=1000)`.
    - Gradually: a schedule, as `optax.polynomial_schedule(0.0, 0.9, power=3,
      transition_steps=5000)`, and `every=100`.
    - A mask made beforehand: `prune_entries(mask=mask)`.

    Put it after `rmtjax.prune_spectrum` if both are there: the kernels are sparse then,
    and only nearly of low rank. To freeze whole leaves there is `optax.freeze`.

    Args:
      sparsity: Share of the entries of all chosen kernels together that are zero, in
        [0, 1); or an optax schedule of it, called with the number of steps before this one.
      every: Pruning period in steps, at least 1, as in `rmtjax.prune_spectrum`. A pruning
        step costs some sixty sums over the entries where some are to go, and next to nothing
        where enough are gone.
      start: First pruning step; 0 stands for `every`.
      mask: Tree of booleans to begin with, from `rmtjax.sparsity`; what it removes is
        zero from the first step on, and counts. By default all entries are there.
      weights: Path to the weight that divides the magnitudes of a kernel, or a function of
        the sparsity that gives it:
        `functools.partial(rmtjax.sparsity.edge_weights, plan)`.
      where: `where(path, leaf)` chooses the kernels, as in `rmtjax.plan`. By default
        biases are not pruned; `Factors` and what is not floating never are.

    Returns:
      A transformation whose state is a `PruneEntriesState`. It needs `params` in `update`,
      ignores extra arguments, and works inside `masked`, `partition`, `MultiSteps` and
      `inject_hyperparams` (callables as `static_args`). Inside `masked` and `partition` the
      sparsity is that of their share of the tree. Updates keep their dtype: where it has
      fewer bits than the parameters', zeros are exact only after a few steps.

    Raises:
      ValueError: A number is out of range, `mask` or `weights` is for another tree, or
        `update` was called without `params`.
      TypeError: A number of steps is no integer.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"Dense_0": {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}}
      >>> optimizer = optax.chain(optax.adam(1e-3), rmtjax.prune_entries(0.9, start=2))
      >>> state = optimizer.init(params)
      >>> for _ in range(3):
      ...     updates, state = optimizer.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{(params['Dense_0']['kernel'] == 0).mean():.2f}")
      0.00
      0.90
      0.90

    References:
      Zhu and Gupta (2017), https://arxiv.org/abs/1710.01878, for the schedule. Berlyand,
      Sandier, Shmalo and Zhang (2023), https://arxiv.org/abs/2310.03165: there no mask is
      kept, and what was removed grows again.
    """
    check_count("every", every, 1)
    check_count("start", start, 0)
    if not callable(sparsity):
        check_sparsity(sparsity)

    def init_fn(params: PyTree) -> PruneEntriesState:
        masks = pick_masks(mask, find_floating(params, where))
        # The user's own mask must outlive a state that is donated to `jit`.
        return PruneEntriesState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, masks))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(NO_PARAMS)
        kernels = find_floating(params, where)
        chosen = {}  # without the kernels whose update is None: they do not move
        map_kernels(chosen.setdefault, updates, kernels)
        kernels = {path: kernels[path] for path in chosen}
        step = jnp.asarray(optax.safe_increment(state.step))
        due = is_due(step, every, start)
        share = sparsity(state.step) if callable(sparsity) else sparsity
        given = weights(share) if callable(weights) else weights
        given = given if given is None else pick("weights", given, kernels)
        masks = {path: state.masks[path] for path in chosen}
        chosen, masks = _prune(due, kernels, chosen, masks, given, share)
        updates = map_kernels(lambda path, _: chosen[path], updates, chosen)
        return updates, PruneEntriesState(step, {**state.masks, **masks})

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
