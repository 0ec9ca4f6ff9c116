"""Estimators beside an oracle: their errors by definition, a short run, and the page."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.agreement import oracle
from experiments.agreement.oracle import Case

PAGE = Path(__file__).parents[2] / "docs" / "agreement.md"
SMALL = Case("10 directions", "white", (40, 30))


def made(case, seed=0):
    rng = np.random.default_rng(seed)
    truth = oracle.signal(case, rng)
    return truth, truth + oracle.coloured(case, rng.standard_normal(case.shape)), rng


def test_errors_of_rivals_are_those_of_the_matrices_that_they_make():
    truth, mean, _ = made(SMALL)
    u, s, vt = np.linalg.svd(mean, full_matrices=False)
    overlaps = np.diagonal(u.T @ truth @ vt.T)
    found = oracle.rivals(SMALL, mean, truth)
    error = lambda values: np.linalg.norm((u * values) @ vt - truth)
    np.testing.assert_allclose(found["oracle"], error(overlaps), rtol=1e-10)
    tried = [error(np.maximum(s - threshold, 0)) for threshold in np.linspace(0, s[0], 2000)]
    # The grid comes near the minimum, where the error is flat.
    np.testing.assert_allclose(found["soft"], min(tried), rtol=1e-4)
    assert found["oracle"] <= found["soft"] <= min(tried) * (1 + 1e-12)
    assert found["oracle"] <= found["known noise"] < error(s)


def test_the_best_soft_threshold_of_noise_alone_leaves_nothing():
    assert not np.any(oracle.best_soft(np.array([3.0, 2.0, 1.0]), np.zeros(3)))


@pytest.mark.parametrize("correlation", [0.0, 0.3])
@pytest.mark.parametrize("count", [2, 5])
def test_replicas_have_the_mean_and_the_correlation_that_they_should(correlation, count):
    case = Case("none", "white", (200, 300), correlation)
    _, mean, rng = made(case)
    changes = oracle.replicas(case, mean, count, rng)
    np.testing.assert_allclose(changes.mean(axis=0), mean, atol=1e-12)
    variance, covariance = np.mean(changes[0] ** 2), np.mean(changes[0] * changes[1])
    # 60,000 products of variance 5^2 at most: by four deviations of their mean.
    wanted = count / (1 + (count - 1) * correlation)
    np.testing.assert_allclose(variance, wanted, atol=4 * 1.5 * wanted / 60_000**0.5)
    np.testing.assert_allclose(covariance, correlation * wanted, atol=4 * wanted / 60_000**0.5)


@pytest.mark.parametrize("noise", oracle.NOISES)
def test_noise_of_all_kinds_has_unit_mean_variance(noise):
    _, mean, _ = made(Case("none", noise, (300, 200)))
    # Rows of ten times the mean variance count as a tenth of all entries.
    np.testing.assert_allclose(np.mean(mean**2), 1, atol=0.05)


@pytest.mark.slow
def test_the_command_runs_once_and_shows_what_is_there(tmp_path, capsys, monkeypatch):
    case = SMALL._replace(shape=(30, 20), counts=(2, 4, 16))
    for name in ("KINDS", "LEAKS", "SPLITS"):
        monkeypatch.setattr(oracle, name, [case])
    monkeypatch.setattr(oracle, "COUNTS", case.counts)
    monkeypatch.setattr(oracle, "GROWING", [SMALL._replace(shape=(30, 20), counts=(2,))])
    arguments = ["--seeds", "2", "--file", str(tmp_path / "oracle.json")]
    assert oracle.main(arguments) == 0
    content = json.loads((tmp_path / "oracle.json").read_text())
    assert all(len(run["mean"]) == 2 for run in content["runs"].values())
    shown = capsys.readouterr().out
    monkeypatch.setattr(oracle, "errors", None)
    assert oracle.main(arguments) == 0
    assert capsys.readouterr().out == shown


def test_the_page_has_the_tables_of_the_committed_results(capsys):
    assert oracle.main(["--show-only"]) == 0
    page = PAGE.read_text()
    for table in capsys.readouterr().out.strip("\n").split("\n\n"):
        assert "\n".join(line.rstrip() for line in table.splitlines()) in page
