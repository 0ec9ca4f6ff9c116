"""The figure of each part, drawn from its records."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments import output
from experiments.study.clean import by_decay, network_outcomes
from experiments.study.outcomes import EARLY_STOPPING, outcomes, PLAIN, RMT_AT_END, tasks
from experiments.study.tasks import Task

Records = list[dict[str, Any]]

# A colour for each arm, the same in all figures.
COLOURS = {
    PLAIN: "0.35",
    EARLY_STOPPING: "C2",
    "fixed rank 10": "C0",
    "RMT": "C3",
    "RMT, weight decay": "C1",
    RMT_AT_END: "C4",
    "weight decay": "C5",
    "dropout": "C6",
}


def draw_band(ax: Axes, x: Sequence[float], lines: np.ndarray, name: str, **style: Any) -> None:
    """The mean of some lines, and the range from the lowest to the highest."""
    style = {"color": COLOURS.get(name), "label": name} | style
    (line,) = ax.plot(x, lines.mean(axis=0), **style)
    shade = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
    ax.fill_between(x, lines.min(axis=0), lines.max(axis=0), **shade)


def of_task(records: Records, task: Task) -> dict[str, Records]:
    """The records of a task by arm, without those of the tuning."""
    found: dict[str, Records] = {}
    for record in records:
        settings = record["settings"]
        if Task(**settings["task"]) == task and not settings["arm"].endswith("tuning"):
            found.setdefault(settings["arm"], []).append(record)
    return found


def draw_accuracy(ax: Axes, arms: dict[str, Records]) -> None:
    """Test accuracy after each epoch."""
    for arm in [arm for arm in arms if arm in COLOURS]:
        lines = np.array([record["history"]["test"] for record in arms[arm]])
        draw_band(ax, range(1, lines.shape[1] + 1), lines, arm)
    stopped = [record["stopped"]["test"] for record in arms.get(PLAIN, ()) if record["stopped"]]
    if stopped:
        level, colour = float(np.mean(stopped)), COLOURS[EARLY_STOPPING]
        ax.axhline(level, color=colour, linestyle=":", label=EARLY_STOPPING)
    ax.set(xlabel="epoch", ylabel="test accuracy, %")
    ax.legend(frameon=False, fontsize="small")


def draw_wrong(ax: Axes, arms: dict[str, Records]) -> None:
    """Share of the wrong labels learnt, at the epochs at which all runs were looked at."""
    for arm in [arm for arm in arms if arm in COLOURS]:
        looks = [record["history"]["looks"] for record in arms[arm]]
        shared = sorted(set.intersection(*(set(look["epoch"]) for look in looks)))
        lines = [
            [dict(zip(look["epoch"], look["wrong"], strict=True))[e] for e in shared]
            for look in looks
        ]
        if None not in lines[0]:
            draw_band(ax, shared, np.array(lines), arm)
    ax.set(xlabel="epoch", ylabel="wrong labels learnt, %")


def draw_by_noise(ax: Axes, records: Records) -> None:
    """Final test accuracy against the share of the labels redrawn, dots for the seeds."""
    found = outcomes(records)
    for arm in (PLAIN, EARLY_STOPPING, "fixed rank 10", "RMT", RMT_AT_END):
        own = [one for one in found if one.arm == arm]
        noises = sorted({one.task.label_noise for one in own})
        means = [np.mean([o.test for o in own if o.task.label_noise == noise]) for noise in noises]
        ax.plot([100 * noise for noise in noises], means, color=COLOURS[arm], label=arm)
        x = [100 * one.task.label_noise for one in own]
        ax.plot(x, [one.test for one in own], ".", color=COLOURS[arm])
    ax.set(xlabel="labels redrawn, %", ylabel="test accuracy at the end, %")
    ax.legend(frameon=False, fontsize="small")


def memorisation(records: Records) -> Figure:
    """Accuracy and wrong labels by epoch."""
    (task,) = tasks(outcomes(records))
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_accuracy(left, of_task(records, task))
    draw_wrong(right, of_task(records, task))
    figure.suptitle(f"{task.title()}: mean and range of the seeds")
    return figure


def elsewhere(records: Records) -> Figure:
    """Accuracy against the share of the labels redrawn; by epoch in the other tasks."""
    found = tasks(outcomes(records))
    alike = lambda task: (task.dataset, task.images) == (found[0].dataset, found[0].images)
    others = [task for task in found if not alike(task)]
    figure = Figure(figsize=(4.4 * (1 + len(others)), 4), layout="constrained")
    left, *right = figure.subplots(1, 1 + len(others), squeeze=False)[0]
    draw_by_noise(left, [r for r in records if alike(Task(**r["settings"]["task"]))])
    left.set_title(replace(found[0], label_noise=0.0).title(), fontsize="medium")
    for ax, task in zip(right, others, strict=True):
        draw_accuracy(ax, of_task(records, task))
        ax.set_title(task.title(), fontsize="medium")
    figure.suptitle("Mean and range of the seeds")
    return figure


def truncation(records: Records) -> Figure:
    """Test accuracy against the rank of the first kernel; dashed, where RMT cuts."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    found = list(dict.fromkeys(Task(**record["settings"]["task"]) for record in records))
    for ax, task in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        own = of_task(records, task)[PLAIN]
        curves = [dict(record["curve"]["points"]) for record in own]
        shared = sorted(set.intersection(*(set(curve) for curve in curves)))
        lines = np.array([[curve[rank] for rank in shared] for curve in curves])
        draw_band(ax, shared, lines, PLAIN, label="mean and range of the seeds")
        for index, (rule, colour) in enumerate((("RMT", "C3"), ("Gavish-Donoho", "C0"))):
            for cut in (record["curve"]["cuts"][rule] for record in own):
                ax.axvline(cut["rank"], color=colour, linestyle=("--", ":")[index], linewidth=0.8)
                ax.plot(cut["rank"], cut["test"], ".", color=colour)
            ax.plot([], [], color=colour, linestyle=("--", ":")[index], label=f"cut of {rule}")
        ax.set(title=task.title(), xlabel="singular values kept", ylabel="test accuracy, %")
        ax.set_xscale("symlog", linthresh=10)  # 0 is one of the ranks
        ax.legend(fontsize="small", loc="lower right", framealpha=1, edgecolor="none")
    return figure


