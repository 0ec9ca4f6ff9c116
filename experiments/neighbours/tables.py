"""The table and the figure of a track, from its records."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.table import Table

from experiments import output
from experiments.neighbours import arms, sizes, tracks
from experiments.neighbours.arms import Arm
from experiments.study.statistics import paired_difference

Records = list[dict[str, Any]]
STYLES = {arms.OURS: "-", arms.NEIGHBOUR: "--", arms.CONTROL: ":", arms.WHOLE: ""}
MARKERS = "os^"


def final(records: Records, track: str, arm: str, level: float) -> dict[int, dict[str, Any]]:
    """Returns the records of an arm at a level, by seed."""
    wanted = {"track": track, "arm": arm, "level": level, "tuning": False}
    matches = lambda settings: all(settings[name] == value for name, value in wanted.items())
    return {r["settings"]["seed"]: r for r in records if matches(r["settings"])}


def tests(found: dict[int, dict[str, Any]]) -> dict[int, float]:
    """Returns the test accuracy by seed."""
    return {seed: record["test"] for seed, record in found.items()}


def _mean(found: dict[int, dict[str, Any]], name: str) -> float:
    return float(np.mean([record[name] for record in found.values()]))


def _latency(found: dict[int, dict[str, Any]]) -> list[str]:
    """Returns milliseconds for each batch, and those of the dense network over them."""
    timed = next((r["milliseconds"] for r in found.values() if "milliseconds" in r), None)
    if timed is None:
        return [""] * 4
    cells = lambda one: (f"{one['thin']:.3f}", f"{one['dense'] / one['thin']:.1f}")
    return [cell for one in timed.values() for cell in cells(one)]


def _mark(arm: Arm) -> str:
    return arm.name + (" *" if arm.kind == arms.OURS else "")


def _row(records: Records, letter: str, arm: Arm, level: float) -> list[str] | None:
    found = final(records, letter, arm.name, level)
    if not found:
        return None
    track = tracks.TRACKS[letter]
    whole, values = sizes.dense_size(track), tests(found)
    against = paired_difference(values, tests(final(records, letter, track.reference, level)))
    return [
        _mark(arm),
        str(len(found)),
        output.interval(np.array([*values.values()]), ".1f"),
        "" if against is None or arm.name == track.reference else str(against),
        f"{_mean(found, 'parameters'):,.0f}",
        f"{_mean(found, 'bytes') / whole.bytes:.3f}",
        f"{_mean(found, 'multiply_adds') / whole.multiply_adds:.3f}",
        *_latency(found),
        f"{_mean(found, 'train_seconds'):.1f}",
    ]


def _new_table(title: str, *columns: str) -> Table:
    table = Table(box=None, title=title, title_justify="left", pad_edge=False)
    table.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def level_table(records: Records, letter: str, level: float) -> Table | None:
    """Returns a row for each arm at a level, the best first; None without records."""
    track = tracks.TRACKS[letter]
    counted = "entries" if track.of_kernels else "parameters"
    title = f"track {letter}: {track.task}, "
    title += "full size" if level == 1 else f"{100 * level:g} % of the {counted}"
    columns = "arm", "seeds", "test %", f"less {track.reference}", "numbers", "bytes", "products"
    table = _new_table(title, *columns, "ms, 1", "x", "ms, 128", "x", "train s")
    rows = [row for arm in arms.on_track(letter) if (row := _row(records, letter, arm, level))]
    for row in sorted(rows, key=lambda row: -float(row[2].split()[0])):
        table.add_row(*row)
    return table if rows else None


def tuned_table(records: Records, letter: str) -> Table | None:
    """Returns the numbers that trials chose, and what they reached on validation."""
    title = f"track {letter}: what {len(arms.TRIALS)} trials of each arm chose"
    table = _new_table(title, "arm", "validation %", "rate", "decay", "dropout", "others")
    for arm in arms.on_track(letter):
        trials = [
            r
            for r in records
            if r["settings"]["tuning"]
            and (r["settings"]["arm"], r["settings"]["track"]) == (arm.name, letter)
        ]
        if not trials:
            continue
        best = max(trials, key=lambda r: (r["validation"], -r["settings"]["trial"]))
        shared = [f"{best['hyper'][name]:g}" for name in arms.SHARED]
        others = ", ".join(f"{name} {best['hyper'][name]:g}" for name, _ in arm.knobs)
        table.add_row(_mark(arm), f"{best['validation']:.1f}", *shared, others)
    return table if table.row_count else None


def track_tables(records: Records, letter: str) -> list[Table]:
    """Returns the tables of a track: its levels, the networks of full size, and the tuning."""
    levels = (*tracks.TRACKS[letter].levels, 1.0)
    found = [level_table(records, letter, level) for level in levels]
    found.append(tuned_table(records, letter))
    return [table for table in found if table is not None]


def _curve(records: Records, letter: str, arm: Arm, name: str) -> tuple[list[float], list[float]]:
    """Returns the share of a cost, and the accuracy, of an arm at each level that was run."""
    track = tracks.TRACKS[letter]
    levels = arm.levels_of(track)
    found = [one for level in levels if (one := final(records, letter, arm.name, level))]
    whole = getattr(sizes.dense_size(track), name)
    return [_mean(one, name) / whole for one in found], [_mean(one, "test") for one in found]


def draw(records: Records, letters: list[str], path: Path) -> None:
    """Draws accuracy against the share of bytes and of products, a line for each arm."""
    figure = Figure(figsize=(12, 4.6 * len(letters)), layout="constrained")
    rows = figure.subplots(len(letters), 2, squeeze=False, sharey="row")
    titles = {"bytes": "stored bytes over dense", "multiply_adds": "multiply-adds over dense"}
    for row, letter in zip(rows, letters, strict=True):
        for ax, (name, title) in zip(row, titles.items(), strict=True):
            for i, arm in enumerate(arms.on_track(letter)):
                x, y = _curve(records, letter, arm, name)
                colour, style = f"C{i % 10}", STYLES[arm.kind]
                marker = MARKERS[i // 10]
                ax.plot(x, y, style, marker=marker, ms=4, lw=1, color=colour, label=_mark(arm))
            ax.set(xscale="log", xlabel=title)
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
        row[0].set_ylabel("test %")
        row[0].set_title(f"track {letter}: {tracks.TRACKS[letter].task}", fontsize=9, loc="left")
        row[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, frameon=False)
    with output.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
