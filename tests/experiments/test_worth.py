"""What columns are worth: Kendall's tau against SciPy, a short run, and the page."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from experiments import worth

PAGE = Path(__file__).parents[2] / "docs" / "columns.md"


def test_taus_are_those_of_scipy():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 5, (30, 3)).astype(float)  # with ties
    y = rng.integers(0, 4, (30, 2)) + x[:, :2]
    counts = rng.integers(0, 3, 30)
    found = worth.taus(x, y, np.outer(counts, counts).astype(float))
    repeated = [np.repeat(numbers, counts, axis=0) for numbers in (x, y)]
    expected = [
        [scipy.stats.kendalltau(one, other).statistic for other in repeated[1].T]
        for one in repeated[0].T
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_number_that_is_missing_ranks_nothing():
    found = worth.taus(np.array([[1.0], [np.nan]]), np.array([[1.0], [2.0]]), np.ones((2, 2)))
    assert found.tolist() == [[0.0]]


def test_networks_of_a_family_differ_in_one_number():
    records = [{"setting": worth.asdict(setting)} for setting in worth.settings()]
    masks = dict(zip(worth.FAMILIES, worth.masks(records), strict=True))
    assert len(records) == 13
    assert all(mask[0] and mask.sum() == 3 for mask in masks.values())
    assert np.sum([*masks.values()], axis=0)[1:].tolist() == [1] * 12


@pytest.mark.slow
def test_the_command_trains_once_and_shows_what_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(worth, "FAMILIES", {"width": (64,)})
    monkeypatch.setattr(worth, "DRAWS", 5)
    file = tmp_path / "worth.json"
    options = ["--source", "sample", "--images", "100", "--epochs", "2", "--early", "1"]
    arguments = [*options, "--seeds", "2", "--file", str(file)]
    assert worth.main(arguments) == 0
    content = json.loads(file.read_text())
    assert len(content["networks"]) == 2 * 2 * 2  # settings, looks, seeds
    for one in content["networks"]:
        assert 0 <= one["test accuracy"] <= one["cut"] + 100
        assert len(one["columns"]) == len(worth.COLUMNS)
    shown = capsys.readouterr().out
    monkeypatch.setattr(worth, "train", None)
    assert worth.main([*arguments, "--show-only"]) == 0
    assert capsys.readouterr().out in shown
    assert worth.main(arguments) == 0  # nothing is missing


def test_the_page_has_the_table_of_the_committed_results(capsys):
    assert worth.main(["--show-only"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "\n".join(lines) in PAGE.read_text()
