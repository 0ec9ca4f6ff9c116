r"""Draws the spectrum of one matrix.

Singular values $s$ are drawn as $\sqrt\lambda = s / \sqrt n$ with the longer side $n$. On this
scale the bulk and the spikes fit into one figure.
"""

from typing import Any, NamedTuple, TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from rmtjax._types import BulkFit, check_type, in_range, Spectrum
from rmtjax.laws import law_curve, law_left, marchenko_pastur, roots, rounding
from rmtjax.plots._style import BLUE, dot_size, finish, new_axes, PALE, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SCALED = r"$s / \sqrt{n}$"


class _Drawn(NamedTuple):
    """The values of a spectrum in float64, descending, with its cuts."""

    values: np.ndarray
    present: np.ndarray  # True for values above the rounding of a zero
    zeros: int  # the number of the other values
    edge: float  # NaN without a fit, like `threshold`
    threshold: float
    spikes: int


def _to_draw(spectrum: Spectrum, fit: BulkFit) -> _Drawn:
    """Returns the spectrum of one matrix with its cuts; raises an error for that of a stack."""
    of_row = "A row of a plan whose kernel has a spectrum has both: `row.spectrum`, `row.fit`."
    check_type("spectrum", spectrum, Spectrum, f"Give `rmtjax.spectrum(matrix)`. {of_row}")
    check_type("fit", fit, BulkFit, f"Give `rmtjax.fit_bema(spectrum)`. {of_row}")
    if np.ndim(spectrum.eigenvalues) != 1 or np.ndim(fit.threshold) != 0:
        raise ValueError(
            "`spectrum` and `fit` must be those of one matrix, got shapes "
            f"{np.shape(spectrum.eigenvalues)} and {np.shape(fit.threshold)}. Of a stack, give "
            "`Spectrum(eigenvalues[i], ratio)` and `jax.tree.map(lambda field: field[i], fit)`."
        )
    values = roots(spectrum.eigenvalues)
    edge, threshold = (float(np.sqrt(np.maximum(n, 0))) for n in (fit.edge, fit.threshold))
    present, spikes = values > rounding(values), int((values > threshold).sum())
    return _Drawn(values, present, int((~present).sum()), edge, threshold, spikes)


def _law_of(spectrum: Spectrum, fit: BulkFit) -> tuple[tuple, float]:
    """Returns the arguments of `laws.law_curve` for the noise without the spikes, and its scale."""
    spectrum, fit, exponent = in_range(spectrum, fit)
    ratio, spikes, edge = map(jnp.asarray, (spectrum.ratio, fit.num_spikes, fit.edge))
    return (ratio, spectrum.eigenvalues.shape[-1], spikes, edge), 2.0**exponent


def _cut_range(low: float, cut: float, top: float, count: int, log: bool) -> np.ndarray:
    """Returns the ends of about `count` equal bars, with the cut among them if it is inside."""
    equal = (np.geomspace if log else np.linspace)(low, top, count + 1)
    if not low < cut < top:
        return equal
    scale, back = (np.log, np.exp) if log else (np.asarray, np.asarray)
    start, middle, end = (float(scale(value)) for value in (low, cut, top))
    left = round(count * (middle - start) / (end - start))
    # A cut within the first bar would make bars without number.
    if not 0 < left < count:
        return equal
    width = (middle - start) / left
    # The last bar ends beyond the largest value: one that is narrow would be a needle.
    right = int(np.ceil((end - middle) / width - 1e-6))
    edges = back(start + width * np.arange(left + right + 1))
    edges[left], edges[-1] = cut, max(edges[-1], top)
    return edges


def _bar_edges(drawn: _Drawn, bins: int | None, log: bool) -> np.ndarray:
    """Returns the ends of the bars; about 2 p^(1/3) bars cover the noise of p values."""
    if bins is not None and bins < 1:
        raise ValueError(f"`bins` must be at least 1, or None for the default, got {bins}.")
    values = drawn.values[drawn.present]
    if not values.size:
        return np.array([0.1 if log else 0.0, 1.0])
    low, top = float(values.min()), float(values.max())
    fine = int(np.clip(2 * drawn.values.size ** (1 / 3), 5, 100))
    if log:
        # The first and the last value must be inside after rounding.
        return _cut_range(low * 0.999, drawn.threshold, top * 1.001, bins or 2 * fine, log)
    bulk = drawn.threshold if 0 < drawn.threshold < top else top
    # With a very distant spike, bars of this width would be too many to draw.
    count = bins or min(int(np.ceil(fine * top / bulk)), 1000)
    return _cut_range(0.0, drawn.threshold, top, count, log)


