"""The command line: `python -m experiments.agreement --help`."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from experiments import measure
from experiments.agreement import cells, tables, trainer
from experiments.agreement.cells import Run
from experiments.study.results import read, Results

RESULTS = Path(__file__).parents[1] / "results" / "agreement.json"
COMMAND = "python -m experiments.agreement"


@dataclass(frozen=True)
class Config:
    """Trains with agreement of replicas, with its rivals, and shows what came of it.

    What is in the file is not run again.
    """

    cells: tuple[str, ...] = tuple(dict.fromkeys(cell.name for cell, _, _ in cells.PLAN))
    """Tasks to run."""
    file: Path = RESULTS
    """Results, read and written."""
    show_only: bool = False
    """Print the tables of the file, and draw the figure."""


def open_results(file: Path) -> Results:
    """Returns what is there, or nothing yet."""
    return read(file) or Results({"tuning_seed": cells.TUNING_SEED}, COMMAND, [], [])


def missing_run(config: Config, results: Results) -> Run | None:
    """Returns the first run of the plan that the file lacks."""
    for run in cells.plan_runs(results.find):
        if run.cell.name in config.cells and results.find(run) is None:
            return run
    return None


def run_all(config: Config, results: Results, console: Console) -> Results:
    """Makes the runs that are missing, and writes the file after each."""
    environment = measure.environment()
    while (run := missing_run(config, results)) is not None:
        begin = time.perf_counter()
        found = trainer.perform(run, cells.load(run.cell, run.seed))
        seconds = time.perf_counter() - begin
        results = results.add(run, found, seconds, environment)
        results.save(config.file)
        final, best = found["final"], found["best"]
        console.print(
            f"{run.cell.name}, {run.arm.name} {run.arm.value:g}, seed {run.seed}: "
            f"{final['test']} (best {best['test']}), wrong {final['wrong']}, {seconds:.0f} s",
            highlight=False,
            soft_wrap=True,
        )
    return results


def main(arguments: list[str] | None = None) -> int:
    """Reads the options, runs what is missing, and shows it."""
    config = tyro.cli(Config, args=arguments, prog=COMMAND)
    console = Console(width=120)
    results = open_results(config.file)
    try:
        if not config.show_only:
            results = run_all(config, results, console)
    except KeyboardInterrupt:
        console.print("Stopped. What was finished is in the file; the same command goes on.")
        return 130
    for table in tables.tables(results.runs):
        console.print(table)
        console.print()
    tables.draw(results.runs, config.file.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
