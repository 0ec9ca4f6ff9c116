"""The figures of the main job."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments import output
from rmtjax import plots


def spectra(results: output.Results) -> Figure:
    """ESD, law and threshold of each kernel of the first seed, in both networks."""
    reports = next(iter(results.seeds.values())).reports
    paths = [row.path for row in reports["baseline"].rows if row.variance is not None]
    shape = max(len(paths), 1), len(reports)
    figure = Figure(figsize=(10, 3.2 * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    for line, path in zip(axes, paths, strict=False):
        for ax, (network, report) in zip(line, reports.items(), strict=True):
            row = report.plan[path]
            if row.spectrum is not None and row.fit is not None:
                plots.esd(row.spectrum, row.fit, ax=ax, title=f"{network}: {path}")
    return figure


def accuracy(results: output.Results) -> Figure:
    """Test accuracy after each epoch, a line for each network and seed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for index, found in enumerate(results.seeds.values()):
        for color, style, network in (("C0", ".--", "baseline"), ("C1", ".-", "pruned")):
            names = (network, "pruned, factorized") if network == "pruned" else (network,)
            line = [entry for entry in found.history if entry["network"] in names]
            epochs, values = zip(*((e["epoch"], e["test_accuracy"]) for e in line), strict=True)
            label = network if index == 0 else None
            ax.plot(epochs, values, style, color=color, label=label, alpha=0.8)
    ax.axvline(results.config.epochs + 0.5, color="0.6", linestyle=":")
    ax.annotate(
        "fine-tuning", (results.config.epochs + 0.6, 0.02), xycoords=("data", "axes fraction")
    )
    ax.set(
        xlabel="epoch",
        ylabel="test accuracy, %",
        title=f"seed{'s' * (len(results.seeds) > 1)} {', '.join(map(str, results.seeds))}",
    )
    ax.legend(frameon=False)
    return figure


def truncation(results: output.Results) -> Figure:
    """Test accuracy of the trained baseline against the rank of its first kernel."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for index, (seed, found) in enumerate(results.seeds.items()):
        ranks, values = (
            zip(*found.curve["points"], strict=True) if found.curve["points"] else ((), ())
        )
        marker = "os^Dv"[index % 5]
        ax.plot(ranks, values, color=f"C{index}", marker=marker, label=f"seed {seed}")
        if found.curve["spikes"] is not None:
            ax.axvline(found.curve["spikes"], color=f"C{index}", linestyle="--")
        if values:
            name = "baseline" if index == 0 else None
            ax.axhline(values[-1], color="0.6", linestyle=":", zorder=0, label=name)
    path = next(iter(results.seeds.values())).curve["path"]
    ax.set(
        xlabel=f"rank of {path} (dashed: number of spikes)",
        ylabel="test accuracy, %",
        title="baseline, truncated after training",
    )
    ax.set_xscale("symlog", linthresh=5)  # 0 is one of the ranks, and the next is 5
    ax.set_xlim(0, max((np.max(line.get_xdata()) for line in ax.lines), default=1))
    ax.legend(frameon=False)
    return figure


def draw(results: output.Results, folder: Path) -> list[Path]:
    """Writes all figures as PNG, each whole or not at all; returns their paths."""
    paths = []
    for name, make in (("spectra", spectra), ("accuracy", accuracy), ("truncation", truncation)):
        path = folder / f"{name}.png"
        with output.replacing(path) as temporary:
            make(results).savefig(temporary, dpi=150, format="png")
        paths.append(path)
    return paths
