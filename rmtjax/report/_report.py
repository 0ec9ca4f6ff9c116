"""A report on a parameter tree: a row a kernel, as data, as text or as a page."""

import csv
import html
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TYPE_CHECKING

from jaxtyping import PyTree

from rmtjax._text import printable
from rmtjax._types import Axes, BulkFit, Where
from rmtjax.noise import ranks
from rmtjax.planning import add_costs, Cost, Plan, plan
from rmtjax.report._page import render
from rmtjax.report._row import make_row, Row, to_cell, to_text

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table


def _plain(value: Any) -> Any:
    """A value that spreadsheets take for what it is: one line, and no formula."""
    if not isinstance(value, str):
        return value
    return (
        f"'{printable(value)}"
        if value.lstrip().startswith(("=", "+", "-", "@"))
        else printable(value)
    )


_COLUMNS = ("path", "shape", "variance", "edge", "threshold", "spikes", "distance", "reason")
_TIMED = (*_COLUMNS[:-1], "parameters", "multiply_adds", "milliseconds", "reason")


# What Markdown would take for a sign of its own; an underscore within a word is none.
_SIGNS = re.compile(r"[\\`*\[\]~|]|(?<![^\W_])_|_(?![^\W_])")


def _check_columns(columns: tuple[str, ...]) -> None:
    unknown = sorted(set(columns) - set(Row._fields))
    if unknown:
        known = ", ".join(Row._fields)
        raise ValueError(f"`columns` must be fields of `Row` ({known}), got {unknown[0]!r}.")


