"""What a truncation can change in the predictions: bounds by certificate, beside measurements.

An MLP is trained with an L2 penalty on its kernels. Each kernel is cut at several ranks, and
all at once at the rank of each that random matrix theory finds. `rmtjax.certificate` bounds
what that does on the test images; both networks are run in float64 beside it.
"""

import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table
from scipy.special import log_softmax

import rmtjax
from experiments import data, measure, output, training

Row = dict[str, Any]
RULE = rmtjax.ranks.bema(level=0.1)  # the committed results were made with this level
OUT = Path(__file__).parent / "results" / "certificate.json"


@dataclass(frozen=True)
class Config:
    """Compares bounds on what truncations change with what they do change."""

    dataset: Literal["mnist", "fashion_mnist"] = "mnist"
    """Images to classify."""
    source: Literal["auto", "tfds", "idx", "download", "sample"] = "auto"
    """Where to take them from; auto takes the first that has them."""
    data_dir: Path | None = None
    """Folder of the data, if not a usual one."""
    widths: tuple[int, ...] = (256,)
    """Widths of the hidden layers."""
    epochs: int = 10
    """Epochs of training."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 0.08
    """Of SGD with momentum 0.9, at the start; it falls to 0 by a cosine."""
    l2: float = 2.5e-4
    """Coefficient of the squares of the kernels' entries in the loss."""
    ranks: tuple[int, ...] = (1, 5, 8, 9, 20, 50, 100, 200, 250)
    """Each kernel is cut at those of these that are below its shorter side."""
    seed: int = 0
    """Of the weights and the batches."""
    out: Path = OUT
    """JSON file for the rows and all that they depend on."""

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.widths or min(self.ranks, default=0) < 0:
            raise ValueError("`widths` needs a number, and `ranks` must not be negative.")


