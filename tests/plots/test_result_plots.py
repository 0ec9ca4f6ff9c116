"""Figures of results: their lines, labels and images."""

import jax
import jaxtyping
import matplotlib
import numpy as np
import pytest
from helpers.plot_cases import check_image, labels, line, made_up
from matplotlib.figure import Figure

import rmtjax
from rmtjax import plots


@pytest.fixture
def ax():
    return Figure().subplots()


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
    assert labels(ax) == ["rank", "spikes", "full rank"]  # each has its symbol
    note = "Not drawn: 1 kernel without a spectrum"
    assert ax.get_xlabel() == f"number of directions (logarithmic above 1)\n{note}"
    assert ax.yaxis_inverted()


@pytest.mark.parametrize("size", [60, 100_000])
def test_layers_has_room_for_the_circle_of_a_full_rank(size, ax):
    spectrum, fit = made_up(60, 3)
    spectrum = spectrum._replace(eigenvalues=np.resize(spectrum.eigenvalues, size))
    row = rmtjax.Kept("kept", (size, size), rmtjax.KernelAxes((0,), (1,)), size, fit, spectrum)
    plots.layers({"kernel": row}, ax=ax)
    (circle,) = (one for one in ax.lines if one.get_label() == "rank")
    center = ax.transData.transform((size, 0))[0]
    radius = (circle.get_markersize() + circle.get_markeredgewidth()) / 2 * ax.figure.dpi / 72
    assert center + radius < ax.bbox.x1
    assert "\n" not in ax.get_xlabel()  # nothing is left out


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


def looks():
    """Made-up looks of two kernels, one of which leaves the law."""
    for step, spikes in ((1, 0), (11, 3), (21, 7), (31, 6)):
        kernels = {"monitor/spikes/a": spikes, "monitor/left_law/a": step > 11}
        yield {"step": step, **kernels, "monitor/spikes/b": 1, "monitor/left_law/b": False}


def test_history_has_a_line_for_each_kernel_and_a_cross_where_the_law_is_left(ax):
    plots.history(looks(), ax=ax)
    assert labels(ax) == ["a", "b", "left the law"]
    assert line(ax, "a").T.tolist() == [[1, 0], [11, 3], [21, 7], [31, 6]]
    assert line(ax, "left the law").T.tolist() == [[21, 7], [31, 6]]
    for records in ([{"step": 1, "loss": 2.0}], [{"monitor/spikes/a": 3}], []):
        with pytest.raises(ValueError, match="`records` must have keys that begin with"):
            plots.history(records, ax=ax)


def test_training_makes_room_for_the_names_of_many_kernels():
    names = [f"encoder/layer_{i}/attention/query/kernel" for i in range(12)]
    wide = plots.training([{"step": 0} | {f"rank/{name}": 8 for name in names}])
    matplotlib.pyplot.close(wide.figure)
    assert wide.figure.get_size_inches()[0] > 9


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plots.esd(np.ones(3), None), "rmtjax.spectrum"),
        (lambda: plots.esd(rmtjax.spectrum(np.eye(3, dtype="f4")), 2.0), "rmtjax.fit_bema"),
        (lambda: plots.layers([1]), "report.plan"),
        (lambda: plots.training({"step": 1}), "into a list"),
    ],
)
def test_arguments_of_other_types_are_refused_with_a_remedy(draw, words, monkeypatch):
    # As users have it: the type checker of the tests would raise first, in other words.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
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


DRAWN = {
    "layers": lambda ax, plan: plots.layers(plan, ax=ax),
    "training": lambda ax, _: plots.training(RECORDS, ax=ax),
    "history": lambda ax, _: plots.history(looks(), ax=ax),
    "accuracy": lambda ax, _: plots.accuracy(*ACCURACY, names=NAMES, ax=ax),
    "certificate": lambda ax, _: plots.certificate(MARGINS, BOUNDS, ax=ax),
}


@pytest.mark.parametrize("name", DRAWN)
def test_figures_of_results_look_as_they_did(name, plan, tmp_path):
    check_image(name, lambda ax: DRAWN[name](ax, plan), tmp_path)


def curves():
    """Two curves of made-up points, which no decomposition has a part in."""
    options = rmtjax.planning.PlanOptions(budget=1.0)
    nothing = rmtjax.planning.Findings({}, {}, {}, {}, {})
    shares = np.linspace(1, 0.3, 15)
    made = {"weights": (1 - shares) / 1.4, "output": (1 - shares) ** 2 / 2}
    sizes = np.round(1e4 * shares).astype(int)
    return {n: rmtjax.TradeOff(sizes, shares, lost, nothing, options) for n, lost in made.items()}


def test_trade_off_has_a_line_for_each_curve(ax):
    found = curves()
    plots.trade_off(found, ax=ax)
    assert labels(ax) == ["weights", "output"]
    for name, curve in found.items():
        np.testing.assert_array_equal(line(ax, name), [curve.shares, curve.removed])
    alone = plots.trade_off(found["output"], ax=Figure().subplots())
    assert alone.get_legend() is None
    with pytest.raises(TypeError, match="curves"):
        plots.trade_off({"a": 1.0})


def test_the_image_of_trade_off(tmp_path):
    check_image("trade_off", lambda ax: plots.trade_off(curves(), ax=ax), tmp_path)
