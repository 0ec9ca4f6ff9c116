r"""Figures of the spectrum of one matrix.

The singular values $s$ are drawn as $\sqrt\lambda = s / \sqrt n$, $n$ the longer side, on which
bulk and spikes can be seen together.
"""

from typing import TYPE_CHECKING

import numpy as np

from rmtjax._types import BulkFit, Spectrum
from rmtjax.laws import marchenko_pastur
from rmtjax.noise import law_curve, law_left
from rmtjax.plots._style import (
    bar_edges,
    BLACK,
    BLUE,
    dot_size,
    Drawn,
    finish,
    law_of,
    new_axes,
    PALE,
    to_draw,
    VERMILION,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SCALED = r"$s / \sqrt{n}$"


def _not_finite(ax: "Axes", title: str) -> "Axes":
    ax.set(xticks=[], yticks=[], title=f"{title} not finite".strip())
    return ax


def _bars(ax: "Axes", drawn: Drawn, edges: np.ndarray) -> None:
    """The density of all values, of which zeros are not drawn, and the spikes under it."""
    counts, _ = np.histogram(drawn.values[drawn.present], edges)
    density = counts / (drawn.values.size * np.diff(edges))
    floor = 0.5 * density[counts > 0].min(initial=1) if ax.get_yscale() == "log" else 0
    ax.stairs(np.maximum(density, floor), edges, baseline=floor, fill=True, color=PALE)
    ax.set_ylim(bottom=floor)
    ax.set_xlim(edges[0] / 1.03, edges[-1] * 1.03)
    spikes = drawn.values[: drawn.spikes]
    ax.plot(
        spikes,
        np.full(spikes.size, 0.025),
        "|",
        color=VERMILION,
        markersize=9,
        markeredgewidth=1.5,
        transform=ax.get_xaxis_transform(),
        label=f"{spikes.size} spike{'s' * (spikes.size != 1)}",
    )


def esd(
    spectrum: Spectrum,
    fit: BulkFit,
    *,
    ax: "Axes | None" = None,
    title: str = "",
    bins: int | None = None,
    log: bool = False,
) -> "Axes":
    r"""Draws the spectrum of one matrix, the law fitted to it, edge, threshold and spikes.

    The density is that of $\sqrt\lambda$. Spikes have a tick each at the foot, since among
    thousands of values the bar of one cannot be seen. Zero eigenvalues, as a truncation
    leaves them, are counted in the legend and not drawn: they would hide all the rest.

    Args:
      spectrum: From `rmtjax.spectrum`, or of a row of a plan.
      fit: From `rmtjax.fit_bema`, or of the same row.
      ax: Where to draw; by default on a new figure.
      title: Above the axes.
      bins: Number of bars from 0 to the largest value, with `log` from the smallest one; by
        default so many that about $2 p^{1/3}$ of them share the bulk.
      log: Both axes logarithmic: for spikes that are far away, and tails.

    Returns:
      The axes.

    Raises:
      ValueError: `bins` is under 1, or `spectrum` or `fit` is that of a stack.
    """
    drawn = to_draw(spectrum, fit)
    ax = new_axes() if ax is None else ax
    if not drawn.finite:
        return _not_finite(ax, title)
    if log:
        ax.set(xscale="log", yscale="log")
    _bars(ax, drawn, bar_edges(drawn, bins, log))
    if fit.variance > 0:
        law = law_curve(*law_of(spectrum, fit), points=400)
        ax.plot(*law, color=BLACK, label="Marchenko-Pastur")
        if drawn.zeros:  # the bulk that was cut stood higher than all that is left
            ax.set_ylim(top=max(ax.get_ylim()[1], 1.05 * float(np.max(law[1]))))
    for name, cut, line, color in (
        ("edge", drawn.edge, ":", BLUE),
        ("threshold", drawn.threshold, "--", VERMILION),
    ):
        if cut > 0:
            ax.axvline(cut, color=color, linestyle=line, label=name)
    if drawn.zeros:
        ax.plot([], [], " ", label=f"{drawn.zeros} zeros not drawn")
    return finish(ax, _SCALED, "density", title)


def singular_values(
    spectrum: Spectrum,
    fit: BulkFit,
    *,
    rank: int | None = None,
    ax: "Axes | None" = None,
    title: str = "",
    log: bool = False,
) -> "Axes":
    r"""Draws the singular values of one matrix by rank, the threshold, and the cut.

    Args:
      spectrum: From `rmtjax.spectrum`, or of a row of a plan.
      fit: From `rmtjax.fit_bema`, or of the same row.
      rank: Number of singular values kept, in [0, p]; by default those above the threshold.
      ax: Where to draw; by default on a new figure.
      title: Above the axes.
      log: Both axes logarithmic; zeros are left out.

    Returns:
      The axes.

    Raises:
      ValueError: `rank` is out of range, or `spectrum` or `fit` is that of a stack.
    """
    drawn = to_draw(spectrum, fit)
    size = drawn.values.size
    if rank is not None and not 0 <= rank <= size:
        raise ValueError(
            f"`rank` must be in [0, {size}], got {rank}: the number of singular values kept."
        )
    ax = new_axes() if ax is None else ax
    if not drawn.finite:
        return _not_finite(ax, title)
    if log:
        ax.set(xscale="log", yscale="log")
    rank = drawn.spikes if rank is None else rank
    ranks, dot = np.arange(1, size + 1), dot_size(size)
    shown = drawn.present if log else np.ones(size, bool)
    for chosen, name, marker, color in (
        (ranks <= rank, "kept", "^", VERMILION),
        (ranks > rank, "cut", "o", BLUE),
    ):
        some = chosen & shown
        ax.plot(ranks[some], drawn.values[some], marker, color=color, markersize=dot, label=name)
    if drawn.threshold > 0:
        ax.axhline(drawn.threshold, color=BLACK, linestyle="--", label="threshold")
    ax.axvline(rank + 0.5, color=BLACK, linestyle=":", label=f"rank {rank} of {size}")
    return finish(ax, "rank", _SCALED, title)


def quantiles(
    spectrum: Spectrum, fit: BulkFit, *, ax: "Axes | None" = None, title: str = ""
) -> "Axes":
    r"""Draws the quantiles of the bulk against those of the law that was fitted to it.

    The noise eigenvalue $\lambda_{(i)}$, ascending from $i = 0$, stands over the quantile
    $F^{-1}((i + 1/2) / m)$ of the law, $m = p - K$ with the $K$ spikes of the fit left out.
    On the line the law holds; zeros are not drawn.

    Args:
      spectrum: From `rmtjax.spectrum`, or of a row of a plan.
      fit: From `rmtjax.fit_bema`, or of the same row.
      ax: Where to draw; by default on a new figure.
      title: Above the axes.

    Returns:
      The axes.

    Raises:
      ValueError: `spectrum` or `fit` is that of a stack.
    """
    drawn = to_draw(spectrum, fit)
    ax = new_axes() if ax is None else ax
    if not drawn.finite:
        return _not_finite(ax, title)
    bulk = slice(int(fit.num_spikes), None)
    values, present = drawn.values[bulk][::-1], drawn.present[bulk][::-1]
    if fit.variance > 0:
        ratio, variance, _ = law_left(*law_of(spectrum, fit))
        positions = (np.arange(values.size) + 0.5) / values.size
        law = np.sqrt(marchenko_pastur.ppf(positions, ratio, variance))
        dot = dot_size(values.size)
        ax.plot(law[present], values[present], "o", color=BLUE, markersize=dot, label="noise")
        ends = law[[0, -1]]
        ax.plot(ends, ends, color=BLACK, label="the law holds")
    if drawn.zeros:
        ax.plot([], [], " ", label=f"{drawn.zeros} zeros not drawn")
    return finish(ax, f"Marchenko-Pastur quantile of {_SCALED}", f"quantile of {_SCALED}", title)
