"""Reports on a parameter tree: a row for each kernel, as data, as text or as a page."""

import csv
import html
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TYPE_CHECKING

from rmtjax._text import align, html_table, no_such_path, printable, SCREEN
from rmtjax.noise import ranks, SpectralMetrics
from rmtjax.planning import (
    add_costs,
    Cost,
    decide_all,
    Findings,
    judge_again,
    NO_OTHERS,
    Others,
    Plan,
    PlanOptions,
    rows_by_path,
)
from rmtjax.report._columns import dtypes, expand_columns, spectral_metrics, USUAL
from rmtjax.report._page import render
from rmtjax.report._row import make_row, Row, to_cell, to_text
from rmtjax.report._words import summarize

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console, ConsoleOptions, RenderResult


Extras = Mapping[str, Mapping[str, Any]]
# The default columns of tables, without and with the costs that `batch` measures.
_COLUMNS = ("path", "shape", "variance", "edge", "threshold", "spikes", "distance", "reason")
_TIMED = (*_COLUMNS[:-1], "parameters", "multiply_adds", "milliseconds", "reason")
# The signs that Markdown reads as markup. An underscore within a word is not one of them.
_SIGNS = re.compile(r"[\\`*\[\]~|]|(?<![^\W_])_|_(?![^\W_])")


