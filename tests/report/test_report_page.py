"""What is in the page of a report, as text; `test_page.py` and its sibling open it in a browser."""

import base64
import dataclasses
import hashlib
import json
import re

import numpy as np
import pytest

import rmtjax
from rmtjax import KernelAxes
from rmtjax.report import _page


def matrix(spikes, shape=(100, 150)):
    noise = np.random.default_rng(0).normal(size=shape)
    return np.float32(noise * np.where(np.arange(shape[0]) < spikes, 5, 1)[:, None])


@pytest.fixture(scope="module")
def report():
    return rmtjax.analyze({f"Dense_{k}": {"kernel": matrix(k)} for k in (0, 3)})


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(text)


def test_no_text_can_end_a_script():
    hostile = "</script><!--&\u2028\u2029"
    text = _page.to_script([hostile])
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == [hostile]
    with pytest.raises(ValueError, match="JSON"):
        _page.to_script(float("nan"))


def test_bars_count_what_is_there():
    values = np.array([5.0, 2.0, 1.0, 0.999, 0.5, 1e-9, 0.0])
    counts, zeros = _page.count_values(values, 4, 2.0)
    assert counts == [0, 2, 1, 1]  # borders belong to the right, but for the last
    assert zeros == 2
    assert _page.count_values(np.zeros(3), 2, 1.0) == ([0, 0], 3)


def test_the_policy_names_the_script_and_the_style(report):
    page = report.to_page()
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', page)
    assert policy.startswith("default-src 'none'; ")
    for kind, tag in (("style-src", "style"), ("script-src", "script")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert "{{" not in page


def test_the_spectrum_is_told_in_few_numbers(report):
    first, second = data_of(report.to_page())["spectra"]
    for found, row in zip((first, second), report.rows, strict=True):
        for name in ("ratio", "variance", "edge", "threshold", "distance"):
            assert found[name] == pytest.approx(getattr(row, name), rel=1e-3)
        ends = row.edge * np.array([(1 - 0.8165) ** 2 / (1 + 0.8165) ** 2, 1])  # sqrt(100/150)
        law = found["law"]
        assert [law["lower"], law["upper"]] == pytest.approx(np.sqrt(ends), rel=0.05)
        assert max(law["heights"]) == 1000
        assert len(found["counts"]) <= 3 * _page.BARS
    values = np.linalg.svd(np.float64(matrix(3)), compute_uv=False) / np.sqrt(150)
    assert second["spikes"] == 3
    assert second["largest"] == pytest.approx(values[:3], rel=1e-3)
    assert sum(second["counts"]) == (values <= second["stop"]).sum()


def test_what_is_above_the_limits_is_told(monkeypatch):
    monkeypatch.setattr(_page, "MOST_SPIKES", 50)
    spikes, bulk = np.linspace(200, 100, 60), np.linspace(3, 0.05, 140)
    spectrum = rmtjax.Spectrum(np.float32([*spikes, *bulk]), np.float32(200 / 300))
    fit = rmtjax.BulkFit(*np.float32([1, 3, 3.3, 0.02]), np.int32(60))
    row = rmtjax.Kept("kept", (200, 300), KernelAxes((0,), (1,)), 200, fit, spectrum)
    (found,) = data_of(rmtjax.Report(rmtjax.Plan(kernel=row)).to_page())["spectra"]
    assert found["spikes"] == found["beyond"] == 60
    assert len(found["largest"]) == _page.MOST_SPIKES
    assert sum(found["counts"]) == 140  # the bulk is not flattened by what is far away


@pytest.mark.parametrize(("top", "bars"), [(1.04, 16), (2.13, 30), (2.95, 42), (3.2, 28)])
def test_an_axis_takes_in_what_is_near_its_end(report, top, bars):
    """In units of the threshold: no axis ends just before the largest value."""
    row = report.plan["Dense_3/kernel"]
    cut = float(row.fit.threshold) ** 0.5
    values = np.concatenate([[top * cut], np.linspace(0.99, 0.2, 99) * cut])
    spectrum = row.spectrum._replace(eigenvalues=np.float32(values**2))
    fit = row.fit._replace(num_spikes=np.int32(1))
    row = dataclasses.replace(row, fit=fit, spectrum=spectrum)
    (found,) = data_of(rmtjax.Report(rmtjax.Plan(kernel=row)).to_page())["spectra"]
    # Up to the threshold there are 14 bars, as 3 * 100^(1/3) rounded up; beyond it as wide ones.
    assert len(found["counts"]) == bars
    assert found["stop"] / cut == pytest.approx(bars / 14)
    assert found["beyond"] == (top > 3)
    assert sum(found["counts"]) == 100 - found["beyond"]


@pytest.mark.parametrize("cut", [np.nan, np.inf, 0.0, -1.0])
def test_a_cut_that_is_none_is_not_drawn(report, cut):
    (row, *_) = report.plan.values()
    odd = dataclasses.replace(row, fit=row.fit._replace(threshold=cut))
    (found,) = data_of(rmtjax.Report(rmtjax.Plan(kernel=odd)).to_page())["spectra"]
    assert found["law"] is None
    assert found["stop"] > 0
    assert sum(found["counts"]) == found["size"]


def test_numbers_are_those_of_the_rows(report):
    numbers = data_of(report.to_page())["numbers"]
    for name, column in numbers.items():
        assert column == [getattr(row, name) for row in report.rows]


def test_columns_that_are_asked_for_are_in_the_page(report):
    narrow, page = report.to_page(), report.to_page("rmtjax", "summary", "tails")
    assert "stable_rank" not in data_of(narrow)["numbers"]
    numbers = data_of(page)["numbers"]
    for name in ("stable_rank", "alpha", "hill_error"):
        expected = [report.metrics[row.path][name] for row in report.rows]
        assert numbers[name] == pytest.approx(expected, rel=1e-5)
    assert f"{report.metrics['Dense_3/kernel']['stable_rank']:.4g}" in page
    with pytest.raises(ValueError, match="`columns` must be fields"):
        report.to_page("rmtjax", "nothing")


def test_what_analyze_was_asked_for_is_in_the_page():
    report = rmtjax.analyze({"kernel": matrix(3)}, randomized=2)
    numbers = data_of(report.to_page())["numbers"]
    assert {"shuffled_spikes", "spikes"} < set(numbers)


def test_a_page_without_kernels():
    page = rmtjax.analyze({}).to_page()
    assert data_of(page)["spectra"] == []
    assert "<dd>0 <small></small></dd>" in page


def test_kernels_without_parameters_have_no_percentage():
    page = rmtjax.analyze({"kernel": np.ones((0, 60), np.float32)}).to_page()
    assert "%" not in re.findall(r'<dl class="totals">(.*?)</dl>', page)[0]
