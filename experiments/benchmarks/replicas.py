"""An epoch of replicas side by side, and the merge after it: on the host, and in a program.

All replicas together see each image once. After the first epoch they are averaged, and it is not
measured. The rows are of the changes that training has made, which have stronger signal than those
of `python -m experiments.benchmarks.merge`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import optax
import tyro

import rmtjax
from experiments import data, training
from experiments.benchmarks import timing


@dataclass(frozen=True)
class Config:
    """Times the merge of replicas beside the epoch that made them."""

    dataset: Literal["mnist", "fashion_mnist"] = "mnist"
    """Images to classify."""
    source: Literal["auto", "tfds", "idx", "download", "sample"] = "auto"
    """Where to take them from, as in `experiments/mnist.py`."""
    widths: tuple[int, ...] = (1000, 1000)
    """Widths of the hidden layers."""
    batch_size: int = 128
    """Images in a step of each replica."""
    replicas: int = 2
    """Number of replicas."""
    rounds: int = 3
    """Epochs that are measured."""
    json: Path | None = None
    """File to write."""


class Runner:
    """Replicas that train; each epoch starts from what was agreed on before."""

    def __init__(self, config: Config, split: training.Split):
        module, optimizer = training.MLP(config.widths), optax.sgd(0.08, momentum=0.9)
        self.params = module.init(jax.random.key(0), split.images[:1])["params"]
        self._state = rmtjax.replicate(optimizer.init(self.params), config.replicas)
        self._count, self._size, self._config = 0, split.labels.size, config

        def step(carry, index, split: training.Split):
            def loss(params):
                batch = split.images[index], split.labels[index]
                return training.losses(module, params, *batch)[0].mean()

            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        @jax.jit
        def epoch(params, state, order):
            train = lambda *carry: jax.lax.scan(partial(step, split=split), carry[:2], carry[2])[0]
            return jax.vmap(train)(rmtjax.replicate(params, config.replicas), state, order)

        self._epoch = epoch

    def epoch(self) -> Any:
        """Trains all replicas for an epoch; returns their parameters."""
        config = self._config
        order = rmtjax.deal(jax.random.key(self._count), self._size, config.replicas)
        steps = order.shape[1] // config.batch_size
        order = order[:, : steps * config.batch_size].reshape(len(order), steps, -1)
        replicas, self._state = self._epoch(self.params, self._state, order)
        self._count += 1
        return replicas


def once(call: Callable[[], Any]) -> tuple[Any, float]:
    """Calls a function; returns what it returns, and the seconds that it takes."""
    begin = time.perf_counter()
    found = jax.block_until_ready(call())
    return found, time.perf_counter() - begin


def measure(config: Config) -> list[dict[str, Any]]:
    """A row for each epoch that is measured."""
    dataset = data.load(config.dataset, source=config.source)
    split, _ = training.to_device(dataset, label_noise=0.0, seed=0)
    runner, compiled = Runner(config, split), jax.jit(rmtjax.merge_replicas)
    replicas = runner.epoch()
    for merge in (rmtjax.merge_replicas, compiled):
        jax.block_until_ready(merge(runner.params, replicas))
    runner.params = jax.tree.map(lambda leaf: leaf.mean(axis=0), replicas)
    rows = []
    for number in range(2, config.rounds + 2):
        replicas, first = once(runner.epoch)
        merged, host = once(lambda: rmtjax.merge_replicas(runner.params, replicas))  # noqa: B023
        _, program = once(lambda: compiled(runner.params, replicas))  # noqa: B023
        seconds = {"epoch": first, "merge": host, "compiled merge": program}
        kept = merged.kept.values()
        rows.append(
            {"epoch": number, "replicas": config.replicas, "images": split.labels.size}
            | {f"{name}, ms": 1e3 * value for name, value in seconds.items()}
            | {f"{name} / epoch": seconds[name] / seconds["epoch"] for name in [*seconds][1:]}
            | {"kept": " ".join(f"{float(share):.2f}" for share in kept)}
        )
        runner.params = merged.params
    return rows


def main() -> None:
    """Prints a row for each epoch."""
    config = tyro.cli(Config, description=__doc__)
    timing.show("an epoch of replicas", measure(config), config.json)


if __name__ == "__main__":
    main()
