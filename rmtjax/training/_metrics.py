"""Reads the states of transforms in the state of an optimizer: metrics and noise levels."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Num, PyTree

from rmtjax._modes import in_usual_modes
from rmtjax._sharding import by_compiler, fetch
from rmtjax._types import BulkFit
from rmtjax.spectra import times_power
from rmtjax.training._prune_state import PruneState

# What a state says on its kernels: the kind of a number, and for each path its values.
Numbers = Mapping[str, Mapping[str, Any]]


def _true_threshold(threshold: Any, exponent: Any) -> Array:
    """Returns a threshold on the scale of its kernel, or the nearest one that its dtype has."""
    threshold, power = jnp.asarray(threshold), 2 * jnp.asarray(exponent)
    limits = jnp.finfo(threshold.dtype)
    moved = jnp.clip(times_power(threshold, power), limits.tiny, limits.max)
    return jnp.where(threshold > 0, moved, 0)


def on_true_scale(fits: Mapping[str, BulkFit], exponents: Mapping[str, Any]) -> dict[str, BulkFit]:
    """Returns noise levels of a state on the scale of their kernels.

    Outside `jit` those that could leave float32 are NumPy arrays of float64.
    """

    def move(fit: BulkFit, exponent: Any) -> BulkFit:
        exponent, fit = jnp.asarray(exponent), BulkFit(*map(jnp.asarray, fit))
        if isinstance(exponent, Tracer):
            along = lambda number: times_power(number, 2 * exponent)
        elif fetch(exponent).any():
            fit, power = jax.tree.map(np.asarray, fetch((fit, 2 * exponent)))
            along = lambda number: np.ldexp(number.astype(np.float64), power)
        else:
            return fit
        moved = map(along, fit[:3])
        return BulkFit(*moved, distance=fit.distance, num_spikes=fit.num_spikes)

    return {path: move(fit, exponents[path]) for path, fit in fits.items()}


def _numbers_of_pruning(state: PruneState) -> Numbers:
    """Returns the numbers that `metrics` has of `prune_spectrum`."""
    thresholds = {
        path: _true_threshold(fit.threshold, state.exponents[path])
        for path, fit in state.fits.items()
    }
    return {
        "rank": state.ranks,
        "signal": state.signal,
        "threshold": thresholds,
        "distance": {path: fit.distance for path, fit in state.fits.items()},
        "removed": state.removed,
        "refused": state.refused,
        "taken": state.taken,
        "cost": state.costs,
        "landed": state.landed,
        "reason": state.reasons,
    }


def _levels_of_pruning(state: PruneState) -> dict[str, BulkFit]:
    """Returns the noise levels that `prune_spectrum` carries."""

    def floored(fit: BulkFit, floor: Array, reason: Array) -> BulkFit:
        # What a refused cut has left must not be cut by a plan. By an edge below 0 it knows that
        # this is no threshold of the noise.
        where = lambda least, own: jnp.where(floor == 0, own, least)
        fit = fit._replace(edge=where(-1, fit.edge), threshold=where(floor, fit.threshold))
        return fit._replace(num_spikes=jnp.where(floor < 0, reason, fit.num_spikes))

    def level(path: str, fit: BulkFit) -> BulkFit:
        # In the state of an `nnx.Optimizer` the leaves are variables, which JAX takes for trees.
        fit, floor = BulkFit(*map(jnp.asarray, fit)), jnp.asarray(state.floors[path])
        return by_compiler(floored, fit, floor, jnp.asarray(state.reasons[path]))

    return on_true_scale({p: level(p, fit) for p, fit in state.fits.items()}, state.exponents)


# States that name their kernels by paths, with what reads them.
STATES: dict[type, Callable[[Any], Numbers]] = {PruneState: _numbers_of_pruning}
_LEVELS: dict[type, Callable[[Any], Mapping[str, BulkFit]]] = {PruneState: _levels_of_pruning}


def register_state(
    kind: type,
    numbers: Callable[[Any], Numbers],
    levels: Callable[[Any], Mapping[str, BulkFit]] | None = None,
) -> None:
    """Registers a state with fields by path: `metrics` reads it, factors do not change it.

    With `levels`, `noise_levels` reads it too. This room does not import rooms of other transforms,
    so these register their states.
    """
    STATES[kind] = numbers
    if levels is not None:
        _LEVELS[kind] = levels


def _find_states(opt_state: PyTree, kinds: tuple[type, ...], name: str) -> list[Any]:
    """Returns the states of some kinds, at any depth."""
    is_state = lambda node: isinstance(node, kinds)
    states = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(leaf)]
    if not states:
        raise ValueError(
            f"`opt_state` has no state of {name}. Give the state of the whole "
            "chain, as `optimizer.init` or `optimizer.update` returned it; of an `nnx.Optimizer` "
            "it is `optimizer.opt_state`."
        )
    return states


def _add(known: dict[str, Any], path: str, new: Mapping[str, Any]) -> None:
    """Adds what a state has of a kernel, once."""
    if not known.keys().isdisjoint(new):
        raise ValueError(
            f"`opt_state` has two states for {path!r}, as of two networks. Give one of "
            "them at a time, and put a prefix before its names."
        )
    known.update(new)


def _numbers(name: str, values: Any) -> dict[str, Array]:
    """Returns the numbers of an array by name and index; a scalar by the bare name."""
    # In the state of an `nnx.Optimizer` the leaves are variables, which JAX takes for trees.
    array = jnp.asarray(values)
    if not array.ndim:
        return {name: array}
    return {"/".join((name, *map(str, i))): array[i] for i in np.ndindex(array.shape)}


@in_usual_modes
def metrics(opt_state: PyTree) -> dict[str, Num[Array, ""]]:
    """Returns numbers on each kernel under a transform of this package, for a log.

    Of `rmtjax.prune_spectrum`:

    - `rank/PATH`: the rank after the last pruning, full before;
    - `signal/PATH`: directions that stood out of the noise at the last pruning step, whether the
      kernel was pruned then or not; 0 before;
    - `threshold/PATH`: the cut for a spike, on the scale of the eigenvalues $s^2 / n$, of the fit
      that is carried; 0 before the first cut;
    - `distance/PATH`: Kolmogorov distance between the bulk and the law of that fit; 1 before;
    - `removed/PATH`: the share of the sum of squares that the last pruning step has removed;
    - `refused/PATH`: the share beyond the rank that it has left, as it fades or had to stay;
    - `taken/PATH`: the share that all cuts together have taken, but for what training has added
      beyond the rank since the last one;
    - `cost/PATH`: what its cut was predicted to add to the loss; exactly 0 if that was not
      measured, as without `value_fn`;
    - `landed/PATH`: False if the last cut is not in the parameters, as after a wrapper that mixes
      updates: it is then forgotten. Always True on a mesh with explicit axes;
    - `reason/PATH`: why the last pruning step left it alone. 1: its fit was refused. 2: nothing
      stood out of the noise. 3: its number of signal directions had not settled. 4: the cut would
      take more than `max_removed`. 5: the network still learns fast. 6: the loss would rise. 7: it
      was cut before and waits for its next turn. 0: none of these, or no step has come.

    Each matrix of a stack has a threshold and a distance; its index ends the name.

    Of `rmtjax.agree`:

    - `kept/PATH`: the share of the squares of the change of a period that the last merge has kept;
    - `effective_rank/PATH`: the effective rank of the change that it has kept. Before the first
      merge, and if a change passed unmerged, they are 1 and 0.

    Of `rmtjax.prune_entries`:

    - `sparsity/PATH`: the share of the entries that are set to zero.

    Of `rmtjax.lowrank.shrink_tail`:

    - `cut/PATH`: the directions that the last shrinking step has left alone, all before;
    - `shrunk/PATH`: the share of the sum of squares that it has removed.

    Of `rmtjax.drop_and_grow`:

    - `density/PATH`: the share of the entries that are not zero;
    - `moved/PATH`: the share of these that the last change of the mask has dropped.

    Of `rmtjax.admm`, 1 before the first projection:

    - `primal/PATH`: the distance of the kernel from its projection, over its norm;
    - `dual/PATH`: by how much the projection has moved since the last one, over its norm.

    Of `rmtjax.monitor`, 0 before the first look: `monitor/COLUMN/PATH` for each column, and
    `monitor/left_law/PATH`, `monitor/traps/PATH` and `monitor/growing/PATH`.

    Args:
      opt_state: From `optimizer.init` or `optimizer.update`, with one state or several, at any
        depth in `chain`, `masked`, `partition`, `MultiSteps` or `inject_hyperparams`.

    Returns:
      Arrays without axes by name, on the device. `jax.device_get` fetches all. Works under `jit`.

    Raises:
      ValueError: `opt_state` has no such state, or two of one kind with the same path.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"Dense_0": {"kernel": 2 + jax.random.normal(jax.random.key(1), (80, 60))}}
      >>> optimizer = optax.chain(optax.sgd(0.0), rmtjax.prune_spectrum(every=1))
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> numbers = rmtjax.metrics(state)
      >>> print(numbers["rank/Dense_0/kernel"], f"{numbers['removed/Dense_0/kernel']:.2f}")
      1 0.20
    """
    found = _find_states(opt_state, tuple(STATES), "`rmtjax.prune_spectrum` or another transform")
    by_path: dict[str, dict[str, Array]] = {}
    for state in found:
        for kind, values in STATES[type(state)](state).items():
            for path, value in values.items():
                known = by_path.setdefault(path, {})
                _add(known, path, _numbers(f"{kind}/{path}", value))
    return {name: number for numbers in by_path.values() for name, number in numbers.items()}


def _warn_if_lost(landed: Mapping[str, Any]) -> None:
    """Warns of cuts that another transform has undone."""
    # As arrays: a state of nnx holds variables, which may hold tracers.
    arrays = {path: jnp.asarray(there) for path, there in landed.items()}
    known = {path: there for path, there in arrays.items() if not isinstance(there, Tracer)}
    lost = [path for path, there in fetch(known).items() if not np.all(there)]
    if lost:
        warnings.warn(
            f"the last cut of {lost[0]!r} is not in the parameters ({len(lost)} such kernels). Put "
            "`prune_spectrum` last in `optax.chain`, outside wrappers that rescale or average.",
            stacklevel=4,  # the caller of `noise_levels`, which runs in usual modes
        )


@in_usual_modes
def noise_levels(opt_state: PyTree) -> dict[str, BulkFit]:
    """Returns the noise level that a transform carries for each kernel.

    Those of `rmtjax.prune_spectrum` and `rmtjax.lowrank.shrink_tail`. `rmtjax.plan` takes them as
    `fits`. A kernel that was pruned must not be fitted again: its truncated spectrum would seem to
    have little noise and many spikes.

    Args:
      opt_state: As in `metrics`, with the same errors; it needs a state of one of the two.

    Returns:
      Path to `BulkFit`; of a stack with an entry for each matrix. Before the first cut it is 0 at a
      distance of 1, and a `plan` fits anew. If a cut was held back or made smaller, the edge is -1
      and the threshold is a floor, below the directions that had to stay: no rule of a `plan` goes
      further. At -1 it keeps the kernel, and `num_spikes` is the reason of `metrics`, which the row
      of the plan tells.

    Warns:
      UserWarning: A cut of `prune_spectrum` is not in the parameters.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"kernel": 2.0 + jax.random.normal(jax.random.key(1), (80, 60))}
      >>> optimizer = rmtjax.prune_spectrum(every=1)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(rmtjax.plan(params, fits=rmtjax.noise_levels(state), multiple=1))
      kernel  factorized: 1 of 60 are signal, rank 1
    """
    levels: dict[str, BulkFit] = {}
    names = "`rmtjax.prune_spectrum` or `rmtjax.lowrank.shrink_tail`"
    for state in _find_states(opt_state, tuple(_LEVELS), names):
        for path, fit in _LEVELS[type(state)](state).items():
            _add(levels, path, {path: fit})
        _warn_if_lost(getattr(state, "landed", {}))
    return levels
