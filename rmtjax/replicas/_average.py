"""Averages parameters once a validation loss has stalled, as averaged SGD with its trigger."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from rmtjax._modes import in_usual_modes
from rmtjax.planning import check_count, is_abstract, path_name, to_number
from rmtjax.spectra import lift
from rmtjax.training import is_placeholder

_HIGHEST = np.finfo(np.float32).max


class AverageState(NamedTuple):
    """State of `average_params`, of arrays.

    Attributes:
      averaging: True from the step on in which the validation loss had stalled.
      recent: The last validation losses, the oldest first; the largest number of float32 before
        there were so many.
      best: The lowest validation loss before those.
      average: Tree like the parameters: the mean of what they have been since.
      age: How many values are in the mean: of each entry with `reset_zeros`, else of each leaf.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> state = rmtjax.average_params(patience=3).init({"kernel": jnp.ones(2)})
      >>> bool(state.averaging), state.recent.shape, state.average["kernel"].tolist()
      (False, (3,), [1.0, 1.0])
    """

    averaging: Bool[Array, ""]
    recent: Float[Array, " n"]
    best: Float[Array, ""]
    average: PyTree
    age: PyTree


def _is_floating(leaf: Any) -> bool:
    dtype = jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16


def _record(state: AverageState, value: Any) -> AverageState:
    """Returns the state after a validation loss, which NaN stands for if there is none."""
    # A loss that is infinite is as high as any, and a state is finite.
    value = jnp.minimum(to_number("value", value, jnp.float32), _HIGHEST)
    stalled = value > state.best  # False for NaN
    best = jnp.minimum(state.best, state.recent[0])
    recent = jnp.concatenate([state.recent[1:], value[None]])
    given = ~jnp.isnan(value)
    keep = lambda new, old: jnp.where(given, new, old)
    return state._replace(
        averaging=state.averaging | stalled,
        recent=keep(recent, state.recent),
        best=keep(best, state.best),
    )


def average_params(
    patience: int = 5, *, reset_zeros: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the parameters from the step on in which the validation loss stalls. Put it last.

    Updates pass unchanged. `averaged(opt_state, params)` returns the parameters to evaluate and to
    keep: their mean $\bar w_t = \bar w_{t-1} + (w_t - \bar w_{t-1}) / t$ over the t steps since the
    trigger, and before it the parameters themselves.

    The trigger is that of NT-ASGD: a validation loss is above the lowest of all but the last
    `patience` ones before it. Give it where you have measured it, as
    `optimizer.update(updates, state, params, value=loss)`, and NaN, or nothing, in other steps.

    Args:
      patience: Number of validation losses that are too recent to compare with, at least 1.
      reset_zeros: Whether the mean of an entry begins anew where the parameter is zero exactly. For
        `rmtjax.drop_and_grow`: an entry that has grown again has no part in what it was before. It
        needs a count for each entry.

    Returns:
      A transformation with an `AverageState`, which has a copy of each floating parameter. It needs
      `params` in `update`. It works inside `masked`, `partition` and `inject_hyperparams` (with its
      options as `static_args`).

    Raises:
      ValueError: `patience` is out of range, or `update` was called without `params` or with a
        `value` of several numbers.

    Examples:
      >>> import jax.numpy as jnp, optax, rmtjax
      >>> optimizer = optax.chain(optax.sgd(1.0), rmtjax.average_params(patience=1))
      >>> params = {"kernel": jnp.zeros(())}
      >>> state = optimizer.init(params)
      >>> for loss in (3.0, 2.0, 4.0, 2.0):  # the third is above the first
      ...     gradients = {"kernel": jnp.ones(())}
      ...     updates, state = optimizer.update(gradients, state, params, value=loss)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params["kernel"]), float(rmtjax.averaged(state, params)["kernel"])
      (-4.0, -3.5)

    References:
      Polyak and Juditsky, SIAM J. Control Optim. 30 (1992) 838-855. Merity, Keskar and Socher
      (2017), https://arxiv.org/abs/1708.02182, for the trigger. Liu, Mocanu, Pei and Pechenizkiy
      (2021), https://arxiv.org/abs/2101.09048, for the count of each entry.
    """
    check_count("patience", patience)

    @in_usual_modes
    def init_fn(params: PyTree) -> AverageState:
        if is_abstract(params):
            return jax.eval_shape(init_fn, params)
        flags = jnp.zeros((), bool), jnp.full((patience,), _HIGHEST), jnp.asarray(_HIGHEST)
        if is_placeholder(params):
            return AverageState(*flags, params, flags[0])
        count = lambda leaf: jnp.zeros(jnp.shape(leaf) if reset_zeros else (), jnp.int32)
        # Copies: parameters and state may both be donated to `jit`.
        wide = lambda leaf: lift(leaf) if _is_floating(leaf) else leaf
        copy = lambda leaf: jnp.copy(wide(jnp.asarray(leaf, jnp.result_type(leaf))))
        return AverageState(*flags, jax.tree.map(copy, params), jax.tree.map(count, params))

    @in_usual_modes
    def update_fn(updates, state, params=None, *, value: ArrayLike | None = None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "`params` must be given to `update`: it decides what is averaged. Call "
                "`optimizer.update(updates, state, params)`."
            )
        state = state if value is None else _record(state, value)
        landed: Any = optax.apply_updates(params, updates)

        def older(age, new):
            age = jnp.where(state.averaging, age + 1, 0)
            return jnp.where(new == 0, 0, age) if reset_zeros else age

        def mean(old, new, age):
            if not _is_floating(new):
                return new
            wide = new.astype(old.dtype)
            if new.size == 0:  # on a mesh with explicit axes JAX fills no such array
                return wide
            # An infinity, as of a mask, less itself would be NaN.
            moved = jnp.where(wide == old, 0, wide - old)
            return jnp.where(age > 0, old + moved / jnp.maximum(age, 1), wide)

        age = jax.tree.map(older, state.age, landed)
        average = jax.tree.map(mean, state.average, landed, age)
        return updates, state._replace(average=average, age=age)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    return [(path_name(key), leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def averaged(opt_state: PyTree, params: PyTree) -> PyTree:
    """Returns the mean that `average_params` has of the parameters, in their dtypes.

    Args:
      opt_state: State of the optimizer after an update, with one `AverageState` at any depth.
      params: The parameters after the same update, for their dtypes.

    Returns:
      A tree like `params`; the parameters themselves before the trigger, and where `masked` or
      `partition` leave them out.

    Raises:
      ValueError: `opt_state` does not have one such state, or it is for another tree.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> params = {"kernel": jnp.ones(2)}
      >>> rmtjax.averaged(rmtjax.average_params().init(params), params)["kernel"].tolist()
      [1.0, 1.0]
    """
    is_state = lambda node: isinstance(node, AverageState)
    states = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(leaf)]
    if len(states) != 1:
        raise ValueError(
            f"`opt_state` must have one state of `rmtjax.average_params`, got {len(states)}. Give "
            "the state of the whole chain, as `optimizer.update` returned it."
        )
    # By the order of leaves: in the state of an `nnx.Optimizer` they are in variables of another
    # type.
    average = states[0].average
    leaves, means = _named(params), _named(average)
    left_out = lambda node: isinstance(node, optax.MaskedNode)
    if any(map(left_out, jax.tree.leaves(average, is_leaf=left_out))):
        # What `masked` and `partition` leave out is its own mean.
        rest = dict(means)
        means = [(path, rest.pop(path, leaf)) for path, leaf in leaves] + [*rest.items()]
    if [jnp.shape(leaf) for _, leaf in leaves] != [jnp.shape(mean) for _, mean in means]:
        raise ValueError(
            f"`params` must be the tree that is averaged, with {len(means)} leaves, got "
            f"{len(leaves)} leaves or other shapes."
        )
    cast = lambda mean, leaf: jnp.asarray(mean[1]).astype(jnp.result_type(leaf[1]))
    return jax.tree.unflatten(jax.tree.structure(params), map(cast, means, leaves))
