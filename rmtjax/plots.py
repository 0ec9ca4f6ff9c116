"""Figures, with matplotlib: `pip install 'rmtjax[experiments]'`. Import it by its name."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from rmtjax import marchenko_pastur
from rmtjax._noise import bulk_law
from rmtjax._typing import BulkFit, Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _new_axes() -> "Axes":
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "rmtjax.plots needs matplotlib: pip install 'rmtjax[experiments]'"
        ) from error
    return pyplot.subplots(layout="constrained")[1]


def _law(spectrum: Spectrum, fit: BulkFit):
    """The density of the noise that the spikes have left, with its share of the mass."""
    size, spikes = spectrum.eigenvalues.shape[-1], int(fit.num_spikes)
    ratio, _ = bulk_law(jnp.asarray(spectrum.ratio), size, jnp.asarray(spikes))
    variance = fit.edge / marchenko_pastur.support(ratio)[1]
    lower, upper = (float(np.sqrt(end)) for end in marchenko_pastur.support(ratio, variance))
    grid = np.linspace(lower, upper, 400)
    density = marchenko_pastur.pdf(grid**2, ratio, variance) * 2 * grid
    return grid, (1 - spikes / size) * np.asarray(density)


def esd(
    spectrum: Spectrum, fit: BulkFit, *, ax: "Axes | None" = None, title: str = "", bins: int = 80
) -> "Axes":
    r"""Draws the spectrum of one matrix, the law that was fitted to it, and the threshold.

    The horizontal axis is $\sqrt\lambda = s / \sqrt n$, on which bulk and spikes can be
    seen together; the density is that of $\sqrt\lambda$. Zero eigenvalues, as a truncation
    leaves them, are counted in the legend and not drawn: they would hide all the rest.

    Args:
      spectrum: From `rmtjax.spectrum`, or of a row of a plan.
      fit: From `rmtjax.fit_bema`, or of the same row.
      ax: Where to draw; by default on a new figure.
      title: Above the axes.
      bins: Number of bars from 0 to the largest value.

    Returns:
      The axes.
    """
    ax = _new_axes() if ax is None else ax
    values = np.sqrt(np.maximum(np.asarray(spectrum.eigenvalues, np.float64), 0))
    if not np.isfinite(values).all():
        ax.set(xticks=[], yticks=[], title=f"{title} not finite".strip())
        return ax
    # What rounding leaves of a zero: float32 and some room.
    present = values > 1e-5 * values.max(initial=0)
    weights = np.full(present.sum(), bins / (values.size * max(values.max(initial=0), 1e-30)))
    ax.hist(values[present], bins=bins, range=(0, values.max()), weights=weights, alpha=0.5)
    if fit.variance > 0:
        ax.plot(*_law(spectrum, fit), color="C1", label="Marchenko-Pastur")
    cut, spikes = float(np.sqrt(fit.threshold)), int((values**2 > fit.threshold).sum())
    ax.axvline(cut, color="C3", linestyle="--", label=f"threshold: {spikes} spikes")
    if not present.all():
        ax.plot([], [], " ", label=f"{(~present).sum()} zeros not drawn")
    ax.set(xlabel=r"$s / \sqrt{n}$", ylabel="density", title=title)
    ax.legend(frameon=False)
    return ax
