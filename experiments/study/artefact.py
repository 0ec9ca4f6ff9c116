"""Part d: what a ReLU on the logits does to a network that nothing is cut from.

The code published with the first papers has one. A class whose logit is negative for all
images then has no gradient: it is never predicted again, and costs a tenth of the test set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from experiments import training
from experiments.study import runs
from experiments.study.options import check_positive, DatasetName, Options
from experiments.study.outcomes import outcomes, summarise, tasks
from experiments.study.recipes import Recipe
from experiments.study.runs import Run
from experiments.study.tables import summary_table
from experiments.study.tasks import Images, Task

LINEAR, RELU = "linear logits", "ReLU on logits"


@dataclass(frozen=True)
class Config(Options):
    """Trains the published network with and without a ReLU on its logits; cuts nothing."""

    datasets: tuple[DatasetName, ...] = ("mnist", "fashion_mnist")
    """Each with all its images."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Two networks for each."""
    widths: tuple[int, ...] = (1000,)
    """Of the hidden layers."""
    epochs: int = 9
    """Of training."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 0.08
    """Of SGD, constant."""
    momentum: float = 0.9
    """Of SGD."""

    def __post_init__(self):
        check_positive(self, "widths", "epochs", "batch_size")


def plan_runs(config: Config, find: Callable) -> list[Run]:
    """Two runs for each data set and seed."""
    del find
    recipe = Recipe(config.epochs, config.batch_size, config.learning_rate, config.momentum)
    modules = {
        LINEAR: training.MLP(config.widths),
        RELU: training.MLP(config.widths, relu_logits=True),
    }
    return [
        Run(arm, seed, Task(dataset, None, 0, 0.0), module, recipe)
        for dataset in config.datasets
        for seed in config.seeds
        for arm, module in modules.items()
    ]


def perform(run: Run, images: Images) -> dict[str, Any]:
    """The record of a run."""
    return runs.watch(run, images)[0]


def missed(record: dict[str, Any]) -> list[int]:
    """Number of classes that no test image was given, after each epoch."""
    return record["history"].get("never", [0] * len(record["history"]["test"]))


def seed_table(records: list[dict[str, Any]], task: Task) -> Table:
    """A row for each run: accuracy and classes never predicted, by epoch."""
    own = [record for record in records if Task(**record["settings"]["task"]) == task]
    table = Table(box=None, title=f"{task.title()}: test % by epoch", title_justify="left")
    for column in ("logits", "seed", *map(str, range(1, len(own[0]["history"]["test"]) + 1))):
        table.add_column(column, justify="left" if column == "logits" else "right")
    table.add_column("classes missed, by epoch")
    for record in sorted(own, key=lambda record: record["settings"]["arm"]):
        arm, seed = record["settings"]["arm"], record["settings"]["seed"]
        tests = (f"{test:.2f}" for test in record["history"]["test"])
        table.add_row(arm, str(seed), *tests, " ".join(map(str, missed(record))))
    return table


def tables(records: list[dict[str, Any]]) -> list[Table]:
    """Two tables for each data set: the arms, and each run by epoch."""
    found = outcomes(records)
    shown = []
    for task in tasks(found):
        shown.append(summary_table(task.title(), summarise(found, task, (LINEAR,)), (LINEAR,)))
        shown.append(seed_table(records, task))
    return shown