@dataclass(frozen=True)
class Report:
    """What `rmtjax.analyze` found: a view of a plan.

    A notebook shows it as a table, and so does `rich.print`. Names of kernels are data: whatever
    they hold, they steer no terminal, and are no markup.

    Tables have the columns that are named, fields of `Row`; by default what was fitted, and the
    costs where these were timed. A cost that the plan changes stands as `before -> after`, and
    the totals stand under the costs.

    Attributes:
      plan: The plan behind the report, with the spectra.
    """

    plan: Plan

    @property
    def rows(self) -> tuple[Row, ...]:
        """A `Row` for each kernel, in the order of the tree."""
        return tuple(make_row(path, layer) for path, layer in self.plan.items())

    @property
    def totals(self) -> Cost:
        """The sums of the costs of all kernels, of milliseconds those of the kernels timed."""
        return add_costs(layer.cost for layer in self.plan.values() if layer.cost)

    def cells(self, *columns: str) -> list[list[str]]:
        """The rows as text, for a table of one's own: the fields of `Row` named."""
        _check_columns(columns)
        return [[to_cell(row, name) for name in columns] for row in self.rows]

    def _lines(self, columns: tuple[str, ...]) -> tuple[list[str], list[list[str]], list[str]]:
        """Head, rows and totals of a table; without costs, or without kernels, no totals."""
        totals = self.totals
        columns = columns or (_COLUMNS if totals.milliseconds is None else _TIMED)
        rows = self.cells(*columns)
        foot = [to_cell(totals, name) if name in Cost._fields else "" for name in columns]
        total = [foot[0] or "total", *foot[1:]] if rows and any(foot) else []
        return list(columns), rows, total

    def table(self, *columns: str) -> str:
        """The rows as aligned text."""
        head, rows, foot = self._lines(columns)
        lines = [head, *rows, *([foot] if foot else [])]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        pad = lambda line: "  ".join(map(str.ljust, line, widths)).rstrip()
        return "\n".join(map(pad, lines))

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold: a list of dictionaries, "rows", and "totals"."""
        rows = [{**row._asdict(), "shape": list(row.shape)} for row in self.rows]
        return {"rows": rows, "totals": self.totals._asdict()}

    def to_json(self) -> str:
        """What `to_dict` has, as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_csv(self, *columns: str) -> str:
        """The rows as comma-separated values, in full precision; by default with all fields.

        A text is printable, and has a quote before it where a spreadsheet would take it for a
        formula.
        """
        _check_columns(columns)
        columns, file = columns or Row._fields, io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in self.rows:
            values = row._replace(shape=to_text(row.shape))._asdict()
            writer.writerow([_plain(values[name]) for name in columns])
        return file.getvalue()

    def to_markdown(self, *columns: str) -> str:
        """The rows as a Markdown table, escaped."""
        head, rows, foot = self._lines(columns)
        lines = [head, ["---"] * len(head), *rows, *([foot] if foot else [])]
        entities = str.maketrans({"&": "&amp;", "<": "&lt;"})
        escape = lambda cell: _SIGNS.sub(r"\\\g<0>", cell.translate(entities))
        return "\n".join(f"| {' | '.join(map(escape, line))} |" for line in lines)

    def to_html(self, *columns: str) -> str:
        """The rows as an HTML table, escaped, without a style of its own."""
        head, rows, foot = self._lines(columns)
        cells = lambda line, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
        line = lambda line, tag="td": f"<tr>{cells(line, tag)}</tr>"
        body = "\n".join(map(line, rows))
        tail = f"\n<tfoot>{line(foot)}</tfoot>" if foot else ""
        head = f"<thead>{line(head, 'th')}</thead>"
        # The classes by which notebooks leave out what they would take for mathematics.
        table = '<table class="tex2jax_ignore mathjax_ignore">'
        return f"{table}\n{head}\n<tbody>\n{body}\n</tbody>{tail}\n</table>"

    def _repr_html_(self) -> str:
        """How a notebook shows the report."""
        return self.to_html()

    def __rich__(self) -> "Table":
        """How `rich` shows the report."""
        from rich.table import Table
        from rich.text import Text

        timed = () if self.totals.milliseconds is None else ("milliseconds",)
        # What 80 columns of a terminal have room for.
        columns = ("path", "spikes", "distance", "parameters", *timed, "reason")
        head, rows, foot = self._lines(columns)
        table = Table(box=None, show_footer=bool(foot), header_style="bold", footer_style="bold")
        for name, total in zip(head, foot or [""] * len(head), strict=True):
            side = "left" if name in ("path", "reason") else "right"
            table.add_column(name, Text(total), justify=side, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # a `Text` has no markup
        return table

    def to_pandas(self) -> "DataFrame":
        """The rows as a `pandas.DataFrame` with the fields of `Row`; what is not known is missing.

        Raises:
          ModuleNotFoundError: pandas is not installed: `pip install 'rmtjax[pandas]'`.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "`Report.to_pandas` needs pandas: pip install 'rmtjax[pandas]'"
            ) from error
        dtypes = {int | None: "Int64", float | None: "float64"}
        kinds = {name: dtypes[kind] for name, kind in Row.__annotations__.items() if kind in dtypes}
        return pandas.DataFrame.from_records(self.rows, columns=Row._fields).astype(kinds)

    def to_page(self, title: str = "rmtjax") -> str:
        """A whole HTML page that needs no network: totals, a table of kernels, their spectra.

        The table can be sorted and filtered, and each kernel opened, by keyboard too; without
        JavaScript it is a table still. Spectra are drawn from histograms: a page of 3,000 kernels
        has some megabytes.

        Args:
          title: Its heading.
        """
        return render(title, self.rows, self.totals, self.plan)


def analyze(
    params: PyTree,
    *,
    rule: ranks.RankRule = ranks.bema(),  # noqa: B008 - a frozen value
    where: Where | None = None,
    axes: Axes | None = None,
    fits: Mapping[str, BulkFit] | None = None,
    min_size: int = 50,
    exact_below: int = 4096,
    batch: int | Mapping[str, int] | None = None,
) -> Report:
    """Looks at every kernel of a parameter tree; changes nothing.

    Args:
      params: Nested dictionaries of arrays, as `module.init(...)["params"]`.
      rule: A rank rule of `rmtjax.ranks`.
      where: `where(path, leaf)` chooses the kernels, as in `rmtjax.plan`.
      axes: The axes that make a kernel a matrix, as in `rmtjax.plan`.
      fits: Noise levels to use instead of new fits, as in `rmtjax.plan`.
      min_size: Kernels with a shorter short side get a row without a fit.
      exact_below: Spectra are estimated from this short side on, as in `rmtjax.plan`.
      batch: Rows for which kernels are timed, dense and as factors, as in `rmtjax.plan`.

    Returns:
      A `Report`: `.rows`, `.totals`, `.table()`, `.to_dict()`, `.to_json()`, `.to_csv()`,
      `.to_markdown()`, `.to_html()`, `.to_pandas()`, `.to_page()`, and `.plan` with the spectra.
      Its ranks are exact, not rounded up to a multiple.

    Raises:
      ValueError: An option is out of range, or `axes` or `batch` does not fit the tree.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> report = rmtjax.analyze({"Dense_0": {"kernel": noise.at[:, 0].add(5.0)}})
      >>> report.rows[0].spikes, report.rows[0].reason
      (1, 'factorized: 1 of 200 are signal, rank 1')
    """
    options = {"rule": rule, "where": where, "axes": axes, "fits": fits, "min_size": min_size}
    return Report(plan(params, **options, exact_below=exact_below, batch=batch, multiple=1))
