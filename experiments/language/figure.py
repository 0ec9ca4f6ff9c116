"""The figure of the study: perplexity against size."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from experiments.language.tables import AFTER


def draw(records: Mapping[str, Any]) -> Figure:
    """Perplexity over that of the dense model, against the share of the parameters that is left."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    ax = figure.subplots()
    runs = records["runs"]
    dense = next(one["perplexity"] for one in runs if one["method"] == "dense" and not one["after"])
    names = dict.fromkeys((one["method"], one["after"]) for one in runs if one["method"] != "dense")
    styles = {"": "-", "repaired": ":", "tuned": "--"}
    colors = {
        method: f"C{place}" for place, method in enumerate(dict.fromkeys(n for n, _ in names))
    }
    for method, after in names:
        points = sorted(
            (one["kept"], one["perplexity"] / dense)
            for one in runs
            if (one["method"], one["after"]) == (method, after)
        )
        style: dict[str, Any] = {"color": colors[method], "linestyle": styles[after], "marker": "."}
        ax.plot(*zip(*points, strict=True), label=method + AFTER[after], **style)
    ax.axhline(1.0, color="0.7", linewidth=0.8)
    ax.set(xlabel="share of the parameters of the kernels left", yscale="log")
    ax.set(ylabel="perplexity over that of the dense model")
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
