"""The spikes of networks with right and wrong labels, from the command."""

import numpy as np
import pytest

from experiments import spikes
from experiments.training import Split

# The experiments are tested by their smallest runs; `test_mnist.py` is among the fast tests.
pytestmark = pytest.mark.slow

OPTIONS = (
    *("--datasets", "fashion_mnist", "--source", "sample", "--images", "200"),
    *("--widths", "60", "--epochs", "2", "--batch-size", "50"),
)


def test_the_table_and_the_figure_have_each_network(tmp_path, capsys):
    figure = tmp_path / "spikes.png"
    assert spikes.main([*OPTIONS, "--figure", str(figure)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = [line for line in lines if line[2:3] == ["spikes"]]
    assert [line[:2] for line in counts] == [["fashion_mnist", "0%"], ["fashion_mnist", "40%"]]
    assert figure.stat().st_size > 10_000


def test_a_share_of_the_labels_is_another_class():
    labels = np.arange(2000) % 10
    moved = spikes.with_wrong_labels(Split(labels, labels), 0.4, 0).labels
    assert 0.35 < np.mean(np.asarray(moved) != labels) < 0.45
    assert {*np.asarray(moved).tolist()} == {*range(10)}
