"""Figures: what they say in numbers and words, and how they look.

An image that is missing in `tests/images` is written there and its test fails: look at it.
"""

import functools
import inspect
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images
from matplotlib.testing.decorators import remove_ticks_and_titles

import rmtjax
from rmtjax import _drawing, plots

IMAGES = Path(__file__).parent / "images"


@pytest.fixture
def ax():
    return Figure().subplots()


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line(ax, label):
    """The points of the line of that label."""
    (found,) = (one for one in ax.lines if one.get_label() == label)
    return found.get_xydata().T


def bars(ax):
    counts, edges, _ = ax.patches[0].get_data()
    return np.sum(counts * np.diff(edges))


@functools.cache
def made_up(size, spikes, ratio=0.5):
    """The quantiles of the law, with some far out: a spectrum that is the same everywhere."""
    positions = (np.arange(size - spikes)[::-1] + 0.5) / (size - spikes)
    bulk = rmtjax.marchenko_pastur.ppf(jnp.float32(positions), ratio)
    spectrum = rmtjax.Spectrum(
        jnp.concatenate([jnp.linspace(16, 4, spikes), bulk]), jnp.asarray(ratio)
    )
    return spectrum, rmtjax.fit_bema(spectrum)


@pytest.fixture(scope="module")
def truncated():
    """A spectrum of 100 cut to 30, and the fit made before."""
    matrix = jax.random.normal(jax.random.key(0), (100, 150))
    fit = rmtjax.fit_bema(rmtjax.spectrum(matrix))
    return rmtjax.spectrum(rmtjax.truncate_matrix(matrix, 30)), fit


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
@pytest.mark.parametrize(("size", "spikes", "bars_of_noise"), [(10, 1, 6), (10_000, 40, 44)])
def test_bars_are_as_many_as_the_spectrum_can_bear(size, spikes, bars_of_noise, log, ax):
    spectrum, fit = made_up(size, spikes)
    plots.esd(spectrum, fit, ax=ax, log=log)
    counts, edges, floor = ax.patches[0].get_data()
    if not log:
        assert np.sum(edges < np.sqrt(fit.threshold)) == bars_of_noise
    drawn = np.where(counts > floor, counts, 0)
    assert np.sum(drawn * np.diff(edges)) == pytest.approx(1.0, abs=1e-6)
    assert labels(ax)[0] == f"{spikes} spike{'s' * (spikes > 1)}"


def test_bars_can_be_chosen(ax):
    spectrum, fit = made_up(100, 3)
    plots.esd(spectrum, fit, ax=ax, bins=7)
    assert ax.patches[0].get_data().values.size == 7
    with pytest.raises(ValueError, match="`bins` must be at least 1, or None"):
        plots.esd(spectrum, fit, ax=ax, bins=0)


def test_zeros_of_a_truncated_spectrum_are_told_and_not_drawn(truncated, ax):
    plots.esd(*truncated, ax=ax)
    assert labels(ax)[-1] == "70 zeros not drawn"
    assert bars(ax) == pytest.approx(0.3, abs=1e-6)
    ax.clear()
    plots.quantiles(*truncated, ax=ax)
    assert labels(ax)[-1] == "70 zeros not drawn"
    assert line(ax, "noise").shape == (2, 30 - int(truncated[1].num_spikes))


def test_singular_values_are_cut_at_a_rank(ax):
    spectrum, fit = made_up(100, 3)
    plots.singular_values(spectrum, fit, ax=ax)
    assert labels(ax) == ["kept", "cut", "threshold", "rank 3 of 100"]
    np.testing.assert_allclose(line(ax, "kept")[1] ** 2, spectrum.eigenvalues[:3], rtol=1e-6)
    assert line(ax, "cut")[0].tolist() == list(range(4, 101))
    ax.clear()
    plots.singular_values(spectrum, fit, rank=8, ax=ax)
    assert labels(ax)[-1] == "rank 8 of 100"
    assert line(ax, "kept").shape == (2, 8)
    assert line(ax, "rank 8 of 100")[0].tolist() == [8.5, 8.5]
    with pytest.raises(ValueError, match=r"`rank` must be in \[0, 100\], got 101"):
        plots.singular_values(spectrum, fit, rank=101)


SPECTRAL = [plots.esd, plots.singular_values, plots.quantiles]


