"""The worth of the columns of a report: how they rank networks, and foretell what a cut costs.

Small networks are trained, alike but for one number: their width, their depth, their batches, their
share of wrong labels, their weight decay or their rate. Kendall's tau tells how a column ranks
them, over all networks and within each family. `python -m experiments.worth` prints the table.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

import rmtjax
from experiments import data, measure, spikes, training

RESULTS = Path(__file__).parent / "results" / "worth.json"
# Those that the shape alone decides rank nothing.
FIXED = {"numerical_rank", "snr_noise", "hill_tail"}
COLUMNS = ("spikes", "distance", *(n for n in rmtjax.SpectralMetrics._fields if n not in FIXED))
TRIVIAL = ("training loss", "margin")
PREDICTORS = TRIVIAL + COLUMNS
TARGETS = ("test accuracy", "gap", "cut")
DRAWS = 400  # of the bootstrap
Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """The numbers that networks differ in."""

    width: int = 128
    depth: int = 2
    batch: int = 50
    wrong: float = 0.0
    decay: float = 0.0
    rate: float = 0.05


FAMILIES: dict[str, tuple[Any, ...]] = {
    "width": (64, 256),
    "depth": (1, 4),
    "batch": (10, 200),
    "wrong": (0.2, 0.4),
    "decay": (1e-3, 5e-3),
    "rate": (0.005, 0.2),
}


@dataclass(frozen=True)
class Config:
    """Trains the networks that the file lacks, and shows how columns rank them."""

    dataset: str = "fashion_mnist"
    """Images to classify, averaged to 14 x 14."""
    source: str = "auto"
    """Where to take them from; auto takes the first that has them."""
    images: int = 2000
    """Training images."""
    epochs: int = 40
    """Epochs of training."""
    early: int = 5
    """The epoch whose columns shall foretell the end."""
    seeds: int = 5
    """Networks of each setting."""
    rank: int = 8
    """Of the cut whose cost shall be foretold."""
    file: Path = RESULTS
    """Results, read and written."""
    show_only: bool = False
    """Print the table of the file."""


def settings() -> Iterator[Setting]:
    """Yields the base, and it with one other number."""
    yield Setting()
    for name, values in FAMILIES.items():
        yield from (replace(Setting(), **{name: value}) for value in values)


def load(config: Config) -> tuple[training.Split, training.Split]:
    """Returns small images: a part of the training set, and the test set."""
    found = data.load(config.dataset, source=config.source)
    whole, test = training.to_device(found, label_noise=0.0, seed=0)
    small = lambda x: x.reshape(-1, 14, 2, 14, 2).astype(jnp.float32).mean((2, 4))
    part = slice(config.images)
    return (
        training.Split(small(whole.images[part]), whole.labels[part]),
        training.Split(small(test.images), test.labels),
    )


def train(setting: Setting, config: Config, split: training.Split) -> Iterator[tuple[int, Any]]:
    """Yields the epochs that are looked at, and the parameters of all seeds after them."""
    module, seeds = training.MLP((setting.width,) * setting.depth), config.seeds
    size = split.labels.shape[1]
    rate = optax.cosine_decay_schedule(setting.rate, config.epochs * -(-size // setting.batch))
    matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    optimizer = optax.chain(
        optax.add_decayed_weights(setting.decay, matrices), optax.sgd(rate, momentum=0.9)
    )
    keys = jax.random.split(jax.random.key(0), seeds)
    params = jax.vmap(lambda key: module.init(key, split.images[:1])["params"])(keys)
    state = jax.vmap(optimizer.init)(params)
    axes: Any = (0, 0, training.Split(None, 0), 0, 0)  # pyright: ignore[reportArgumentType]
    epoch = jax.jit(jax.vmap(training.make_epoch(module, optimizer), axes))
    deal = jax.vmap(lambda key: training.batches(key, size, setting.batch))
    for number in range(1, config.epochs + 1):
        order, weights = deal(jax.vmap(lambda key: jax.random.fold_in(key, number))(keys))  # noqa: B023
        params, state, _ = epoch(params, state, split, order, weights)
        if number in (config.early, config.epochs):
            yield number, params


def columns_of(params: Any) -> list[float]:
    """Returns the mean over the kernels that were analyzed; NaN where there is no number."""
    report = rmtjax.analyze(params)
    rows = [row for row in report.rows if row.spikes is not None]
    known = lambda row, name: (
        getattr(row, name) if name in row._fields else report.metrics[row.path][name]
    )
    table = np.array([[known(row, name) for name in COLUMNS] for row in rows], np.float64)
    return [float(f"{value:.5g}") for value in table.mean(axis=0)]


def judge(module: Any, params: Any, split: training.Split, test: training.Split, rank: int):
    """Returns numbers of one network: trivial predictors, accuracies, and the cost of a cut."""
    logits = module.apply({"params": params}, split.images)
    hit = jax.nn.one_hot(split.labels, logits.shape[-1], dtype=bool)
    own, other = (jnp.where(hit == right, logits, -jnp.inf).max(-1) for right in (True, False))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels).mean()
    lower = rmtjax.truncate(params, rmtjax.plan(params, rule=rmtjax.ranks.fixed(rank), multiple=1))
    accuracies = [training.accuracy(module, tree, test) for tree in (params, lower)]
    return {
        "training loss": float(loss),
        "margin": float(jnp.quantile(own - other, 0.1)),
        "training accuracy": float(100 * (own > other).mean()),
        "test accuracy": accuracies[0],
        "cut": accuracies[0] - accuracies[1],
    }


def run(config: Config, content: dict[str, Any], console: Console) -> None:
    """Trains the settings that are missing; the file is written after each."""
    (clean, test), done = load(config), [record["setting"] for record in content["networks"]]
    for setting in settings():
        if asdict(setting) in done:
            continue
        begin, records = time.perf_counter(), []
        wrong = [
            spikes.with_wrong_labels(clean, setting.wrong, seed).labels
            for seed in range(config.seeds)
        ]
        split = training.Split(clean.images, jnp.stack(wrong))
        module = training.MLP((setting.width,) * setting.depth)
        for epoch, stacked in train(setting, config, split):
            for seed in range(config.seeds):
                params = jax.tree.map(lambda leaf: leaf[seed], stacked)  # noqa: B023
                own = training.Split(split.images, split.labels[seed])
                found = judge(module, params, own, test, config.rank)
                place = {"setting": asdict(setting), "seed": seed, "epoch": epoch}
                records.append(place | found | {"columns": columns_of(params)})
        content["networks"] += records
        content["seconds"] += time.perf_counter() - begin
        content["environment"] = measure.environment()
        save(content, config.file)
        console.print(f"{setting}: {records[-1]['test accuracy']:.2f} %", highlight=False)


def save(content: dict[str, Any], file: Path) -> None:
    """Writes all at once, a network in each line."""
    lines = ",\n".join(map(json.dumps, content["networks"]))
    head = json.dumps({name: part for name, part in content.items() if name != "networks"})
    partial = file.with_suffix(".partial")
    partial.write_text(f'{head[:-1]}, "networks": [\n{lines}\n]}}\n')
    os.replace(partial, file)


def numbers_of(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Returns predictors and targets of networks, one row for each network."""
    rows = [[*(one[name] for name in TRIVIAL), *one["columns"]] for one in records]
    targets = [
        (one["test accuracy"], one["training accuracy"] - one["test accuracy"], one["cut"])
        for one in records
    ]
    return np.array(rows, np.float64), np.array(targets, np.float64)


