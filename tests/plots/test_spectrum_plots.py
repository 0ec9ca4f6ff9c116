"""Figures of a spectrum: their numbers, labels and images."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.plot_cases import bars, check_image, labels, line, made_up
from matplotlib.figure import Figure

import rmtjax
from rmtjax import plots


@pytest.fixture
def ax():
    return Figure().subplots()


@pytest.fixture(scope="module")
def truncated():
    """A spectrum of 200 cut to 60, and the fit made before."""
    matrix = jax.random.normal(jax.random.key(0), (200, 300))
    fit = rmtjax.fit_bema(rmtjax.spectrum(matrix))
    return rmtjax.spectrum(rmtjax.truncate_matrix(matrix, 60)), fit


@pytest.mark.parametrize("draw", [plots.esd, plots.quantiles], ids=["esd", "quantiles"])
def test_a_row_of_a_very_large_kernel_is_drawn_on_its_scale(draw):
    # A convolution's, whose spectrum only its row has: `rmtjax.spectrum` takes matrices.
    kernel, lines = np.random.default_rng(0).normal(size=(3, 3, 10, 60)).astype(np.float32), []
    for scale in (1.0, 2.0**80):
        conv = {"kernel": kernel * np.float32(scale), "bias": np.zeros(60, np.float32)}
        row = rmtjax.plan({"conv": conv})["conv/kernel"]
        shown = draw(row.spectrum, row.fit, ax=Figure().subplots())
        law = next(one for one in shown.get_lines() if one.get_color() == "black")
        lines.append(np.asarray(law.get_xdata(), np.float64) / scale)
    np.testing.assert_allclose(*lines, rtol=1e-4)


def test_the_law_has_the_area_of_the_noise(ax):
    spectrum = rmtjax.spectrum(jax.random.normal(jax.random.key(0), (200, 300)).at[:, 0].add(4.0))
    fit = rmtjax.fit_bema(spectrum)
    plots.esd(spectrum, fit, ax=ax, title="a kernel")
    assert ax.get_title() == "a kernel"
    assert labels(ax) == ["1 spike", "Marchenko-Pastur", "edge", "threshold"]
    assert bars(ax) == pytest.approx(1.0, abs=1e-6)
    x, y = line(ax, "Marchenko-Pastur")
    # The trapezoidal rule on 400 points that crowd at the vertical ends.
    assert np.trapezoid(y, x) == pytest.approx(1 - 1 / 200, abs=1e-3)
    assert line(ax, "edge")[0] == pytest.approx(float(fit.edge) ** 0.5)
    assert line(ax, "threshold")[0] == pytest.approx(float(fit.threshold) ** 0.5)
    assert line(ax, "1 spike")[0] == pytest.approx(float(spectrum.eigenvalues[0]) ** 0.5)


def test_the_law_lies_on_the_bulk_that_many_spikes_have_left(ax):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 40)))[0] for n in (400, 500))
    matrix = rng.normal(size=(400, 500)) + 60 * left @ right.T
    spectrum = rmtjax.spectrum(jnp.float32(matrix))
    fit = rmtjax.fit_bema(spectrum)
    plots.esd(spectrum, fit, ax=ax)
    x, y = line(ax, "Marchenko-Pastur")
    bulk = np.sqrt(np.asarray(spectrum.eigenvalues)[40:])
    assert bulk.max() == pytest.approx(x[-1], rel=0.02)  # a Tracy-Widom fluctuation
    # Quantiles of curve and bars; a spacing is 0.4 % of the width of the bulk.
    law = np.append(0, np.cumsum((y[1:] + y[:-1]) / 2 * np.diff(x)))
    for q in (0.1, 0.5, 0.9):
        assert np.interp(q * law[-1], law, x) == pytest.approx(np.quantile(bulk, q), abs=0.02)
    # So do the points of the other figure, each of which is a quantile.
    ax.clear()
    plots.quantiles(spectrum, fit, ax=ax)
    x, y = line(ax, "noise")
    assert x.size == 360
    np.testing.assert_allclose(y, x, atol=0.03)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("size", "spikes", "bars_of_noise"), [(10, 1, 5), (10_000, 40, 43)])
def test_bars_are_as_many_as_the_spectrum_can_bear(size, spikes, bars_of_noise, log, ax):
    spectrum, fit = made_up(size, spikes)
    plots.esd(spectrum, fit, ax=ax, log=log)
    counts, edges, floor = ax.patches[0].get_data()
    # The threshold is an end of bars: none shows noise and spikes. Rounded as a float32.
    cut = np.argmin(np.abs(edges - np.sqrt(fit.threshold)))
    np.testing.assert_allclose(edges[cut], np.sqrt(fit.threshold), rtol=1e-6)
    if not log:
        assert cut == bars_of_noise
    drawn = np.where(counts > floor, counts, 0)
    assert np.sum(drawn * np.diff(edges)) == pytest.approx(1.0, abs=1e-6)
    assert labels(ax)[0] == f"{spikes} spike{'s' * (spikes > 1)}"


def test_bars_can_be_chosen(ax):
    spectrum, fit = made_up(200, 6)
    plots.esd(spectrum, fit, ax=ax, bins=7)
    counts, edges, _ = ax.patches[0].get_data()
    assert counts.size in (7, 8)
    np.testing.assert_allclose(np.min(np.abs(edges - np.sqrt(fit.threshold))), 0, atol=1e-6)
    ax.clear()
    plots.esd(spectrum, fit, ax=ax, bins=1)
    assert ax.patches[0].get_data().values.size == 1
    with pytest.raises(ValueError, match="`bins` must be at least 1, or None"):
        plots.esd(spectrum, fit, ax=ax, bins=0)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("above", [1.0005, 1.1, 9.0])
def test_a_spike_just_beyond_the_threshold_is_no_needle(above, log, ax):
    """All bars have one width, so that a single value is not the highest."""
    spectrum, fit = made_up(200, 6)
    values = spectrum.eigenvalues.at[0].set(above * fit.threshold).at[1:6].set(fit.threshold / 2)
    plots.esd(spectrum._replace(eigenvalues=values), fit, ax=ax, log=log)
    _, edges, _ = ax.patches[0].get_data()
    widths = np.diff(np.log(edges) if log else edges)
    # Rounding of ends near 1, of which differences near 0.1 are taken.
    np.testing.assert_allclose(widths, widths[0], rtol=1e-5)
    assert edges[-1] >= np.sqrt(np.float64(values[0]))


def test_zeros_of_a_truncated_spectrum_are_counted_and_not_drawn(truncated, ax):
    plots.esd(*truncated, ax=ax)
    assert labels(ax)[-1] == "140 zeros not drawn"
    assert bars(ax) == pytest.approx(0.3, abs=1e-6)
    ax.clear()
    plots.quantiles(*truncated, ax=ax)
    assert labels(ax)[-1] == "140 zeros not drawn"
    assert line(ax, "noise").shape == (2, 60 - int(truncated[1].num_spikes))


def test_a_spectrum_of_zeros_is_drawn_with_logarithmic_axes(ax):
    spectrum = rmtjax.spectrum(np.zeros((60, 90), np.float32))
    plots.esd(spectrum, rmtjax.fit_bema(spectrum), ax=ax, log=True)
    assert "60 zeros not drawn" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_singular_values_are_cut_at_a_rank(ax):
    spectrum, fit = made_up(200, 6)
    plots.singular_values(spectrum, fit, ax=ax)
    assert labels(ax) == ["kept", "cut", "threshold", "rank 6 of 200"]
    np.testing.assert_allclose(line(ax, "kept")[1] ** 2, spectrum.eigenvalues[:6], rtol=1e-6)
    assert line(ax, "cut")[0].tolist() == list(range(7, 201))
    ax.clear()
    plots.singular_values(spectrum, fit, rank=8, ax=ax)
    assert labels(ax)[-1] == "rank 8 of 200"
    assert line(ax, "kept").shape == (2, 8)
    assert line(ax, "rank 8 of 200")[0].tolist() == [8.5, 8.5]
    with pytest.raises(ValueError, match=r"`rank` must be in \[0, 200\], got 201"):
        plots.singular_values(spectrum, fit, rank=201)


DRAWN = {
    "esd_10": lambda ax: plots.esd(*made_up(10, 1), ax=ax),
    "esd_200": lambda ax: plots.esd(*made_up(200, 6), ax=ax),
    "esd_10000": lambda ax: plots.esd(*made_up(10_000, 40), ax=ax),
    "esd_10_log": lambda ax: plots.esd(*made_up(10, 1), ax=ax, log=True),
    "esd_10000_log": lambda ax: plots.esd(*made_up(10_000, 40, ratio=1.0), ax=ax, log=True),
    "singular_values_10": lambda ax: plots.singular_values(*made_up(10, 1), ax=ax),
    "singular_values_10000_log": lambda ax: plots.singular_values(
        *made_up(10_000, 40), rank=48, ax=ax, log=True
    ),
    "quantiles_10": lambda ax: plots.quantiles(*made_up(10, 1), ax=ax),
    "quantiles_10000": lambda ax: plots.quantiles(*made_up(10_000, 40), ax=ax),
}


@pytest.mark.parametrize("name", DRAWN)
def test_figures_of_spectra_look_as_they_did(name, tmp_path):
    check_image(name, DRAWN[name], tmp_path)


SPECTRAL = [plots.esd, plots.singular_values, plots.quantiles]


@pytest.mark.parametrize("draw", SPECTRAL)
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_spectrum_without_a_law_is_drawn_without_one(draw, value, ax):
    spectrum = rmtjax.spectrum(jnp.full((200, 300), value))
    assert draw(spectrum, rmtjax.fit_bema(spectrum), ax=ax, title="k") is ax
    assert "Marchenko-Pastur" not in [one.get_label() for one in ax.lines]
    assert ax.get_title() == ("k not finite" if np.isnan(value) else "k")
    ax.figure.canvas.draw()


@pytest.mark.parametrize("draw", SPECTRAL)
def test_a_stack_is_refused_with_the_way_to_one_of_it(draw):
    spectrum, fit = made_up(200, 6)
    stack = spectrum._replace(eigenvalues=jnp.stack([spectrum.eigenvalues] * 2))
    with pytest.raises(ValueError, match="`spectrum` and `fit` must be those of one matrix"):
        draw(stack, fit)


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spectrum = rmtjax.spectrum(jnp.eye(4))
    with pytest.raises(ModuleNotFoundError, match=r"rmtjax\[plots\]"):
        plots.esd(spectrum, rmtjax.fit_bema(spectrum))
