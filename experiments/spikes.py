"""The number of spikes while a network trains, with right labels and with wrong ones.

Each network is watched by `rmtjax.monitor`, once an epoch. A table has the spikes of its first
kernel by epoch, and `--figure` draws them. `python -m experiments.spikes --figure spikes.png`.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table

import rmtjax
from experiments import data, output, training


@dataclass(frozen=True)
class Config:
    """Trains one network for each data set and share of wrong labels."""

    datasets: tuple[str, ...] = ("mnist", "fashion_mnist")
    """Images to classify."""
    source: str = "auto"
    """Where to take them from; auto takes the first that has them."""
    wrong: tuple[float, ...] = (0.0, 0.4)
    """Shares of wrong training labels."""
    images: int = 10_000
    """Training images."""
    widths: tuple[int, ...] = (512,)
    """Widths of the hidden layers."""
    epochs: int = 40
    """Epochs of training."""
    batch_size: int = 100
    """Images in a step."""
    learning_rate: float = 0.02
    """Of SGD with momentum 0.9."""
    seed: int = 0
    """Of the weights, the batches and the wrong labels."""
    figure: Path | None = None
    """File for a figure."""


def with_wrong_labels(split: training.Split, share: float, seed: int) -> training.Split:
    """Returns a split in which a share of the labels is another class, each with equal chance."""
    rng = np.random.default_rng(seed)
    labels = np.asarray(split.labels)
    moved = rng.random(labels.size) < share
    others = (labels + rng.integers(1, 10, labels.size)) % 10
    return split._replace(labels=jnp.asarray(np.where(moved, others, labels), jnp.int32))


def make_epoch(module: training.MLP, optimizer: optax.GradientTransformationExtraArgs) -> Any:
    """Returns a compiled epoch, whose optimizer gets the loss of each step."""

    def step(carry, index, split: training.Split):
        params, state = carry

        def loss(params):
            images, labels = split.images[index], split.labels[index]
            return training.losses(module, params, images, labels)[0].mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), value

    return jax.jit(
        lambda carry, order, split: jax.lax.scan(partial(step, split=split), carry, order)
    )


def train(config: Config, split: training.Split, test: training.Split) -> list[dict[str, Any]]:
    """Returns the records of a network, with the loss and the test accuracy of each epoch."""
    module, key = training.MLP(config.widths), jax.random.key(config.seed)
    every = -(-split.labels.size // config.batch_size)
    sgd = optax.sgd(config.learning_rate, momentum=0.9)
    monitor = rmtjax.monitor(every, start=every, shuffles=3, where="Dense_0/*")
    # Last in the chain or first, it sees the parameters before the step.
    optimizer = optax.chain(monitor, sgd)
    params = module.init(key, split.images[:1])["params"]
    carry, history = (params, optimizer.init(params)), rmtjax.History()
    epoch = make_epoch(module, optimizer)
    for number in range(config.epochs):
        order, _ = training.batches(
            jax.random.fold_in(key, number), split.labels.size, config.batch_size
        )
        carry, losses = epoch(carry, order, split)
        accuracy = training.accuracy(module, carry[0], test)
        history.add(carry[1], loss=losses.mean(), accuracy=accuracy, epoch=number + 1)
    return history.records


def draw(found: dict[tuple[str, float], list[dict[str, Any]]], path: Path) -> None:
    """Writes a figure of the spikes over epochs: a panel for each data set."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for name, _ in found))
    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    panels = np.ravel(figure.subplots(1, len(names), sharey=True))
    for ax, name in zip(panels, names, strict=True):
        kernels = {
            f"{share:.0%} wrong labels": records
            for (n, share), records in found.items()
            if n == name
        }
        rows = [
            {
                "step": epoch + 1,
                **{
                    f"monitor/spikes/{label}": records[epoch]["monitor/spikes/Dense_0/kernel"]
                    for label, records in kernels.items()
                },
            }
            for epoch in range(min(map(len, kernels.values())))
        ]
        rmtjax.plots.history(rows, "spikes", ax=ax, title=data.TITLES.get(name, name))
        ax.set_xlabel("epoch")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, and writes the figure if that was asked for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = tyro.cli(Config, args=arguments, description=__doc__)
    console, found = output.console(), {}
    for name in config.datasets:
        dataset = data.load(name, source=config.source)
        whole, test = training.to_device(dataset, label_noise=0.0, seed=0)
        some = training.Split(*(array[: config.images] for array in whole))
        for share in config.wrong:
            split = with_wrong_labels(some, share, config.seed)
            found[dataset.name, share] = train(config, split, test)
    shown = sorted({1, 2, 5, 10, 20, 30, 40, config.epochs} & {*range(1, config.epochs + 1)})
    table = Table("data", "wrong", "", *map(str, shown), box=None, title="by epoch")
    columns = {
        "spikes": "monitor/spikes/Dense_0/kernel",
        "growing": "monitor/growing/Dense_0/kernel",
    }
    columns |= {"loss": "loss", "test %": "accuracy"}
    for (name, share), records in found.items():
        for word, column in columns.items():
            cells = (f"{records[epoch - 1][column]:.4g}" for epoch in shown)
            table.add_row(name, f"{share:.0%}", word, *cells)
    console.print(table)
    if config.figure is not None:
        draw(found, config.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
