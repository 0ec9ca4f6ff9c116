"""What all benchmarks share: alternatives that take turns, their table and their JSON."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import measure, output


def in_turns(
    alternatives: Mapping[str, Callable[[], Any]], rounds: int, calls: int = 1
) -> dict[str, np.ndarray]:
    """Seconds of a call of each alternative, round by round: what else the machine does hits all.

    In its turn each is called so many times, and the seconds are the mean. There is one turn
    before, to compile them.
    """
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(rounds + 1):
        for name, call in alternatives.items():
            begin = time.perf_counter()
            for _ in range(calls):
                jax.block_until_ready(call())
            if turn:
                times[name].append((time.perf_counter() - begin) / calls)
    return {name: np.array(values) for name, values in times.items()}


def spread(seconds: np.ndarray) -> str:
    """The median in ms, and the range of the middle half."""
    low, middle, high = 1e3 * np.quantile(seconds, (0.25, 0.5, 0.75))
    return f"{middle:.4g} [{low:.4g}, {high:.4g}]"


def _cell(value: Any) -> str:
    """Three digits, and no power of ten for a large number."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Rows of one form."""
    found = Table(*rows[0], title=title, box=None, title_justify="left")
    for row in rows:
        found.add_row(*map(_cell, row.values()))
    return found


def show(title: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Prints rows of one form as a table, and writes them as JSON if a path is given."""
    environment = measure.environment()
    console = Console()
    console.print(table(title, rows))
    console.print(environment, style="dim")
    if path is not None:
        content = {"title": title, "environment": environment, "rows": rows}
        with output.replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
