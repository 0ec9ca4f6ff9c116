"""Reads the states of `prune_spectrum` in the state of an optimizer: metrics and noise levels."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num, PyTree

from rmtjax._sharding import by_compiler
from rmtjax._types import BulkFit
from rmtjax.training._prune_spectrum import PruneState


def _state_of_each_kernel(opt_state: PyTree) -> dict[str, PruneState]:
    """Returns the state of `prune_spectrum` that has each kernel, at any depth."""
    is_state = lambda node: isinstance(node, PruneState)
    states = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(leaf)]
    if not states:
        raise ValueError(
            "`opt_state` has no state of `rmtjax.prune_spectrum`. Give the state of the whole "
            "chain, as `optimizer.init` or `optimizer.update` returned it; of an `nnx.Optimizer` "
            "it is `optimizer.opt_state`."
        )
    by_kernel: dict[str, PruneState] = {}
    for state in states:
        for path in state.ranks:
            if path in by_kernel:
                raise ValueError(
                    f"`opt_state` has two states for {path!r}, as of two networks. Give one of "
                    "them at a time, and put a prefix before its names."
                )
            by_kernel[path] = state
    return by_kernel


def _numbers(name: str, array: Array) -> dict[str, Array]:
    """Returns the numbers of an array by name and index; a scalar by the bare name."""
    if not array.ndim:
        return {name: array}
    return {"/".join((name, *map(str, i))): array[i] for i in np.ndindex(array.shape)}


def metrics(opt_state: PyTree) -> dict[str, Num[Array, ""]]:
    """Returns numbers on each kernel under `rmtjax.prune_spectrum`, for a log.

    - `rank/PATH`: the rank after the last pruning, full before;
    - `signal/PATH`: directions that stood out of the noise at the last pruning step, whether the
      kernel was pruned then or not; 0 before;
    - `threshold/PATH`: the cut for a spike, on the scale of the eigenvalues $s^2 / n$, of the fit
      that is carried; NaN before the first cut;
    - `distance/PATH`: Kolmogorov distance between the bulk and the law of that fit;
    - `removed/PATH`: the share of the sum of squares that the last pruning step has removed;
    - `refused/PATH`: the share that it would have removed, if it had been allowed to;
    - `cost/PATH`: what its cut was predicted to add to the loss; NaN without `value_fn`;
    - `landed/PATH`: False if the last cut is not in the parameters, as after a wrapper that mixes
      updates: it is then forgotten. Always True on a mesh with explicit axes.

    Each matrix of a stack has a threshold and a distance; its index ends the name.

    Args:
      opt_state: From `optimizer.init` or `optimizer.update`, with one `PruneState` or several, at
        any depth in `chain`, `masked`, `partition`, `MultiSteps` or `inject_hyperparams`.

    Returns:
      Arrays without axes by name, on the device. `jax.device_get` fetches all. Works under `jit`.

    Raises:
      ValueError: `opt_state` has no `PruneState`, or two with the same path.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"Dense_0": {"kernel": 1 + jax.random.normal(jax.random.key(1), (80, 60))}}
      >>> optimizer = optax.chain(optax.sgd(0.0), rmtjax.prune_spectrum(every=1))
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> numbers = rmtjax.metrics(state)
      >>> print(numbers["rank/Dense_0/kernel"], f"{numbers['removed/Dense_0/kernel']:.2f}")
      1 0.49
    """
    numbers = {}
    for path, state in _state_of_each_kernel(opt_state).items():
        numbers[f"rank/{path}"] = jnp.asarray(state.ranks[path])
        numbers[f"signal/{path}"] = jnp.asarray(state.signal[path])
        numbers |= _numbers(f"threshold/{path}", jnp.asarray(state.fits[path].threshold))
        numbers |= _numbers(f"distance/{path}", jnp.asarray(state.fits[path].distance))
        numbers[f"removed/{path}"] = jnp.asarray(state.removed[path])
        numbers[f"refused/{path}"] = jnp.asarray(state.refused[path])
        numbers[f"cost/{path}"] = jnp.asarray(state.costs[path])
        numbers[f"landed/{path}"] = jnp.asarray(state.landed[path])
    return numbers


def noise_levels(opt_state: PyTree) -> dict[str, BulkFit]:
    """Returns the noise level that `rmtjax.prune_spectrum` carries for each kernel.

    `rmtjax.plan` takes it as `fits`. A kernel that was pruned must not be fitted again: its
    truncated spectrum would seem to have little noise and many spikes.

    Args:
      opt_state: As in `metrics`, with the same errors.

    Returns:
      Path to `BulkFit`, NaN before the first cut; of a stack with an entry for each matrix. If a
      cut was held back or made smaller, the threshold is below the directions that had to stay,
      and -1 if all had to: `plan` then keeps the kernel.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"kernel": 1.0 + jax.random.normal(jax.random.key(1), (80, 60))}
      >>> optimizer = rmtjax.prune_spectrum(every=1)
      >>> updates, state = optimizer.update(params, optimizer.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(rmtjax.plan(params, fits=rmtjax.noise_levels(state), multiple=1))
      kernel  factorized: 1 of 60 are signal, rank 1
    """

    def level(path: str, state: PruneState) -> BulkFit:
        # In the state of an `nnx.Optimizer` the leaves are variables, which JAX takes for trees.
        fit, floor = BulkFit(*map(jnp.asarray, state.fits[path])), jnp.asarray(state.floors[path])
        # What a refused cut has left must not be cut by a plan.
        return fit._replace(threshold=by_compiler(jnp.fmin, fit.threshold, floor))

    return {path: level(path, state) for path, state in _state_of_each_kernel(opt_state).items()}
