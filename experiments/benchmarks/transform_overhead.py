"""What the transform costs on a step that does not prune: the same chain with and without it.

Both chains take turns in one run, so that what else the machine does hits both. Printed is
the median over the turns of the time of a step, and the median of the ratios of the turns
with its 95 % interval (bootstrap).
"""

import time
from dataclasses import dataclass

import jax
import numpy as np
import optax
import scipy.stats
import tyro
from rich.console import Console
from rich.table import Table

import rmtjax
from experiments import data, training


@dataclass(frozen=True)
class Config:
    """Times one training step with and without the transform."""

    widths: tuple[tuple[int, ...], ...] = ((1000,), (512, 512, 512))
    """Hidden layers of each network."""
    batch_size: int = 128
    """Images in a step."""
    turns: int = 40
    """Turns of each chain, of one epoch of 2,000 images."""


def chains() -> dict[str, optax.GradientTransformation]:
    """The chain of the main job, without and with pruning so rare that it never happens."""
    plain = optax.sgd(0.08, momentum=0.9)
    return {"without": plain, "with": optax.chain(plain, rmtjax.prune_spectrum(every=10**9))}


def ratios(config: Config, widths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Seconds of a step in each turn, by chain."""
    dataset = data.load("fashion_mnist", source="sample")
    split, _ = training.to_device(dataset, label_noise=0.0, seed=0)
    module = training.MLP(widths)
    order, weights = training.batches(jax.random.key(0), split.labels.size, config.batch_size)
    runs = {}
    for name, optimizer in chains().items():
        params = module.init(jax.random.key(1), split.images[:1])["params"]
        epoch = training.make_epoch(module, optimizer)
        runs[name] = [epoch, params, optimizer.init(params)]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(config.turns + 2):
        for name, (epoch, *carry) in runs.items():
            begin = time.perf_counter()
            *carry, loss = epoch(*carry, split, order, weights)
            loss.block_until_ready()
            runs[name] = [epoch, *carry]
            if turn >= 2:  # compiled and warm
                times[name].append((time.perf_counter() - begin) / len(order))
    return {name: np.array(values) for name, values in times.items()}


def main() -> None:
    """Prints a row for each network."""
    config = tyro.cli(Config, description=__doc__)
    table = Table("hidden layers", "ms without", "ms with", "ratio", "95 %", box=None)
    for widths in config.widths:
        times = ratios(config, widths)
        ratio = times["with"] / times["without"]
        low, high = scipy.stats.bootstrap(
            (ratio,), np.median, rng=np.random.default_rng(0), method="percentile"
        ).confidence_interval
        medians = (f"{1e3 * np.median(times[name]):.3f}" for name in ("without", "with"))
        table.add_row(
            "-".join(map(str, widths)),
            *medians,
            f"{np.median(ratio):.3f}",
            f"{low:.3f} to {high:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