def artefact(records: Records) -> Figure:
    """Test accuracy by epoch, a line for each seed, with linear logits and with a ReLU."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    found = list(dict.fromkeys(Task(**record["settings"]["task"]) for record in records))
    for ax, task in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        for colour, (arm, own) in zip(("C0", "C3"), of_task(records, task).items(), strict=False):
            for index, record in enumerate(own):
                tests = record["history"]["test"]
                label = arm if index == 0 else None
                ax.plot(range(1, len(tests) + 1), tests, color=colour, label=label, alpha=0.7)
        ax.set(title=task.title(), xlabel="epoch", ylabel="test accuracy, %")
        ax.legend(frameon=False, fontsize="small")
    return figure


def cnn(records: Records) -> Figure:
    """Test accuracy and wrong labels learnt by epoch, a line of panels."""
    found = tasks(outcomes(records))
    figure = Figure(figsize=(4.5 * (len(found) + 1), 3.6), layout="constrained")
    axes = figure.subplots(1, len(found) + 1)
    for ax, task in zip(axes, found, strict=False):
        draw_accuracy(ax, of_task(records, task))
        ax.set_title(task.title(), fontsize="medium")
    draw_wrong(axes[-1], of_task(records, found[-1]))
    return figure


def clean(records: Records) -> Figure:
    """Test accuracy against stored parameters; the mark tells the weight decay."""
    found = tasks(network_outcomes(records))
    figure = Figure(figsize=(6 * len(found), 4), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for ax, task in zip(axes, found, strict=True):
        for marker, (_, own) in zip("xos+", by_decay(records).items(), strict=False):
            dots = [dot for dot in network_outcomes(own) if dot.task == task]
            for index, arm in enumerate(dict.fromkeys(dot.arm for dot in dots)):
                points = [(dot.parameters, dot.test) for dot in dots if dot.arm == arm]
                label = arm if marker == "x" else None
                color = colormaps["tab20"](index)
                ax.plot(*zip(*points, strict=True), marker, color=color, label=label)
        ax.set(title=task.title(), xlabel="stored parameters", ylabel="test accuracy, %")
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())  # a decade has too many to write
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    return figure


PARTS = {
    "truncation": truncation,
    "memorisation": memorisation,
    "elsewhere": elsewhere,
    "pilot": memorisation,
    "clean": clean,
    "artefact": artefact,
    "cnn": cnn,
}


def draw(part: str, records: Records, folder: Path) -> Path:
    """Writes the figure of a part as PNG, whole or not at all; returns its path."""
    path = folder / f"{part}.png"
    with output.replacing(path) as temporary:
        PARTS[part](records).savefig(temporary, dpi=120, format="png")
    return path
