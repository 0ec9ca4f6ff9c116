"""Figures of strange kernels: drawn without a warning, or an error of ours."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import rmtjax


def drawn(draw, *args, **options):
    """Draws on a canvas without a window, and renders it."""
    figure = Figure(figsize=(4, 3))
    FigureCanvasAgg(figure)
    draw(*args, ax=figure.subplots(), **options)
    figure.canvas.draw()


def check_spectrum(leaf, exact):
    del exact
    spectrum = rmtjax.spectrum(leaf)
    fit = rmtjax.fit_bema(spectrum)
    for log in (False, True):
        drawn(rmtjax.plots.esd, spectrum, fit, log=log)
        drawn(rmtjax.plots.singular_values, spectrum, fit, log=log)
    drawn(rmtjax.plots.quantiles, spectrum, fit)


def check_plan(plan, curve):
    """Figures of a plan with all its kernels, and of the sizes that plans can reach."""
    drawn(rmtjax.plots.layers, plan)
    drawn(rmtjax.plots.trade_off, curve)
    for row in plan.values():
        if row.spectrum is not None and row.spectrum.eigenvalues.ndim == 1:
            drawn(rmtjax.plots.esd, row.spectrum, row.fit)
            drawn(rmtjax.plots.singular_values, row.spectrum, row.fit, rank=row.rank)
            drawn(rmtjax.plots.quantiles, row.spectrum, row.fit)
