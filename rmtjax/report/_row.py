"""Makes the rows of a report: the numbers of a kernel, and their text."""

import math
from typing import Any, NamedTuple

import numpy as np

from rmtjax._text import brief, printable
from rmtjax.planning import Cost, is_convolution, LayerPlan


class Row(NamedTuple):
    r"""Holds the numbers of one kernel. They are None without a spectrum that is finite.

    A stack of matrices has the mean variance, edge and threshold of its members, and the largest
    distance and number of spikes.

    Attributes:
      path: Place in the tree.
      shape: Shape of the dense kernel.
      action: "factorize", "truncate" or "keep".
      reason: The reason of the action, in words.
      ratio: Aspect ratio $p / n$ of the matrix.
      variance: $\sigma^2$ of the noise.
      edge: End of the Marchenko-Pastur bulk, on the scale of the eigenvalues $s^2 / n$.
      threshold: The cut for a spike.
      spikes: Number of eigenvalues above the threshold.
      distance: Kolmogorov distance between bulk and law, when the noise was fitted.
      rank: Rank of the kernel after the plan.
      removed: Share of the sum of squared entries that the plan removes, in [0, 1). What shrinkage
        removes is not counted.
      removed_outputs: Share of the mean square of the outputs that the plan removes, on the data
        of the moments; None without moments.
      parameters: Numbers in the kernel.
      multiply_adds: Multiply-adds for the rows of `batch`, or for one row without `batch`. A row
        of a convolution is one position of its window, not one image.
      milliseconds: Measured time of one call; None if it was not timed.
      parameters_after: As `parameters`, after the plan.
      multiply_adds_after: As `multiply_adds`, after the plan.
      milliseconds_after: As `milliseconds`, after the plan.
      positions: Of a convolution, the positions that its multiply-adds count; None for others. How
        many positions a call has, the weights do not tell.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> row = rmtjax.analyze({"kernel": noise.at[:, :3].add(5.0)})["kernel"]
      >>> row.action, row.spikes, row.parameters, row.parameters_after
      ('factorize', 1, 80000, 600)
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
    removed_outputs: float | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    milliseconds: float | None = None
    parameters_after: int | None = None
    multiply_adds_after: int | None = None
    milliseconds_after: float | None = None
    positions: int | None = None

    def __repr__(self) -> str:
        known = {name: value for name, value in self._asdict().items() if value is not None}
        return f"Row({', '.join(f'{name}={brief(value)}' for name, value in known.items())})"


def to_number(value: Any) -> float | None:
    """Returns a Python number; None if it is not finite, which JSON does not have."""
    return float(value) if math.isfinite(value) else None


def _share(lost: Any, whole: Any) -> float | None:
    """Returns a sum over another, None if not finite; a kernel of zeros loses nothing."""
    lost, whole = lost.sum(), whole.sum()
    return to_number(lost / whole if whole else np.float64(lost))


def _removed(layer: LayerPlan) -> tuple[float | None, float | None]:
    """Returns the shares of squared entries and of squared outputs that a plan removes."""
    cut = layer.action != "keep"
    if layer.loss is None:
        # In float64: for a large kernel float32 would lose digits in the sum.
        spectrum: Any = layer.spectrum
        eigenvalues = np.asarray(spectrum.eigenvalues, np.float64)
        return _share(eigenvalues[..., layer.rank :], eigenvalues) if cut else 0.0, None
    losses = layer.loss.squares, layer.loss.outputs
    shares = (_share(lost[..., layer.rank], lost[..., 0]) for lost in losses)
    squares, outputs = (share if cut else 0.0 for share in shares)
    return squares, outputs


def _positions(path: str, layer: LayerPlan, rows: int | None) -> int | None:
    """Returns the positions that the multiply-adds of a convolution count; None for others."""
    if layer.cost is None or not is_convolution(path, layer.shape, layer.axes):
        return None
    if rows is not None or not layer.cost.parameters:
        return rows or 1
    # A plan alone does not tell its rows. Kernels in parts have no such quotient.
    quotient, rest = divmod(layer.cost.multiply_adds, layer.cost.parameters)
    return 1 if rest else quotient


def make_row(path: str, layer: LayerPlan, rows: int | None = None) -> Row:
    """Returns the row of a kernel from its row of the plan; `rows` are those of its inputs."""
    fit, spectrum = layer.fit, layer.spectrum
    costs = layer.cost._asdict() if layer.cost else {}
    row = Row(path, layer.shape, layer.action, layer.reason, **costs)
    row = row._replace(positions=_positions(path, layer, rows))
    if fit is None or spectrum is None:
        return row
    distance, (removed, outputs) = to_number(np.max(fit.distance)), _removed(layer)
    return row._replace(
        ratio=to_number(spectrum.ratio),
        variance=to_number(np.mean(fit.variance)),
        edge=to_number(np.mean(fit.edge)),
        threshold=to_number(np.mean(fit.threshold)),
        spikes=None if distance is None else int(np.max(fit.num_spikes)),
        distance=distance,
        rank=layer.rank,
        removed=removed,
        removed_outputs=outputs,
    )


def to_text(value: Any) -> str:
    """Returns the text of a cell. Numbers have four digits."""
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "()"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else printable(value)


def to_cell(row: Row | Cost, name: str, arrow: str = " -> ") -> str:
    """Returns a field as text, with its value after the plan if that is different.

    Multiply-adds of a convolution also say how many positions they count.
    """
    value = getattr(row, name)
    after = getattr(row, f"{name}_after", value)
    text = to_text(value) if after == value else f"{to_text(value)}{arrow}{to_text(after)}"
    positions = getattr(row, "positions", None)
    if positions is None or not name.startswith("multiply_adds"):
        return text
    return f"{text} of {'one position' if positions == 1 else f'{positions:,} positions'}"
