"""Why pruning to the spikes drifts if labels are wrong, and whether another way of cutting holds.

A network 784-512-512-512-10 learns 10,000 images of which 40 % have redrawn labels. After each
epoch from the fifth on the kernels are cut, in one of several ways. None has a weight decay, sees a
clean label, or has a value that was tuned. Run `python -m experiments.drift --help`.
"""

import itertools
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro
from rich.table import Table

import rmtjax
from experiments import measure, output, training
from experiments.drift.ways import CARRIED, cut, Known, Look, look_at, NOTHING, Way, WAYS
from experiments.study import runs, tasks
from experiments.study.options import DatasetName

RESULTS = Path(__file__).parents[1] / "results" / "drift.json"
START, BATCH, LEAST = 5, 128, 64  # epochs before the first cut; images; the short side of a kernel
LOOKS = 10, 20, 30, 40, 50, 60
RATE, MOMENTUM = 0.05, 0.9
LAST = 5  # epochs of which the mean is the end


@dataclass(frozen=True)
class Config:
    """Trains a network on wrong labels, and cuts it in several ways.

    What is in the file is not run again.
    """

    ways: tuple[str, ...] = tuple(WAYS)
    """Of cutting."""
    seeds: tuple[int, ...] = (0, 1)
    """Of images, labels, weights and batches."""
    dataset: DatasetName = "mnist"
    """Which images."""
    images: int = 10_000
    """To train on."""
    epochs: int = 60
    """Of training."""
    widths: tuple[int, ...] = (512, 512, 512)
    """Of the hidden layers."""
    source: Literal["auto", "tfds", "idx", "download", "sample"] = "auto"
    """Where to take the images from; auto takes the first that has them, but no sample."""
    data_dir: Path | None = None
    """Folder of the data, if not a usual one."""
    file: Path = RESULTS
    """Results, read and written."""
    show_only: bool = False
    """Print the tables of the file."""


def kernels(params: Mapping[str, Any]) -> list[str]:
    """Returns the names of the layers whose kernels are cut."""
    return [name for name, layer in params.items() if min(layer["kernel"].shape) >= LEAST]


def shares(module: training.MLP, params: Any, images: tasks.Images) -> dict[str, Any]:
    """Returns accuracies in %, and the share of the wrong labels that was learnt."""
    return {
        **runs.accuracies(module, params, images),
        "wrong": runs.fitted(module, params, images)["wrong"],
    }


def with_kernels(params: Any, matrices: Mapping[str, jax.Array]) -> Any:
    """Returns parameters with other kernels."""
    return {
        name: {**layer, "kernel": matrices.get(name, layer["kernel"])}
        for name, layer in params.items()
    }


def cut_all(
    params: Any, known: dict[str, Known], way: Way, looks: bool
) -> tuple[Any, dict[str, Known], dict[str, Any]]:
    """Returns the parameters after a cut of all kernels, and what there is to tell of it."""
    results = {name: cut(params[name]["kernel"], one, way) for name, one in known.items()}
    lower = with_kernels(params, {name: result[0] for name, result in results.items()})
    told = {
        name: [float(x) for x in look_at(params[name]["kernel"], one, results[name][2])]
        for name, one in known.items()
        if looks
    }
    return lower, {name: result[1] for name, result in results.items()}, told


def freeze(params: Any, side: str) -> tuple[Any, optax.GradientTransformation]:
    """Returns parameters cut to their spikes as factors, and an optimizer that leaves one alone."""
    thin = rmtjax.factorize(params, rmtjax.plan(params, multiple=1))
    kind: Any = lambda path, _: (
        "frozen" if path[-1] == jax.tree_util.GetAttrKey(side) else "trained"
    )
    rules: Any = {"trained": optax.sgd(RATE, MOMENTUM), "frozen": optax.set_to_zero()}
    return thin, optax.multi_transform(rules, jax.tree_util.tree_map_with_path(kind, thin))


def ranks_of(params: Any) -> dict[str, list[float]]:
    """Returns the ranks of factors by layer, in the place of looks."""
    kernels = {name: layer["kernel"] for name, layer in params.items()}
    return {
        n: [float(k.left.shape[-1])] for n, k in kernels.items() if isinstance(k, rmtjax.Factors)
    }


