"""The tables of the study, from its records."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from experiments.minilm import cuts

Records = Mapping[str, Any]


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(box=None, title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def kernels(records: Records) -> Table:
    """A row for each kernel: what the law makes of it, as it is and with its entries shuffled."""
    shuffled = ("shuffled distance", "shuffled spikes")
    columns = ("shape", "4th moment", "distance", "spikes", "fits", *shuffled)
    table = _table("kernels", "kernel", *columns)
    for row in records["kernels"]:
        other = row["shuffled"]
        table.add_row(
            escape(row["path"]),
            "x".join(map(str, row["shape"])),
            f"{row['moment']:.2f}",
            _number(row["distance"], ".4f"),
            _number(row["spikes"], "d"),
            "yes" if row["fits"] else "-" if row["distance"] is None else "no",
            _number(other["distance"], ".4f"),
            _number(other["spikes"], "d"),
        )
    return table


def together(records: Records) -> Table:
    """A row for each rule: what it leaves of the embeddings, and the mean cosines of controls.

    The gap is the largest between an entry of an embedding by factors and by truncated kernels.
    """
    shares = ("itself %", "neighbour %", "topic %")
    columns = ("kernels cut", "parameters", "cosine", "worst", *shares, "order", "gap")
    table = _table("all kernels together", "rule", *columns, *cuts.CONTROLS)
    topic = f"{records['topic']:.1f}"  # the only one that is not perfect by itself
    table.add_row("nothing", "0", f"{records['parameters']:,}", "", "", "", "", topic)
    for row in records["together"]:
        left = row["top"]
        table.add_row(
            escape(row["rule"]),
            str(row["cut"]),
            f"{row['parameters']:,}",
            *(f"{left[name]:.4f}" for name in ("mean", "worst")),
            *(f"{left[name]:.1f}" for name in ("itself", "neighbour", "topic")),
            f"{left['order']:.3f}",
            f"{row['gap']:.0e}",
            *(f"{row[name]['mean']:.4f}" for name in cuts.CONTROLS),
        )
    return table


def alone(records: Records) -> Table:
    """A row for each kernel cut by itself, to its spikes and to a share of its energy."""
    kinds = ("rank", "top", "random", "bottom", "noise")
    rules = records["alone"][0]["cuts"]
    columns = [name for rule in rules for name in (f"{rule}: rank", *kinds[1:])]
    table = _table("one kernel at a time: mean cosine", "kernel", *columns)
    for row in records["alone"]:
        cells = []
        for cut in row["cuts"].values():
            cells += [str(cut["rank"]), *(f"{cut[name]:.4f}" for name in kinds[1:])]
        table.add_row(escape(row["path"]), *cells)
    return table


def tables(records: Records) -> list[Table]:
    """All of them."""
    return [kernels(records), together(records), alone(records)]
