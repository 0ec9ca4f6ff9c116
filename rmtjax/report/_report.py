"""Reports on a parameter tree: a row for each kernel, as data, as text or as a page."""

import csv
import html
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TYPE_CHECKING

from jaxtyping import PyTree

from rmtjax._text import printable
from rmtjax._types import Axes, BulkFit, Where
from rmtjax.moments import Moments
from rmtjax.noise import ranks
from rmtjax.planning import (
    add_costs,
    Cost,
    count_others,
    make_plan,
    NO_OTHERS,
    Others,
    Plan,
    PlanOptions,
)
from rmtjax.report._columns import dtypes, expand_columns, spectral_metrics
from rmtjax.report._page import render
from rmtjax.report._row import make_row, Row, to_cell, to_text

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table


# The default columns of tables, without and with the costs that `batch` measures.
_COLUMNS = ("path", "shape", "variance", "edge", "threshold", "spikes", "distance", "reason")
_TIMED = (*_COLUMNS[:-1], "parameters", "multiply_adds", "milliseconds", "reason")
# The signs that Markdown reads as markup. An underscore within a word is not one of them.
_SIGNS = re.compile(r"[\\`*\[\]~|]|(?<![^\W_])_|_(?![^\W_])")


@dataclass(frozen=True)
class Report:
    """Shows a plan as tables, text, data or a page. `rmtjax.analyze` makes it.

    A notebook and `rich.print` show it as a table. Names of kernels are escaped in every form, so
    that they cannot control a terminal or act as markup.

    The columns of a table are fields of `Row` and of `SpectralMetrics`, by their names or by the
    name of a group: "summary", "law", "ranks", "tails", "cost" or "all". By default these are the
    results of the fit, and the costs if these were timed. A cost that the plan changes is written
    as `before -> after`. The totals are below the costs.

    Attributes:
      plan: The plan behind the report, with the spectra.
      others: How many tensors have no row, such as biases and scales, and the numbers in them.
    """

    plan: Plan
    others: Others = NO_OTHERS

    # Cached, because every form of the report asks for them. A frozen dataclass allows it: the
    # cache writes into `__dict__`, and not by `setattr`.
    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """A `Row` for each kernel, in the order of the tree."""
        return tuple(make_row(path, layer) for path, layer in self.plan.items())

    @cached_property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """The `SpectralMetrics` of each kernel by path and name, computed when first asked for.

        A number is None without a spectrum that is finite, and where it does not exist. A stack has
        the mean of its members, and the largest of their counts.
        """
        return spectral_metrics(self.plan)

    @property
    def totals(self) -> Cost:
        """The sums of the costs of all kernels; of milliseconds over the kernels timed."""
        return add_costs(layer.cost for layer in self.plan.values() if layer.cost)

    def _value(self, row: Row, name: str) -> Any:
        return getattr(row, name) if name in Row._fields else self.metrics[row.path][name]

    def _cell(self, row: Row, name: str) -> str:
        return to_cell(row, name) if name in Row._fields else to_text(self._value(row, name))

    def cells(self, *columns: str) -> list[list[str]]:
        """Returns the named columns of each row as text."""
        columns = expand_columns(columns)
        return [[self._cell(row, name) for name in columns] for row in self.rows]

    def _lines(self, columns: tuple[str, ...]) -> tuple[list[str], list[list[str]], list[str]]:
        """Returns head, rows and totals of a table; no totals without costs or kernels."""
        totals = self.totals
        columns = expand_columns(columns)
        columns = columns or (_COLUMNS if totals.milliseconds is None else _TIMED)
        rows = self.cells(*columns)
        foot = [to_cell(totals, name) if name in Cost._fields else "" for name in columns]
        total = [foot[0] or "total", *foot[1:]] if rows and any(foot) else []
        return list(columns), rows, total

    def table(self, *columns: str) -> str:
        """Returns the rows as aligned text."""
        head, rows, foot = self._lines(columns)
        lines = [head, *rows, *filter(None, [foot])]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        pad = lambda line: "  ".join(map(str.ljust, line, widths)).rstrip()
        return "\n".join(map(pad, lines))

    __str__ = table

    def to_dict(self, *columns: str) -> dict[str, Any]:
        """Returns data that JSON can hold: "rows", a list of dictionaries, and "totals".

        By default the rows have all fields of `Row`. The totals also count the tensors without a
        row, if there are some, and their numbers.
        """
        columns = expand_columns(columns) or Row._fields
        plain = lambda value: list(value) if isinstance(value, tuple) else value
        rows = [{name: plain(self._value(row, name)) for name in columns} for row in self.rows]
        others = {f"other_{name}": count for name, count in self.others._asdict().items()}
        totals = self.totals._asdict() | (others if any(self.others) else {})
        return {"rows": rows, "totals": totals}

    def to_json(self, *columns: str) -> str:
        """Returns the data of `to_dict` as text."""
        return json.dumps(self.to_dict(*columns), indent=2, allow_nan=False)

    def to_csv(self, *columns: str) -> str:
        """Returns comma-separated values in full precision, by default all fields of `Row`.

        A text that a spreadsheet would take for a formula begins with a quote.
        """
        columns = expand_columns(columns) or Row._fields
        quote = lambda text: "'" if text.lstrip().startswith(("=", "+", "-", "@")) else ""
        text = lambda value: to_text(value) if isinstance(value, tuple) else value
        plain = lambda value: quote(value) + printable(value) if isinstance(value, str) else value
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in self.rows:
            writer.writerow([plain(text(self._value(row, name))) for name in columns])
        return file.getvalue()

    def to_markdown(self, *columns: str) -> str:
        """Returns the rows as a Markdown table."""
        head, rows, foot = self._lines(columns)
        lines = [head, ["---"] * len(head), *rows, *([foot] if foot else [])]
        entities = str.maketrans({"&": "&amp;", "<": "&lt;"})
        escape = lambda cell: _SIGNS.sub(r"\\\g<0>", cell.translate(entities))
        return "\n".join(f"| {' | '.join(map(escape, line))} |" for line in lines)

    def to_html(self, *columns: str) -> str:
        """Returns the rows as an HTML table without a style."""
        head, rows, foot = self._lines(columns)
        cells = lambda line, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
        line = lambda line, tag="td": f"<tr>{cells(line, tag)}</tr>"
        body = "\n".join(map(line, rows))
        tail = f"\n<tfoot>{line(foot)}</tfoot>" if foot else ""
        head = f"<thead>{line(head, 'th')}</thead>"
        # With these classes, notebooks do not take a dollar sign in a name for mathematics.
        table = '<table class="tex2jax_ignore mathjax_ignore">'
        return f"{table}\n{head}\n<tbody>\n{body}\n</tbody>{tail}\n</table>"

    _repr_html_ = to_html  # what a notebook shows

    def __rich__(self) -> "Table":
        """Returns the table that `rich` shows."""
        from rich.table import Table
        from rich.text import Text

        timed = () if self.totals.milliseconds is None else ("milliseconds",)
        # A terminal of 80 columns has room for these.
        columns = ("path", "spikes", "distance", "parameters", *timed, "reason")
        head, rows, foot = self._lines(columns)
        table = Table(box=None, show_footer=bool(foot), header_style="bold", footer_style="bold")
        for name, total in zip(head, foot or [""] * len(head), strict=True):
            side = "left" if name in ("path", "reason") else "right"
            table.add_column(name, Text(total), justify=side, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # a `Text` has no markup
        return table

    def to_pandas(self, *columns: str) -> "DataFrame":
        """Returns the rows as a `pandas.DataFrame`, with missing values for unknown numbers.

        By default it has all fields of `Row`.

        Raises:
          ModuleNotFoundError: pandas is not installed: `pip install 'rmtjax[pandas]'`.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("needs pandas: pip install 'rmtjax[pandas]'") from error
        columns = expand_columns(columns) or Row._fields
        rows = [tuple(self._value(row, name) for name in columns) for row in self.rows]
        return pandas.DataFrame.from_records(rows, columns=columns).astype(dtypes(columns))

    def to_page(self, title: str = "rmtjax") -> str:
        """Returns an HTML page with totals, a table of kernels, and their spectra.

        The page needs no network. Mouse or keyboard sort and filter the table and open kernels.
        Without JavaScript the table is still there. Spectra are drawn from histograms: a page of
        3,000 kernels has a few megabytes.
        """
        return render(title, self.rows, self.totals, self.plan, self.others)


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
    moments: Moments | None = None,
) -> Report:
    """Analyzes every kernel of a parameter tree; changes nothing.

    Args:
      params: Nested dictionaries of arrays, as `module.init(...)["params"]`.
      rule, where, axes, fits, min_size, exact_below, batch, moments: As in `rmtjax.plan`.

    Returns:
      A `Report`. Ranks are not rounded up to a multiple, and kernels under `min_size` have rows
      without a fit.

    Raises:
      ValueError: An option is out of range, or `axes` or `batch` does not fit the tree.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> report = rmtjax.analyze({"Dense_0": {"kernel": noise.at[:, 0].add(5.0)}})
      >>> report.rows[0].spikes, report.rows[0].reason
      (1, 'factorized: 1 of 200 are signal, rank 1')
    """
    sizes: dict[str, Any] = {"multiple": 1, "min_size": min_size, "exact_below": exact_below}
    known: dict[str, Any] = {"where": where, "axes": axes, "fits": fits, "moments": moments}
    options = PlanOptions(rule, batch=batch, **known, **sizes)
    plan = make_plan(params, options)
    return Report(plan, count_others(params, plan))