def train(config: Config, module: training.MLP, split: training.Split) -> Any:
    """The trained parameters."""
    size = split.labels.size
    steps = config.epochs * -(-size // config.batch_size)
    is_kernel = lambda key, _: jax.tree_util.keystr(key).endswith("['kernel']")
    optimizer = optax.chain(
        optax.add_decayed_weights(2 * config.l2, partial(jax.tree.map_with_path, is_kernel)),
        optax.sgd(optax.cosine_decay_schedule(config.learning_rate, steps), momentum=0.9),
    )
    key = jax.random.key(config.seed)
    params = module.init(key, split.images[:1])["params"]
    opt_state, epoch = optimizer.init(params), training.make_epoch(module, optimizer)
    for number in range(config.epochs):
        order = training.batches(jax.random.fold_in(key, number), size, config.batch_size)
        params, opt_state, _ = epoch(params, opt_state, split, *order)
    return params


def logits_in_float64(params: Any, layers: tuple[str, ...], inputs: jax.Array) -> np.ndarray:
    """The network by NumPy."""
    hidden = np.asarray(inputs, np.float64)
    for layer in layers:
        kernel, bias = (np.asarray(params[layer][name], np.float64) for name in ("kernel", "bias"))
        hidden = (hidden if layer == layers[0] else np.maximum(hidden, 0)) @ kernel + bias
    return hidden


def mean_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Cross-entropy."""
    return -float(log_softmax(logits, axis=1)[np.arange(labels.size), labels].mean())


def squares(params: Any, layers: tuple[str, ...]) -> float:
    """The sum of the squares of the kernels' entries."""
    return sum(float((np.asarray(params[layer]["kernel"], float) ** 2).sum()) for layer in layers)


@partial(jax.jit, static_argnames="layers")
def certify(params: Any, cut: Any, inputs: jax.Array, labels: jax.Array, layers: tuple[str, ...]):
    """The certificate, compiled once for all cuts."""
    return rmtjax.certificate.certify(params, cut, inputs, labels=labels, layers=layers)


def compare(params: Any, cut: Any, inputs: jax.Array, labels: jax.Array, l2: float) -> Row:
    """The bounds on one cut and what it does, over all inputs."""
    layers = tuple(f"Dense_{depth}" for depth in range(len(params)))
    found = certify(params, cut, inputs, labels, layers)
    before, after = (logits_in_float64(tree, layers, inputs) for tree in (params, cut))
    same = before.argmax(axis=1) == after.argmax(axis=1)
    change, bound = np.abs(after - before), np.asarray(found.change, np.float64)
    increase = mean_loss(after, np.asarray(labels)) - mean_loss(before, np.asarray(labels))
    penalty = l2 * (squares(cut, layers) - squares(params, layers))
    broken = (
        (change > bound).sum(),
        (np.asarray(found.unchanged) & ~same).sum(),
        increase > float(found.loss),
        bool(found.lowers_loss(l2)) and increase + penalty >= 0,
    )
    median = lambda values: float(np.median(values.max(axis=1)))
    return {
        "bound_median": median(bound),
        "bound_largest": float(bound.max()),
        "change_median": median(change),
        "change_largest": float(change.max()),
        "violations": int(sum(broken)),
        "certified": 100 * float(np.mean(found.unchanged)),
        "same": 100 * float(same.mean()),
        "loss_bound": float(found.loss),
        "loss_change": increase,
        "penalty_change": penalty,
        "certified_lower": bool(found.lowers_loss(l2)),
        "lower": increase + penalty < 0,
    }


def cuts(config: Config, params: Any) -> Iterator[tuple[Row, Any]]:
    """Yields each cut: the kernels that it cuts, how, and the tree after it."""
    every, total = params, []
    for path, row in rmtjax.plan(params, rule=RULE).items():
        spikes = None if row.fit is None else int(row.fit.num_spikes)
        ranks = {rank for rank in (*config.ranks, spikes) if rank is not None}
        ranks = sorted(rank for rank in ranks if rank < min(row.shape))
        for rank in ranks:
            kind = "RMT" if rank == spikes else ""
            cut = training.truncate_at(params, path, rank)
            yield {"kernel": path, "rank": str(rank), "rule": kind}, cut
        if ranks:
            chosen = spikes if spikes in ranks else ranks[-1]
            every = training.truncate_at(every, path, chosen)
            total.append(str(chosen))
    yield {"kernel": "all", "rank": ", ".join(total), "rule": ""}, every


COLUMNS = {  # heading, and what stands under it
    "kernel": lambda row: row["kernel"].removesuffix("/kernel"),
    "rank": lambda row: f"{row['rank']} {row['rule']}".strip(),
    "bound": lambda row: f"{row['bound_median']:.3g}",
    "largest": lambda row: f"{row['bound_largest']:.3g}",
    "change": lambda row: f"{row['change_median']:.3g}",
    "largest ": lambda row: f"{row['change_largest']:.3g}",
    "ratio": lambda row: f"{row['bound_median'] / (row['change_median'] or math.nan):.4g}",
    "broken": lambda row: str(row["violations"]),
    "certified %": lambda row: f"{row['certified']:.2f}",
    "same %": lambda row: f"{row['same']:.2f}",
    "CE bound": lambda row: f"{row['loss_bound']:+.2g}",
    "CE": lambda row: f"{row['loss_change']:+.2g}",
    "L2": lambda row: f"{row['penalty_change']:+.2g}",
    "certain": lambda row: "yes" if row["certified_lower"] else "no",
    "lower": lambda row: "yes" if row["lower"] else "no",
}


def to_table(rows: list[Row]) -> Table:
    """A row for each cut."""
    table = Table(box=None)
    for number, heading in enumerate(COLUMNS):
        table.add_column(heading, justify="right" if number > 1 else "left")
    for row in rows:
        table.add_row(*(cell(row) for cell in COLUMNS.values()))
    return table


def run(config: Config, console: Console) -> tuple[str, float, list[Row]]:
    """Trains, cuts and compares; the data set in words, the accuracy, and a row a cut."""
    dataset = data.load(config.dataset, source=config.source, data_dir=config.data_dir)
    console.print(data.describe(dataset), highlight=False)
    train_split, test = training.to_device(dataset, label_noise=0.0, seed=config.seed)
    module = training.MLP(config.widths)
    params = train(config, module, train_split)
    accuracy = training.accuracy(module, params, test)
    console.print(f"test accuracy before a cut: {accuracy:.2f} %", highlight=False)
    inputs = test.images.reshape(len(test.images), -1).astype(jnp.float32) / 255
    rows = [
        head | compare(params, cut, inputs, test.labels, config.l2)
        for head, cut in cuts(config, params)
    ]
    return data.describe(dataset), accuracy, rows


def main(arguments: list[str] | None = None) -> int:
    """Reads the options, prints the table and writes the rows."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config, console = tyro.cli(Config, args=arguments, description=__doc__), output.console()
    begin = time.perf_counter()
    dataset, accuracy, rows = run(config, console)
    console.print(to_table(rows))
    console.print(
        "bound, change: of the logits of an image the one that changes most, median and largest "
        "over the test images; ratio: of the medians; broken: bounds that did not hold; "
        "certified, same: predictions that can not change, and that do not; CE, L2: change of the "
        "cross-entropy and of the penalty; lower: their sum falls, and does so for certain. "
        "all: each kernel at its RMT rank, or else at the highest tried.",
        style="dim",
    )
    found = {
        "command": shlex.join(["python", "-m", "experiments.certificate", *arguments]),
        "configuration": dataclasses.asdict(config) | {"data_dir": None, "out": config.out.name},
        "environment": measure.environment(),
        "seconds": round(time.perf_counter() - begin, 1),
        "dataset": dataset.partition(" from ")[0],  # no path of a machine
        "test_accuracy": accuracy,
        "rows": rows,
    }
    with output.replacing(config.out) as path:
        path.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
