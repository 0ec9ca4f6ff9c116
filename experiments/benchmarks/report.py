"""The tables of the benchmarks whose results are kept here, and their figure.

Each benchmark has written its JSON by `--json`, into one folder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.console import Console

from experiments import output
from experiments.benchmarks import timing

RESULTS = Path(__file__).parents[1] / "results" / "benchmarks"
NAMES = (
    "whole_model",
    "fit",
    "sizes",
    "truncation",
    "epoch",
    "transform_overhead",
    "latency",
    "memory",
)
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "0.4"


@dataclass(frozen=True)
class Config:
    """Prints the tables, and draws the figure."""

    results: Path = RESULTS
    """Folder of the JSON files."""
    out: Path = RESULTS / "speed.png"
    """Figure to write."""


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Loads the rows that each benchmark has written."""
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in NAMES}


def _ticks(axis: Axis, values: Sequence[float]) -> None:
    """These numbers alone on a logarithmic axis, written out."""
    axis.set_ticks(values, labels=[f"{value:g}" for value in values])
    axis.set_minor_locator(NullLocator())


def draw_model(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """A report of a whole model, beside its rivals."""
    (row,) = rows
    middle = lambda name: float(str(row[name]).split()[0]) / 1e3
    names = ["numpy eigvalsh, ms", "rmtjax.analyze, ms", "WeightWatcher, ms"]
    labels = ["NumPy,\neigenvalues\nalone", "rmtjax", "Weight-\nWatcher"]
    bars = ax.bar(labels, list(map(middle, names)), color=[GREY, BLUE, VERMILION])
    ax.bar_label(bars, fmt="%.2g s")
    ax.set(yscale="log", ylabel="s", title=f"Report of a model: {row['kernels']} kernels")
    ax.set_ylim(0.1, 100)
    _ticks(ax.yaxis, (0.1, 1, 10, 100))


def draw_sizes(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """A report of one kernel by its size."""
    for how, color, style in (("exact", VERMILION, "o-"), ("estimated", BLUE, "^-")):
        own = [row for row in rows if row["how"] == how]
        seconds = [row["seconds"] for row in own]
        ax.loglog([row["side"] for row in own], seconds, style, color=color, label=how)
    ax.set(xlabel="side of a square kernel", ylabel="s", title="Report of one kernel")
    _ticks(ax.xaxis, sorted({row["side"] for row in rows})[::2])
    _ticks(ax.yaxis, (0.01, 0.1, 1, 10, 100))
    ax.legend(frameon=False)


def draw_latency(ax: Axes, rows: list[dict[str, Any]]) -> None:
    """Draws the time that factors save over the time that multiply-adds would let them save."""
    own = [row for row in rows if row["batch"] > 1]
    for width, color, marker in zip(
        dict.fromkeys(row["width"] for row in own), (GREY, BLUE, VERMILION), "o^s", strict=False
    ):
        points = [(row["ideal"], row["speed-up"]) for row in own if row["width"] == width]
        x, y = zip(*points, strict=True)
        ax.loglog(x, y, color=color, marker=marker, label=f"width {width}")
    ideal = sorted({row["ideal"] for row in own})
    ax.loglog(ideal, ideal, "k--", label="ideal")
    ax.set(xlabel="fewer multiply-adds, times", ylabel="less time, times")
    _ticks(ax.xaxis, ideal)
    _ticks(ax.yaxis, ideal)
    ax.set_title(f"Factors, batch {own[0]['batch']}")
    ax.legend(frameon=False)


def draw(found: dict[str, dict[str, Any]]) -> Figure:
    """Three panels."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = {"whole_model": draw_model, "sizes": draw_sizes, "latency": draw_latency}
    for ax, (name, panel) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        panel(ax, found[name]["rows"])
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Prints a table for each benchmark, and writes the figure."""
    config = tyro.cli(Config, description=__doc__)
    found, console = load(config.results), Console(width=160)
    for name, content in found.items():
        console.print(timing.table(f"{name}: {content['title']}", content["rows"]))
        console.print()
    figure = draw(found)
    with output.replacing(config.out) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    console.print(f"wrote {config.out}")


if __name__ == "__main__":
    main()
