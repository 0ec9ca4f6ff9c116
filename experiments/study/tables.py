"""Tables of the study."""

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from experiments import output
from experiments.study.outcomes import Summary

number = lambda value, form=".2f": "" if value is None else format(value, form)


def rank_text(ranks: Mapping[str, float]) -> str:
    """The mean ranks of the kernels, in the order of the network."""
    return ", ".join(f"{rank:.0f}" for rank in ranks.values())


def _cells(summary: Summary, references: Sequence[str], best: str) -> dict[str, str]:
    return {
        "seeds": str(len(summary.values)),
        "test %": output.interval(np.array([*summary.values.values()])),
        best: number(summary.best),
        "train %": number(summary.given),
        "wrong %": number(summary.wrong),
        "ranks": rank_text(summary.ranks),
        "parameters": f"{summary.parameters:,.0f}",
        **{f"less {name}": str(summary.against.get(name) or "") for name in references},
    }


def summary_table(
    title: str,
    summaries: Mapping[str, Summary],
    references: Sequence[str],
    best: str = "best %",
) -> Table:
    """A row for each arm: means over its seeds, and its paired differences.

    Args:
      title: What stands above.
      summaries: By arm.
      references: Arms that have a column of differences.
      best: What the column of `best` is called.

    Returns:
      The table, without columns that would be empty.
    """
    table = Table(box=None, title=title, title_justify="left")
    table.add_column("arm", no_wrap=True)
    rows = [_cells(summary, references, best) for summary in summaries.values()]
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for arm, row in zip(summaries, rows, strict=True):
        table.add_row(arm, *(row[column] for column in columns))
    return table
