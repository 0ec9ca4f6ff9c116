"""What the moments of an optimizer do after a cut: kept as they are, or projected on what is left.

Four small networks train for 500 steps with a constant rate. All kernels are cut after 300 steps,
after 400 and at the end, and the moments go on in one of three ways. Run
`python -m experiments.moments_after_cuts --help`.
"""

import dataclasses
import itertools
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table

from experiments import measure, output
from experiments.tasks import models, problems
from rmtjax._axes import MatrixView
from rmtjax.planning import find_kernels, leaves_by_path, map_kernels

RESULTS = Path(__file__).parent / "results" / "moments_after_cuts.json"
# As they are; projected on the columns and the rows that stay; without what lies beyond both; and
# projected as the steps that Adam makes of them, which are those over the root of the squares.
WAYS = {
    "SGD": ("kept", "projected", "tangent"),
    "AdamW": ("kept", "projected", "tangent", "steps"),
}
STEPS, FIRST, EVERY, BATCH = 500, 300, 100, 64
BY_NAME = {task.name: task for task in problems.TASKS}
TASKS = {
    "MLP": dataclasses.replace(
        BY_NAME["MLP"], build=problems.from_linen(models.MLP((256, 256, 10)))
    ),
    "CNN": BY_NAME["CNN"],
    "transformer": dataclasses.replace(
        BY_NAME["transformer, nnx"],
        build=problems.from_nnx(lambda rngs: models.NnxTransformer(7, 64, rngs)),
    ),
    "LSTM": dataclasses.replace(
        BY_NAME["LSTM"], build=problems.from_linen(models.Recurrent(nn.OptimizedLSTMCell, 64, 10))
    ),
}


@dataclass(frozen=True)
class Config:
    """Trains four networks with cuts, and with moments that know of them or not.

    What is in the file is not run again.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    """Networks."""
    optimizers: tuple[str, ...] = ("SGD", "AdamW")
    """SGD has a momentum of 0.9; AdamW a rate of 0.001 and a decay of 0.01."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the weights and the batches."""
    share: float = 0.25
    """Share of the squares of each kernel that the first cut removes."""
    file: Path = RESULTS
    """Results, read and written."""
    show_only: bool = False
    """Print the table of the file."""


