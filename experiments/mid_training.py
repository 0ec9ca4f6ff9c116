"""From dense to factors in mid-training: what becomes of the loss at the switch and after it.

A network is trained, planned by BEMA and factorized, and training goes on over equal batches:
with the optimizer's moments projected, reset, or all of its state new; and dense as before,
never switched. Losses are means over the training images, so that the batches do not blur them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table

import rmtjax
from experiments import data, output, training
from rmtjax import transfer_opt_state


@dataclass(frozen=True)
class Config:
    """Compares ways to carry the state of an optimizer over to the factors."""

    dataset: Literal["mnist", "fashion_mnist"] = "mnist"
    """Images to classify."""
    source: Literal["auto", "tfds", "idx", "download", "sample"] = "auto"
    """Where to take them from; auto takes the first that has them."""
    widths: tuple[int, ...] = (512, 512)
    """Widths of the hidden layers."""
    epochs: int = 3
    """Epochs before the switch."""
    steps: tuple[int, ...] = (1, 10, 100)
    """Steps after the switch at which the loss is taken."""
    slower: tuple[float, ...] = (1.0, 5.0)
    """The learning rates after the switch are divided by each of these, also where all is dense."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 0.08
    """Of SGD with momentum 0.9."""
    adam_rate: float = 0.001
    """Learning rate of Adam."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run for each: of the weights and the batches."""


@partial(jax.jit, static_argnums=0)
def mean_loss(module: training.MLP, params, split: training.Split) -> jax.Array:
    """Cross-entropy over all images."""
    return training.losses(module, params, split.images, split.labels)[0].mean()


def arms(optimizer: optax.GradientTransformation, params, opt_state, factorized):
    """The parameters and the optimizer state that each way goes on with."""
    reset = transfer_opt_state(opt_state, params, factorized, moments="reset", optimizer=optimizer)
    return {
        "dense": (params, opt_state),
        "project": (factorized, transfer_opt_state(opt_state, params, factorized)),
        "reset": (factorized, reset),
        "all new": (factorized, optimizer.init(factorized)),
    }


def run_seed(
    config: Config,
    make_optimizer: Callable[[float], optax.GradientTransformation],
    split: training.Split,
    seed: int,
) -> tuple[rmtjax.Plan, dict[tuple[float, str], list[float]]]:
    """The plan, and the losses of each arm: before, at the switch, after it, and of the steps."""
    module, key = training.MLP(config.widths), jax.random.key(seed)
    optimizer = make_optimizer(1.0)
    params = module.init(key, split.images[:1])["params"]
    opt_state, epoch = optimizer.init(params), training.make_epoch(module, optimizer)
    order = lambda number: training.batches(
        jax.random.fold_in(key, number), split.labels.size, config.batch_size
    )
    for number in range(config.epochs):
        params, opt_state, _ = epoch(params, opt_state, split, *order(number))
    plan = rmtjax.plan(params)
    ways = arms(optimizer, params, opt_state, rmtjax.factorize(params, plan))
    before, losses = float(mean_loss(module, params, split)), {}
    for slower in config.slower:
        epoch = training.make_epoch(module, make_optimizer(slower))
        for arm, carry in ways.items():
            carry = jax.tree.map(jnp.copy, carry)  # an epoch takes its arguments over
            row, total = [before, float(mean_loss(module, carry[0], split))], 0.0
            for first, last in pairwise((0, *config.steps)):
                part = (batches[first:last] for batches in order(config.epochs))
                *carry, loss = epoch(*carry, split, *part)
                total += (last - first) * float(loss)
                row.append(float(mean_loss(module, carry[0], split)))
            losses[slower, arm] = [*row, total / config.steps[-1]]
    return plan, losses


def main(arguments: list[str] | None = None) -> None:
    """Prints the plan of each run, and a row for each optimizer, slowing and arm."""
    config, console = tyro.cli(Config, args=arguments, description=__doc__), output.console()
    dataset = data.load(config.dataset, source=config.source)
    console.print(data.describe(dataset), highlight=False)
    split, _ = training.to_device(dataset, label_noise=0.0, seed=0)
    table = Table("optimizer", "rate", "arm", "before", "switched", box=None)
    for title in (*(f"after {step}" for step in config.steps), "mean of steps"):
        table.add_column(title)
    optimizers = {
        "SGD": lambda slower: optax.sgd(config.learning_rate / slower, momentum=0.9),
        "Adam": lambda slower: optax.adam(config.adam_rate / slower),
    }
    for name, make_optimizer in optimizers.items():
        found = []
        for seed in config.seeds:
            plan, losses = run_seed(config, make_optimizer, split, seed)
            console.print(f"{name}, seed {seed}\n{plan}", highlight=False)
            found.append(losses)
        for slower, arm in found[0]:
            columns = np.array([losses[slower, arm] for losses in found]).T
            cells = (f"{column.mean():.4f} ± {column.std():.4f}" for column in columns)
            table.add_row(name, f"1 / {slower:g}", arm, *cells)
    console.print(table)
    console.print("±: standard deviation over the seeds", highlight=False)


if __name__ == "__main__":
    main()
