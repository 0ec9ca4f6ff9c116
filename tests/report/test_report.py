"""A report: its rows, its totals, and what each of its forms says."""

import csv
import json
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.page_reports import quarter_clock

import rmtjax
from rmtjax.planning import make_plan, PlanOptions


def planted(num_spikes=2):
    noise = np.random.default_rng(1).standard_normal((80, 120), np.float32)
    noise[:num_spikes] *= 20
    return jnp.asarray(noise)


SHORT = {"kernel": jnp.ones((60, 10))}


@pytest.fixture(scope="module")
def params():
    # All fitted kernels have 80 singular values, so that one program fits them.
    return {
        "Dense_0": {"kernel": planted(), "bias": jnp.zeros(120)},
        "Dense_1": {"kernel": jnp.full((80, 120), jnp.nan)},
        "<b>&": SHORT,
    }


@pytest.fixture(scope="module")
def report(params):
    return rmtjax.analyze(params)


def test_a_row_for_each_kernel_with_its_numbers(params, report):
    short, found, broken = report.rows
    assert report.rows is report.rows  # made once
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


def test_a_kernel_that_bears_the_whole_cut_of_a_budget_is_told():
    rng = np.random.default_rng(0)
    noise = lambda: {"kernel": jnp.asarray(rng.normal(size=(80, 120)), jnp.float32)}
    low = jnp.asarray(rng.normal(size=(80, 8)) @ rng.normal(size=(8, 120)), jnp.float32)
    params = {"Dense_0": noise(), "Dense_1": noise(), "embed": {"kernel": low}}
    words = "One kernel of 3 takes the whole cut. To spread it, leave that one out."
    # Factors of rank 8 cost nothing, and are nearly enough for a budget of 75 %.
    assert words in rmtjax.Report(rmtjax.plan(params, budget=0.75)).summary
    assert words not in rmtjax.Report(rmtjax.plan(params, budget=0.5)).summary
    del params["Dense_1"]
    assert words not in rmtjax.Report(rmtjax.plan(params, budget=0.75)).summary


def test_a_stack_is_one_row_of_its_worst_member():
    stack = jnp.stack([planted(num_spikes=1), planted(num_spikes=3)])
    axes = lambda path, leaf: rmtjax.KernelAxes(inputs=(1,), outputs=(2,), batch=(0,))
    (row,) = rmtjax.analyze({"kernel": stack}, axes=axes).rows
    fits = [rmtjax.fit_bema(rmtjax.spectrum(matrix)) for matrix in stack]
    assert row.spikes == row.rank == 3
    assert row.distance == pytest.approx(max(float(fit.distance) for fit in fits), rel=1e-5)
    assert row.variance == pytest.approx(sum(float(fit.variance) for fit in fits) / 2, rel=1e-5)


def test_csv_has_a_line_a_kernel_and_no_formulas():
    names = ["=HYPERLINK(1)", "+1", "-1", "@x", " =1", "\r=1", "a\r\nb", "Dense_0/kernel", 'a,"b']
    rows = rmtjax.plan({name: {"kernel": np.ones((2, 2), np.float32)} for name in names})
    lines = rmtjax.Report(rows).to_csv("path", "spikes").splitlines()
    found = {path for path, _ in csv.reader(lines[1:])}
    assert len(lines) == 1 + len(names)
    assert found == {
        "'=HYPERLINK(1)/kernel",
        "'+1/kernel",
        "'-1/kernel",
        "'@x/kernel",
        "' =1/kernel",
        "'\\r=1/kernel",
        "a\\r\\nb/kernel",
        "Dense_0/kernel/kernel",
        'a,"b/kernel',
    }


def test_dictionary_is_json_without_nan(report):
    text = json.dumps(report.to_dict(), allow_nan=False)
    rows = json.loads(text)["rows"]
    assert [row["path"] for row in rows] == [row.path for row in report.rows]
    assert [row["shape"] for row in rows] == [list(row.shape) for row in report.rows]


def test_table_is_aligned_and_says_all(report):
    head, *lines = report.table().splitlines()
    assert len(lines) == 3
    start = head.index("reason")
    would = {"keep": "", "factorize": "would be ", "truncate": "would be "}
    assert [line[start:] for line in lines] == [would[row.action] + row.reason for row in report]
    assert str(report) == report.table()


def test_representations_fit_a_screen(report):
    assert len(report) == 3
    assert all(report[row.path] is row for row in report)
    with pytest.raises(KeyError, match="there is no kernel 'x'; there are '"):
        report["x"]
    with pytest.raises(KeyError, match="there is no kernel 'x'; there are '"):
        report.plan["x"]
    (path, row) = next((path, row) for path, row in report.plan.items() if row.spectrum)
    few = report.plan[path], row.spectrum, row.fit, report[path]
    assert all(len(repr(one)) < 500 and "array(" not in repr(one) for one in few)
    many = rmtjax.Report(rmtjax.Plan({f"layers_{i}/kernel": row for i in range(100)}))
    for text in (repr(many), repr(many.plan)):
        assert 20 < len(text.splitlines()) < 30
        assert "... and 80 more" in text
    assert many._repr_html_().count("<tr>") == many.plan._repr_html_().count("<tr>") == 1 + 20


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.cells, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        if data.strip():
            self.cells.append(data)


def test_page_is_a_table_and_escapes_paths(report):
    page = Cells()
    page.feed(report.to_html())
    assert "<b>&/kernel" in page.cells
    assert "b" not in page.tags
    assert page.tags.count("tr") == 4
    assert "<b>&/kernel" not in report._repr_html_()


