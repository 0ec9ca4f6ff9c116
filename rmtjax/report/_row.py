"""A kernel of a report as a row: its numbers, and their text."""

import math
from typing import Any, NamedTuple

import numpy as np

from rmtjax._text import printable
from rmtjax.planning import Cost, LayerPlan


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
      removed: Share of the sum of the squares of its entries that the plan takes away, in [0, 1);
        what shrinkage takes besides is not counted.
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
    removed: float | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    milliseconds: float | None = None
    parameters_after: int | None = None
    multiply_adds_after: int | None = None
    milliseconds_after: float | None = None


def _number(value: Any) -> float | None:
    """A Python number, for JSON too, which knows no NaN."""
    return float(value) if math.isfinite(value) else None


def _removed(layer: LayerPlan) -> float:
    """The share of the eigenvalues beyond the rank, of all matrices of a stack."""
    if layer.action == "keep" or layer.spectrum is None:
        return 0.0
    eigenvalues = np.asarray(layer.spectrum.eigenvalues, np.float64)
    return float(eigenvalues[..., layer.rank :].sum() / eigenvalues.sum())


def make_row(path: str, layer: LayerPlan) -> Row:
    """The row of a kernel, from what is planned for it."""
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
        removed=_number(_removed(layer)),
    )


def to_text(value: Any) -> str:
    """A cell, in which a name steers nothing; four digits are what the eye can use."""
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "()"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else printable(value)


def to_cell(row: Row | Cost, name: str, arrow: str = " -> ") -> str:
    """A field as text, with what becomes of it."""
    value = getattr(row, name)
    after = getattr(row, f"{name}_after", value)
    return to_text(value) if after == value else f"{to_text(value)}{arrow}{to_text(after)}"