@pytest.mark.parametrize("draw", SPECTRAL)
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_what_has_no_law_is_drawn_without_one(draw, value, ax):
    spectrum = rmtjax.spectrum(jnp.full((60, 60), value))
    assert draw(spectrum, rmtjax.fit_bema(spectrum), ax=ax, title="k") is ax
    assert "Marchenko-Pastur" not in [one.get_label() for one in ax.lines]
    assert ax.get_title() == ("k not finite" if np.isnan(value) else "k")
    ax.figure.canvas.draw()


@pytest.mark.parametrize("draw", SPECTRAL)
def test_a_stack_is_refused_with_the_way_to_one_of_it(draw):
    spectrum, fit = made_up(60, 2)
    stack = spectrum._replace(eigenvalues=jnp.stack([spectrum.eigenvalues] * 2))
    with pytest.raises(ValueError, match="`spectrum` and `fit` must be those of one matrix"):
        draw(stack, fit)


@pytest.fixture(scope="module")
def plan():
    noise, stack = (
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in ((0, (80, 120)), (1, (2, 60, 90)))
    )
    params = {
        "dense": {"kernel": noise.at[:, 0].add(5.0)},
        "head": {"kernel": noise[:, :10]},
        "stack": {"kernel": stack.at[1, :, :2].add(5.0).at[1, :30, 1].add(-9.0)},
    }
    axes = {"stack/kernel": rmtjax.KernelAxes((1,), (2,), batch=(0,))}
    return rmtjax.plan(params, axes=axes)


def test_layers_has_a_line_for_each_kernel_with_a_spectrum(plan, ax):
    plots.layers(plan, ax=ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["dense/kernel", "stack/kernel"]
    assert [bar.get_width() for bar in ax.patches] == [80, 60]
    assert line(ax, "rank")[0].tolist() == [
        plan[f"{name}/kernel"].rank for name in ("dense", "stack")
    ]
    assert line(ax, "spikes")[0].tolist() == [1, 2]
    assert "1 without a spectrum" in labels(ax)
    assert ax.yaxis_inverted()


def test_layers_makes_room_for_many_kernels(plan):
    axes = [plots.layers({f"{i}": plan["dense/kernel"] for i in range(n)}) for n in (1, 60)]
    heights = [ax.figure.get_size_inches()[1] for ax in axes]
    for ax in axes:
        matplotlib.pyplot.close(ax.figure)
    assert heights[0] < 3 < 12 < heights[1]


RECORDS = [
    {"step": step, "loss": 1.0, "rank/a": rank, "signal/a": signal, "rank/b": 60, "signal/b": 0}
    for step, rank, signal in ((0, 80, 0), (10, 80, 12), (20, 9, 9), (30, 8, 8))
]


def test_training_begins_when_the_signal_is_known(ax):
    plots.training(RECORDS, ax=ax)
    assert labels(ax) == ["a", "b", "signal"]
    assert line(ax, "a").T.tolist() == [[0, 80], [10, 80], [20, 9], [30, 8]]
    assert line(ax, "b")[1].tolist() == [60] * 4
    signal = ax.lines[1].get_xydata().tolist()
    assert signal == [[10, 12], [20, 9], [30, 8]]
    with pytest.raises(ValueError, match="`records` must have keys that begin with"):
        plots.training([{"step": 1, "loss": 2.0}])
    with pytest.raises(ValueError, match='a "step" each'):
        plots.training([{"rank/a": 3}])


def test_training_makes_room_for_the_names_of_many_kernels():
    names = [f"encoder/layer_{i}/attention/query/kernel" for i in range(12)]
    wide = plots.training([{"step": 0} | {f"rank/{name}": 8 for name in names}])
    matplotlib.pyplot.close(wide.figure)
    assert wide.figure.get_size_inches()[0] > 9


# Without the checks of types during tests, which would come first.
unchecked = inspect.unwrap


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: unchecked(_drawing.to_draw)(np.ones(3), None), "rmtjax.spectrum"),
        (
            lambda: unchecked(_drawing.to_draw)(rmtjax.spectrum(np.eye(3, dtype="f4")), 2.0),
            "rmtjax.fit_bema",
        ),
        (lambda: unchecked(plots.layers)([1]), "report.plan"),
        (lambda: unchecked(plots.training)({"step": 1}), "into a list"),
    ],
)
def test_what_is_no_result_is_told_apart(draw, words):
    with pytest.raises(TypeError, match=words):
        draw()


