import json
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import pytest

import rmtjax


def planted(shape=(80, 120), num_spikes=2):
    noise = jax.random.normal(jax.random.key(0), shape)
    for row in range(num_spikes):
        noise = noise.at[row].multiply(20.0)
    return noise


@pytest.fixture
def params():
    return {
        "Dense_0": {"kernel": planted(), "bias": jnp.zeros(120)},
        "Dense_1": {"kernel": jnp.full((60, 60), jnp.nan)},
        "<b>&": {"kernel": jnp.ones((60, 10))},
    }


def test_a_row_for_each_kernel_with_its_numbers(params):
    found, broken, short = rmtjax.analyze(params).rows[1:] + rmtjax.analyze(params).rows[:1]
    fit = rmtjax.fit_bema(rmtjax.spectrum(params["Dense_0"]["kernel"]))
    assert found.path == "Dense_0/kernel"
    assert found.shape == (80, 120)
    assert found.spikes == found.rank == int(fit.num_spikes) == 2
    numbers = (found.ratio, found.variance, found.edge, found.threshold, found.distance)
    expected = (80 / 120, fit.variance, fit.edge, fit.threshold, fit.distance)
    assert numbers == pytest.approx([float(value) for value in expected], rel=1e-5)
    assert broken.reason == "kept: not finite"
    assert broken.variance is broken.spikes is broken.distance is None
    assert short.reason == "kept: short side 10 under 50"
    assert short.ratio is short.rank is None


def test_a_stack_is_one_row_of_its_worst_member():
    stack = jnp.stack([planted(num_spikes=1), planted(num_spikes=3)])
    axes = lambda path, leaf: rmtjax.KernelAxes(inputs=(1,), outputs=(2,), batch=(0,))
    (row,) = rmtjax.analyze({"kernel": stack}, axes=axes).rows
    fits = [rmtjax.fit_bema(rmtjax.spectrum(matrix)) for matrix in stack]
    assert row.spikes == row.rank == 3
    assert row.distance == pytest.approx(max(float(fit.distance) for fit in fits), rel=1e-5)
    assert row.variance == pytest.approx(sum(float(fit.variance) for fit in fits) / 2, rel=1e-5)


def test_dictionary_is_json_without_nan(params):
    report = rmtjax.analyze(params)
    text = json.dumps(report.to_dict(), allow_nan=False)
    rows = json.loads(text)["rows"]
    assert [row["path"] for row in rows] == [row.path for row in report.rows]
    assert [row["shape"] for row in rows] == [list(row.shape) for row in report.rows]


def test_table_is_aligned_and_says_all(params):
    report = rmtjax.analyze(params)
    head, *lines = report.table().splitlines()
    assert len(lines) == 3
    start = head.index("reason")
    assert [line[start:] for line in lines] == [row.reason for row in report.rows]
    assert str(report) == report.table()


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.cells, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        if data.strip():
            self.cells.append(data)


def test_page_is_a_table_and_escapes_paths(params):
    report, page = rmtjax.analyze(params), Cells()
    page.feed(report.to_html())
    assert "<b>&/kernel" in page.cells
    assert "b" not in page.tags
    assert page.tags.count("tr") == 4
    assert report.to_html() == report._repr_html_()


def test_empty_tree():
    report = rmtjax.analyze({})
    assert report.rows == ()
    assert report.to_dict() == {"rows": []}
    assert report.table().split() == [
        *("path", "shape", "variance", "edge", "threshold", "spikes", "distance", "reason")
    ]


def test_options_reach_the_plan(params):
    report = rmtjax.analyze(
        params,
        rule=rmtjax.ranks.fixed(7),
        where=lambda path, leaf: path.startswith("Dense_0/kernel"),
        min_size=81,
    )
    (row,) = report.rows
    assert row.reason == "kept: short side 80 under 81"
    assert rmtjax.analyze(params, rule=rmtjax.ranks.fixed(7)).rows[1].rank == 7