def test_empty_tree():
    report = rmtjax.analyze({})
    assert report.rows == ()
    nothing = rmtjax.Cost(0, 0, None, 0, 0, None)
    assert report.totals == nothing
    assert report.to_dict() == {"rows": [], "totals": nothing._asdict()}
    assert len(report.to_csv().splitlines()) == 1
    assert len(report.to_markdown("path", "parameters").splitlines()) == 2
    assert report.table().split() == [
        *("path", "shape", "variance", "edge", "threshold", "spikes", "distance", "reason")
    ]


def test_what_has_no_row_is_counted():
    tree = {"a": {"kernel": SHORT["kernel"], "bias": np.ones(7)}, "norm": {"scale": np.ones(5)}}
    report = rmtjax.analyze(tree)
    assert report.others == (2, 12)
    totals = report.to_dict()["totals"]
    assert (totals["other_tensors"], totals["other_parameters"]) == (2, 12)
    assert (
        "<dt>other tensors</dt><dd>2 <small>12 numbers, not looked at</small>" in report.to_page()
    )
    assert rmtjax.analyze(SHORT).others == (0, 0)


def test_options_reach_the_plan(params):
    options = {"rule": rmtjax.ranks.fixed(7), "where": "re:^Dense_0/kernel"}
    (row,) = rmtjax.analyze(params, **options, min_size=81).rows
    assert row.reason == "kept: short side 80 under 81"
    (row,) = rmtjax.analyze(params, **options).rows
    assert row.rank == 7


def test_a_batch_is_timed():
    (row,) = rmtjax.analyze({"kernel": SHORT["kernel"]}, batch=10).rows
    assert row.multiply_adds == 10 * 600
    assert row.milliseconds == row.milliseconds_after > 0


@pytest.fixture(scope="module")
def timed(params):
    """A report whose kernels take a millisecond dense, and a quarter as factors."""
    return rmtjax.Report(make_plan(params, PlanOptions(batch=10, multiple=1), quarter_clock))


def test_costs_are_told_for_each_kernel_and_in_total(timed):
    short, found, broken = timed.rows
    costs = [tuple(getattr(row, name) for name in rmtjax.Cost._fields) for row in timed.rows]
    assert short.multiply_adds == 10 * short.parameters == 10 * 600
    assert (found.parameters, found.parameters_after) == (80 * 120, 2 * (80 + 120))
    assert (found.milliseconds, found.milliseconds_after) == (1.0, 0.25)
    assert broken.parameters == broken.parameters_after == 9600
    assert timed.totals == tuple(sum(column) for column in zip(*costs, strict=True))
    assert timed.to_dict()["totals"] == timed.totals._asdict()
    assert json.loads(timed.to_json()) == json.loads(json.dumps(timed.to_dict()))


def test_tables_tell_what_becomes_of_costs(timed):
    head, _, found, _, total = timed.table().splitlines()
    column = lambda line, name: line[head.index(name) :].split("  ")[0]
    assert head.split()[-4:] == ["parameters", "multiply_adds", "milliseconds", "reason"]
    assert column(found, "parameters") == "9,600 -> 400"
    assert column(found, "milliseconds") == "1 -> 0.25"
    assert total.startswith("total ")
    assert column(total, "parameters") == "19,800 -> 10,600"
    assert column(total, "multiply_adds") == "198,000 -> 106,000"
    assert column(total, "milliseconds") == "3 -> 2.25"


def test_columns_may_be_chosen(report):
    assert report.table("path", "rank").splitlines() == [
        "path            rank",
        "<b>&/kernel     -",
        "Dense_0/kernel  2",
        "Dense_1/kernel  80",
    ]
    assert report.table("parameters_after", "rank").splitlines()[-1] == "10,600"
    for table in (report.table, report.to_html, report.to_csv, report.to_markdown, report.cells):
        with pytest.raises(ValueError, match=r"`columns` must be fields of `Row` .*got 'size'"):
            table("path", "size")


def test_page_has_the_totals_in_its_foot(timed):
    page = Cells()
    page.feed(timed.to_html("path", "parameters"))
    assert page.tags[-4:] == ["tfoot", "tr", "td", "td"]
    assert page.cells[-2:] == ["total", "19,800 -> 10,600"]


def test_values_separated_by_commas_are_read_back(params):
    report = rmtjax.analyze(params | {"a,b": SHORT})
    lines = list(csv.DictReader(report.to_csv().splitlines()))
    assert [line["path"] for line in lines] == [row.path for row in report.rows]
    assert lines[1]["shape"] == "80x120"
    assert float(lines[1]["variance"]) == report.rows[1].variance
    assert lines[2]["variance"] == lines[2]["milliseconds"] == ""
    assert report.to_csv("rank", "path").splitlines()[2] == "2,Dense_0/kernel"


def test_markdown_has_cells_that_end_where_they_should(params):
    lines = rmtjax.analyze(params | {"a|b": SHORT}).to_markdown("path", "parameters").splitlines()
    assert lines == [
        "| path | parameters |",
        "| --- | --- |",
        "| &lt;b>&amp;/kernel | 600 |",
        "| Dense_0/kernel | 9,600 -> 400 |",
        "| Dense_1/kernel | 9,600 |",
        r"| a\|b/kernel | 600 |",
        "| total | 20,400 -> 11,200 |",
    ]
