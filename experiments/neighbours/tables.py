"""The table and the figure of a track, from its records."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from experiments import output
from experiments.neighbours import arms, sizes, tracks
from experiments.neighbours.arms import Arm
from experiments.study.statistics import paired_difference

Records = list[dict[str, Any]]
REFERENCE = "truncated SVD"  # of paired differences
COLOURS = {arms.OURS: "C0", arms.NEIGHBOUR: "C1", arms.CONTROL: "0.4", arms.WHOLE: "0.7"}


def final(records: Records, track: str, arm: str, level: float) -> dict[int, dict[str, Any]]:
    """Returns the records of an arm at a level, by seed."""
    wanted = {"track": track, "arm": arm, "level": level, "tuning": False}
    matches = lambda settings: all(settings[name] == value for name, value in wanted.items())
    return {r["settings"]["seed"]: r for r in records if matches(r["settings"])}


def tests(found: dict[int, dict[str, Any]]) -> dict[int, float]:
    """Returns the test accuracy by seed."""
    return {seed: record["test"] for seed, record in found.items()}


def _tuned(arm: Arm, record: dict[str, Any]) -> str:
    """Returns the numbers that trials chose."""
    names = [name for name in record["hyper"] if name not in dict(arm.fixed)]
    return ", ".join(f"{name} {record['hyper'][name]:g}" for name in names)


def _mean(found: dict[int, dict[str, Any]], name: str) -> float:
    return float(np.mean([record[name] for record in found.values()]))


def _latency(found: dict[int, dict[str, Any]]) -> list[str]:
    """Returns milliseconds of both batches, and how many times faster than dense that is."""
    timed = next((r["milliseconds"] for r in found.values() if "milliseconds" in r), None)
    if timed is None:
        return ["", ""]
    cell = lambda one: f"{one['thin']:.3g} ({one['dense'] / one['thin']:.2g}x)"
    return [cell(one) for one in timed.values()]


def _row(records: Records, letter: str, arm: Arm, level: float) -> list[str] | None:
    track = tracks.TRACKS[letter]
    found = final(records, letter, arm.name, level)
    if not found:
        return None
    whole, values = sizes.dense_size(track), tests(found)
    against = paired_difference(values, tests(final(records, letter, REFERENCE, level)))
    return [
        arm.name,
        arm.kind,
        str(len(found)),
        output.interval(np.array([*values.values()])),
        "" if against is None or arm.name == REFERENCE else str(against),
        f"{_mean(found, 'parameters'):,.0f}",
        f"{_mean(found, 'bytes') / whole.bytes:.3f}",
        f"{_mean(found, 'multiply_adds') / whole.multiply_adds:.3f}",
        *_latency(found),
        f"{_mean(found, 'train_seconds'):.1f}",
        _tuned(arm, next(iter(found.values()))),
    ]


def level_table(records: Records, letter: str, level: float) -> Table | None:
    """Returns a row for each arm at a level, the best first; None without records."""
    columns = "less SVD", "numbers", "bytes", "products", "ms, 1", "ms, 128", "train s"
    title = f"track {letter}: {tracks.TRACKS[letter].task}, "
    title += "full size" if level == 1 else f"{100 * level:g} % of the parameters"
    table = Table(box=None, title=title, title_justify="left", pad_edge=False)
    for name in ("arm", "kind"):
        table.add_column(name, no_wrap=True)
    for name in ("seeds", "test %", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("tuned", no_wrap=True)
    rows = [row for arm in arms.on_track(letter) if (row := _row(records, letter, arm, level))]
    for row in sorted(rows, key=lambda row: -float(row[3].split()[0])):
        table.add_row(*row)
    return table if rows else None


def track_tables(records: Records, letter: str) -> list[Table]:
    """Returns the tables of a track: its levels, and the networks of full size."""
    levels = (*tracks.TRACKS[letter].levels, 1.0)
    found = [level_table(records, letter, level) for level in levels]
    return [table for table in found if table is not None]


def draw(records: Records, letters: list[str], path: Path) -> None:
    """Draws accuracy against the share of parameters and of products, a line for each arm."""
    figure = Figure(figsize=(11, 4.2 * len(letters)), layout="constrained")
    axes = figure.subplots(len(letters), 2, squeeze=False)
    for row, letter in zip(axes, letters, strict=True):
        track = tracks.TRACKS[letter]
        whole = sizes.dense_size(track)
        for ax, name in zip(row, ("parameters", "multiply_adds"), strict=True):
            for arm in arms.on_track(letter):
                levels = (1.0,) if arm.is_full_size else track.levels
                found = [final(records, letter, arm.name, level) for level in levels]
                found = [one for one in found if one]
                x = [_mean(one, name) / getattr(whole, name) for one in found]
                y = [_mean(one, "test") for one in found]
                ax.plot(x, y, "o-", ms=3, lw=1, color=COLOURS[arm.kind], alpha=0.8)
                if found:
                    ax.annotate(
                        arm.name,
                        (x[-1], y[-1]),
                        fontsize=5,
                        textcoords="offset points",
                        xytext=(3, 0),
                    )
            ax.set(xscale="log", xlabel=f"{name.replace('_', '-')} over dense", ylabel="test %")
            ax.set_title(f"track {letter}: {track.task}", fontsize="small", loc="left")
    with output.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