def train(config: Config, name: str, seed: int) -> dict[str, Any]:
    """Returns the record of a run: a list of what each epoch left, after its cut."""
    task = tasks.Task(config.dataset, config.images, config.images // 10, 0.4)
    images, way = tasks.load(task, seed, config.source, config.data_dir), WAYS[name]
    module = training.MLP(config.widths, centred=True)
    params: Any = module.init(jax.random.key(seed), images.test.images[:1])["params"]
    optimizer = optax.sgd(RATE, MOMENTUM)
    state, epoch = optimizer.init(params), training.make_epoch(module, optimizer)
    params = jax.tree.map(lambda leaf: leaf.copy(), params)  # an epoch takes its arguments over
    known = {one: Known.of(params[one]["kernel"]) for one in kernels(params)}
    history: list[dict[str, Any]] = []
    for number in range(1, config.epochs + 1):
        key = jax.random.fold_in(jax.random.key(seed), number)
        order = training.batches(key, config.images, BATCH)
        params, state, _ = epoch(params, state, images.train, *order)
        told: dict[str, Any] = {}
        if way is not None and way.freezes:
            if number == START:
                params, optimizer = freeze(params, way.freezes)
                state, epoch = optimizer.init(params), training.make_epoch(module, optimizer)
            told["looks"] = ranks_of(params)
        elif way is not None and number >= START:
            if number in LOOKS:
                told["before"] = runs.fitted(module, params, images)["wrong"]
            params, known, told["looks"] = cut_all(params, known, way, number in LOOKS)
            state = optimizer.init(params) if way.resets else state
        history.append({**shares(module, params, images), **told})
    return {"way": name, "seed": seed, "history": history}


def load(file: Path) -> dict[str, Any]:
    """Reads results: how they were made, the seconds that it took, and the runs."""
    if file.exists():
        return json.loads(file.read_text())
    return {"command": "python -m experiments.drift", "seconds": 0.0, "runs": []}


def find(content: dict[str, Any], name: str, seed: int) -> dict[str, Any] | None:
    """Returns the run of a way and a seed, if it is there."""
    same = lambda run: (run["way"], run["seed"]) == (name, seed)
    return next(filter(same, content["runs"]), None)


def run(config: Config, content: dict[str, Any]) -> None:
    """Runs what is missing, and writes each record."""
    content["environment"] = measure.environment()
    for seed, name in itertools.product(config.seeds, config.ways):
        if find(content, name, seed) is None:
            begun = time.monotonic()
            content["runs"].append(train(config, name, seed))
            content["seconds"] += time.monotonic() - begun
            with output.replacing(config.file) as partial:
                partial.write_text(json.dumps(content) + "\n")


def ended(run: dict[str, Any], key: str) -> float:
    """Returns the mean of the last epochs, since one of them says little."""
    return float(np.mean([epoch[key] for epoch in run["history"][-LAST:]]))


def stopped(plain: dict[str, Any]) -> float:
    """Returns the test accuracy at the epoch that clean validation images choose."""
    return max(plain["history"], key=lambda epoch: epoch["validation"])["test"]


def summary(content: dict[str, Any], config: Config) -> Table:
    """Returns a row for each way: the end of each seed, less early stopping, and means."""
    seeds = (f"seed {seed}" for seed in config.seeds)
    table = Table("way", *seeds, "wrong %", "ranks", box=None)
    runs_of = lambda name: [run for seed in config.seeds if (run := find(content, name, seed))]
    early = [stopped(run) for run in runs_of(NOTHING)]
    for name in config.ways:
        found = runs_of(name)
        if not len(found) == len(early) == len(config.seeds):
            continue
        ends = [ended(run, "test") for run in found]
        cells = [f"{end:.2f} ({end - best:+.2f})" for end, best in zip(ends, early, strict=True)]
        wrong = np.mean([ended(run, "wrong") for run in found])
        looks = [run["history"][-1].get("looks", {}) for run in found]
        ranks = (np.mean([look[kernel][0] for look in looks]) for kernel in looks[0])
        table.add_row(name, *cells, f"{wrong:.2f}", ", ".join(f"{rank:.1f}" for rank in ranks))
    return table


def directions(content: dict[str, Any], config: Config) -> Table:
    """Returns a row for each look at the carried noise: means over seeds of what a cut finds."""
    names = "wrong %", "added", "cut", "kernel", *Look._fields
    table = Table("epoch", *names, box=None)
    found = [run for seed in config.seeds if (run := find(content, CARRIED, seed))]
    for number in (n for n in LOOKS if found and n <= min(len(run["history"]) for run in found)):
        last, epochs = ([run["history"][i] for run in found] for i in (number - 2, number - 1))
        after, before, then = (
            np.mean([epoch[key] for epoch in group])
            for group, key in ((epochs, "wrong"), (epochs, "before"), (last, "wrong"))
        )
        wrong = (f"{x:.2f}" for x in (after, before - then, before - after))
        row = [str(number), *wrong]
        for kernel in epochs[0]["looks"]:
            look = np.mean([epoch["looks"][kernel] for epoch in epochs], axis=0)
            table.add_row(*row, kernel, *(f"{x:.2g}" if x else "0" for x in look))
            row = [""] * len(row)
    return table


def main(arguments: list[str] | None = None) -> int:
    """Reads the options, runs what is missing, and prints the tables."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    content = load(config.file)
    if not config.show_only:
        run(config, content)
    console = output.console()
    console.print(summary(content, config))
    console.print(directions(content, config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
