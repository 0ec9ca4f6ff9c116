"""Trains with a fixed number of entries: drops the smallest, grows others in their place."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from rmtjax._modes import in_usual_modes
from rmtjax._types import Axes, Where
from rmtjax.planning import (
    check_count,
    check_share,
    is_abstract,
    map_kernels,
    path_name,
    warn_if_idle,
)
from rmtjax.sparse._densities import (
    cell_gates,
    check_density,
    Density,
    find_densities,
    Group,
    random_keys,
    random_masks,
    to_groups,
)
from rmtjax.sparse._masks import (
    check_size,
    find_floating,
    Groups,
    Masks,
    order_keys,
    pick_masks,
    without_smallest,
)
from rmtjax.spectra import lift
from rmtjax.training import is_due, is_placeholder, moving_kernels, register_state


class SparseState(NamedTuple):
    """The masks of `drop_and_grow`, of arrays.

    Attributes:
      step: Number of updates seen.
      masks: Path to the booleans of that kernel, True for its entries that are not 0.
      moved: Path to the share of its entries that the last change of the mask has dropped.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> state = rmtjax.drop_and_grow(optax.sgd(0.1), every=10, density=0.5).init(params)
      >>> int(state.sparse.masks["kernel"].sum()), float(state.sparse.moved["kernel"])
      (2400, 0.0)
    """

    step: Int[Array, ""]
    masks: dict[str, Bool[Array, "..."]]
    moved: dict[str, Float[Array, ""]]


class DropAndGrowState(NamedTuple):
    """State of `drop_and_grow`.

    Attributes:
      sparse: The masks.
      inner_state: The state of the optimizer inside, zero where a mask is False.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> state = rmtjax.drop_and_grow(optax.adam(0.1), every=10, density=0.5).init(params)
      >>> optax.tree.get(state.inner_state, "mu")["kernel"].shape
      (80, 60)
    """

    sparse: SparseState
    inner_state: Any


def _sums(masks: Masks, groups: Groups) -> Int[Array, " g"]:
    """Returns the number of entries of each group."""
    count = jnp.stack([jnp.sum(mask, dtype=jnp.int32) for mask in masks.values()])
    index = np.array([groups[path] for path in masks])
    return jnp.zeros(max(groups.values()) + 1, jnp.int32).at[index].add(count)


def _exchange(landed, growth, masks: Masks, groups: Groups, share) -> tuple[Masks, Masks]:
    """Returns masks of what stays and of what grows, as many entries as have gone.

    Args:
      landed: Kernels after the step.
      growth: Keys by which entries grow, the largest first.
      masks: Entries before.
      groups: What shares a number of entries.
      share: Of the entries of each group, dropped.
    """
    alive = _sums(masks, groups)
    size = _sums(jax.tree.map(jnp.ones_like, masks), groups)
    wanted = jnp.round(jnp.asarray(share, jnp.float32) * alive).astype(jnp.int32)
    count = jnp.clip(wanted, 0, jnp.minimum(alive, size - alive))
    dtype = jnp.result_type(*map(lift, landed.values()))
    keys = {path: order_keys(landed[path], masks[path], 1.0, dtype) for path in masks}
    stays = without_smallest(keys, groups, size - alive + count)
    # What has just been dropped does not grow in the same step.
    growth = {path: jnp.where(masks[path], 0, growth[path]) for path in masks}
    return stays, without_smallest(growth, groups, size - count)


@partial(jax.jit, static_argnames=("groups", "grow"))
def _advance(due, kernels, moves, gradients, sparse: SparseState, share, key, *, groups, grow):
    """Returns updates that land on zero where the mask is False, and the new state."""
    groups, masks = dict(groups), sparse.masks

    def exchange():
        landed: Any = optax.apply_updates(kernels, moves)
        if grow == "random":
            growth = random_keys(kernels, key)
        else:
            dtype = jnp.result_type(*map(lift, gradients.values()))
            growth = {path: order_keys(g, True, 1.0, dtype) for path, g in gradients.items()}
        stays, grown = _exchange(landed, growth, masks, groups, share)
        dropped = lambda path: 1 - jnp.sum(stays[path]) / jnp.maximum(jnp.sum(masks[path]), 1)
        moved = {path: dropped(path).astype(jnp.float32) for path in masks}
        return stays, {path: stays[path] | grown[path] for path in masks}, moved

    stays, masks, moved = jax.lax.cond(due, exchange, lambda: (masks, masks, sparse.moved))
    # p + (0 - p) is exactly 0. What has just grown starts there.
    zero = lambda path: (-kernels[path]).astype(moves[path].dtype)
    moves = {path: jnp.where(stays[path], moves[path], zero(path)) for path in masks}
    return moves, stays, masks, moved


def _mask_moments(inner, inner_state: Any, params: PyTree, masks: Masks) -> Any:
    """Returns the state of an optimizer, zero where a mask is False."""
    find = lambda key, leaf: masks.get(path_name(key), np.True_)
    tree = jax.tree_util.tree_map_with_path(find, params)

    def visit(leaf, mask):
        # Factored second moments have another shape than their kernel.
        fits = isinstance(mask, jax.Array) and getattr(leaf, "shape", None) == mask.shape
        return jnp.where(mask, leaf, jnp.zeros_like(leaf)) if fits else leaf

    left_out = lambda node: isinstance(node, optax.MaskedNode)  # by `optax.masked` inside
    return optax.tree.map_params(inner, visit, inner_state, tree, is_leaf=left_out)


def drop_and_grow(
    inner: optax.GradientTransformation,
    every: Int[ArrayLike, ""],
    *,
    density: Density = 0.1,
    drop: ArrayLike | Callable[[Any], ArrayLike] = 0.3,
    grow: str = "random",
    start: Int[ArrayLike, ""] = 0,
    mask: PyTree | None = None,
    distribution: str = "erdos_renyi_kernel",
    group: Group = cell_gates,
    seed: int = 0,
    where: Where | None = None,
    axes: Axes | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains sparse kernels whose number of entries is fixed and whose places move.

    Every `every` steps each kernel drops its entries of smallest magnitude and grows as many
    others, at random (SET) or where the gradient is largest (RigL). New entries start at zero. The
    number of entries of a kernel, or of the gates of a recurrent cell together, is the same after
    each step.

    It wraps an optimizer: it hands it gradients that are zero where the mask is False, sets the
    moments of dropped entries to zero, and rewrites updates so that `optax.apply_updates` lands on
    zero exactly. Under Adam the first step of a new entry is about three learning rates long, since
    its second moment starts at zero.

    The first gradient should be that of the masked network. So either multiply `params` by a
    `rmtjax.sparsity.random_mask` that is given as `mask` too, or let the first step do it.

    Args:
      inner: An optimizer such as `optax.adam(1e-3)`, or a chain.
      every: Steps between changes of the mask, at least 1.
      density: Share of all entries of the chosen kernels that are not 0, in (0, 1]; or path to the
        density of each kernel. Without effect if `mask` is given.
      drop: Share of the entries of a kernel that is exchanged, in [0, 1]; or an optax schedule of
        it, called with the number of steps before this one, such as
        `optax.cosine_decay_schedule(0.3, 7500)`.
      grow: "random" or "gradient". For "gradient" the gradients must be dense, as JAX's are.
      start: First step that changes the mask; 0 stands for `every`.
      mask: Tree of booleans to begin with; by default `rmtjax.sparsity.random_mask`.
      distribution, axes: As in `rmtjax.sparsity.layer_densities`.
      group: Path to a name. Kernels with one name have one number of entries together, by default
        the gates of a recurrent cell.
      seed: Of the random numbers, of the first mask and of growth.
      where: Chooses the kernels, as in `rmtjax.plan`. `Factors` and leaves that are not floating
        are never masked.

    Returns:
      A transformation with a `DropAndGrowState`. It takes any tree that optax takes, needs `params`
      in `update` and passes extra arguments on. It works inside `masked`, `partition`, `MultiSteps`
      and `inject_hyperparams` (with `inner`, callables and strings as `static_args`).

    Warns:
      UserWarning: `init` finds no kernel that can be masked.

    Raises:
      ValueError, TypeError: An argument is not as described, `mask` is for another tree, or
        `update` was called without `params` or with a kernel that `init` did not get.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> drop = optax.cosine_decay_schedule(0.3, 100)
      >>> optimizer = rmtjax.drop_and_grow(optax.adam(1e-3), every=10, density=0.2, drop=drop)
      >>> state = optimizer.init(params)
      >>> for _ in range(30):
      ...     updates, state = optimizer.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int(state.sparse.masks["kernel"].sum()), 80 * 60 // 5
      (960, 960)

    References:
      Liu, Mocanu, Pei and Pechenizkiy (2021), https://arxiv.org/abs/2101.09048, for recurrent
      cells. Mocanu et al. (2018), https://arxiv.org/abs/1707.04780 (SET). Evci, Gale, Menick,
      Castro and Elsen (2020), https://arxiv.org/abs/1911.11134 (RigL).
    """
    check_count("every", every)
    check_count("start", start, 0)
    check_density(density)
    if not callable(drop):
        check_share("drop", drop, "the entries of a kernel that are exchanged")
    if grow not in ("random", "gradient"):
        raise ValueError(f'`grow` must be "random" or "gradient", got {grow!r}.')
    inner = optax.with_extra_args_support(inner)
    find = lambda params: find_floating(params, where)

    def first_masks(params: PyTree) -> Masks:
        kernels = find(params)
        warn_if_idle("drop_and_grow", kernels, params, where)
        if mask is not None:
            # The user's mask must outlive a state that is donated to `jit`.
            return jax.tree.map(jnp.copy, pick_masks(mask, kernels))
        check_size(kernels)
        options: Any = {"distribution": distribution, "group": group, "where": where, "axes": axes}
        densities = find_densities(params, density, kernels, **options)
        key = jax.random.fold_in(jax.random.key(seed), 0)
        return random_masks(kernels, densities, to_groups(kernels, group), key)

    # The optimizer inside runs in the modes of its caller.
    @in_usual_modes
    def first_state(params: PyTree) -> SparseState:
        step = jnp.zeros((), jnp.int32)
        if is_placeholder(params):
            return SparseState(step, step, step)  # pyright: ignore[reportArgumentType]
        masks = first_masks(params)
        moved = {path: jnp.zeros((), jnp.float32) for path in masks}
        return SparseState(step, masks, moved)

    def init_fn(params: PyTree) -> DropAndGrowState:
        if is_abstract(params):
            return jax.eval_shape(init_fn, params)
        return DropAndGrowState(first_state(params), inner.init(params))

    @in_usual_modes
    def hide(updates, params, masks: Masks):
        """Returns the kernels that have an update, their gradients, and masked updates."""
        kernels, gradients = moving_kernels(updates, params, find, masks)
        zero = lambda path, g: jnp.where(masks[path], g, jnp.zeros_like(g))
        return kernels, gradients, map_kernels(zero, updates, gradients)

    @in_usual_modes
    def exchange(moves, inner_state, params, sparse: SparseState, kernels, gradients):
        """Returns updates that land on zero where a mask is False, and the new state."""
        step = jnp.asarray(optax.safe_increment(sparse.step))
        if not kernels:
            return moves, DropAndGrowState(sparse._replace(step=step), inner_state)
        _, chosen = moving_kernels(moves, params, find, sparse.masks)
        groups = to_groups(kernels, group)
        # Kernels without an update rest.
        part = lambda field: {path: field[path] for path in kernels}
        old = SparseState(step, part(sparse.masks), part(sparse.moved))
        chosen, stays, masks, moved = _advance(
            is_due(step, every, start),
            kernels,
            chosen,
            gradients,
            old,
            drop(sparse.step) if callable(drop) else drop,
            jax.random.fold_in(jax.random.key(seed), step),
            groups=tuple(groups.items()),
            grow=grow,
        )
        moves = map_kernels(lambda path, _: chosen[path], moves, chosen)
        inner_state = _mask_moments(inner, inner_state, params, stays)
        sparse = SparseState(step, {**sparse.masks, **masks}, {**sparse.moved, **moved})
        return moves, DropAndGrowState(sparse, inner_state)

    def update_fn(updates, state, params: Any = None, **extra_args):
        kernels, gradients, thin = hide(updates, params, state.sparse.masks)
        moves, inner_state = inner.update(thin, state.inner_state, params, **extra_args)
        return exchange(moves, inner_state, params, state.sparse, kernels, gradients)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _numbers(state: SparseState) -> dict[str, dict[str, Array]]:
    """Returns the numbers that `metrics` has of this transform."""
    # In the state of an `nnx.Optimizer` the leaves are variables, which JAX takes for trees.
    share = lambda mask: jnp.mean(jnp.asarray(mask), dtype=jnp.float32)
    density = {path: share(mask) for path, mask in state.masks.items()}
    return {"density": density, "moved": dict(state.moved)}


register_state(SparseState, _numbers)
