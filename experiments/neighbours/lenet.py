"""LeNet5 on MNIST by dynamical low-rank training: 98.1 % with 13,091 weights in 2205.13571.

Ranks are those that a tolerance tau leaves in each step. The authors count (outputs + 1) numbers
for each rank, and the last layer: the basis of the inputs is not in their count. Here that count
stands beside the numbers of both factors, which are what is stored. Neither has biases.

`python -m experiments.neighbours.lenet` makes the runs that the file lacks, and prints the table.
"""

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments import data, measure, output
from experiments.neighbours import dynamical, networks, sizes, trainer
from experiments.neighbours.tracks import Splits, Track
from experiments.neighbours.trainer import Setting
from experiments.study.results import read, Results

FILE = Path(__file__).parents[1] / "results" / "neighbours" / "lenet.json"
COMMAND = "python -m experiments.neighbours.lenet"
KERNELS: tuple[str, ...] = "Conv_0/kernel", "Conv_1/kernel", "Dense_0/kernel"
WIDE, NARROW = (10, 25, 32), (4, 4, 4)  # the most ranks; of convolutions half, as the authors have
CASES = (0.2, WIDE), (0.22, WIDE), (0.0, NARROW)  # tau, and the most ranks
HYPER = {"rate": 1e-3, "flow": 0.02, "decay": 0.0, "dropout": 0.0}
# Accuracy and count of the paper's table by tau, as mean and standard deviation of five runs.
PAPER = {0.2: "98.1 ± 0.34 %, 13,091"}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
      tau: Relative norm of the tail that a step cuts.
      most: Ranks to begin with, which are not exceeded.
      seed: Of weights and batches.
      steps: Their number, with 64 images each.
    """

    tau: float
    most: tuple[int, int, int]
    seed: int
    steps: int


@dataclass(frozen=True)
class Config:
    """Makes the runs that the file lacks, and shows all of them."""

    seeds: int = 2
    """Seeds 0, 1, ... of each case."""
    steps: int = 800
    """Gradient steps of a run, with 64 images each."""
    file: Path = field(default=FILE)
    """Results, read and written."""
    show_only: bool = False
    """Print the table of the file."""


@cache
def digits() -> Splits:
    """Returns MNIST: 50,000 images to train on, as the authors have it, 10,000 and 10,000."""
    found = data.load("mnist", download=False)
    flat = lambda x: (x / 255).astype(np.float32)
    x, y = flat(found.train_images), found.train_labels.astype(np.int32)
    last = len(x) // 6
    test = flat(found.test_images), found.test_labels.astype(np.int32)
    return Splits((x[:-last], y[:-last]), (x[-last:], y[-last:]), test)


TRACK = Track(
    "lenet", "MNIST, LeNet5", networks.LeNet5(), digits, KERNELS, (), 800, 64, scan=False
)  # fmt: skip


def counted(leaves: Mapping[str, Any]) -> int:
    """Returns the weights as the authors count them: (outputs + 1) for each rank, and all others.

    All 45 runs in their repository have this count. It gives 13,091 for ranks 8, 8 and 15.
    """
    each = lambda leaf: leaf.right.shape[0] * (leaf.right.shape[1] + 1)
    whole = sum(math.prod(leaves[path].shape) for path in leaves if path not in KERNELS)
    return sum(each(leaves[path]) for path in KERNELS) + whole


def perform(run: Run, track: Track = TRACK) -> dict[str, Any]:
    """Returns the record of a run. The test set is looked at once, after the last step."""
    track = replace(track, steps=run.steps)
    setting = Setting(track, 1.0, run.seed, HYPER)
    most = dict(zip(KERNELS, run.most, strict=True))
    training = dynamical.train(setting, trainer.start(setting), most, run.tau)
    judge = lambda part: round(trainer.accuracy(track.module, training.params, track, part), 3)
    leaves = sizes.leaves_by_path(training.params)
    kernels = {path: leaf for path, leaf in leaves.items() if path.endswith("kernel")}
    return {
        "ranks": [kernels[path].right.shape[0] for path in KERNELS],
        "counted": counted(kernels),
        "stored": sum(sizes.numbers(leaf) for leaf in kernels.values()),
        "validation": judge("validation"),
        "test": judge("test"),
        "train_seconds": round(training.seconds, 1),
    }


def open_results(file: Path) -> Results:
    """Returns what is there, or nothing yet."""
    return read(file) or Results({"batch": TRACK.batch, "hyper": HYPER}, COMMAND, [], [])


def run_all(config: Config, console: Console) -> None:
    """Makes the runs that are missing, and writes the file after each."""
    results, environment = open_results(config.file), measure.environment()
    for seed in range(config.seeds):
        for tau, most in CASES:
            run = Run(tau, most, seed, config.steps)
            if results.find(run):
                continue
            begin = time.perf_counter()
            found = perform(run)
            results = results.add(run, found, time.perf_counter() - begin, environment)
            results.save(config.file)
            console.print(f"tau {tau:g}, seed {seed}: {found}", highlight=False, soft_wrap=True)


def of_case(records: list[dict[str, Any]], tau: float) -> list[dict[str, Any]]:
    """Returns the records of a tolerance."""
    return [record for record in records if record["settings"]["tau"] == tau]


def name_of(tau: float, most: tuple[int, ...]) -> str:
    """Returns a case in words: its tolerance, or its ranks if it has none."""
    return f"tau {tau:g}" if tau else f"ranks {', '.join(map(str, most))}"


def told(records: list[dict[str, Any]], tau: float) -> str:
    """Returns accuracy and counts of a tolerance in words; "not run" without."""
    found = of_case(records, tau)
    if not found:
        return "not run"
    test = output.interval(np.array([record["test"] for record in found]), ".1f")
    counts = " and ".join(f"{record['counted']:,}" for record in found)
    stored = " and ".join(f"{record['stored']:,}" for record in found)
    return f"{test} % ({len(found)} seeds), {counts} as they count, {stored} stored"


def table(records: list[dict[str, Any]]) -> Table:
    """Returns a row for each run, by tolerance."""
    shown = Table(box=None, title="LeNet5, MNIST", title_justify="left", pad_edge=False)
    columns = "tau", "seed", "test %", "validation %", "ranks", "as the paper counts", "stored"
    for name in (*columns, "train s", "the paper"):
        shown.add_column(name, justify="right", no_wrap=True)
    for tau, _ in CASES:
        for record in of_case(records, tau):
            settings = record["settings"]
            cells = f"{tau:g}" if tau else "none", str(settings["seed"])
            cells += f"{record['test']:.2f}", f"{record['validation']:.2f}"
            cells += ", ".join(map(str, record["ranks"])), f"{record['counted']:,}"
            cells += f"{record['stored']:,}", f"{record['train_seconds']:.0f}", PAPER.get(tau, "")
            shown.add_row(*cells)
    return shown


def main(arguments: list[str] | None = None) -> int:
    """Reads the options, runs what is missing, and shows it."""
    config = tyro.cli(Config, args=arguments, prog=COMMAND)
    console = Console(width=138)
    if not config.show_only:
        run_all(config, console)
    console.print(table(open_results(config.file).runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
