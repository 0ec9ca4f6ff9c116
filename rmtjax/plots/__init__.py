"""Figures with matplotlib: `pip install 'rmtjax[plots]'`.

In come plain results: spectra, plans, logs. Each function draws them on the given axes, or on a new
figure, and returns the axes for further changes. Lines and markers differ as well as colours, so
that a figure can be read without colours.

Examples:
  >>> import jax, rmtjax
  >>> from matplotlib.figure import Figure
  >>> from rmtjax import plots
  >>> matrix = jax.random.normal(jax.random.key(0), (200, 400)).at[:, 0].add(5.0)
  >>> spectrum = rmtjax.spectrum(matrix)
  >>> left, right = Figure(figsize=(10, 4), layout="constrained").subplots(1, 2)
  >>> ax = plots.esd(spectrum, rmtjax.fit_bema(spectrum), ax=left)
  >>> ax = plots.layers(rmtjax.plan({"Dense_0": {"kernel": matrix}}), ax=right)
  >>> [label.get_text() for label in ax.get_yticklabels()]
  ['Dense_0/kernel']
"""

from rmtjax.plots._results import (
    accuracy as accuracy,
    certificate as certificate,
    layers as layers,
    training as training,
)
from rmtjax.plots._spectra import (
    esd as esd,
    quantiles as quantiles,
    singular_values as singular_values,
)

__all__ = ["accuracy", "certificate", "esd", "layers", "quantiles", "singular_values", "training"]
