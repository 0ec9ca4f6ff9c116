"""Figures, with matplotlib: `pip install 'rmtjax[plots]'`.

Each function draws plain results on the axes given, by default on those of a new figure, and
returns the axes, of which everything can be changed afterwards. No meaning hangs on a colour
alone: lines and markers differ too.

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
