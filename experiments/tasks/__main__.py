"""The command line: `python -m experiments.tasks --help`."""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments import measure
from experiments.tasks import compare, problems

RESULTS = Path(__file__).parents[1] / "results" / "tasks.json"
LIMITS = {
    "value_fn": (1, 2),
    "max_removed": (3, 3),
    "size": (1, 2),
}  # points, and per cent of the loss
Found = dict[str, list[dict]]  # outcomes of the seeds, by "task / optimizer / arm"


@dataclass(frozen=True)
class Config:
    """Trains ten tasks with one recipe: never cut, guarded by the loss, and by squares alone.

    What is in the file is not run again. It holds its seeds in their order.
    """

    tasks: tuple[str, ...] = tuple(task.name for task in problems.TASKS)
    """Networks."""
    optimizers: tuple[str, ...] = compare.OPTIMIZERS
    """SGD has a momentum of 0.9; AdamW a rate of 0.001 and a decay of 0.01."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run for each: of the weights and the batches."""
    arms: tuple[str, ...] = compare.ARMS[:3]
    """Ways to prune; `size` asks for 45 % of each kernel and lets the rest fade."""
    file: Path = RESULTS
    """Results, read and written."""
    reuse: Path | None = None
    """Results of seeds 0, 1, 2 and so on: their runs that are never cut are not made again."""
    show_only: bool = False
    """Print the table of the file."""


def key_of(task: str, optimizer: str, arm: str) -> str:
    """The name of some runs in the file."""
    return f"{task} / {optimizer} / {arm}"


def load(file: Path) -> dict:
    """Reads results: how they were made, the seconds that it took, and the outcomes as `runs`."""
    if file.exists():
        return json.loads(file.read_text())
    return {"command": "python -m experiments.tasks", "seconds": 0.0, "runs": {}}


def save(content: dict, file: Path) -> None:
    """Writes all at once: a run that is stopped leaves a whole file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, file)


def run(config: Config, content: dict, console: Console) -> None:
    """Runs what is missing."""
    found: Found = content["runs"]
    content["environment"] = measure.environment()
    if config.reuse is not None and config.seeds == tuple(range(len(config.seeds))):
        known = load(config.reuse)["runs"]
        taken = {k: known[k][: len(config.seeds)] for k in known if k.endswith("/ never cut")}
        found.update({k: runs for k, runs in taken.items() if len(found.get(k, [])) < len(runs)})
    for task in (task for task in problems.TASKS if task.name in config.tasks):
        data = task.load()
        network = task.build(data.train[0][: task.batch])
        for optimizer in config.optimizers:
            for arm in config.arms:
                key = key_of(task.name, optimizer, arm)
                done = found.get(key, [])
                missing = config.seeds[len(done) :]
                if not missing:
                    continue
                begun = time.monotonic()
                outcomes = compare.run(task, data, network, optimizer, arm, missing)
                found[key] = done + [outcome._asdict() for outcome in outcomes]
                content["seconds"] += time.monotonic() - begun
                save(content, config.file)
                console.print(f"{key}: {[round(outcome.thin, 3) for outcome in outcomes]}")


def changes(task: problems.Task, optimizer: str, arm: str, found: Found) -> np.ndarray:
    """Returns the gain of each seed over no cut: points, or per cent of the loss."""
    plain = np.array([one["test"] for one in found[key_of(task.name, optimizer, "never cut")]])
    thin = np.array([one["thin"] for one in found[key_of(task.name, optimizer, arm)]])
    plain = plain[: len(thin)]  # some seeds may still be missing
    return thin - plain if task.in_points else 100 * (plain - thin) / plain


def table(config: Config, found: Found) -> tuple[Table, list[str]]:
    """A row for each task and optimizer, and a line for each arm over all of them."""
    limits_of = {arm: limits for arm, limits in LIMITS.items() if arm in config.arms}
    parts = [f"{arm}\n{name}" for arm in limits_of for name in ("mean", "worst", "stored")]
    names = "network", "optimizer", "never cut", "cut at\nthe end"
    rows = Table(*names, *parts, box=None, pad_edge=False)
    over: dict[str, list[float]] = {arm: [] for arm in limits_of}
    stored: dict[str, list[float]] = {arm: [] for arm in limits_of}
    for task in problems.TASKS:
        for optimizer in config.optimizers:
            if any(key_of(task.name, optimizer, arm) not in found for arm in config.arms):
                continue
            plain = found[key_of(task.name, optimizer, "never cut")]
            means = [np.mean([one[name] for one in plain]) for name in ("test", "thin")]
            shown = [f"{mean:.1f}" if task.in_points else f"{mean:.3f}" for mean in means]
            cells = [task.name, optimizer, *shown]
            for arm, limits in limits_of.items():
                change = changes(task, optimizer, arm, found)
                sizes = [one["stored"] for one in found[key_of(task.name, optimizer, arm)]]
                over[arm] += list(-change / limits[not task.in_points])
                stored[arm] += sizes
                cells += [f"{change.mean():+.2f}", f"{change.min():+.2f}", f"{np.mean(sizes):.2f}"]
            rows.add_row(*cells)
    lines = [
        f"{arm}: {np.sum(np.array(over[arm]) <= 1)} of {len(over[arm])} runs lose at most "
        f"{points} {'point' if points == 1 else 'points'} or {share} % of the loss; "
        f"the median of stored parameters is {np.median(stored[arm]):.2f}"
        for arm, (points, share) in limits_of.items()
        if over[arm]
    ]
    return rows, lines


def main(arguments: list[str] | None = None) -> int:
    """Reads the options, runs what is missing, and shows it."""
    config = tyro.cli(Config, args=arguments, prog="python -m experiments.tasks")
    console = Console() if Console().is_terminal else Console(width=120)
    content = load(config.file)
    try:
        if not config.show_only:
            run(config, content, console)
    except KeyboardInterrupt:
        console.print("Stopped. What was finished is in the file; the same command goes on.")
        return 130
    rows, lines = table(config, content["runs"])
    console.print(rows, *lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
