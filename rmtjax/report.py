"""A report on a parameter tree: a row a kernel, as data, as text or as a page."""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from rmtjax import ranks
from rmtjax._plan import LayerPlan, Plan, plan
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


def _number(value: Any) -> float | None:
    """A Python number, for JSON too, which knows no NaN."""
    return float(value) if math.isfinite(value) else None


def _row(path: str, layer: LayerPlan) -> Row:
    fit, spectrum = layer.fit, layer.spectrum
    if fit is None or spectrum is None:
        return Row(path, layer.shape, layer.action, layer.reason)
    distance = _number(np.max(fit.distance))
    return Row(
        path,
        layer.shape,
        layer.action,
        layer.reason,
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
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_COLUMNS = ("path", "shape", "variance", "edge", "threshold", "spikes", "distance", "reason")


@dataclass(frozen=True)
class Report:
    """What `rmtjax.analyze` found: a view of a plan.

    Attributes:
      plan: The plan behind the report, with the spectra.
    """

    plan: Plan

    @property
    def rows(self) -> tuple[Row, ...]:
        """A `Row` for each kernel, in the order of the tree."""
        return tuple(_row(path, layer) for path, layer in self.plan.items())

    def cells(self, *columns: str) -> list[list[str]]:
        """The rows as text, for a table of one's own: the fields of `Row` named."""
        return [[_text(getattr(row, name)) for name in columns] for row in self.rows]

    def table(self) -> str:
        """The rows as aligned text."""
        lines = [list(_COLUMNS), *self.cells(*_COLUMNS)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        pad = lambda line: "  ".join(map(str.ljust, line, widths)).rstrip()
        return "\n".join(map(pad, lines))

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """The rows as plain data that JSON can hold: a list of dictionaries, under "rows"."""
        return {"rows": [{**row._asdict(), "shape": list(row.shape)} for row in self.rows]}

    def to_html(self) -> str:
        """The rows as an HTML table, escaped, without a style of its own."""
        line = lambda cells, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        body = "\n".join(f"<tr>{line(cells, 'td')}</tr>" for cells in self.cells(*_COLUMNS))
        head = f"<thead><tr>{line(_COLUMNS, 'th')}</tr></thead>"
        return f"<table>\n{head}\n<tbody>\n{body}\n</tbody>\n</table>"

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
) -> Report:
    """Looks at every kernel of a parameter tree; changes nothing.

    Args:
      params: Nested dictionaries of arrays, as `module.init(...)["params"]`.
      rule: A rank rule of `rmtjax.ranks`.
      where: `where(path, leaf)` chooses the kernels, as in `rmtjax.plan`.
      axes: `axes(path, leaf)` names the axes that make a kernel a matrix, as in
        `rmtjax.plan`.
      fits: Noise levels to use instead of new fits, as in `rmtjax.plan`.
      min_size: Kernels with a shorter short side get a row without numbers.

    Returns:
      A `Report`: `.rows`, `.table()`, `.to_dict()`, `.to_html()`, and `.plan` with the
      spectra. Its ranks are exact, not rounded up to a multiple.

    Raises:
      ValueError: An option is out of range, or `axes` does not fit a leaf.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> report = rmtjax.analyze({"Dense_0": {"kernel": noise.at[:, 0].add(5.0)}})
      >>> report.rows[0].spikes, report.rows[0].reason
      (1, 'factorized: 1 of 200 are signal, rank 1')
    """
    options = {"rule": rule, "where": where, "axes": axes, "fits": fits, "min_size": min_size}
    return Report(plan(params, **options, multiple=1))