def taus(predictors: np.ndarray, targets: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Returns Kendall's tau-b of each predictor with each target over weighted pairs."""
    some = pairs.ravel() > 0
    weights = pairs.ravel()[some]

    def order(numbers):
        signs = np.nan_to_num(np.sign(numbers[:, None] - numbers[None]))
        return signs.reshape(-1, numbers.shape[1])[some]

    x, y = order(predictors), order(targets)
    apart = lambda signs: weights @ np.abs(signs)
    both = (x * weights[:, None]).T @ y
    return both / np.maximum(np.sqrt(np.outer(apart(x), apart(y))), 1e-30)


def masks(records: Records) -> list[np.ndarray]:
    """Returns which networks are in each family, with the base."""
    base = asdict(Setting())
    others = lambda one, name: {**one["setting"], name: base[name]}
    return [np.array([others(one, name) == base for one in records]) for name in FAMILIES]


def both_taus(predictors, targets, families: list[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Returns tau over all networks, and its mean over families; networks count so many times."""
    pairs = np.outer(counts, counts).astype(np.float64)
    within = [taus(predictors, targets, pairs * np.outer(mask, mask)) for mask in families]
    return np.stack([taus(predictors, targets, pairs), np.mean(within, axis=0)])


def with_errors(
    predictors: np.ndarray, targets: np.ndarray, records: Records
) -> tuple[np.ndarray, np.ndarray]:
    """Returns taus, and half of their 95 % intervals: a bootstrap over the seeds of a setting."""
    families, rng = masks(records), np.random.default_rng(0)
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(records):
        groups.setdefault(json.dumps(one["setting"]), []).append(index)
    draws = []
    for _ in range(DRAWS):
        drawn = [rng.choice(group, len(group)) for group in groups.values()]
        counts = np.bincount(np.concatenate(drawn), minlength=len(records))
        draws.append(both_taus(predictors, targets, families, counts))
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    return both_taus(predictors, targets, families, np.ones(len(records))), (high - low) / 2


def table(config: Config, networks: Records) -> Table:
    """Returns the table: a predictor in each row, sorted by how it ranks the test accuracy."""
    at = lambda epoch: [one for one in networks if one["epoch"] == epoch]
    end, early = at(config.epochs), at(config.early)
    predictors, targets = numbers_of(end)
    found, errors = with_errors(predictors, targets, end)
    soon, soon_errors = with_errors(numbers_of(early)[0], targets[:, :1], early)
    found, errors = (
        np.concatenate(pair, axis=2) for pair in ((found, soon), (errors, soon_errors))
    )
    heads = [*TARGETS, f"test, epoch {config.early}"]
    parts = [f"{head}\n{part}" for head in heads for part in ("all", "within")]
    rows = Table("", *parts, box=None, pad_edge=False)
    for index in np.argsort(-np.abs(found[0, :, 0])):
        cells = [
            f"{found[part, index, target]:+.2f} ± {errors[part, index, target]:.2f}"
            for target in range(len(heads))
            for part in range(2)
        ]
        rows.add_row(PREDICTORS[index], *cells)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Reads the options, trains what is missing, and shows the table."""
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.worth")
    console = Console(width=138)
    empty = {"command": "python -m experiments.worth", "seconds": 0.0, "networks": []}
    content = json.loads(config.file.read_text()) if config.file.exists() else empty
    if not config.show_only:
        run(config, content, console)
    console.print(table(config, content["networks"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
