"""What pruning has found so far, as numbers for a log."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num, PyTree

from rmtjax.training._prune_spectrum import PruneState


def _find_states(opt_state: PyTree) -> list:
    """The states of `prune_spectrum`, however deep."""
    is_state = lambda node: isinstance(node, PruneState)
    states = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(leaf)]
    if not states:
        raise ValueError(
            "`opt_state` has no state of `rmtjax.prune_spectrum`. Give the state of the whole "
            "chain, as `optimizer.init` or `optimizer.update` returned it; of an `nnx.Optimizer` "
            "it is `optimizer.opt_state`."
        )
    return states


def _of_kernel(state, path: str) -> dict[str, Array]:
    """The numbers of one kernel by kind."""
    fit = state.fits[path]
    found = {
        "rank": state.ranks[path],
        "signal": state.signal[path],
        "threshold": fit.threshold,
        "distance": fit.distance,
        "removed": state.removed[path],
    }
    # In an `nnx.Optimizer` they are variables.
    return {kind: jnp.asarray(value) for kind, value in found.items()}


def _entries(name: str, array: Array) -> dict[str, Array]:
    """An array as numbers, the index of each in its name; a number under the name alone."""
    if not array.ndim:
        return {name: array}
    return {"/".join((name, *map(str, i))): array[i] for i in np.ndindex(array.shape)}


def metrics(opt_state: PyTree) -> dict[str, Num[Array, ""]]:
    """The numbers of `rmtjax.prune_spectrum`, from the state of an optimizer, for a log.

    For each kernel

    - `rank/PATH`: the rank after the last pruning, full before;
    - `signal/PATH`: directions that stood out of the noise at the last pruning step, whether the
      kernel was pruned then or not; 0 before;
    - `threshold/PATH`: the cut for a spike, on the scale of the eigenvalues $s^2 / n$, of the fit
      that is carried; NaN before one was accepted;
    - `distance/PATH`: Kolmogorov distance between the bulk and the law of that fit;
    - `removed/PATH`: the share of the sum of its squares that the last pruning step has taken.

    Of a stack of matrices, which has one rank, each has its own threshold and distance, its
    index at the end of the name.

    Args:
      opt_state: From `optimizer.init` or `optimizer.update`, with one `PruneState` or several,
        however deep in `chain`, `masked`, `partition`, `MultiSteps`, `inject_hyperparams`.

    Returns:
      A flat dictionary of arrays without axes, on the device; `jax.device_get` fetches all at
      once. Works under `jit`.

    Raises:
      ValueError: `opt_state` has no `PruneState`, or two that have the same path.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"Dense_0": {"kernel": jax.random.normal(jax.random.key(1), (80, 60))}}
      >>> params["Dense_0"]["kernel"] += 1.0  # one direction of signal
      >>> optimizer = optax.chain(optax.sgd(0.0), rmtjax.prune_spectrum(every=1))
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> for name, value in rmtjax.metrics(state).items():
      ...     print(f"{name} {value:.3g}")
      rank/Dense_0/kernel 1
      signal/Dense_0/kernel 1
      threshold/Dense_0/kernel 3.55
      distance/Dense_0/kernel 0.0409
      removed/Dense_0/kernel 0.493
    """
    found = {}
    for state in _find_states(opt_state):
        for path in state.ranks:
            if f"rank/{path}" in found:
                raise ValueError(
                    f"`opt_state` has two states for {path!r}, as of two networks. Give each on "
                    "its own, and put a prefix before its names."
                )
            for kind, value in _of_kernel(state, path).items():
                found |= _entries(f"{kind}/{path}", value)
    return found
