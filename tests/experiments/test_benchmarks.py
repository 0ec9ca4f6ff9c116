"""The benchmarks run and compare what they say; their times are nobody's business here."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.benchmarks import (
    epoch,
    fit,
    latency,
    memory,
    merge,
    moments,
    replicas,
    report,
    sizes,
    timing,
    transform_overhead,
    truncation,
    whole_model,
)


def run(module, arguments, tmp_path, monkeypatch):
    """The rows that a benchmark has written."""
    path = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments, "--json", str(path)])
    module.main()
    return json.loads(path.read_text())["rows"]


def test_both_fits_of_a_spectrum_agree(tmp_path, monkeypatch):
    (row,) = run(fit, ["--sizes", "60", "--rounds", "1"], tmp_path, monkeypatch)
    # The published one has no term of order 1 / p.
    np.testing.assert_allclose(row["variance, ours"], row["variance, published"], rtol=0.01)


def test_sizes_find_what_is_planted(tmp_path, monkeypatch, capsys):
    arguments = ["--exact", "512", "1024", "--estimated", "--rounds", "1"]
    rows = run(sizes, arguments, tmp_path, monkeypatch)
    assert [(row["side"], row["how"], row["spikes"]) for row in rows] == [
        (size, "exact", 20) for size in (512, 1024)
    ]
    assert "exact: time grows with the power" in capsys.readouterr().out


def test_truncation_is_that_of_the_decomposition(tmp_path, monkeypatch):
    arguments = ["--sizes", "200", "--ranks", "3", "--rounds", "1"]
    (row,) = run(truncation, arguments, tmp_path, monkeypatch)
    assert row["relative difference"] < 1e-5


def test_sums_over_inputs_are_those_of_float64(tmp_path, monkeypatch):
    file = tmp_path / "models.json"
    arguments = ["--widths", "60", "--rows", "500", "--tokens", "64", "--rounds", "1"]
    arguments += ["--models-json", str(file)]
    (row,) = run(moments, arguments, tmp_path, monkeypatch)
    assert row["relative difference"] < 1e-5
    rows = json.loads(file.read_text())["rows"]
    assert [row["model"] for row in rows] == ["Dense", "Transformer"]


def test_an_epoch_of_replicas_is_measured_with_both_merges(tmp_path, monkeypatch):
    arguments = ["--source", "sample", "--dataset", "fashion_mnist", "--widths", "30"]
    (row,) = run(replicas, [*arguments, "--rounds", "1"], tmp_path, monkeypatch)
    assert all(0 < float(kept) < 1 for kept in row["kept"].split())
    ratios = [row["merge / epoch"], row["compiled merge / epoch"]]
    times = [row["merge, ms"], row["compiled merge, ms"]]
    np.testing.assert_allclose(np.array(times) / row["epoch, ms"], ratios)


def test_a_merge_of_replicas_is_that_of_decompositions(tmp_path, monkeypatch):
    arguments = ["--shapes", "90", "60", "--replicas", "2", "--rounds", "1"]
    (row,) = run(merge, arguments, tmp_path, monkeypatch)
    assert row["kernel"] == "90 x 60"
    assert row["relative difference"] < 3e-3  # turns of directions with equal values


@pytest.mark.slow
@pytest.mark.usefixtures("minilm_folder")
def test_the_whole_model_has_all_its_kernels(tmp_path, monkeypatch):
    (row,) = run(whole_model, ["--rounds", "1"], tmp_path, monkeypatch)
    assert row["kernels"] == 39


@pytest.mark.slow
def test_an_epoch_is_trained_with_and_without_pruning(tmp_path, monkeypatch):
    arguments = [
        "--dataset",
        "fashion_mnist",
        "--source",
        "sample",
        "--widths",
        "64",
        "--rounds",
        "1",
    ]
    plain, pruned = run(epoch, arguments, tmp_path, monkeypatch)
    assert plain["images"] == pruned["images"]
    assert plain["ranks"] == "-"
    assert int(pruned["ranks"]) < 64


@pytest.mark.slow
def test_a_step_is_timed_with_and_without_the_transform(tmp_path, monkeypatch):
    arguments = ["--networks", "64-32", "--rounds", "2"]
    (row,) = run(transform_overhead, arguments, tmp_path, monkeypatch)
    assert row["hidden layers"] == "64-32"
    for name in ("with", "a branch"):
        ratio, low, high = map(float, re.findall(r"[\d.]+", row[f"ratio, {name}"]))
        assert 0 < low <= ratio <= high


@pytest.mark.slow
def test_memory_is_measured_in_kernels(tmp_path, monkeypatch):
    (row,) = run(memory, ["--shapes", "1024", "768"], tmp_path, monkeypatch)
    assert row["MiB"] == 3
    # U, V^T and the copy that is overwritten; of what is compiled so much for 3 MiB.
    assert row["jnp.linalg.svd"] > 3
    assert 0 < row["rmtjax.analyze"] < 30


def test_the_page_of_speed_tells_the_kept_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", "--out", str(tmp_path / "speed.png")])
    report.main()
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    printed = {line.strip() for line in capsys.readouterr().out.splitlines()}
    page = (Path(__file__).parents[2] / "docs" / "speed.md").read_text()
    blocks = re.findall(r"```text\n(.*?)```", page.partition("## What was measured")[2], re.DOTALL)
    assert blocks
    assert {line.strip() for line in "".join(blocks).splitlines()} <= printed


def test_a_turn_is_of_so_many_calls(monkeypatch):
    """By a clock that goes on with each call, and by no other way."""
    now, calls = [0.0], []

    def call(name, seconds):
        calls.append(name)
        now[0] += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    alternatives = {"slow": lambda: call("slow", 3), "fast": lambda: call("fast", 1)}
    times = timing.in_turns(alternatives, rounds=2, calls=4)
    assert calls == (["slow"] * 4 + ["fast"] * 4) * 3  # of which the first turn compiles
    np.testing.assert_array_equal(times["slow"], [3, 3])
    np.testing.assert_array_equal(times["fast"], [1, 1])


@pytest.fixture
def asynchronous():
    """How JAX dispatches, which a benchmark of latency changes."""
    yield
    jax.config.update("jax_cpu_enable_async_dispatch", True)


@pytest.mark.usefixtures("asynchronous")
@pytest.mark.parametrize("dispatch", ["synchronous", "asynchronous"])
def test_latency_has_a_row_for_each_width_rank_and_batch(tmp_path, monkeypatch, dispatch):
    sizes = ["--widths", "64", "--shares", "4", "8", "--batches", "1", "3", "--dispatch", dispatch]
    rows = run(latency, [*sizes, "--rounds", "2", "--calls", "2"], tmp_path, monkeypatch)
    found = [(row["width"], row["rank"], row["batch"], row["ideal"]) for row in rows]
    assert found == [(64, 16, 1, 2), (64, 8, 1, 4), (64, 16, 3, 2), (64, 8, 3, 4)]
    assert all(row["share"] == pytest.approx(row["speed-up"] / row["ideal"]) for row in rows)
    # Read when JAX looks for its devices, which is after it in the benchmark.
    assert jax.config.read("jax_cpu_enable_async_dispatch") == (dispatch == "asynchronous")
