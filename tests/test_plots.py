import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import rmtjax
from rmtjax import plots


@pytest.fixture
def ax():
    return Figure().subplots()


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def bars(ax):
    return sum(bar.get_height() * bar.get_width() for bar in ax.patches)


def test_the_law_has_the_area_of_the_noise(ax):
    spectrum = rmtjax.spectrum(jax.random.normal(jax.random.key(0), (200, 300)).at[:, 0].add(4.0))
    plots.esd(spectrum, rmtjax.fit_bema(spectrum), ax=ax, title="a kernel")
    assert ax.get_title() == "a kernel"
    assert labels(ax) == ["Marchenko-Pastur", "threshold: 1 spikes"]
    assert bars(ax) == pytest.approx(1.0, abs=1e-6)
    x, y = ax.lines[0].get_data()
    # The trapezoidal rule on 400 points of a curve with vertical ends.
    assert np.trapezoid(y, x) == pytest.approx(1 - 1 / 200, abs=2e-3)


def test_the_law_lies_on_the_bulk_that_many_spikes_have_left(ax):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 40)))[0] for n in (400, 500))
    matrix = rng.normal(size=(400, 500)) + 60 * left @ right.T
    spectrum = rmtjax.spectrum(jnp.float32(matrix))
    fit = rmtjax.fit_bema(spectrum)
    plots.esd(spectrum, fit, ax=ax)
    x, y = ax.lines[0].get_data()
    bulk = np.sqrt(np.asarray(spectrum.eigenvalues)[40:])
    assert bulk.max() == pytest.approx(x[-1], rel=0.02)  # a Tracy-Widom fluctuation
    # Quantiles of curve and bars; a spacing is 0.4 % of the width of the bulk.
    law = np.cumsum(y) / np.sum(y)
    for q in (0.1, 0.5, 0.9):
        assert np.interp(q, law, x) == pytest.approx(np.quantile(bulk, q), abs=0.02)


def test_zeros_of_a_truncated_spectrum_are_told_and_not_drawn(ax):
    matrix = jax.random.normal(jax.random.key(0), (100, 150))
    fit = rmtjax.fit_bema(rmtjax.spectrum(matrix))
    plots.esd(rmtjax.spectrum(rmtjax.truncate_matrix(matrix, 30)), fit, ax=ax)
    assert labels(ax)[-1] == "70 zeros not drawn"
    assert bars(ax) == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize("matrix", [jnp.zeros((60, 60)), jnp.full((60, 60), jnp.nan)])
def test_what_has_no_law_is_drawn_without_one(matrix, ax):
    spectrum = rmtjax.spectrum(matrix)
    plots.esd(spectrum, rmtjax.fit_bema(spectrum), ax=ax, title="k")
    assert len(ax.lines) <= 2
    ax.figure.canvas.draw()


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spectrum = rmtjax.spectrum(jnp.eye(4))
    with pytest.raises(ModuleNotFoundError, match=r"rmtjax\[experiments\]"):
        plots.esd(spectrum, rmtjax.fit_bema(spectrum))
