"""The command line: `python -m experiments.tasks --help`."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments.tasks import compare, problems

RESULTS = Path(__file__).parents[1] / "results" / "tasks.json"
Found = dict[str, list[dict]]  # outcomes of the seeds, by "task / optimizer / arm"


@dataclass(frozen=True)
class Config:
    """Trains ten tasks with one recipe: never cut, guarded by the loss, and by squares alone.

    What is in the file is not run again.
    """

    tasks: tuple[str, ...] = tuple(task.name for task in problems.TASKS)
    """Networks."""
    optimizers: tuple[str, ...] = compare.OPTIMIZERS
    """SGD has a momentum of 0.9; AdamW a rate of 0.001 and a decay of 0.01."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run for each: of the weights and the batches."""
    file: Path = RESULTS
    """Results, read and written."""
    show_only: bool = False
    """Print the table of the file."""


def key_of(task: str, optimizer: str, arm: str) -> str:
    """The name of some runs in the file."""
    return f"{task} / {optimizer} / {arm}"


def save(found: Found, file: Path) -> None:
    """Writes all at once: a run that is stopped leaves a whole file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(partial, file)


def run(config: Config, found: Found, console: Console) -> None:
    """Runs what is missing."""
    for task in (task for task in problems.TASKS if task.name in config.tasks):
        data = task.load()
        network = task.build(data.train[0][: task.batch])
        for optimizer in config.optimizers:
            for arm in compare.ARMS:
                key = key_of(task.name, optimizer, arm)
                if len(found.get(key, [])) == len(config.seeds):
                    continue
                outcomes = compare.run(task, data, network, optimizer, arm, config.seeds)
                found[key] = [outcome._asdict() for outcome in outcomes]
                save(found, config.file)
                console.print(f"{key}: {[round(outcome.thin, 3) for outcome in outcomes]}")


def changes(task: problems.Task, optimizer: str, arm: str, found: Found) -> np.ndarray:
    """What each seed gains over never being cut: points, or per cent of the loss."""
    plain = np.array([one["test"] for one in found[key_of(task.name, optimizer, "never cut")]])
    thin = np.array([one["thin"] for one in found[key_of(task.name, optimizer, arm)]])
    return thin - plain if task.in_points else 100 * (plain - thin) / plain


def table(config: Config, found: Found) -> tuple[Table, list[str]]:
    """A row for each task and optimizer, and a line for each arm over all of them."""
    arms = [arm for arm, options in compare.ARMS.items() if options is not None]
    columns = ("network", "learns", "optimizer", "never cut")
    rows = Table(
        *columns, *(f"{arm}: {name}" for arm in arms for name in ("mean", "worst", "stored"))
    )
    worst: dict[str, list[float]] = {arm: [] for arm in arms}
    stored: dict[str, list[float]] = {arm: [] for arm in arms}
    for task in problems.TASKS:
        for optimizer in config.optimizers:
            if any(key_of(task.name, optimizer, arm) not in found for arm in compare.ARMS):
                continue
            plain = np.mean(
                [one["test"] for one in found[key_of(task.name, optimizer, "never cut")]]
            )
            cells = [
                task.name,
                task.learns,
                optimizer,
                f"{plain:.1f}" if task.in_points else f"{plain:.4f}",
            ]
            for arm in arms:
                change = changes(task, optimizer, arm, found)
                sizes = [one["stored"] for one in found[key_of(task.name, optimizer, arm)]]
                worst[arm].append(change.min())
                stored[arm] += sizes
                cells += [f"{change.mean():+.2f}", f"{change.min():+.2f}", f"{np.mean(sizes):.2f}"]
            rows.add_row(*cells)
    lines = [
        f"{arm}: the worst of {len(stored[arm])} runs changes by {min(worst[arm]):+.2f}; "
        f"the median of stored parameters is {np.median(stored[arm]):.2f}"
        for arm in arms
        if stored[arm]
    ]
    return rows, lines


def main(arguments: list[str] | None = None) -> int:
    """Reads the options, runs what is missing, and shows it."""
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.tasks")
    console = Console() if Console().is_terminal else Console(width=150)
    found: Found = json.loads(config.file.read_text()) if config.file.exists() else {}
    try:
        if not config.show_only:
            run(config, found, console)
    except KeyboardInterrupt:
        console.print("Stopped. What was finished is in the file; the same command goes on.")
        return 130
    rows, lines = table(config, found)
    console.print(rows, *lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