def _not_finite(ax: "Axes", title: str) -> "Axes":
    ax.set(xticks=[], yticks=[], title=f"{title} not finite".strip())
    return ax


def _bars(ax: "Axes", drawn: _Drawn, edges: np.ndarray) -> None:
    """Draws the density of the values that are not 0, and the spikes below it."""
    counts, _ = np.histogram(drawn.values[drawn.present], edges)
    density = counts / (drawn.values.size * np.diff(edges))
    # A logarithmic axis has no 0 for the bars to stand on.
    floor = 0.5 * density[counts > 0].min(initial=1) if ax.get_yscale() == "log" else 0
    ax.stairs(np.maximum(density, floor), edges, baseline=floor, fill=True, color=PALE)
    ax.set_ylim(bottom=floor)
    ax.set_xlim(edges[0] / 1.03, edges[-1] * 1.03)
    spikes, size = drawn.values[: drawn.spikes], {"markersize": 9, "markeredgewidth": 1.5}
    label = f"{spikes.size} spike{'s' * (spikes.size != 1)}"
    # In this transform y is a share of the height of the axes, whatever the density is.
    foot = {"transform": ax.get_xaxis_transform(), "label": label}
    ax.plot(spikes, np.full(spikes.size, 0.025), "|", color=VERMILION, **size, **foot)


