"""Prunes entries in an optax chain, and restores a part of them if that is asked for."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PyTree

from rmtjax._modes import in_usual_modes
from rmtjax._types import Axes, Where
from rmtjax.planning import (
    check_count,
    check_share,
    is_abstract,
    map_kernels,
    warn_if_idle,
)
from rmtjax.sparse._masks import (
    check_pattern,
    check_size,
    check_sparsity,
    check_weights,
    find_floating,
    Pattern,
    pick,
    pick_masks,
)
from rmtjax.sparse._rounds import advance, Chooser, Round, RoundNumbers
from rmtjax.sparse.patterns import find_grouped
from rmtjax.training import is_due, is_placeholder, moving_kernels, register_state

Sparsity = ArrayLike | Callable[[Any], ArrayLike]
Budget = Mapping[str, ArrayLike] | Callable[[Any], Mapping[str, ArrayLike]]


class PruneEntriesState(NamedTuple):
    """State of `prune_entries`, of arrays.

    Attributes:
      step: Number of updates seen.
      masks: Path to the booleans of that kernel, True where an entry stays.
      selecting: Steps of the selection of a round that are left; 0 outside it.
      goal: Number of entries that the last round removes in the end.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> state = rmtjax.prune_entries(0.9, start=2).init({"kernel": jnp.ones((80, 60))})
      >>> int(state.step), int(state.masks["kernel"].sum())
      (0, 4800)
    """

    step: Int[Array, ""]
    masks: dict[str, Bool[Array, "..."]]
    selecting: Int[Array, ""]
    goal: Int[Array, ""]


def _check_rounds(sparsity: Any, restore: Any, select: Any, pattern: Any, budget: Any) -> None:
    """Raises ValueError for options of rounds that contradict one another."""
    check_share(
        "restore", restore, "all entries that a round removes and puts back", below_one=True
    )
    check_count("select", select, 0)
    known = not any(isinstance(value, jax.Array) for value in (restore, select))
    if known and (restore > 0) != (select > 0):
        raise ValueError(
            f"`restore` and `select` must both be above 0 or both 0, got {restore} and {select}: "
            "removed entries train for `select` steps, and the share `restore` comes back."
        )
    if pattern is None:
        return
    check_pattern(pattern)
    if budget is not None:
        raise ValueError(
            "`budget` must be None with `pattern`: all groups lose as many entries, whatever their "
            "layer."
        )
    most = 1 - pattern[0] / pattern[1]
    fixed = isinstance(sparsity, int | float)
    if fixed and sparsity > most + 1e-6:
        raise ValueError(
            f"`sparsity` must be at most {most:g} with the pattern {pattern}, got {sparsity}."
        )


def prune_entries(
    sparsity: Sparsity | None = None,
    *,
    every: Int[ArrayLike, ""] = 1,
    start: Int[ArrayLike, ""] = 0,
    mask: PyTree | None = None,
    budget: Budget | None = None,
    restore: ArrayLike = 0.0,
    select: Int[ArrayLike, ""] = 0,
    magnitude_until: ArrayLike = 0.0,
    pattern: Pattern | None = None,
    where: Where | None = None,
    axes: Axes | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sets entries of kernels to zero and keeps them there. Put it last in a chain.

    A pruning step removes the entries that would land on the smallest magnitudes, until `sparsity`
    is reached, as `rmtjax.sparsity.magnitude_mask` does. Every step rewrites the update of a
    removed entry so that `optax.apply_updates` lands on zero exactly. Without `restore` no entry
    comes back.

    - Once, at step 1,000: `prune_entries(0.9, start=1000)`.
    - Gradually: a schedule, as `optax.polynomial_schedule(0.0, 0.9, power=3,
      transition_steps=5000)`, and `every=100`.
    - With the layer budget of the Marchenko-Pastur edge:
      `budget=functools.partial(rmtjax.sparsity.edge_weights, plan)`.
    - By spectral edge reallocation: that budget, and `restore=0.03, select=200`.
    - By N:M: `prune_entries(pattern=(2, 4), start=1000)`.

    With `restore` a pruning step removes that share of all entries beyond its target. For `select`
    steps the removed entries, which start at zero, train alone: what was kept rests, and so do all
    other parameters. Then those of largest $|w| / b$ come back, with the budget b of their kernel,
    until the sparsity is the target. From there on the mask is fixed until the next round. A round
    takes place only if its target is above the sparsity reached.

    The paper ranks what comes back by $|w| \rho$, and says of $\rho$ both that it is b and that
    kernels with a larger edge get less back. This is the second: the order in which entries go.

    After `rmtjax.prune_spectrum`, kernels are sparse and only nearly of low rank.

    Args:
      sparsity: Share of the entries of all chosen kernels together that are zero, in [0, 1); or an
        optax schedule of it, called with the number of steps before this one. By default 0, or
        1 - N / M with a pattern.
      every: Pruning period in steps, at least 1, as in `rmtjax.prune_spectrum`. A pruning step
        costs some sixty sums over the entries, or next to nothing if enough entries have gone.
      start: First pruning step; 0 stands for `every`.
      mask: Tree of booleans to begin with, from `rmtjax.sparsity`. Entries that it removes are zero
        from the first step on, and count. By default no entry is removed.
      budget: Path to the number b that divides the magnitudes of a kernel, or a function of the
        sparsity such as `functools.partial(rmtjax.sparsity.edge_weights, plan)`. A larger b removes
        more of a kernel. By default 1.
      restore: Share of all entries that a round removes beyond its target and puts back, in [0, 1);
        the paper has 0.03. With a pattern it is rounded to at least one entry of each group.
      select: Steps for which removed entries train alone. Moments of the optimizer go on in them.
        Pruning steps that fall into them are left out.
      magnitude_until: Up to this sparsity rounds go by magnitude alone, without budget and without
        restoration; the paper has 0.2.
      pattern: (N, M): of M consecutive inputs of an output N entries stay, as in
        `rmtjax.patterns.nm_mask`. A schedule of the sparsity then removes as many entries of each
        group, rounded to the nearest.
      where: Chooses the kernels, as in `rmtjax.plan`. By default biases are not pruned. `Factors`
        and leaves that are not floating are never pruned.
      axes: As in `rmtjax.plan`. Only a pattern needs to know the inputs.

    Returns:
      A transformation with a `PruneEntriesState`. It takes any tree that optax takes, needs
      `params` in `update` and ignores extra arguments. It works inside `masked`, `partition`,
      `MultiSteps` and `inject_hyperparams` (callables and `pattern` as `static_args`). Inside
      `masked` and `partition` the sparsity is that of their share of the tree. Updates keep their
      dtype: if it has fewer bits than that of the parameters, zeros are exact after a few steps.

    Warns:
      UserWarning: `init` finds no kernel that can be pruned.

    Raises:
      ValueError: A number is out of range, `mask` or `budget` is for another tree, or `update` was
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
      removed entries grow again, as in https://arxiv.org/abs/2310.03165. Berlyand, Bourdais, Owhadi
      and Shmalo (2026), https://arxiv.org/abs/2606.02608, for budget and restoration.
    """
    check_count("every", every)
    check_count("start", start, 0)
    _check_rounds(sparsity, restore, select, pattern, budget)
    if sparsity is None:
        sparsity = 0.0 if pattern is None else 1 - pattern[0] / pattern[1]
    if not callable(sparsity):
        check_sparsity(sparsity)
    check_share("magnitude_until", magnitude_until, "the entries that go by magnitude alone")
    restores = isinstance(restore, jax.Array) or bool(np.asarray(restore) > 0)
    find = lambda params: find_floating(params, where)

    def choose(params: PyTree, kernels: Mapping[str, Any]) -> Chooser:
        """Returns what competes, which the shapes of the kernels decide."""
        if pattern is None:
            return Chooser()
        found = find_grouped(params, pattern, where, axes)
        return Chooser(pattern, tuple((path, found[path]) for path in sorted(kernels)))

    @in_usual_modes
    def init_fn(params: PyTree) -> PruneEntriesState:
        if is_abstract(params):
            return jax.eval_shape(init_fn, params)
        # One array each: a buffer that appears twice in a state cannot be donated to `jit`.
        step, selecting, goal = (jnp.zeros((), jnp.int32) for _ in range(3))
        if is_placeholder(params):
            return PruneEntriesState(step, step, selecting, goal)  # pyright: ignore[reportArgumentType]
        kernels = find(params)
        warn_if_idle("prune_entries", kernels, params, where)
        masks = pick_masks(mask, kernels)
        check_size(masks)
        choose(params, masks)
        # The user's mask must outlive a state that is donated to `jit`.
        return PruneEntriesState(step, jax.tree.map(jnp.copy, masks), selecting, goal)

    @in_usual_modes
    def update_fn(updates, state, params: Any = None, **extra_args):
        del extra_args
        kernels, chosen = moving_kernels(updates, params, find, state.masks)
        step = jnp.asarray(optax.safe_increment(state.step))
        share = sparsity(state.step) if callable(sparsity) else sparsity
        divisors = budget(share) if callable(budget) else budget
        divisors = dict.fromkeys(kernels, 1.0) if divisors is None else divisors
        check_weights("budget", divisors)
        before = Round({path: state.masks[path] for path in kernels}, *state[2:])
        if kernels:
            chosen, after = advance(
                is_due(step, every, start),
                kernels,
                chosen,
                before,
                pick("budget", divisors, kernels),
                RoundNumbers(share, restore, select, magnitude_until),
                chooser=choose(params, kernels),
                restores=restores,
            )
        else:
            after = before
        if restores:  # other parameters rest in a selection
            rests = jnp.asarray(before.selecting) > 0
            updates = jax.tree.map(lambda u: jnp.where(rests, jnp.zeros_like(u), u), updates)
        updates = map_kernels(lambda path, _: chosen[path], updates, chosen)
        masks = {**state.masks, **after.masks}
        return updates, PruneEntriesState(step, masks, after.selecting, after.goal)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _numbers(state: PruneEntriesState) -> dict[str, dict[str, Array]]:
    """Returns the numbers that `metrics` has of this transform."""
    # In the state of an `nnx.Optimizer` the leaves are variables, which JAX takes for trees.
    share = lambda mask: 1 - jnp.mean(jnp.asarray(mask), dtype=jnp.float32)
    return {"sparsity": {path: share(mask) for path, mask in state.masks.items()}}


register_state(PruneEntriesState, _numbers)
