"""The table of the study: perplexity by method and size."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

AFTER = {"": "", "repaired": " + refit", "tuned": " + tuned"}


def _order(records: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The rows: what is not trained again first."""
    found = {(one["method"], one["after"]): None for one in records["runs"]}
    return sorted(found, key=lambda row: (row[0] != "dense", [*AFTER].index(row[1])))


def tables(records: Mapping[str, Any]) -> Iterator[Table]:
    """Perplexities, a column for each share, and what they are relative to the dense model."""
    runs = {(one["method"], one["after"], one["share"]): one for one in records["runs"]}
    shares = sorted({share for *_, share in runs if share < 1}, reverse=True)
    made = Table(box=None, title="perplexity of the next character", title_justify="left")
    for name in ("method", *(f"{share:.0%} of parameters" for share in shares)):
        made.add_column(name, no_wrap=True, justify="left" if name == "method" else "right")
    dense = runs["dense", "", 1.0]["perplexity"]
    for method, after in _order(records):
        cells = []
        for share in shares:
            one = runs.get((method, after, 1.0 if method == "dense" else share))
            cells.append(_cell(one["perplexity"], dense) if one else "")
        made.add_row(method + AFTER[after], *cells)
    yield made


def _cell(value: float, dense: float) -> str:
    digits = 3 if value < 100 else 0
    return f"{value:,.{digits}f} ({value / dense - 1:+.1%})"
