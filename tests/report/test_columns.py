"""Columns of a report beyond those of its rows: in every form, by name and by group."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cli_models import save_model, usage_error

import rmtjax
from rmtjax import cli
from rmtjax.report import expand_columns


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((60, 90), np.float32)
    kernel[0] *= 12
    return {
        "a": {"kernel": jnp.asarray(kernel)},
        "nan": {"kernel": jnp.full((60, 90), jnp.nan)},
        "short": {"kernel": jnp.ones((60, 3))},
        "zero": {"kernel": jnp.zeros((60, 90))},
    }


@pytest.fixture(scope="module")
def report(params):
    return rmtjax.analyze(params)


@pytest.mark.parametrize("power", [-90, 80])
def test_metrics_are_those_at_any_scale(params, report, power):
    plain = report.metrics["a/kernel"]
    scaled = rmtjax.analyze({"a": {"kernel": params["a"]["kernel"] * 2.0**power}})
    found, row = scaled.metrics["a/kernel"], scaled.plan["a/kernel"]
    moved = {"spectral_norm": power, "frobenius_norm": power, "alpha_start": 2 * power}
    for name, value in plain.items():
        wanted = value * 2.0 ** moved.get(name, 0)
        if name in ("alpha_weighted", "log_alpha_norm"):
            wanted = value + 2 * power * np.log10(2) * plain["alpha"]
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, err_msg=name)
    alone = rmtjax.metrics_of(row.spectrum, row.fit)
    np.testing.assert_allclose(alone.frobenius_norm, found["frobenius_norm"])


def test_metrics_are_those_of_the_matrix(params, report):
    expected = rmtjax.metrics_of(rmtjax.spectrum(params["a"]["kernel"]))
    found = report.metrics["a/kernel"]
    assert tuple(found) == rmtjax.SpectralMetrics._fields
    np.testing.assert_allclose([*found.values()], [*expected], rtol=1e-4)
    assert report.rows[0].spikes == 1
    assert found["condition"] == 1
    assert {*report.metrics["nan/kernel"].values()} == {None}
    assert report.metrics["short/kernel"] == report.metrics["nan/kernel"]
    assert report.metrics["zero/kernel"]["frobenius_norm"] == 0
    assert report.metrics["zero/kernel"]["alpha"] is None


def test_every_form_has_the_columns(report):
    values = report.metrics["a/kernel"]
    (first, *_) = report.to_dict("path", "snr")["rows"]
    assert first == {"path": "a/kernel", "snr": values["snr"]}
    assert json.loads(report.to_json("tails"))["rows"][0]["alpha"] == values["alpha"]
    (line, *_) = csv.DictReader(report.to_csv("all").splitlines())
    assert float(line["hill"]) == values["hill"]
    assert line["shape"] == "60x90"
    frame = report.to_pandas("law", "numerical_rank", "alpha_tail")
    assert frame["snr_noise"][0] == values["snr_noise"]
    assert frame["alpha_tail"].isna().tolist() == [False, True, True, False]
    assert frame.dtypes[["numerical_rank", "alpha_tail"]].astype(str).tolist() == ["Int64"] * 2
    assert f"{values['stable_rank']:.4g}" in report.table("summary").splitlines()[1]
    assert "| alpha |" in report.to_markdown("path", "alpha")
    assert "<th>alpha</th>" in report.to_html("tails")


def test_groups_are_names_and_each_column_comes_once():
    assert expand_columns(["law", "path", "alpha", "ranks"])[:2] == ("path", "ratio")
    every = expand_columns(["summary", "law", "ranks", "tails", "cost", "all"])
    assert len(every) == len({*every})
    assert {*rmtjax.SpectralMetrics._fields, *rmtjax.Row._fields} == {*every}
    assert expand_columns([]) == ()
    with pytest.raises(ValueError, match=r"or groups \('summary', .*got 'alfa'"):
        expand_columns(["alfa"])


def test_the_default_stays_narrow_and_computes_nothing(report):
    fresh = rmtjax.Report(report.plan)
    assert "alpha" not in fresh.table() + fresh.to_csv() + fresh.to_json()
    assert "metrics" not in vars(fresh)


def test_a_stack_has_means_and_the_largest_counts():
    stack = jax.random.normal(jax.random.key(0), (2, 60, 90)).at[1, 0].multiply(12)
    axes = lambda path, leaf: rmtjax.KernelAxes(inputs=(1,), outputs=(2,), batch=(0,))
    found = rmtjax.analyze({"kernel": stack}, axes=axes).metrics["kernel"]
    each = [rmtjax.metrics_of(rmtjax.spectrum(matrix)) for matrix in stack]
    np.testing.assert_allclose(found["hill"], (each[0].hill + each[1].hill) / 2, rtol=1e-5)
    assert found["alpha_tail"] == max(int(one.alpha_tail) for one in each)


def test_an_empty_tree_has_no_metrics():
    assert rmtjax.analyze({}).metrics == {}
    assert rmtjax.analyze({}).table("alpha") == "alpha"


def test_the_command_line_chooses_columns(tmp_path, capsys):
    model, data = save_model(tmp_path), tmp_path / "report.csv"
    argv = ["analyze", model, "--columns", "summary,hill", "--csv", str(data)]
    assert cli.main(argv) == 0
    head = ["path", "shape", "spikes", "distance", "stable_rank", "alpha", "reason", "hill"]
    assert capsys.readouterr().out.split()[: len(head)] == head
    assert data.read_text().splitlines()[0].split(",") == head
    assert "--columns alfa: `columns` must be" in usage_error(
        capsys, "analyze", model, "--columns", "alfa"
    )
