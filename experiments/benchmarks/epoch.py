"""An epoch of training, with and without pruning, beside the same network in PyTorch.

Ours is one compiled program: a scan over shuffled batches of images that lie on the device, and the
pruning step in it, once an epoch. It prunes for the first time in the epoch before those that are
measured. PyTorch's is the loop that one writes by hand over tensors in memory, with as many threads
as it takes; it runs after ours, in an environment that is made for it and removed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro

import rmtjax
from experiments import data, training
from experiments.benchmarks import apart, timing


@dataclass(frozen=True)
class Config:
    """Times epochs of training."""

    dataset: Literal["mnist", "fashion_mnist"] = "mnist"
    """Images to classify."""
    source: Literal["auto", "tfds", "idx", "download", "sample"] = "auto"
    """Where to take them from, as in `experiments/mnist.py`."""
    widths: tuple[int, ...] = (1000, 1000)
    """Widths of the hidden layers."""
    batch_size: int = 128
    """Images in a step."""
    rounds: int = 7
    """Epochs of each that are measured."""
    pytorch: bool = False
    """Whether PyTorch is installed and run, too: minutes, and gigabytes with some builds."""
    torch: str = "torch"
    """The requirement that PyTorch is installed by."""
    json: Path | None = None
    """File to write."""


def chains(steps: int) -> dict[str, optax.GradientTransformation]:
    """The optimizer of the main job, without and with a pruning step an epoch."""
    plain = optax.sgd(0.08, momentum=0.9)
    prune = rmtjax.prune_spectrum(every=steps, start=2 * steps, max_removed=1.0)
    return {"rmtjax, plain": plain, "rmtjax, pruned": optax.chain(plain, prune)}


class Runner:
    """Epochs of one chain; each goes on where the last one stopped."""

    def __init__(self, module, optimizer, split: training.Split, batch_size: int):
        self._split, self._batch_size = split, batch_size
        self._epoch = training.make_epoch(module, optimizer)
        params = module.init(jax.random.key(0), split.images[:1])["params"]
        self._carry, self._count = (params, optimizer.init(params)), 0

    def __call__(self) -> jax.Array:
        """One epoch; its mean loss."""
        key = jax.random.key(self._count)
        order = training.batches(key, self._split.labels.size, self._batch_size)
        *carry, loss = self._epoch(*self._carry, self._split, *order)
        self._carry, self._count = tuple(carry), self._count + 1
        return loss

    @property
    def ranks(self) -> list[int]:
        """Those after the last pruning step."""
        return [int(rank) for rank in optax.tree.get(self._carry[1], "ranks", {}).values()]


def measure(config: Config) -> list[dict[str, Any]]:
    """A row for each way to train."""
    dataset = data.load(config.dataset, source=config.source)
    split, _ = training.to_device(dataset, label_noise=0.0, seed=0)
    steps = -(-split.labels.size // config.batch_size)
    module = training.MLP(config.widths)
    runners = {
        name: Runner(module, optimizer, split, config.batch_size)
        for name, optimizer in chains(steps).items()
    }
    for runner in runners.values():  # the next one, which prunes first, is not measured either
        jax.block_until_ready(runner())
    times = timing.in_turns(runners, config.rounds)
    if config.pytorch:
        arrays = {"images": np.asarray(split.images), "labels": np.asarray(split.labels)}
        widths = ",".join(map(str, config.widths))
        options = widths, config.batch_size, config.rounds
        needed = config.torch, "numpy"
        found = apart.run_apart("pytorch_rival.py", needed, arrays, *options)
        times[f"PyTorch {found['version']}"] = np.array(found["seconds"])
    plain = np.median(times["rmtjax, plain"])
    rows = []
    for name, seconds in times.items():
        ranks = runners[name].ranks if name in runners else []
        ratio = float(np.median(seconds) / plain)
        row = {"epoch of": name, "ms": timing.spread(seconds), "ratio": ratio}
        rows.append(row | {"images": split.labels.size, "ranks": " ".join(map(str, ranks)) or "-"})
    return rows


def main() -> None:
    """Prints a row for each way to train."""
    config = tyro.cli(Config, description=__doc__)
    timing.show("an epoch of training", measure(config), config.json)


if __name__ == "__main__":
    main()
