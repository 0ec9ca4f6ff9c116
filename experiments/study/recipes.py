"""How a network is trained: the optimizer's chain, and its epochs one after the other."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments import training
from experiments.study.arms import Pruning


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum, all its settings, and the pruning at the end of the chain."""

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    schedule: str = "constant"  # or "cosine", down to 0 over these epochs
    weight_decay: float = 0.0  # added to the gradient
    pruning: Pruning | None = None  # after each epoch from `start` on
    start: int = 0

    def chain(self, steps: int) -> optax.GradientTransformation:
        """The optimizer, for epochs of so many steps."""
        rate = self.learning_rate
        if self.schedule == "cosine":
            rate = optax.cosine_decay_schedule(rate, self.epochs * steps)
        links: list[optax.GradientTransformation] = []
        if self.weight_decay:
            links.append(optax.add_decayed_weights(self.weight_decay))
        links.append(optax.sgd(rate, self.momentum))
        if self.pruning is not None:
            links.append(self.pruning.transform(steps, self.start * steps))
        return optax.chain(*links)


class Epoch(NamedTuple):
    """The state after an epoch; the next epoch takes its arrays over."""

    number: int  # from 1
    params: Any
    opt_state: Any
    loss: float  # mean over the epoch


@lru_cache(maxsize=64)
def _compiled(module: nn.Module, recipe: Recipe, steps: int):
    """An optimizer and its epoch; those of equal settings are compiled once for all seeds."""
    optimizer = recipe.chain(steps)
    convolves = isinstance(module, training.CNN)
    return optimizer, training.make_epoch(module, optimizer, scan=not convolves)


def train(
    module: nn.Module,
    params: Any,
    recipe: Recipe,
    split: training.Split,
    seed: int,
    first: int = 0,
) -> Iterator[Epoch]:
    """Trains epoch by epoch.

    Args:
      module: The network.
      params: Where it starts; stays as it is. Kernels may be factorized.
      recipe: How.
      split: Images and the labels given.
      seed: Of the order of the images and of dropout.
      first: Number of epochs done before, of which each had its own order.

    Yields:
      An `Epoch` after each.
    """
    size = split.labels.size
    optimizer, run = _compiled(module, recipe, -(-size // recipe.batch_size))
    params = jax.tree.map(jnp.copy, params)  # an epoch takes its arguments over
    opt_state = optimizer.init(params)
    orders, dropouts = (jax.random.fold_in(jax.random.key(seed), stream) for stream in (1, 2))
    for number in range(first, first + recipe.epochs):
        order = training.batches(jax.random.fold_in(orders, number), size, recipe.batch_size)
        key = jax.random.fold_in(dropouts, number)
        params, opt_state, loss = run(params, opt_state, split, *order, key)
        yield Epoch(number + 1, params, opt_state, float(loss))