def esd(
    spectrum: Spectrum,
    fit: BulkFit,
    *,
    ax: "Axes | None" = None,
    title: str = "",
    bins: int | None = None,
    log: bool = False,
) -> "Axes":
    r"""Draws the spectral density of one matrix, the fitted law, its edge, threshold and spikes.

    The density is that of $\sqrt\lambda$. Each spike has a tick at the bottom, since the bar of one
    value among thousands is invisible. Zero eigenvalues, which a truncation leaves, are counted in
    the legend. They are not drawn, because their bar would be far higher than the others.

    Args:
      spectrum, fit: From `rmtjax.spectrum` and `rmtjax.fit_bema`, or from one row of a plan.
      ax: Where to draw; by default on a new figure.
      title: Above the axes.
      bins: Number of bars from 0 to the largest value, with `log` from the smallest one. By
        default about $2 p^{1/3}$ bars cover the bulk. So that no bar crosses the threshold, there
        may be one more. Few bars, or a threshold near 0, leave it within one.
      log: Makes both axes logarithmic, for distant spikes and for tails.

    Raises:
      ValueError: `bins` is under 1, or `spectrum` or `fit` is that of a stack.

    Examples:
      >>> import jax, rmtjax
      >>> from matplotlib.figure import Figure
      >>> spectrum = rmtjax.spectrum(jax.random.normal(jax.random.key(0), (80, 60)))
      >>> ax = Figure().subplots()
      >>> shown = rmtjax.plots.esd(spectrum, rmtjax.fit_bema(spectrum), title="Noise", ax=ax)
      >>> ax.get_title()
      'Noise'
    """
    drawn = _to_draw(spectrum, fit)
    ax = new_axes() if ax is None else ax
    if not np.isfinite(drawn.values).all():
        return _not_finite(ax, title)
    if log:
        ax.set(xscale="log", yscale="log")
    _bars(ax, drawn, _bar_edges(drawn, bins, log))
    if fit.variance > 0:
        arguments, scale = _law_of(spectrum, fit)
        grid, density = map(np.asarray, law_curve(*arguments, points=400))
        density = density.astype(np.float64) / scale
        ax.plot(grid * np.float64(scale), density, color="black", label="Marchenko-Pastur")
        # The law is that of the bulk before the truncation, and higher than what is left.
        if drawn.zeros:
            ax.set_ylim(top=max(ax.get_ylim()[1], 1.05 * float(density.max())))
    if drawn.edge > 0:
        # Often the two are one pixel apart: the edge has the upper half, the threshold the lower.
        ax.axvline(drawn.edge, ymin=0.5, color=BLUE, linestyle=":", label="edge")
    if drawn.threshold > 0:
        cut: dict[str, Any] = {"color": VERMILION, "linestyle": "--", "label": "threshold"}
        ax.axvline(drawn.threshold, ymax=0.5 if drawn.edge > 0 else 1, **cut)
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
      spectrum, fit, ax, title: As in `esd`.
      rank: Number of singular values kept, in [0, p]; by default those above the threshold.
      log: Makes both axes logarithmic, without zeros.

    Raises:
      ValueError: `rank` is out of range, or `spectrum` or `fit` is that of a stack.

    Examples:
      >>> import jax, rmtjax
      >>> from matplotlib.figure import Figure
      >>> spectrum = rmtjax.spectrum(jax.random.normal(jax.random.key(0), (80, 60)))
      >>> fit, ax = rmtjax.fit_bema(spectrum), Figure().subplots()
      >>> ax = rmtjax.plots.singular_values(spectrum, fit, rank=10, title="Noise", ax=ax)
      >>> ax.get_title()
      'Noise'
    """
    drawn = _to_draw(spectrum, fit)
    size = drawn.values.size
    if rank is not None and not 0 <= rank <= size:
        raise ValueError(f"`rank` must be in [0, {size}], got {rank}: how many values are kept.")
    ax = new_axes() if ax is None else ax
    if not np.isfinite(drawn.values).all():
        return _not_finite(ax, title)
    if log:
        ax.set(xscale="log", yscale="log")
    rank = drawn.spikes if rank is None else rank
    ranks, dot = np.arange(1, size + 1), dot_size(size)
    # A logarithmic axis has no 0.
    shown = drawn.present if log else np.ones(size, bool)
    kept, cut = shown & (ranks <= rank), shown & (ranks > rank)
    ax.plot(ranks[kept], drawn.values[kept], "^", color=VERMILION, markersize=dot, label="kept")
    ax.plot(ranks[cut], drawn.values[cut], "o", color=BLUE, markersize=dot, label="cut")
    if drawn.threshold > 0:
        ax.axhline(drawn.threshold, color="black", linestyle="--", label="threshold")
    ax.axvline(rank + 0.5, color="black", linestyle=":", label=f"rank {rank} of {size}")
    return finish(ax, "rank", _SCALED, title)


def quantiles(
    spectrum: Spectrum, fit: BulkFit, *, ax: "Axes | None" = None, title: str = ""
) -> "Axes":
    r"""Draws the quantiles of the bulk against those of the law that was fitted to it.

    The noise eigenvalue $\lambda_{(i)}$, ascending from $i = 0$, is drawn over the quantile
    $F^{-1}((i + 1/2) / m)$ of the law. Here $m = p - K$ for $K$ spikes of the fit. Where the law
    holds, the points are on the line. Zeros are not drawn.

    Args:
      spectrum, fit, ax, title: As in `esd`. Those of a stack raise ValueError.

    Examples:
      >>> import jax, rmtjax
      >>> from matplotlib.figure import Figure
      >>> spectrum = rmtjax.spectrum(jax.random.normal(jax.random.key(0), (80, 60)))
      >>> ax = Figure().subplots()
      >>> shown = rmtjax.plots.quantiles(spectrum, rmtjax.fit_bema(spectrum), title="Noise", ax=ax)
      >>> ax.get_title()
      'Noise'
    """
    drawn = _to_draw(spectrum, fit)
    ax = new_axes() if ax is None else ax
    if not np.isfinite(drawn.values).all():
        return _not_finite(ax, title)
    # The law was fitted to what these spikes leave.
    bulk = slice(int(fit.num_spikes), None)
    values, present = drawn.values[bulk][::-1], drawn.present[bulk][::-1]
    if fit.variance > 0:
        arguments, scale = _law_of(spectrum, fit)
        ratio, variance, _ = law_left(*arguments)
        positions = (np.arange(values.size) + 0.5) / values.size
        law = scale * np.sqrt(np.float64(marchenko_pastur.ppf(positions, ratio, variance)))
        dot = dot_size(values.size)
        ax.plot(law[present], values[present], "o", color=BLUE, markersize=dot, label="noise")
        ends = law[[0, -1]]
        ax.plot(ends, ends, color="black", label="the law holds")
    if drawn.zeros:
        ax.plot([], [], " ", label=f"{drawn.zeros} zeros not drawn")
    return finish(ax, f"Marchenko-Pastur quantile of {_SCALED}", f"quantile of {_SCALED}", title)
