"""The tables, with rows of the study's results for equal tasks, and the figure."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from experiments import output
from experiments.agreement import arms
from experiments.agreement.cells import Cell, CORE
from experiments.study.figures import draw_band
from experiments.study.outcomes import (
    EARLY_STOPPING,
    Outcome,
    outcomes,
    PLAIN,
    summarise,
    Summary,
)
from experiments.study.results import read
from experiments.study.tables import number

Records = list[dict[str, Any]]
STUDY = Path(__file__).parents[1] / "results"
# Arms of the study, as the tables call them. Their runs had the same images, labels and starts.
NAMES = {
    PLAIN: "plain *",
    EARLY_STOPPING: "early stopping *",
    "weight decay": "weight decay, tuned *",
    "dropout": "dropout, tuned *",
    "RMT": "cut to the spikes *",
    "RMT, weight decay": "cut to the spikes, tuned decay *",
}
# What the clean validation images would stop is an arm that needs no run of its own.
STOPPED = {
    arms.PLAIN.name: EARLY_STOPPING,
    arms.AVERAGED.name: f"{arms.AVERAGED.name}, {EARLY_STOPPING}",
    "label smoothing 0.8": f"label smoothing 0.8, {EARLY_STOPPING}",
    "label smoothing 0.9": f"label smoothing 0.9, {EARLY_STOPPING}",
    "SAM 0.5": f"SAM 0.5, {EARLY_STOPPING}",
}
COLOURS = {
    NAMES[PLAIN]: "0.35",
    arms.AVERAGED.name: "C5",
    arms.PAIR.name: "C3",
    arms.FOUR.name: "C1",
    arms.CHAIN.name: "C0",
}


def label(settings: dict[str, Any]) -> str:
    """Returns what an arm of this package is called, with its value if it has one."""
    arm = settings["arm"]
    return f"{arm['name']} {arm['value']:g}" if arm["value"] else arm["name"]


@cache
def study_records(part: str) -> Records:
    """Returns the committed records of a part of the study."""
    found = read(STUDY / f"{part}.json")
    return found.runs if found else []


def of_study(cell: Cell) -> Records:
    """Returns the study's records of the task of a cell, if its networks were trained so too."""
    parts = {"784-512-512-10": ("memorisation", "elsewhere"), "CNN": ("cnn",)}
    others = cell.asymmetric or cell.pixel_noise or cell.target_noise
    if others or cell.optimizer != "SGD":
        return []
    for part in parts.get(cell.network, ()):
        found = [
            record
            for record in study_records(part)
            if record["settings"]["task"] == vars(cell.task())
            and record["settings"]["recipe"]["epochs"] == cell.epochs
            and not record["settings"]["arm"].endswith("tuning")
        ]
        if found:
            return found
    return []


def outcomes_of(cell: Cell, records: Records) -> list[Outcome]:
    """Returns the outcomes of a cell: of the study's arms, and of those trained anew."""
    found = [
        one._replace(arm=NAMES[one.arm]) for one in outcomes(of_study(cell)) if one.arm in NAMES
    ]
    for record in records:
        settings, final = record["settings"], record["final"]
        make = lambda arm, seen, best, seed=settings["seed"]: Outcome(
            cell.task(), arm, seed, seen["test"], 0, {}, best, seen.get("wrong")
        )
        found.append(make(label(settings), final, record["best"]["test"]))
        if name := STOPPED.get(label(settings)):
            found.append(make(name, record["stopped"], None))
    return found


def _cells(summary: Summary, references: Iterable[str]) -> list[str]:
    test = np.array([*summary.values.values()])
    against = [str(summary.against.get(name) or "") for name in references]
    drift = "" if summary.best is None else f"{test.mean() - summary.best:+.2f}"
    return [
        str(test.size),
        output.interval(test),
        number(summary.best),
        drift,
        number(summary.wrong),
        *against,
    ]


def cell_table(cell: Cell, records: Records) -> Table:
    """Returns a row for each arm of a cell: means over its seeds."""
    found = outcomes_of(cell, records)
    known = {one.arm for one in found}
    references = [arm for arm in (NAMES[EARLY_STOPPING], EARLY_STOPPING) if arm in known]
    title = f"{cell.name}: {cell.network}, {cell.optimizer}, {cell.epochs} epochs"
    table = Table(box=None, title=title, title_justify="left")
    table.add_column("arm", no_wrap=True)
    columns = ["seeds", "test %", "best %", "drift", "wrong %"]
    for column in (*columns, *(f"less {name}" for name in references)):
        table.add_column(column, justify="right", no_wrap=True)
    for arm, summary in summarise(found, cell.task(), tuple(references)).items():
        table.add_row(arm, *_cells(summary, references))
    return table


def tuning_table(records: Records) -> Table:
    """Returns what the values of the rivals were chosen by."""
    table = Table("value", "clean validation %", "test %", box=None, title="tuning")
    for record in records:
        final = record["final"]
        table.add_row(
            label(record["settings"]), f"{final['validation']:.1f}", f"{final['test']:.2f}"
        )
    return table


def tables(records: Records) -> list[Table]:
    """Returns a table for each cell, in the order of the records, and that of the tuning."""
    groups: dict[Cell, Records] = {}
    for record in records:
        if not record["settings"]["tuning"]:
            groups.setdefault(Cell(**record["settings"]["cell"]), []).append(record)
    tuned = [record for record in records if record["settings"]["tuning"]]
    found = [cell_table(cell, group) for cell, group in groups.items()]
    return [*found, tuning_table(tuned)] if tuned else found


def _lines(records: Records, name: str) -> dict[str, tuple[list[int], np.ndarray]]:
    """Returns epochs and histories of the arms of the core task that the figure shows."""
    found = {}
    of_plain = [r["history"] for r in of_study(CORE) if r["settings"]["arm"] == PLAIN]
    if of_plain and name == "test":
        histories = np.array([history["test"] for history in of_plain])
        found[NAMES[PLAIN]] = ([*range(1, histories.shape[1] + 1)], histories)
    elif of_plain:
        looks = [dict(zip(h["looks"]["epoch"], h["looks"]["wrong"], strict=True)) for h in of_plain]
        epochs = sorted(set.intersection(*(set(look) for look in looks)))
        found[NAMES[PLAIN]] = (epochs, np.array([[look[e] for e in epochs] for look in looks]))
    core = [r for r in records if Cell(**r["settings"]["cell"]) == CORE]
    for arm in COLOURS:
        own = [r["history"] for r in core if r["settings"]["arm"]["name"] == arm]
        if own:
            places = [i for i, value in enumerate(own[0][name]) if value is not None]
            values = np.array([[history[name][i] for i in places] for history in own])
            found[arm] = ([own[0]["epoch"][i] for i in places], values)
    return found


def draw(records: Records, path: Path) -> None:
    """Draws accuracy and wrong labels learnt by epoch, on the core task."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    titles = {"test": "test accuracy, %", "wrong": "wrong labels learnt, %"}
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        for arm, (epochs, values) in _lines(records, name).items():
            draw_band(ax, epochs, values, arm, color=COLOURS[arm], label=arm.removesuffix(" *"))
        ax.set(xlabel="epoch", ylabel=title)
    axes[0].legend(frameon=False, fontsize="small")
    with output.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
