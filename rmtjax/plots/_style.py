"""The style of all figures: colours, markers, axes and legends."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Okabe and Ito's colours, which colour-blind people can distinguish, without their yellow, which
# is invisible on white paper. In grey they are similar, so each goes with a marker and a line.
BLUE, SKY, ORANGE = "#0072B2", "#56B4E9", "#E69F00"
PALE = "#B3DCF4"  # the hue of SKY, lighter: areas must not hide lines
VERMILION, GREEN, PURPLE = "#D55E00", "#009E73", "#CC79A7"
COLOURS = (BLUE, VERMILION, GREEN, "black", ORANGE, PURPLE, SKY)
MARKERS = "o^sDvXP*"
LEGEND = 8  # entries; a longer legend covers data, so it goes beside the axes


def style(index: int) -> dict:
    """Returns colour and marker of a series; 56 series differ."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def new_axes(height: float = 4.8, names: Collection[str] = ()) -> "Axes":
    """Returns the axes of a new figure of pyplot, with room for a legend of these names."""
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("needs matplotlib: pip install 'rmtjax[plots]'") from error
    # A legend beside the axes needs room for its longest name.
    beside = max(map(len, names)) if len(names) >= LEGEND else 0
    return pyplot.subplots(figsize=(6.4 + 0.075 * beside, height), layout="constrained")[1]


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