@dataclass(frozen=True)
class Report:
    """Shows a plan as tables, text, data or a page. `rmtjax.analyze` makes it.

    A notebook and `rich.print` show it as a table. `report[path]` is the row of a kernel, and the
    report is also a sequence of its rows. Names of kernels are escaped in every form, so that they
    cannot control a terminal or act as markup.

    The columns of a table are fields of `Row`, `SpectralMetrics` and `ExtraMetrics`, by their names
    or by that of a group: "summary", "law", "ranks", "tails", "cost", "traps", "pooled", "change"
    or "all". By default these are the results of the fit, and the costs if these were timed. A cost
    that the plan changes is written as `before -> after`. The totals are below the costs.

    Attributes:
      plan: The plan behind the report, with the spectra.
      others: How many tensors have no row, such as biases and scales, and the numbers in them.
      applied: Whether the plan was carried out. If not, tables say "would be factorized".
      findings: What was measured of the kernels, without their values; None for a plan alone.
      options: The options of the plan.
      extras: The `ExtraMetrics` of kernels by path and name, if they were asked for.
      difference: Whether the kernels are what a fine-tuning has changed.

    Examples:
      >>> import jax, rmtjax
      >>> report = rmtjax.analyze({"kernel": jax.random.normal(jax.random.key(0), (80, 60))})
      >>> print(report.replan(rmtjax.ranks.fixed(16)).table("path", "shape", "rank"))
      path    shape  rank
      kernel  80x60  16
    """

    plan: Plan
    others: Others = NO_OTHERS
    applied: bool = False
    findings: Findings | None = field(default=None, compare=False)
    options: PlanOptions | None = field(default=None, compare=False)
    extras: Extras = field(default_factory=dict)
    difference: bool = False

    # Cached, because every form of the report asks for them. A frozen dataclass allows it: the
    # cache writes into `__dict__`, and not by `setattr`.
    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """A `Row` for each kernel, in the order of the tree."""
        options, found = self.options, self.findings
        known = options and found and rows_by_path(options.batch, found.kernels)
        return tuple(make_row(p, row, (known or {}).get(p)) for p, row in self.plan.items())

    def __len__(self) -> int:
        return len(self.rows)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, path: str) -> Row:
        row = next((row for row in self.rows if row.path == path), None)
        if row is None:
            raise no_such_path(path, self.plan)
        return row

    def replan(self, rule: ranks.RankRule) -> "Report":
        """Returns the report under another rank rule, from the spectra that it has.

        No spectrum is computed, and another number of a rule compiles nothing. Kernels that the
        first rule could not judge, such as factors without a noise level, stay as they are. A
        spectrum that was estimated decides, although a new report might compute it.

        Args:
          rule: A rank rule of `rmtjax.ranks`.

        Raises:
          ValueError: The report was made of a plan alone, or only one of both rules equalizes.
        """
        if self.findings is None or self.options is None:
            raise ValueError(
                "`replan` needs the spectra of a report of `analyze` or `analyze_file`, got one of "
                "a plan alone: call `rmtjax.analyze(params)`."
            )
        options = replace(self.options, rule=rule)
        found = judge_again(self.findings, options)
        known: Any = {"findings": found, "options": options}
        return replace(self, plan=decide_all(found, options), applied=False, **known)

    @cached_property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """The `SpectralMetrics` of each kernel by path and name, computed when first asked for.

        A number is None without a spectrum that is finite, and where it does not exist. A stack has
        the mean of its members, and the largest of their counts. `ExtraMetrics` follow if
        `analyze` was asked for them.
        """
        found = spectral_metrics(self.plan)
        return {path: {**numbers, **self.extras.get(path, {})} for path, numbers in found.items()}

    @property
    def totals(self) -> Cost:
        """The sums of the costs of all kernels; of milliseconds over the kernels timed.

        Multiply-adds are for as many positions of a convolution as its row says. Where only these
        are known, tables and pages show no sum.
        """
        return add_costs(layer.cost for layer in self.plan.values() if layer.cost)

    @property
    def _sums(self) -> Cost:
        """The totals that have a meaning: multiply-adds of convolutions count one position each."""
        batch = self.options.batch if self.options else None
        given = batch if isinstance(batch, Mapping) else {}
        unknown: Any = {"multiply_adds": None, "multiply_adds_after": None}
        odd = any(row.positions is not None and row.path not in given for row in self.rows)
        return self.totals._replace(**unknown) if odd else self.totals

    def _value(self, row: Row, name: str) -> Any:
        return getattr(row, name) if name in Row._fields else self.metrics[row.path].get(name)

    @property
    def summary(self) -> str:
        """A few sentences: what was analyzed, what stands out, and what to do next."""
        known = {"applied": self.applied, "difference": self.difference}
        return "\n".join(summarize(self.rows, self.totals, self.others, **known))

    def _cell(self, row: Row, name: str) -> str:
        planned = name == "reason" and row.action != "keep" and not self.applied
        text = to_cell(row, name) if name in Row._fields else to_text(self._value(row, name))
        return f"would be {text}" if planned else text

    def cells(self, *columns: str) -> list[list[str]]:
        """Returns the named columns of each row as text."""
        columns = expand_columns(columns)
        return [[self._cell(row, name) for name in columns] for row in self.rows]

    def _lines(self, columns: tuple[str, ...]) -> tuple[list[str], list[list[str]], list[str]]:
        """Returns head, rows and totals of a table; no totals without costs or kernels."""
        totals = self._sums
        columns = expand_columns(columns)
        columns = columns or (_COLUMNS if totals.milliseconds is None else _TIMED)
        rows = self.cells(*columns)
        foot = [to_cell(totals, name) if name in Cost._fields else "" for name in columns]
        total = [foot[0] or "total", *foot[1:]] if rows and any(foot) else []
        return list(columns), rows, total

    def table(self, *columns: str, width: int | None = None) -> str:
        """Returns the rows as aligned text.

        In lines of at most `width` characters there is no room for some columns, which are left
        out. No number is shortened, and long reasons go on in the next line.
        """
        head, rows, foot = self._lines(columns)
        return align(head, [*rows, *filter(None, [foot])], width)

    __str__ = table

    def _first(self) -> tuple["Report", str]:
        """Returns a report with the first rows, which fit a screen, and how many more there are."""
        more = len(self) - SCREEN
        few = replace(self, plan=Plan([*self.plan.items()][:SCREEN]))
        return few, f"... and {more} more" if more > 0 else ""

    def __repr__(self) -> str:
        few, more = self._first()
        head, rows, _ = few._lines(("path", "shape", "spikes", "rank", "removed", "action"))
        return "\n".join(filter(None, [align(head, rows, 80), more, self.summary]))

    def _repr_html_(self) -> str:
        few, more = self._first()
        head, rows, _ = few._lines(())
        return f"{html_table(head, rows)}\n<p>{more}</p>\n<p>{html.escape(self.summary)}</p>"

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
        return html_table(head, rows, foot)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """Yields the table that `rich` shows, as wide as its terminal."""
        from rich.text import Text

        timed = () if self.totals.milliseconds is None else ("milliseconds",)
        columns = ("path", "spikes", "distance", "parameters", *timed, "reason")
        yield Text(self.table(*columns, width=options.max_width))  # a `Text` has no markup

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

    def to_page(self, title: str = "rmtjax", *columns: str) -> str:
        """Returns an HTML page with totals, a table of kernels, and their spectra.

        The page needs no network. Mouse or keyboard sort and filter the table and open kernels.
        Of the first ten rows, that with the largest cut is open, or else the first with a law.
        Without JavaScript the table is still there. Spectra are drawn from histograms: a page of
        3,000 kernels has a few megabytes.

        With `columns` the page opens with them, and its list "Columns" has the groups among them
        and the default. By default there are a few, and what `analyze` was asked for by
        `randomized` or `aspect`.
        """
        extras = {n for found in self.extras.values() for n, v in found.items() if v is not None}
        asked = expand_columns(columns) or (tuple(sorted(extras)) and (*USUAL, *sorted(extras)))
        spectral = set(asked) & set(SpectralMetrics._fields)
        metrics = self.metrics if spectral else self.extras
        numbers = self.rows, self._sums, self.plan, self.others
        options: Any = {"applied": self.applied, "asked": asked, "metrics": metrics}
        return render(title, *numbers, summary=self.summary, **options)
