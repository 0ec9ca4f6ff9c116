"""What a report says of its numbers: positions, tensors under other names, what is next."""

import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import KernelAxes, ranks
from rmtjax.planning import is_convolution, make_plan, PlanOptions
from rmtjax.report import _page


def noise(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


CNN = {
    "conv1": {"kernel": noise(3, 3, 1, 8), "bias": jnp.zeros(8)},
    "fc1": {"kernel": noise(80, 60)},
    "place": {"token": noise(4, 8)},
}


@pytest.fixture(scope="module")
def report():
    return rmtjax.analyze(CNN, rule=ranks.fixed(8))


@pytest.mark.parametrize(
    ("path", "shape", "axes", "expected"),
    [
        ("conv1/kernel", (3, 3, 1, 8), None, True),
        ("Conv_0/kernel", (5, 3, 8), KernelAxes((0, 1), (2,)), True),
        ("body/kernel", (3, 3, 1, 8), KernelAxes((0, 1, 2), (3,)), True),
        ("layers/Conv_0/kernel", (2, 3, 3, 1, 8), KernelAxes((1, 2, 3), (4,), (0,)), True),
        ("patch.weight", (8, 3, 4, 4), KernelAxes((0,), (1, 2, 3)), True),
        ("out/kernel", (4, 8, 32), KernelAxes((0, 1), (2,)), False),
        ("query/kernel", (32, 4, 8), KernelAxes((0,), (1, 2)), False),
        ("Dense_0/kernel", (2, 80, 60), KernelAxes((1,), (2,), (0,)), False),
        ("conv_out/kernel", (80, 60), KernelAxes((0,), (1,)), False),
        ("experts/weight", (4, 80, 60), None, False),
        ("kernel", (80, 60), None, False),
    ],
)
def test_convolutions_are_told_from_other_kernels(path, shape, axes, expected):
    assert is_convolution(path, shape, axes) == expected


def test_multiply_adds_of_a_convolution_are_of_one_position(report):
    assert [row.positions for row in report] == [1, None, None]
    shown = ["72 of one position", "4,800 -> 1,120", "32"]
    assert [cells[0] for cells in report.cells("multiply_adds")] == shown
    assert report.table("path", "parameters", "multiply_adds").splitlines()[-1].split() == [
        *("total", "4,904", "->", "1,224", "-")
    ]
    assert report.to_markdown("path", "multiply_adds").count("of one position") == 1
    assert report.totals.multiply_adds == 4904  # as data, with `positions` beside it
    page = report.to_page()
    assert "<dt>parameters</dt>" in page
    assert "<dt>multiply-adds</dt>" not in page
    assert "<dt>multiply-adds</dt>" in rmtjax.Report(make_plan(CNN["fc1"], PlanOptions())).to_page()


def test_positions_that_are_given_are_summed():
    clock = lambda product: np.asarray([[1.0] * len(product.ranks)] * 3)
    given = {"conv1/kernel": 64, "fc1/kernel": 1}
    for batch, positions, total in ((given, 64, "9,440"), (5, 5, "-")):
        options = PlanOptions(rule=ranks.fixed(8), batch=batch)
        plan = make_plan(CNN, options, clock)
        alone, timed = rmtjax.Report(plan), rmtjax.Report(plan, options=options)
        assert alone.rows[0].positions == timed.rows[0].positions == positions
        cell, *_, last = (cells[0] for cells in timed.cells("multiply_adds"))
        assert cell == f"{72 * positions:,} of {positions} positions"
        assert last == "32"
        html = timed._repr_html_()  # has the costs of kernels that were timed
        assert cell in html
        assert timed.table("path", "multiply_adds").splitlines()[-1].split()[1] == total
        assert ("<dt>multiply-adds</dt>" in timed.to_page()) == (total != "-")


def test_a_tensor_under_another_name_is_no_kernel(report):
    first, *_ = report.summary.splitlines()
    assert first == (
        "Analyzed: 2 kernels with 4,872 parameters. Kept: 1 tensor with 32, not a kernel by its "
        "name. Not analyzed: 1 other tensor with 8."
    )
    page = report.to_page()
    assert "<dt>kernels</dt><dd>2 <small>1 would be factorized, 1 kept</small>" in page
    assert "<dt>tensors under other names</dt><dd>1 <small>32 numbers, kept</small>" in page
    assert "1 would be factorized, 1 kept: 4,904 -> 1,224 parameters" in report.summary


def test_the_summary_names_the_calls_that_follow(report):
    call = report.summary.splitlines()[-1]
    assert "`rmtjax.factorize(params, report.plan)`" in call
    assert "`rmtjax.nnx.factorize(model, report.plan)`" in call
    assert "`rmtjax.linen.moments`" in call
    # The calls are as they are named.
    thin = rmtjax.factorize(CNN, report.plan)
    assert thin["fc1"]["kernel"].left.shape == (80, 8)
    assert callable(rmtjax.nnx.factorize)
    assert callable(rmtjax.linen.moments)
    assert callable(rmtjax.nnx.moments)
    done = rmtjax.Report(report.plan, applied=True)
    assert done.summary.endswith("\nMeasure the outputs before you keep a cut.")
    kept = rmtjax.Report(rmtjax.Plan({"fc2": rmtjax.Kept("kept: by hand", (3, 2))}))
    assert kept.summary.endswith("\nEvery kernel is kept: the reasons say why.")


def test_a_page_says_would_be_until_a_plan_is_carried_out(report):
    page, done = report.to_page(), rmtjax.Report(report.plan, applied=True).to_page()
    badge = '<b class="factorize">{}</b>'
    assert badge.format("would be factorized") in page
    assert badge.format("factorized") in done
    assert '<option value="factorize">would be factorized</option>' in page
    assert "would be" not in done.partition('<section class="legend">')[0]


def test_a_rule_that_asks_for_a_size_finds_no_signal(report):
    assert report["fc1/kernel"].reason == "factorized: rank 8 of 60, as asked by the rule"
    reason = lambda rule, **options: rmtjax.plan(CNN, rule=rule, **options)["fc1/kernel"].reason
    assert reason(ranks.fixed(9)) == "factorized: rank 16 of 60, where the rule asks for 9"
    assert reason(ranks.fixed(60)) == "kept: full rank (rank 60 of 60, as asked by the rule)"
    assert reason(ranks.size(0.5)) == "factorized: rank 16 of 60, as asked by the rule"
    energy = reason(ranks.energy(0.3), multiple=1)
    assert energy.endswith("of 60, as asked by the rule")
    assert " signal" in reason(ranks.gavish_donoho())


def test_of_the_first_rows_the_largest_cut_is_open():
    keep, cut = (
        rmtjax.report.Row(name, (9, 9), action, "", removed=share)
        for name, action, share in (("a", "keep", 0.9), ("b", "truncate", 0.1))
    )
    law, none = {"law": {}}, {"law": None}
    assert _page._to_open([keep, cut], [law, law]) == 1
    assert _page._to_open([keep, keep, keep], [None, none, law]) == 2
    assert _page._to_open([keep, keep], [None, none]) == 1
    assert _page._to_open([cut, cut._replace(removed=0.2)], [law, none]) == 1
    assert _page._to_open([keep], [None]) is None
    assert _page._to_open([], []) is None
    # One further down would not be seen.
    far = [keep] * _page.SEEN + [cut]
    assert _page._to_open(far, [law] * len(far)) == 0
    assert _page._to_open(far, [None] * _page.SEEN + [law]) == _page.SEEN


@pytest.mark.parametrize("spikes", [0, 3])
@pytest.mark.parametrize("shape", [(60, 80), (100, 100), (300, 40)])
def test_bars_beyond_the_threshold_are_spikes(spikes, shape):
    kernel = np.random.default_rng(1).normal(size=shape)
    kernel[:spikes] *= 2.2
    spectrum = rmtjax.spectrum(np.float32(kernel))
    fit = rmtjax.BulkFit(*map(np.asarray, rmtjax.fit_bema(spectrum)))
    row = rmtjax.Kept("kept", shape, KernelAxes((0,), (1,)), min(shape), fit, spectrum)
    (found,) = _page._spectra(rmtjax.Plan(kernel=row))
    edges = np.linspace(0, found["stop"], len(found["counts"]) + 1)
    cut = np.sqrt(np.float64(fit.threshold))
    place = int(np.argmin(abs(edges - cut)))
    assert edges[place] == pytest.approx(cut, rel=1e-12)
    assert sum(found["counts"][place:]) + found["beyond"] == found["spikes"] == fit.num_spikes
    assert len(found["counts"]) <= 3 * _page.BARS
