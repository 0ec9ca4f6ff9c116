"""Steps of a transform, counted from 1: which of them are due."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

NO_PARAMS = (
    "`params` must be given to `update`: pruning depends on where the updates land. "
    "Call `optimizer.update(updates, state, params)`."
)


def check_count(name: str, value: Any, least: int) -> None:
    """Refuses a wrong number; one injected by `inject_hyperparams` is not looked at."""
    if isinstance(value, jax.Array):
        return
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an integer number of steps, got {value!r}.")
    if operator.index(value) < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def is_due(
    step: Int[Array, ""], every: Int[ArrayLike, ""], start: Int[ArrayLike, ""]
) -> Bool[Array, ""]:
    """Whether a step is `start`, `start + every`, ...; with a start of 0 the first is `every`."""
    return jnp.asarray((step > 0) & (step >= start) & ((step - start) % every == 0))
