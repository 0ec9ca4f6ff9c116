"""Part b: labels redrawn at random, and which arms learn the wrong ones by heart.

Weight decay, alone and with two ways of pruning, and dropout get the value with the highest
accuracy on clean validation images at the last epoch, of a small grid, on the core task with
a seed of its own. That these images are clean favours them, as it does early stopping. Arms
with a weight decay of 5e-4, which is customary, have nothing tuned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.table import Table

from experiments import training
from experiments.study import runs
from experiments.study.arms import ARMS
from experiments.study.options import (
    check_choices,
    check_positive,
    check_shares,
    DatasetName,
    Options,
)
from experiments.study.outcomes import EARLY_STOPPING, outcomes, PLAIN, summarise, tasks
from experiments.study.recipes import Recipe
from experiments.study.runs import Run
from experiments.study.tables import summary_table
from experiments.study.tasks import Images, Task

DECAY, DROPOUT = "weight decay", "dropout"
TUNED = (DECAY, DROPOUT, f"RMT, {DECAY}", f"fixed rank 10, {DECAY}")
UNTUNED = tuple(f"{arm}{DECAY} 5e-4" for arm in ("", "RMT, ", "fixed rank 10, "))
CHOICES = (PLAIN, *TUNED, *ARMS, *UNTUNED)
REFERENCES = (PLAIN, EARLY_STOPPING, "fixed rank 10", DECAY)


class Cell(NamedTuple):
    """A task, and how long all arms train on it."""

    task: Task
    epochs: int
    prune_start: int


@dataclass(frozen=True)
class Config(Options):
    """Redraws a share of the labels at random, and looks who learns them by heart."""

    dataset: DatasetName = "mnist"
    """Which images."""
    images: int = 10_000
    """Training images."""
    validation: int = 1_000
    """Training images held out in all arms, with clean labels."""
    label_noise: float = 0.4
    """Share of the labels redrawn."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """A run of each arm for each."""
    arms: tuple[str, ...] = CHOICES
    """What is compared; early stopping and the single cuts come with `nothing`."""
    widths: tuple[int, ...] = (512, 512)
    """Of the hidden layers."""
    initial_variance: float = 1 / 3
    """Of an entry of a kernel, times its inputs."""
    centred: bool = False
    """Whether the inputs are in [-1, 1] and not in [0, 1]."""
    epochs: int = 60
    """Of training."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 0.05
    """Of SGD, constant."""
    momentum: float = 0.9
    """Of SGD."""
    prune_start: int = 5
    """Epoch after which the first pruning comes, then after each."""
    cuts: tuple[int, ...] = (5, 10, 20, 40)
    """Epochs after which a copy of the plain network is cut once; the last is one anyway."""
    weight_decays: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """To choose from."""
    dropouts: tuple[float, ...] = (0.2, 0.5, 0.8)
    """To choose from."""
    tuning_seed: int = 100
    """Of the runs that choose."""

    def __post_init__(self):
        check_positive(self, "images", "validation", "widths", "epochs", "batch_size")
        check_positive(self, "prune_start")
        check_shares(self, "label_noise", "dropouts")
        check_choices(self, "arms", CHOICES)
        if self.tuning_seed in self.seeds:
            raise ValueError(f"`tuning_seed` must not be among the seeds, got {self.tuning_seed}.")

    def cells(self) -> list[Cell]:
        """The tasks; what is tuned is tuned on the first."""
        task = Task(self.dataset, self.images, self.validation, self.label_noise)
        return [Cell(task, self.epochs, self.prune_start)]


def ingredients(arm: str, value: float) -> tuple[str, float, float]:
    """The pruning, weight decay and dropout of an arm; a tuned one has a value."""
    words = arm.removesuffix(", tuning")
    if DECAY in words:
        pruning, _, fixed = words.partition(DECAY)
        return pruning.rstrip(", "), float(fixed or value), 0.0
    return (DROPOUT, 0.0, value) if words == DROPOUT else (words, 0.0, 0.0)


def make_run(config: Config, cell: Cell, arm: str, seed: int, value: float = 0.0) -> Run:
    """The run of an arm; a tuned one has a value."""
    pruning, decay, dropout = ingredients(arm, value)
    recipe = Recipe(
        cell.epochs,
        config.batch_size,
        config.learning_rate,
        config.momentum,
        weight_decay=decay,
        pruning=ARMS.get(pruning),
        start=cell.prune_start if pruning in ARMS else 0,
    )
    cuts = {*(epoch for epoch in config.cuts if epoch < cell.epochs), cell.epochs}
    module = training.MLP(
        config.widths,
        dropout=dropout,
        initial_variance=config.initial_variance,
        centred=config.centred,
    )
    return Run(arm, seed, cell.task, module, recipe, tuple(sorted(cuts)) if arm == PLAIN else ())


Find = Callable[[Any], dict[str, Any] | None]


def grids(config: Config) -> dict[str, dict[float, Run]]:
    """The runs that choose the value of each tuned arm, by value."""
    core = config.cells()[0]
    values = lambda arm: config.dropouts if arm == DROPOUT else config.weight_decays
    make = lambda arm, value: make_run(config, core, f"{arm}, tuning", config.tuning_seed, value)
    return {
        arm: {value: make(arm, value) for value in values(arm)}
        for arm in TUNED
        if arm in config.arms
    }


def choose(grid: dict[float, Run], find: Find) -> float | None:
    """The value with the best clean validation accuracy; None while runs are missing."""
    records = {value: find(run) for value, run in grid.items()}
    known = {v: record["final"]["validation"] for v, record in records.items() if record}
    return max(known, key=known.__getitem__) if len(known) == len(grid) else None


def plan_runs(config: Config, find: Find) -> list[Run]:
    """All runs; those of a tuned arm once its grid is done."""
    tuning = grids(config)
    found = [run for grid in tuning.values() for run in grid.values()]
    chosen = {arm: choose(grid, find) for arm, grid in tuning.items()}
    for cell in config.cells():
        for seed in config.seeds:
            for arm in config.arms:
                value = chosen.get(arm, 0.0)
                if value is not None:
                    found.append(make_run(config, cell, arm, seed, value))
    return found


def perform(run: Run, images: Images) -> dict[str, Any]:
    """The record of a run."""
    return runs.watch(run, images)[0]


def tables(records: list[dict[str, Any]]) -> list[Table]:
    """The choice of the tuned values, then the arms of each task."""
    tuning = [r for r in records if r["settings"]["arm"].endswith(", tuning")]
    choice = Table("value", "clean validation %", "test %", box=None, title="tuning")
    for record in tuning:
        settings, final = record["settings"], record["final"]
        arm = settings["arm"].removesuffix(", tuning")
        value = settings["recipe"]["weight_decay"] or settings["module"]["dropout"]
        choice.add_row(f"{arm} {value:g}", f"{final['validation']:.1f}", f"{final['test']:.2f}")
    found = outcomes(record for record in records if record not in tuning)
    arms = [
        summary_table(task.title(), summarise(found, task, REFERENCES), REFERENCES)
        for task in tasks(found)
    ]
    return [choice, *arms] if tuning else arms
