"""The ten tasks: every network has a finite loss, and the command does nothing twice."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.slow import slow_except

from experiments.tasks import __main__ as command, problems

TASKS = {task.name: task for task in problems.TASKS}


@pytest.mark.parametrize("name", slow_except(("MLP", "LSTM"), TASKS))
def test_a_network_has_a_finite_loss_and_kernels(name, monkeypatch):
    monkeypatch.setattr(problems, "images", sample)
    task = TASKS[name]
    x, y = (array[:4] for array in task.load().train)
    network = task.build(x)
    variables = network.init(jax.random.key(0))
    outputs, _ = network.apply(variables, x, True, jax.random.key(1))
    assert np.isfinite(task.loss(outputs, y))
    assert len(network.axes) > 0


def sample(name, train, test=10, side=28):
    """Images of the packaged sample's shapes, without its file."""
    del name
    rng = np.random.default_rng(0)
    images = lambda count: rng.uniform(size=(count, side, side)).astype("f4")
    labels = lambda count: rng.integers(0, 10, count).astype("i4")
    return problems.Data((images(train), labels(train)), (images(test), labels(test)))


@pytest.mark.slow
def test_the_command_trains_shows_and_does_nothing_twice(tmp_path, capsys, monkeypatch):
    shorter = replace(
        TASKS["regression MLP"], load=partial(problems.teacher, train=1000), epochs=24
    )
    monkeypatch.setattr(problems, "TASKS", (shorter,))
    file = tmp_path / "tasks.json"
    options = ["--tasks", "regression MLP", "--optimizers", "AdamW", "--seeds", "0"]
    arguments = [*options, "--file", str(file)]
    assert command.main(arguments) == 0
    found = json.loads(file.read_text())["runs"]
    assert set(found) == {
        f"regression MLP / AdamW / {arm}" for arm in ("never cut", "value_fn", "max_removed")
    }
    shown = capsys.readouterr().out
    assert "regression MLP" in shown
    assert "value_fn: 1 of 1 runs lose at most 1 point or 2 % of the loss" in shown

    def trained(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(command.compare, "run", trained)
    assert command.main(arguments) == 0
    assert command.main([*arguments, "--show-only"]) == 0


def test_the_page_has_the_table_of_the_committed_results(capsys):
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    assert command.main(["--show-only"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "\n".join(lines) in page
    found = json.loads(command.RESULTS.read_text())["runs"]
    assert len(found) == 10 * 2 * 3
    assert {len(outcomes) for outcomes in found.values()} == {3}


def test_the_page_has_the_table_of_a_given_size(capsys):
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    path = command.RESULTS.with_name("tasks_size.json")
    assert {len(runs) for runs in json.loads(path.read_text())["runs"].values()} == {3}
    options = ["--arms", "never cut", "size", "--file", str(path), "--show-only"]
    assert command.main(options) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "\n".join(lines) in page