def projections(matrices: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns projections on the leading directions of a stack: those of columns and of rows."""
    u, _, vt = jnp.linalg.svd(matrices, full_matrices=False)
    live = jnp.arange(u.shape[-1]) < rank
    u, vt = u * live[None, None], vt * live[None, :, None]
    return u @ u.swapaxes(1, 2), vt.swapaxes(1, 2) @ vt


def beyond(matrices: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns what lies beyond both projections."""
    rest = matrices - left @ matrices
    return rest - rest @ right


def moved(way: str, matrices: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns the moments of a kernel after a cut."""
    if way == "kept":
        return matrices
    if way == "tangent":
        return matrices - beyond(matrices, left, right)
    return left @ matrices @ right


class Kernels:
    """The kernels of a network, as matrices."""

    def __init__(self, params: Any, axes: Any):
        views = find_kernels(params, None, axes).items()
        self.axes = {p: v.axes for p, v in views if isinstance(v, MatrixView) and v.short >= 50}

    def matrices(self, tree: Any) -> dict[str, jax.Array]:
        """Returns those of parameters or of their moments, by path."""
        leaves = leaves_by_path(tree, lambda path, _: path in self.axes)
        return {
            path: MatrixView("", leaf, self.axes[path]).matrices() for path, leaf in leaves.items()
        }

    def replaced(self, tree: Any, matrices: dict[str, jax.Array]) -> Any:
        """Returns a tree with other matrices."""
        back = lambda path, leaf: MatrixView("", leaf, self.axes[path]).from_matrices(
            matrices[path]
        )
        return map_kernels(back, tree, self.axes)

    def ranks(self, params: Any, share: float) -> dict[str, int]:
        """Returns the least ranks that remove no more than a share of the squares."""
        ranks = {}
        for path, matrices in self.matrices(params).items():
            squares = np.sum(np.linalg.svd(matrices, compute_uv=False) ** 2, axis=0)
            left = 1 - np.cumsum(squares) / squares.sum()
            ranks[path] = int(np.argmax(left <= share)) + 1
        return ranks


def squares(matrices: Any) -> jax.Array:
    """Returns the sum of all squares."""
    return sum((jnp.sum(m**2) for m in jax.tree.leaves(matrices)), jnp.zeros(()))


@partial(jax.jit, static_argnames=("kernels", "way", "field"))
def cut(kernels: Kernels, way: str, field: str, params, opt_state, ranks):
    """Returns truncated kernels, the state, the projections, and shares of what lay beyond."""
    matrices = kernels.matrices(params)
    sides = {path: projections(matrices[path], rank) for path, rank in ranks.items()}
    lower = {path: left @ matrices[path] @ right for path, (left, right) in sides.items()}
    moments = kernels.matrices(optax.tree.get(opt_state, field))
    scales: dict[str, Any] = dict.fromkeys(sides, 1.0)
    if way == "steps":
        squared = kernels.matrices(optax.tree.get(opt_state, "nu"))
        scales = {path: jnp.sqrt(matrices) + 1e-8 for path, matrices in squared.items()}
    new = {p: scales[p] * moved(way, moments[p] / scales[p], *sides[p]) for p in sides}
    tree = kernels.replaced(optax.tree.get(opt_state, field), new)
    removed = squares({path: matrices[path] - lower[path] for path in sides})
    lost = squares({path: beyond(moments[path], *sides[path]) for path in sides})
    state = optax.tree.set(opt_state, **{field: tree})
    return kernels.replaced(params, lower), state, sides, removed, lost / squares(moments)


@partial(jax.jit, static_argnames="kernels")
def squares_beyond(kernels: Kernels, params, sides) -> jax.Array:
    """Returns the squares of kernels beyond projections."""
    matrices = kernels.matrices(params)
    return squares({path: beyond(matrices[path], *sides[path]) for path in sides})


class Trainer:
    """Trains one network with one optimizer."""

    def __init__(self, name: str, optimizer: str):
        task = TASKS[name]
        self.data = task.load()
        self.network = network = task.build(self.data.train[0][:BATCH])
        self.field, self.ways = "trace" if optimizer == "SGD" else "mu", WAYS[optimizer]
        rules = {
            "SGD": optax.sgd(task.sgd, momentum=0.9),
            "AdamW": optax.adamw(1e-3, weight_decay=1e-2),
        }
        self.optimizer = rule = rules[optimizer]
        apply = lambda params, x: network.apply((params, {}), x, False, jax.random.key(0))[0]

        def loss(params, x, y):
            return task.loss(apply(params, x), y)

        def step(params, state, x, y):
            updates, state = rule.update(jax.grad(loss)(params, x, y), state, params)
            return optax.apply_updates(params, updates), state

        def accuracy(params, x, y):
            return 100 * (apply(params, x).argmax(-1) == y).mean()

        self.step, self.loss, self.accuracy = map(jax.jit, (step, loss, accuracy))

    def run(self, seed: int, share: float) -> dict[str, dict[str, float]]:
        """Returns the outcome of each way; all share the steps before the first cut."""
        rng, (x, y) = np.random.default_rng(seed), self.data.train
        batches = rng.integers(0, len(x), (STEPS, BATCH))
        params, _ = self.network.init(jax.random.key(seed))
        state = self.optimizer.init(params)
        for batch in batches[:FIRST]:
            params, state = self.step(params, state, x[batch], y[batch])
        kernels = Kernels(params, self.network.axes)
        start = kernels, params, state, kernels.ranks(params, share)
        return {way: self._finish(way, start, batches[FIRST:]) for way in self.ways}

    def _finish(self, way: str, start: tuple, batches: np.ndarray) -> dict[str, float]:
        """Returns the outcome of the steps from the first cut on."""
        (kernels, params, state, ranks), (x, y) = start, self.data.train
        score = lambda params: float(self.loss(params, x[:1000], y[:1000]))
        before = score(params)
        params, state, sides, removed, lost = cut(kernels, way, self.field, params, state, ranks)
        found = {"momentum beyond": float(lost), "before": before, "0 steps": score(params)}
        for number, batch in enumerate(batches, 1):
            params, state = self.step(params, state, x[batch], y[batch])
            if number in (10, EVERY):
                back = squares_beyond(kernels, params, sides) / removed
                found |= {f"{number} steps": score(params), f"back {number}": float(back)}
            if number % EVERY == 0:
                params, state, *_ = cut(kernels, way, self.field, params, state, ranks)
        return found | {"end": score(params), "test": float(self.accuracy(params, *self.data.test))}


def load(file: Path) -> dict[str, Any]:
    """Reads results: how they were made, the seconds that it took, and the outcomes as `runs`."""
    if file.exists():
        return json.loads(file.read_text())
    return {"command": "python -m experiments.moments_after_cuts", "seconds": 0.0, "runs": {}}


def run(config: Config, content: dict[str, Any]) -> None:
    """Runs what is missing, and writes each outcome."""
    content["environment"] = measure.environment()
    for name, optimizer in itertools.product(config.tasks, config.optimizers):
        trainer = Trainer(name, optimizer)
        for seed in config.seeds:
            key = f"{name} / {optimizer} / {config.share:g} / {seed}"
            if key not in content["runs"]:
                begun = time.monotonic()
                content["runs"][key] = trainer.run(seed, config.share)
                content["seconds"] += time.monotonic() - begun
                with output.replacing(config.file) as partial:
                    partial.write_text(json.dumps(content, indent=1) + "\n")


def outcomes(config: Config, runs: dict, name: str, optimizer: str) -> list[dict]:
    """Returns the outcomes of the seeds that are there."""
    keys = (f"{name} / {optimizer} / {config.share:g} / {seed}" for seed in config.seeds)
    return [runs[key] for key in keys if key in runs]


def table(config: Config, runs: dict) -> Table:
    """Means over the seeds: a row for each network, optimizer and way."""
    names = "before", "0 steps", "10 steps", "100 steps", "end", "test", "back 10", "back 100"
    rows = Table("network", "optimizer", "moments", *names, box=None, pad_edge=False)
    for name, optimizer in itertools.product(config.tasks, config.optimizers):
        found = outcomes(config, runs, name, optimizer)
        for way in WAYS[optimizer] if found else ():
            means = {n: np.mean([one[way][n] for one in found]) for n in names}
            digits = lambda name, mean: 1 if name == "test" else 4 if mean < 100 else 0
            cells = (f"{mean:.{digits(name, mean)}f}" for name, mean in means.items())
            rows.add_row(name, optimizer, way, *cells)
    return rows


def differences(config: Config, runs: dict) -> Table:
    """Changes by the projections over all pairs of runs: means with their standard errors."""
    names = "10 steps", "100 steps", "end", "test"
    rows = Table("optimizer", "moments", "runs", *names, box=None, pad_edge=False)
    for optimizer in config.optimizers:
        found = [one for name in config.tasks for one in outcomes(config, runs, name, optimizer)]
        for way in WAYS[optimizer][1:] if len(found) > 1 else ():
            cells = []
            for name in names:
                kept, new = (np.array([one[w][name] for one in found]) for w in ("kept", way))
                change = new - kept if name == "test" else 100 * np.log(new / kept)
                error = change.std(ddof=1) / len(found) ** 0.5
                cells.append(f"{change.mean():+.2f} ({error:.2f})")
            rows.add_row(optimizer, way, str(len(found)), *cells)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Reads the options, runs what is missing, and prints the tables."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    content = load(config.file)
    if not config.show_only:
        run(config, content)
    console = output.console()
    console.print(table(config, content["runs"]))
    console.print(differences(config, content["runs"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
