"""The ways to train: agreement of replicas, its control, and the rivals by their gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[Any, Any, Any], jax.Array]  # of parameters, images and labels
Gradient = Callable[[Loss, Any, Any, Any], Any]


@dataclass(frozen=True)
class Arm:
    """One way to train; all settings that it has beside those of the task.

    Attributes:
      name: In the tables.
      replicas: Networks that train at once, each on its part of the images.
      merge: How they become one after each epoch: by agreement, or by their mean.
      chain: Whether the halves of an epoch, one after the other, are the replicas.
      rest: Share of what is not agreed on that is kept at first; it falls to 0 linearly.
      period: Epochs from one merge to the next: a half, or a whole number.
      fixed: Whether the images are dealt to the replicas once, and not anew in each period.
      rule: What is done to the gradients, a key of `RULES`.
      value: The number that this rule has to be given.
    """

    name: str
    replicas: int = 1
    merge: str = "none"
    chain: bool = False
    rest: float = 0.0
    period: float = 1.0
    fixed: bool = False
    rule: str = "plain"
    value: float = 0.0


class Rule(NamedTuple):
    """A rival.

    Attributes:
      make: Makes the gradient's function from the arm's value.
      parts: Micro-batches that a batch is divided into.
      values: What the value is chosen from; nothing where there is none to choose.
      before: Makes a transform of the gradients that has a state, if the rule has one.
    """

    make: Callable[[float], Gradient]
    parts: int = 1
    values: tuple[float, ...] = ()
    before: Callable[[], optax.GradientTransformation] = optax.identity


def _plain(value: float) -> Gradient:
    del value
    return lambda loss, params, x, y: jax.grad(loss)(params, x, y)


def _smoothed(value: float) -> Gradient:
    """Returns gradients for labels of which a share is spread over the classes."""

    def gradient(loss, params, x, y):
        return jax.grad(loss)(params, x, optax.smooth_labels(jax.nn.one_hot(y, 10), value))

    return gradient


def _sharp(value: float) -> Gradient:
    """Returns gradients at the worst point of a ball of this radius: SAM (Foret et al., 2021)."""

    def gradient(loss, params, x, y):
        slope = jax.grad(loss)(params, x, y)
        scale = value / (optax.tree.norm(slope) + 1e-12)
        worst = jax.tree.map(lambda leaf, rise: leaf + scale * rise, params, slope)
        return jax.grad(loss)(worst, x, y)

    return gradient


def _of_parts(loss: Loss, params, x, y, parts: int):
    """Returns the gradient of each micro-batch, with a leading axis."""
    divide = lambda array: array.reshape(parts, -1, *array.shape[1:])
    return jax.vmap(jax.grad(loss), (None, 0, 0))(params, divide(x), divide(y))


def median_of_three(a, b, c):
    """Returns the median of three arrays, entry by entry."""
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def _median(value: float) -> Gradient:
    """Returns medians of the gradients of three micro-batches: M3 (Zielinski et al., 2020)."""
    del value

    def gradient(loss, params, x, y):
        found = _of_parts(loss, params, x, y, 3)
        return jax.tree.map(lambda leaf: median_of_three(*leaf), found)

    return gradient


def _masked(value: float) -> Gradient:
    """Returns the entries of which most micro-batches have one sign: the AND-mask.

    Parascandolo et al. (2021): an entry is kept if the mean of the signs is at least `value`.
    """

    def gradient(loss, params, x, y):
        found = _of_parts(loss, params, x, y, 10)
        # A mean of ten signs such as 0.6 is not exact in float32.
        agree = lambda leaf: jnp.abs(jnp.sign(leaf).mean(0)) >= value - 1e-3
        return jax.tree.map(lambda leaf: leaf.mean(0) * agree(leaf), found)

    return gradient


def rolling_median() -> optax.GradientTransformation:
    """Returns medians of this gradient and the two before: RM3 (Zielinski et al., 2020)."""

    def init(params):
        # Two steps of zeros make the first two medians small, and nothing else.
        return (jax.tree.map(jnp.zeros_like, params),) * 2

    def update(updates, state, params=None):
        del params
        older, newer = state
        return jax.tree.map(median_of_three, older, newer, updates), (newer, updates)

    return optax.GradientTransformation(init, update)


# The first five were tried for label smoothing, then one more, since the largest was the best.
RULES = {
    "plain": Rule(_plain),
    "label smoothing": Rule(_smoothed, values=(0.1, 0.2, 0.4, 0.6, 0.8, 0.9)),
    "SAM": Rule(_sharp, values=(0.05, 0.1, 0.2, 0.5, 1.0)),
    "M3": Rule(_median, parts=3),
    "RM3": Rule(_plain, before=rolling_median),
    "AND-mask": Rule(_masked, parts=10, values=(0.2, 0.4, 0.6, 0.8, 1.0)),
}

PLAIN = Arm("plain")
AVERAGED = Arm("2 replicas averaged", 2, "mean")
PAIR = Arm("agreement, k = 2", 2, "agreement")
FOUR = Arm("agreement, k = 4", 4, "agreement")
CHAIN = Arm("agreement in a chain", 1, "agreement", chain=True)
REST = Arm("agreement, k = 2, rest 0.1 to 0", 2, "agreement", rest=0.1)
EIGHT = Arm("agreement, k = 8", 8, "agreement")
PERIODS = tuple(
    Arm(f"agreement, k = 2, period {period:g}", 2, "agreement", period=period)
    for period in (0.5, 2.0, 5.0)
)
FIXED = Arm("agreement, k = 2, parts fixed", 2, "agreement", fixed=True)
OURS = (PAIR, FOUR, CHAIN)
RIVALS = tuple(Arm(name, rule=name) for name in RULES if name != "plain")
