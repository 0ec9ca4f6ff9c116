"""A report on a parameter tree: a row a kernel, as data, as text or as a page."""

import csv
import html
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from rmtjax import ranks
from rmtjax._cost import add_costs, Cost
from rmtjax._plan import LayerPlan, Plan, plan
from rmtjax._tensors import printable
from rmtjax._typing import Axes, BulkFit, Where


class Row(NamedTuple):
    r"""One kernel. Numbers are None where there is no spectrum, or where it is not finite.

    For a stack of matrices these are the mean variance, edge and threshold, and the largest
    distance and number of spikes.

    Attributes:
      path: Place in the tree.
      shape: Of the kernel.
      action: "factorize", "truncate" or "keep".
      reason: Why.
      ratio: Aspect ratio $p / n$ of its matrix.
      variance: $\sigma^2$ of the noise.
      edge: End of the Marchenko-Pastur bulk, on the scale of the eigenvalues $s^2 / n$.
      threshold: The cut for a spike.
      spikes: Number of eigenvalues above it.
      distance: Kolmogorov distance between bulk and law, when the noise was fitted.
      rank: Rank that the plan gives the kernel.
      parameters: Numbers in the kernel.
      multiply_adds: For the rows of `batch`, or for one row without it.
      milliseconds: Measured time of one call; None where it was not timed.
      parameters_after: The same after the plan, where factors stand for the kernel.
      multiply_adds_after: As `parameters_after`.
      milliseconds_after: As `parameters_after`.
    """

    path: str
    shape: tuple[int, ...]
    action: str
    reason: str
    ratio: float | None = None
    variance: float | None = None
    edge: float | None = None
    threshold: float | None = None
    spikes: int | None = None
    distance: float | None = None
    rank: int | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    milliseconds: float | None = None
    parameters_after: int | None = None
    multiply_adds_after: int | None = None
    milliseconds_after: float | None = None


def _number(value: Any) -> float | None:
    """A Python number, for JSON too, which knows no NaN."""
    return float(value) if math.isfinite(value) else None


def _row(path: str, layer: LayerPlan) -> Row:
    fit, spectrum = layer.fit, layer.spectrum
    costs = layer.cost._asdict() if layer.cost else {}
    row = Row(path, layer.shape, layer.action, layer.reason, **costs)
    if fit is None or spectrum is None:
        return row
    distance = _number(np.max(fit.distance))
    return row._replace(
        ratio=_number(spectrum.ratio),
        variance=_number(np.mean(fit.variance)),
        edge=_number(np.mean(fit.edge)),
        threshold=_number(np.mean(fit.threshold)),
        spikes=None if distance is None else int(np.max(fit.num_spikes)),
        distance=distance,
        rank=layer.rank,
    )


def _text(value: Any) -> str:
    """A cell; four digits are what the eye can use."""
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "()"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else value


def _plain(value: Any) -> Any:
    """A value that spreadsheets take for what it is: one line, and no formula."""
    if not isinstance(value, str):
        return value
    return (
        f"'{printable(value)}"
        if value.lstrip().startswith(("=", "+", "-", "@"))
        else printable(value)
    )


def _cell(row: Row | Cost, name: str) -> str:
    """A field as text, with what becomes of it."""
    value = getattr(row, name)
    after = getattr(row, f"{name}_after", value)
    return _text(value) if after == value else f"{_text(value)} -> {_text(after)}"


_COLUMNS = ("path", "shape", "variance", "edge", "threshold", "spikes", "distance", "reason")
_TIMED = (*_COLUMNS[:-1], "parameters", "multiply_adds", "milliseconds", "reason")


def _check_columns(columns: tuple[str, ...]) -> None:
    unknown = sorted(set(columns) - set(Row._fields))
    if unknown:
        known = ", ".join(Row._fields)
        raise ValueError(f"`columns` must be fields of `Row` ({known}), got {unknown[0]!r}.")


@dataclass(frozen=True)
class Report:
    """What `rmtjax.analyze` found: a view of a plan.

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
        return tuple(_row(path, layer) for path, layer in self.plan.items())

    @property
    def totals(self) -> Cost:
        """The sums of the costs of all kernels, of milliseconds those of the kernels timed."""
        return add_costs(layer.cost for layer in self.plan.values() if layer.cost)

    def cells(self, *columns: str) -> list[list[str]]:
        """The rows as text, for a table of one's own: the fields of `Row` named."""
        _check_columns(columns)
        return [[_cell(row, name) for name in columns] for row in self.rows]

    def _lines(self, columns: tuple[str, ...]) -> tuple[list[str], list[list[str]], list[str]]:
        """Head, rows and totals of a table; without costs, or without kernels, no totals."""
        totals = self.totals
        columns = columns or (_COLUMNS if totals.milliseconds is None else _TIMED)
        rows = self.cells(*columns)
        foot = [_cell(totals, name) if name in Cost._fields else "" for name in columns]
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
            values = row._replace(shape=_text(row.shape))._asdict()
            writer.writerow([_plain(values[name]) for name in columns])
        return file.getvalue()

    def to_markdown(self, *columns: str) -> str:
        """The rows as a Markdown table, escaped."""
        head, rows, foot = self._lines(columns)
        lines = [head, ["---"] * len(head), *rows, *([foot] if foot else [])]
        escape = str.maketrans({"&": "&amp;", "<": "&lt;", "|": r"\|"})
        cells = lambda line: (cell.translate(escape) for cell in line)
        return "\n".join(f"| {' | '.join(cells(line))} |" for line in lines)

    def to_html(self, *columns: str) -> str:
        """The rows as an HTML table, escaped, without a style of its own."""
        head, rows, foot = self._lines(columns)
        cells = lambda line, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
        line = lambda line, tag="td": f"<tr>{cells(line, tag)}</tr>"
        body = "\n".join(map(line, rows))
        tail = f"\n<tfoot>{line(foot)}</tfoot>" if foot else ""
        head = f"<thead>{line(head, 'th')}</thead>"
        return f"<table>\n{head}\n<tbody>\n{body}\n</tbody>{tail}\n</table>"

    def _repr_html_(self) -> str:
        """How a notebook shows the report."""
        return self.to_html()


def analyze(
    params: PyTree,
    *,
    rule: ranks.RankRule = ranks.bema(),  # noqa: B008 - a frozen value
    where: Where | None = None,
    axes: Axes | None = None,
    fits: Mapping[str, BulkFit] | None = None,
    min_size: int = 50,
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
      batch: Rows for which kernels are timed, dense and as factors, as in `rmtjax.plan`.

    Returns:
      A `Report`: `.rows`, `.totals`, `.table()`, `.to_dict()`, `.to_json()`, `.to_csv()`,
      `.to_markdown()`, `.to_html()`, and `.plan` with the spectra. Its ranks are exact, not rounded
      up to a multiple.

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
    return Report(plan(params, **options, batch=batch, multiple=1))
