"""What the transform costs on a step that does not prune: the same chain with and without it.

A third chain has in its place a branch that is never taken, and nothing else: what anything costs
that may or may not change an update. All take turns of an epoch of the sample that lies in the
repository, 2,000 images. Printed is the time of a step, and the median of the ratios of the turns
with its 95 % interval (bootstrap).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import tyro

import rmtjax
from experiments import data, training
from experiments.benchmarks import epoch, timing


@dataclass(frozen=True)
class Config:
    """Times one training step with and without the transform."""

    networks: tuple[str, ...] = ("1000", "512-512-512")
    """The widths of the hidden layers of each."""
    batch_size: int = 128
    """Images in a step."""
    rounds: int = 40
    """Turns of each chain."""
    json: Path | None = None
    """File to write."""


def never() -> optax.GradientTransformation:
    """Doubles the updates of kernels at a step that does not come."""

    def init(params):
        del params
        return jnp.zeros((), jnp.int32)

    def update(updates, state, params=None):
        del params
        visit = lambda leaf: 2 * leaf if leaf.ndim > 1 else leaf
        double = lambda updates: jax.tree.map(visit, updates)
        state = state + 1
        return jax.lax.cond(state == 10**9, double, lambda same: same, updates), state

    return optax.GradientTransformation(init, update)


def chains() -> dict[str, optax.GradientTransformation]:
    """The chain of the main job, without and with pruning so rare that it never happens."""
    plain = optax.sgd(0.08, momentum=0.9)
    pruned = optax.chain(plain, rmtjax.prune_spectrum(every=10**9))
    return {"without": plain, "with": pruned, "a branch": optax.chain(plain, never())}


def interval(ratio: np.ndarray) -> str:
    """The median and its 95 % interval."""
    low, high = scipy.stats.bootstrap(
        (ratio,), np.median, rng=np.random.default_rng(0), method="percentile"
    ).confidence_interval
    return f"{np.median(ratio):.3f} [{low:.3f}, {high:.3f}]"


def measure(split: training.Split, network: str, config: Config) -> dict[str, Any]:
    """The row of one network."""
    module = training.MLP(tuple(map(int, network.split("-"))))
    runners = {
        name: epoch.Runner(module, optimizer, split, config.batch_size)
        for name, optimizer in chains().items()
    }
    steps = -(-split.labels.size // config.batch_size)
    times = {name: t / steps for name, t in timing.in_turns(runners, config.rounds).items()}
    row: dict[str, Any] = {"hidden layers": network}
    row |= {f"{name}, ms a step": timing.spread(seconds) for name, seconds in times.items()}
    ratios = {name: interval(times[name] / times["without"]) for name in ("with", "a branch")}
    return row | {f"ratio, {name}": ratio for name, ratio in ratios.items()}


def main() -> None:
    """Prints a row for each network."""
    config = tyro.cli(Config, description=__doc__)
    dataset = data.load("fashion_mnist", source="sample")
    split, _ = training.to_device(dataset, label_noise=0.0, seed=0)
    rows = [measure(split, network, config) for network in config.networks]
    timing.show("a step that does not prune", rows, config.json)


if __name__ == "__main__":
    main()
