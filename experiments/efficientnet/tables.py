"""The table of the study, from its records."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table


def _mean(values: Sequence[float], digits: int) -> str:
    """Returns the mean over draws, and their standard deviation if there are several."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    mean = np.round(np.mean(values), digits) + 0.0  # no -0.00
    return f"{mean:.{digits}f}{spread}"


def _cell(found: Sequence[Mapping[str, Any]]) -> str:
    same = _mean([100 * one["same"] for one in found], 0)
    return f"{same} %  {_mean([one['cosine'] for one in found], 2)}"


def table(records: Mapping[str, Any]) -> Table:
    """Returns what is left of the logits: rows by crops and method, a column for each share."""
    title = "crops with the class that the dense network gives, and mean cosine to its logits"
    made = Table(box=None, title=title, title_justify="left")
    for name in ("crops of", "cut by"):
        made.add_column(name, no_wrap=True)
    rows: dict[tuple[str, str], dict[float, list[Mapping[str, Any]]]] = {}
    for one in records["runs"]:
        row = rows.setdefault((one["on"], one["method"]), {})
        row.setdefault(one["share"], []).append(one)
    for share in next(iter(rows.values())):
        made.add_column(f"{share:.0%} of parameters", no_wrap=True, justify="right")
    for kind in dict.fromkeys(kind for kind, _ in rows):
        for method in (method for other, method in rows if other == kind):
            made.add_row(kind, method, *(_cell(found) for found in rows[kind, method].values()))
    return made
