"""The style of all figures, and spectra with their laws as points to draw."""

from typing import Any, NamedTuple, TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rmtjax._types import BulkFit, Spectrum
from rmtjax.noise import roots, rounding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Law = tuple[Float[Array, ""], int, Int[Array, ""], Float[Array, ""]]

# Okabe and Ito's colours, which colour-blind people can distinguish, without their yellow, which
# is invisible on white paper. In grey they are similar, so each goes with a marker and a line.
BLACK, BLUE, SKY, ORANGE = "#000000", "#0072B2", "#56B4E9", "#E69F00"
PALE = "#B3DCF4"  # the hue of SKY, lighter: areas must not hide lines
VERMILION, GREEN, PURPLE = "#D55E00", "#009E73", "#CC79A7"
COLOURS = (BLUE, VERMILION, GREEN, BLACK, ORANGE, PURPLE, SKY)
MARKERS = "o^sDvXP*"
LEGEND = 8  # entries; a longer legend covers data, so it goes beside the axes


def style(index: int) -> dict:
    """Returns colour and marker of a series; 56 series differ."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def new_axes(height: float = 4.8, width: float = 6.4) -> "Axes":
    """Returns the axes of a new figure of pyplot, of this height and width in inches."""
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "rmtjax.plots needs matplotlib: pip install 'rmtjax[plots]'"
        ) from error
    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def dot_size(count: int) -> float:
    """Returns the size of a marker in points, smaller if many markers share a curve."""
    return float(np.clip(40 / max(count, 1) ** 0.5, 1.5, 6))


def _label_logarithms(axis: "Axis", form: str) -> None:
    """Labels a logarithmic axis with few numbers, written out."""
    # The labels that matplotlib chooses, such as 2x10^2, overlap on small figures.
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        # On less than two decades, powers of ten alone would be too few labels.
        axis.set_major_locator(LogLocator(subs=(1,) if high > 50 * low else (1, 2, 5)))
    axis.set_major_formatter(EngFormatter(sep="") if form == "k" else StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _add_legend(ax: "Axes", beside: bool) -> None:
    """Adds the legend, beside the axes if `beside` or if it is long."""
    count = len(ax.get_legend_handles_labels()[0])
    if not count:
        return
    place: dict = {"loc": "best"}
    if beside or count > LEGEND:
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1), "ncols": 1 + count // 20}
    legend = ax.legend(fontsize="small", framealpha=0.8, edgecolor="none", **place)
    for handle in legend.get_lines():
        # The markers of thousands of points are too small to be seen in a legend.
        handle.set_markersize(6)


def finish(
    ax: "Axes", xlabel: str, ylabel: str, title: str, *, form: str = "", beside: bool = False
) -> "Axes":
    """Adds labels, title and legend to axes; form "k" writes numbers as 100k."""
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_scale() != "linear":
            _label_logarithms(axis, form)
    _add_legend(ax, beside)
    return ax


class Drawn(NamedTuple):
    r"""A spectrum as $\sqrt\lambda = s / \sqrt n$ in float64, descending, with its cuts."""

    values: np.ndarray
    present: np.ndarray  # True for values above the rounding of a zero
    edge: float  # NaN without a fit, like `threshold`
    threshold: float
    spikes: int

    @property
    def finite(self) -> bool:
        """Returns True if all values are finite."""
        return bool(np.isfinite(self.values).all())

    @property
    def zeros(self) -> int:
        """The number of values that are zero up to rounding."""
        return int((~self.present).sum())


def check_type(name: str, value: Any, kind: type | tuple[type, ...], remedy: str) -> None:
    """Raises TypeError for an argument of another type, with a remedy."""
    if not isinstance(value, kind):
        wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise TypeError(f"`{name}` must be a {wanted}, got {type(value).__name__}. {remedy}")


def to_draw(spectrum: Spectrum, fit: BulkFit) -> Drawn:
    """Returns the spectrum of one matrix with its cuts; raises an error for that of a stack."""
    of_row = "A row of a plan whose kernel has a spectrum has both: `row.spectrum`, `row.fit`."
    check_type("spectrum", spectrum, Spectrum, f"Give `rmtjax.spectrum(matrix)`. {of_row}")
    check_type("fit", fit, BulkFit, f"Give `rmtjax.fit_bema(spectrum)`. {of_row}")
    if np.ndim(spectrum.eigenvalues) != 1 or np.ndim(fit.threshold) != 0:
        raise ValueError(
            "`spectrum` and `fit` must be those of one matrix, got eigenvalues of shape "
            f"{np.shape(spectrum.eigenvalues)} and a threshold of shape "
            f"{np.shape(fit.threshold)}. For matrix `i` of a stack, give "
            "`spectrum._replace(eigenvalues=spectrum.eigenvalues[i])` and "
            "`jax.tree.map(lambda field: field[i], fit)`."
        )
    values = roots(spectrum.eigenvalues)
    edge, threshold = (float(np.sqrt(cut)) for cut in (fit.edge, fit.threshold))
    present, spikes = values > rounding(values), int((values > threshold).sum())
    return Drawn(values, present, edge, threshold, spikes)


def law_of(spectrum: Spectrum, fit: BulkFit) -> Law:
    """Returns the arguments of `noise.law_curve`: the law of the noise without the spikes."""
    ratio, spikes, edge = map(jnp.asarray, (spectrum.ratio, fit.num_spikes, fit.edge))
    return ratio, spectrum.eigenvalues.shape[-1], spikes, edge


def bar_edges(drawn: Drawn, bins: int | None, log: bool) -> np.ndarray:
    """Returns the ends of the bars; about 2 p^(1/3) bars cover the noise of p values."""
    if bins is not None and bins < 1:
        raise ValueError(f"`bins` must be at least 1, or None for the default, got {bins}.")
    values = drawn.values[drawn.present]
    if not values.size:
        return np.linspace(0, 1, 2)
    low, top = float(values.min()), float(values.max())
    fine = int(np.clip(2 * drawn.values.size ** (1 / 3), 5, 100))
    if log:
        # The first and the last value must be inside after rounding.
        return np.geomspace(low * 0.999, top * 1.001, (bins or 2 * fine) + 1)
    bulk = drawn.threshold if 0 < drawn.threshold < top else top
    # With a very distant spike, bars of this width would be too many to draw.
    return np.linspace(0, top, (bins or min(int(np.ceil(fine * top / bulk)), 1000)) + 1)
