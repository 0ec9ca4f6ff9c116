"""What the main job tells: progress, tables, and results.json."""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import rmtjax
from experiments import data, measure

# The network that each one is compared with: the one trained for as long and never cut.
REFERENCE = {
    "baseline, factorized": "baseline",
    "baseline, factorized, fine-tuned": "baseline, fine-tuned",
    "agreement": "baseline",
    "pruned": "baseline",
    "pruned, factorized": "baseline",
    "pruned, factorized, fine-tuned": "baseline, fine-tuned",
}

WIDTH = 140  # of the tables


@dataclasses.dataclass(frozen=True)
class Seed:
    """The results of one seed."""

    measures: dict[str, measure.Measures]
    reports: dict[str, rmtjax.Report]
    history: list[dict[str, Any]]
    curve: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of the seeds so far."""

    config: Any
    dataset: str
    seeds: dict[int, Seed] = dataclasses.field(default_factory=dict)

    def add(self, seed: int, measures: dict[str, measure.Measures], **found: Any) -> "Results":
        """The results with one more seed."""
        return dataclasses.replace(self, seeds={**self.seeds, seed: Seed(measures, **found)})

    def values(self, network: str, field: str) -> np.ndarray:
        """A measure of a network, an entry a seed."""
        return np.array([getattr(seed.measures[network], field) for seed in self.seeds.values()])

    def to_dict(self) -> dict[str, Any]:
        """Plain data: configuration, environment, and all of every seed."""
        return {
            "config": dataclasses.asdict(self.config),
            "environment": measure.environment(),
            "dataset": self.dataset,
            "seeds": {
                str(seed): {
                    "networks": {name: m._asdict() for name, m in found.measures.items()},
                    "kernels": {name: r.to_dict()["rows"] for name, r in found.reports.items()},
                    "history": found.history,
                    "truncation_curve": found.curve,
                }
                for seed, found in self.seeds.items()
            },
        }


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; the file appears under its own name when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(results: Results, folder: Path) -> None:
    """Writes results.json, whole or not at all."""
    with replacing(folder / "results.json") as path:
        path.write_text(json.dumps(results.to_dict(), indent=1, default=str) + "\n")


def console() -> Console:
    """The terminal; in a file or a pipe, wide enough for the tables."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDTH)


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A bar over all epochs; silent when the output is no terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    quiet = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet) as bar:
        task = bar.add_task("compiling", total=total)
        yield lambda text: bar.update(task, advance=1, description=escape(text))


def interval(values: np.ndarray, form: str = ".2f") -> str:
    """The mean, and half the width of its 95 % interval (Student's t) from two seeds on."""
    mean = format(values.mean(), form)
    if values.size < 2:
        return mean
    half = scipy.stats.t.ppf(0.975, values.size - 1) * values.std(ddof=1) / values.size**0.5
    return f"{mean} ± {half:.2f}"


def _networks(results: Results) -> Table:
    """A row for each network."""
    table = Table("network", box=None, title="networks", title_justify="left")
    for title in ("test %", "change", "gap", "parameters", "multiply-adds"):
        table.add_column(title, justify="right")
    for batch in measure.BATCHES:
        table.add_column(f"ms, batch {batch}", justify="right")
    times = {
        name: results.values(name, "latency_ms")
        for name in next(iter(results.seeds.values())).measures
    }
    for name, latency in times.items():
        test = results.values(name, "test_accuracy")
        reference = REFERENCE.get(name)
        change = reference and interval(test - results.values(reference, "test_accuracy"), "+.2f")
        table.add_row(
            name,
            interval(test),
            change or "",
            interval(results.values(name, "train_accuracy") - test),
            *(
                f"{results.values(name, field).mean():,.0f}"
                for field in ("parameters", "multiply_adds")
            ),
            *(f"{np.mean([one[batch] for one in latency]):.3f}" for batch in measure.BATCHES),
        )
    return table


def _kernels(results: Results) -> Table:
    """A row for each kernel of each network and seed."""
    columns = ("shape", "variance", "edge", "threshold", "spikes", "distance", "reason")
    table = Table(
        "seed", "network", "kernel", *columns, box=None, title="kernels", title_justify="left"
    )
    for seed, found in results.seeds.items():
        for network, report in found.reports.items():
            for path, *cells in report.cells("path", *columns):
                table.add_row(str(seed), network, *map(escape, (path, *cells)))
    return table


def show(results: Results, console: Console) -> None:
    """Prints the tables."""
    # A terminal that is narrower breaks the lines: better than to have no room for numbers.
    whole = {"width": max(console.width, WIDTH), "crop": False}
    console.print()
    console.print(_networks(results), **whole)
    console.print(
        "change: against the network trained as long and never cut; gap: training accuracy, on "
        "the labels trained on, less test accuracy, in points"
        + ("; ±: 95 % interval over the seeds" if len(results.seeds) > 1 else ""),
        style="dim",
    )
    console.print()
    console.print(_kernels(results), **whole)
    _show_truncation(results, console)


def _show_truncation(results: Results, console: Console) -> None:
    """Prints how the accuracy changes if the baseline's first kernel is cut to its spikes."""
    changes = []
    for seed, found in results.seeds.items():
        path, spikes, points = (found.curve[key] for key in ("path", "spikes", "points"))
        if points:
            full, kept = points[-1][1], dict(points)[spikes]
            changes.append(kept - full)
            console.print(
                f"seed {seed}: {path} truncated to its {spikes} spikes after training, and nothing "
                f"trained again: test {full:.2f} -> {kept:.2f} % ({kept - full:+.2f})",
                highlight=False,
            )
    if len(changes) > 1:
        console.print(f"mean change: {interval(np.array(changes), '+.2f')}", highlight=False)


def free_folder(dataset: data.Dataset, overwrite: bool) -> Path:
    """The folder of a run without `--out`: the first that has no results, or the first of all."""
    name = dataset.name + "-sample" * (dataset.source == "sample")
    ends = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    folders = (Path("runs", name + end) for end in ends)
    return next(one for one in folders if overwrite or not (one / "results.json").exists())


def make_folder(folder: Path, overwrite: bool) -> Path:
    """Makes the folder of a run; raises ValueError if it has results that may not be replaced."""
    if (folder / "results.json").exists() and not overwrite:
        raise ValueError(
            f"--out {folder} has the results of another run: give --overwrite to replace them, or "
            "another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out can not be made: {error}") from error
    return folder
