"""Part a: accuracy against the number of singular values kept, and where the rules cut.

The figure of the first paper (arXiv 2303.08986): the first kernel of a trained network is
truncated to each rank, and nothing is trained again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

import rmtjax
from experiments import measure, training
from experiments.study import runs
from experiments.study.arms import count_parameters, RMT
from experiments.study.options import check_positive, DatasetName, Options
from experiments.study.outcomes import Outcome, PLAIN, summarise, tasks
from experiments.study.recipes import Recipe
from experiments.study.runs import Run
from experiments.study.tables import summary_table
from experiments.study.tasks import Images, Task

RULES = {
    "RMT": RMT,
    "Gavish-Donoho": rmtjax.ranks.gavish_donoho(),
    "energy 0.9": rmtjax.ranks.energy(0.9),
}
WHOLE = "all kept"


@dataclass(frozen=True)
class Config(Options):
    """Truncates the first kernel of trained networks to each rank, and trains nothing again."""

    datasets: tuple[DatasetName, ...] = ("mnist", "fashion_mnist")
    """Each with all its images."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """A network for each."""
    widths: tuple[int, ...] = (1000,)
    """Of the hidden layers."""
    epochs: int = 10
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
    """A run for each data set and seed."""
    del find
    recipe = Recipe(config.epochs, config.batch_size, config.learning_rate, config.momentum)
    module = training.MLP(config.widths)
    return [
        Run(PLAIN, seed, Task(dataset, None, 0, 0.0), module, recipe)
        for dataset in config.datasets
        for seed in config.seeds
    ]


def perform(run: Run, images: Images) -> dict[str, Any]:
    """The record of a run: that of the training, the curve, and the cut of each rule."""
    record, params = runs.watch(run, images)
    report = rmtjax.analyze(params, rule=RMT)
    curve = measure.truncation_curve(run.module, params, report, images.test)
    cuts = {name: cut(run, params, curve["path"], rule, images) for name, rule in RULES.items()}
    points = [[rank, round(accuracy, 2)] for rank, accuracy in curve["points"]]
    return record | {"curve": {"path": curve["path"], "points": points, "cuts": cuts}}


def cut(run: Run, params: Any, path: str, rule: Any, images: Images) -> dict[str, Any]:
    """The network with one kernel truncated as a rule says."""
    plan = rmtjax.plan(params, rule=rule, where=lambda name, leaf: name == path, multiple=1)
    lower = rmtjax.truncate(params, plan)
    return {
        "rank": plan[path].rank,
        "test": runs.accuracies(run.module, lower, images)["test"],
        "parameters": count_parameters(rmtjax.factorize(params, plan)),
        "reason": plan[path].reason,
    }


def cut_outcomes(records: list[dict[str, Any]]) -> list[Outcome]:
    """The networks as they are and as each rule cuts them."""
    found = []
    for record in records:
        settings, path = record["settings"], record["curve"]["path"]
        whole = {"test": record["final"]["test"], "parameters": record["parameters"]}
        for arm, cut in {WHOLE: whole, **record["curve"]["cuts"]}.items():
            found.append(
                Outcome(
                    Task(**settings["task"]),
                    arm,
                    settings["seed"],
                    test=cut["test"],
                    parameters=cut["parameters"],
                    ranks={path: cut["rank"]} if "rank" in cut else {},
                )
            )
    return found


def tables(records: list[dict[str, Any]]) -> list[Table]:
    """A table for each data set: what the cut of each rule costs."""
    found = cut_outcomes(records)
    return [
        summary_table(task.title(), summarise(found, task, (WHOLE,)), (WHOLE,))
        for task in tasks(found)
    ]
