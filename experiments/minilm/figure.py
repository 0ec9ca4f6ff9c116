"""The figure of the study: three spectra, and the drift of the embeddings."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import rmtjax
from experiments.minilm import cuts
from rmtjax import plots

# Never trained; accepted; refused.
SHOWN = ("pooler/kernel", "layer_0/output/kernel", "layer_2/output/kernel")
NAMES = {
    "top": "largest kept (truncation)",
    "random": "as many kept at random",
    "bottom": "as many kept, the smallest",
    "noise": "none cut, noise of that norm added",
}


def draw_drift(ax: Axes, records: Mapping[str, Any]) -> None:
    """Mean cosine against the parameters left, for the rules that cut most kernels."""
    rows = [row for row in records["together"] if row["rule"].startswith(("fixed", "energy"))]
    rows.sort(key=lambda row: row["parameters"])
    sizes = [row["parameters"] / records["parameters"] for row in rows]
    for index, kind in enumerate(("top", *cuts.CONTROLS)):
        values = [row[kind]["mean"] for row in rows]
        ax.plot(sizes, values, color=f"C{index}", marker=".", label=NAMES[kind])
    ax.set(xlabel="share of the parameters left", ylabel="mean cosine", title="all kernels cut")
    ax.legend(frameon=False)


def draw(plan: rmtjax.Plan, records: Mapping[str, Any]) -> Figure:
    """The figure, from the plan with the spectra and from the records."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2).flat
    for ax, path in zip(axes, SHOWN, strict=False):
        row = plan[path]
        if row.spectrum is not None and row.fit is not None:
            title = f"{path}, distance {row.fit.distance:.3f}"
            plots.esd(row.spectrum, row.fit, ax=ax, title=title, bins=40)
    draw_drift(axes[3], records)
    return figure
