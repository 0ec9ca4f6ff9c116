"""Figures with matplotlib: `pip install 'rmtjax[plots]'`.

In come plain results: spectra, plans, logs. Each function draws them on the given axes, or on a new
figure, and returns the axes for further changes. Lines and markers differ as well as colours, so
that a figure can be read without colours.

Examples:
  >>> import jax, rmtjax
  >>> from matplotlib.figure import Figure
  >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
  >>> spectrum = rmtjax.spectrum(noise.at[:, 0].add(5.0))
  >>> ax = rmtjax.plots.esd(spectrum, rmtjax.fit_bema(spectrum), ax=Figure().subplots())
  >>> [text.get_text() for text in ax.get_legend().get_texts()]
  ['1 spike', 'Marchenko-Pastur', 'edge', 'threshold']
"""

from rmtjax.plots._results import (
    accuracy as accuracy,
    certificate as certificate,
    history as history,
    layers as layers,
    trade_off as trade_off,
    training as training,
)
from rmtjax.plots._spectra import (
    esd as esd,
    quantiles as quantiles,
    singular_values as singular_values,
)

__all__ = [
    "accuracy",
    "certificate",
    "esd",
    "history",
    "layers",
    "quantiles",
    "singular_values",
    "trade_off",
    "training",
]
