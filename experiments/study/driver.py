"""One part from its options to its file, tables and figure."""

import shlex
import time
from pathlib import Path
from types import ModuleType

from rich.console import Console

from experiments import measure
from experiments.study import tasks
from experiments.study.options import Options
from experiments.study.results import check_same_study, configuration, read, Results


def open_results(part: ModuleType, config: Options, path: Path, arguments: list[str]) -> Results:
    """Opens the results that there are, if they belong to the same study.

    Raises:
      ValueError: It does not; or nothing is there, and nothing is to be run.
    """
    command = shlex.join(["python", "-m", "experiments.study", *arguments])
    new = Results(configuration(config), command, [], [])
    found = read(path)
    if config.show_only:
        if found is None:
            raise ValueError(
                f"`--show-only` needs {path}, which is not there: leave out `--out` for the "
                "results of the repository, or `--show-only` to make some."
            )
        return found
    if found is None:
        return new
    found = found.discard(config.discard)
    check_same_study(found, part.plan_runs(config, found.find), config, path)
    return found._replace(configuration=new.configuration, command=command)


def run_all(
    part: ModuleType, config: Options, results: Results, path: Path, console: Console
) -> Results:
    """Makes the runs that are missing, and writes the file after each."""
    environment = measure.environment()
    while True:
        runs = part.plan_runs(config, results.find)
        missing = [run for run in runs if results.find(run) is None]
        if not missing:
            return results
        run, begin = missing[0], time.perf_counter()
        images = tasks.load(run.task, run.seed, config.source, config.data_dir)
        found = part.perform(run, images)
        seconds = time.perf_counter() - begin
        results = results.add(run, found, seconds, environment).ordered(runs)
        results.save(path)
        console.print(
            f"{len(results.runs)} of {len(runs)}: {run.task.title()}, {run.arm}, seed {run.seed}, "
            f"{seconds:.0f} s",
            highlight=False,
            soft_wrap=True,
        )


def show(name: str, part: ModuleType, results: Results, folder: Path, console: Console) -> Path:
    """Prints the tables and draws the figure; returns the path of the figure."""
    from experiments.study import figures  # matplotlib, which a stopped run does not need

    for table in part.tables(results.runs):
        console.print()
        console.print(table)
    console.print(
        "±: 95 % interval over the seeds (Student's t); best: in the epoch chosen by the test set; "
        "before: the second phase; train: accuracy on the labels given; wrong: share of the wrong "
        "labels learnt; parameters: stored, kernels factorized; less: paired difference in points, "
        "with its 95 % bootstrap interval.",
        style="dim",
    )
    return figures.draw(name, results.runs, folder)


def study(
    name: str, part: ModuleType, config: Options, arguments: list[str], console: Console
) -> None:
    """Runs what is missing of a part and shows it all.

    Raises:
      ValueError: An option, or a file of another study.
      FileNotFoundError: There are no data.
    """
    path = config.out / f"{name}.json"
    results = open_results(part, config, path, arguments)
    if not config.show_only:
        results = run_all(part, config, results, path, console)
    drawn = show(name, part, results, config.out, console)
    seconds = sum(record["seconds"] for record in results.runs)
    console.print(f"{len(results.runs)} runs of {seconds / 60:.1f} minutes in {path}; {drawn}")
