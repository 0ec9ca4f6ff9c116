"""The ten tasks: every network has a finite loss, and the command does nothing twice."""

import json

import jax
import numpy as np
import pytest

from experiments.tasks import __main__ as command, problems

TASKS = {task.name: task for task in problems.TASKS}


@pytest.mark.parametrize("name", TASKS)
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
    file = tmp_path / "tasks.json"
    options = ["--tasks", "regression MLP", "--optimizers", "AdamW", "--seeds", "0"]
    arguments = [*options, "--file", str(file)]
    assert command.main(arguments) == 0
    found = json.loads(file.read_text())
    assert set(found) == {
        f"regression MLP / AdamW / {arm}" for arm in ("never cut", "value_fn", "max_removed")
    }
    shown = capsys.readouterr().out
    assert "regression MLP" in shown
    assert "value_fn: the worst of 1 runs changes by" in shown

    def trained(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(command.compare, "run", trained)
    assert command.main(arguments) == 0
    assert command.main([*arguments, "--show-only"]) == 0
