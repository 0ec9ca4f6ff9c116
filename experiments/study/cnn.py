"""Part e: pruning of convolutions and dense kernels while a small CNN is trained.

No mistake of the published CNN is repeated: it has no ReLU on its logits, no softmax over
the batch, and no dropout that is still active when it is tested. Its first convolution has
a short side of 9 and is left alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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

REFERENCES = (PLAIN, EARLY_STOPPING)


@dataclass(frozen=True)
class Config(Options):
    """Trains a small CNN with and without pruning, on clean and on redrawn labels."""

    dataset: DatasetName = "fashion_mnist"
    """Images to classify."""
    images: int = 10_000
    """Training images."""
    validation: int = 1_000
    """Training images held out in all arms, with clean labels."""
    noises: tuple[float, ...] = (0.0, 0.4)
    """Shares of the labels redrawn."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A network for each."""
    arms: tuple[str, ...] = (PLAIN, "RMT")
    """Early stopping and the single cut at the end come with `nothing`."""
    channels: tuple[int, ...] = (32, 64)
    """Of the convolutions."""
    width: int = 256
    """Of the dense hidden layer."""
    epochs: int = 40
    """Of training."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 0.05
    """Of SGD, constant."""
    momentum: float = 0.9
    """Of SGD."""
    prune_start: int = 5
    """Epoch after which the first pruning comes, then after each."""

    def __post_init__(self):
        names = ("images", "channels", "width", "epochs", "batch_size", "prune_start")
        check_positive(self, *names)
        check_shares(self, "noises")
        check_choices(self, "arms", (PLAIN, *ARMS))


def make_run(config: Config, noise: float, arm: str, seed: int) -> Run:
    """The run of an arm."""
    recipe = Recipe(
        config.epochs,
        config.batch_size,
        config.learning_rate,
        config.momentum,
        pruning=ARMS.get(arm),
        start=config.prune_start if arm in ARMS else 0,
    )
    task = Task(config.dataset, config.images, config.validation, noise)
    module = training.CNN(config.channels, config.width)
    return Run(arm, seed, task, module, recipe, (config.epochs,) if arm == PLAIN else ())


def plan_runs(config: Config, find: Callable) -> list[Run]:
    """A run for each noise, seed and arm."""
    del find
    return [
        make_run(config, noise, arm, seed)
        for noise in config.noises
        for seed in config.seeds
        for arm in config.arms
    ]


def perform(run: Run, images: Images) -> dict[str, Any]:
    """The record of a run."""
    return runs.watch(run, images)[0]


def tables(records: list[dict[str, Any]]) -> list[Table]:
    """The arms of each task."""
    found = outcomes(records)
    return [
        summary_table(task.title(), summarise(found, task, REFERENCES), REFERENCES)
        for task in tasks(found)
    ]