ACCURACY = (
    [8e5, 1e5, 2e5, 1e5],
    [98.3, 98.0, 98.2, 97.0],
    [[98.2, 98.4], [97.8, 98.3], [98.1, 98.3], [np.nan, np.nan]],
)
NAMES = ["pruned", "pruned", "pruned", "random"]


def test_accuracy_joins_what_has_one_name_and_draws_the_ends(ax):
    plots.accuracy(*ACCURACY, names=NAMES, ax=ax)
    assert labels(ax) == ["pruned", "random"]
    joined, *_ = ax.containers[0]
    assert joined.get_xdata().tolist() == [1e5, 2e5, 8e5]
    ends = [[y for _, y in path] for path in ax.containers[0].lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [[97.8, 98.3], [98.1, 98.3], [98.2, 98.4]])


def test_accuracy_refuses_lengths_that_differ(ax):
    with pytest.raises(ValueError, match="`parameters`, `accuracies` and `names`"):
        plots.accuracy(*ACCURACY, names=NAMES[:2], ax=ax)


MARGINS, BOUNDS = [3.0, 2.0, 0.5, 1.0, 4.0], [1.0, 2.0, 1.5, 0.2, np.nan]


def test_certificate_counts_what_is_certain(ax):
    plots.certificate(MARGINS, BOUNDS, ax=ax)
    # As much as the margin is too much, and what is not finite bounds nothing.
    assert labels(ax) == ["cannot change: 2 of 5", "may change: 3 of 5", "bound = margin"]
    with pytest.raises(ValueError, match="`margins` and `bounds` must have one number a sample"):
        plots.certificate(MARGINS, BOUNDS[:2])


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spectrum = rmtjax.spectrum(jnp.eye(4))
    with pytest.raises(ModuleNotFoundError, match=r"rmtjax\[plots\]"):
        plots.esd(spectrum, rmtjax.fit_bema(spectrum))


DRAWN = {
    "esd_10": lambda ax, _: plots.esd(*made_up(10, 1), ax=ax),
    "esd_200": lambda ax, _: plots.esd(*made_up(200, 6), ax=ax),
    "esd_10000": lambda ax, _: plots.esd(*made_up(10_000, 40), ax=ax),
    "esd_10_log": lambda ax, _: plots.esd(*made_up(10, 1), ax=ax, log=True),
    "esd_10000_log": lambda ax, _: plots.esd(*made_up(10_000, 40, ratio=1.0), ax=ax, log=True),
    "singular_values_10": lambda ax, _: plots.singular_values(*made_up(10, 1), ax=ax),
    "singular_values_10000_log": lambda ax, _: plots.singular_values(
        *made_up(10_000, 40), rank=48, ax=ax, log=True
    ),
    "quantiles_10": lambda ax, _: plots.quantiles(*made_up(10, 1), ax=ax),
    "quantiles_10000": lambda ax, _: plots.quantiles(*made_up(10_000, 40), ax=ax),
    "layers": lambda ax, plan: plots.layers(plan, ax=ax),
    "training": lambda ax, _: plots.training(RECORDS, ax=ax),
    "accuracy": lambda ax, _: plots.accuracy(*ACCURACY, names=NAMES, ax=ax),
    "certificate": lambda ax, _: plots.certificate(MARGINS, BOUNDS, ax=ax),
}


@pytest.mark.parametrize("name", DRAWN)
def test_figures_look_as_they_did(name, plan, tmp_path):
    """Without words and legend, which each version of matplotlib draws its own way."""
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = Figure(figsize=(4, 3), dpi=60)
        ax = figure.add_axes((0.05, 0.05, 0.75, 0.9))
        DRAWN[name](ax, plan)
        remove_ticks_and_titles(figure)
        ax.set(xlabel="", ylabel="")
        ax.get_legend().remove()
        expected, actual = IMAGES / f"{name}.png", tmp_path / f"{name}.png"
        if not expected.exists():
            figure.savefig(expected)
            pytest.fail(f"{expected} was missing: look at it.")
        figure.savefig(actual)
    # The root of the mean square over the pixels, of 255: an edge drawn a little softer passes, a
    # threshold moved by a bar does not.
    assert compare_images(str(expected), str(actual), tol=2, in_decorator=True) is None
