"""Certificates of a network trained on real data, and the experiment that makes them."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.certificate_cases import check_bounds, compiled

from experiments import certificate as experiment, data, training


@pytest.fixture(scope="module")
def mnist():
    """A network of two layers trained on MNIST, and its test images."""
    try:
        dataset = data.load("mnist", source="idx", data_dir=os.environ.get("RMTJAX_DATA_DIR"))
    except FileNotFoundError as error:
        if os.environ.get("RMTJAX_REQUIRE_DATA") == "1":
            raise
        pytest.skip(str(error))
    train, test = training.to_device(dataset, label_noise=0.0, seed=0)
    module, optimizer = training.MLP((256,)), optax.sgd(0.08, momentum=0.9)
    params = module.init(jax.random.key(0), train.images[:1])["params"]
    opt_state, epoch = optimizer.init(params), training.make_epoch(module, optimizer)
    for number in range(2):
        order = training.batches(jax.random.key(number), train.labels.size, 128)
        params, opt_state, _ = epoch(params, opt_state, train, *order)
    assert training.accuracy(module, params, test) > 95
    inputs = test.images.reshape(len(test.images), -1).astype(jnp.float32) / 255
    return params, inputs, np.asarray(test.labels)


@pytest.mark.slow  # trains a network
@pytest.mark.parametrize(
    ("ranks", "least"),
    [
        ({"Dense_0": 20}, 0), ({"Dense_0": 100}, 40), ({"Dense_0": 250}, 95),
        ({"Dense_1": 5}, 50), ({"Dense_1": 9}, 95), ({"Dense_0": 250, "Dense_1": 9}, 90),
    ],
    ids=str,
)  # fmt: skip
def test_no_bound_is_violated_on_mnist(mnist, ranks, least):
    params, inputs, labels = mnist
    after = params
    for layer, rank in ranks.items():
        after = training.truncate_at(after, f"{layer}/kernel", rank)
    found = compiled(2, "relu")(params, after, inputs, labels=labels)
    change = check_bounds(found, params, after, inputs, labels)
    assert 100 * np.mean(found.unchanged) >= least
    if "Dense_0" not in ranks:
        tightness = np.median(found.change.max(axis=1)) / np.median(change.max(axis=1))
        assert tightness < 1.05


@pytest.mark.slow
def test_the_experiment_finds_no_violation(tmp_path, capsys):
    out = tmp_path / "found.json"
    options = ["--dataset", "fashion_mnist", "--source", "sample", "--widths", "64"]
    options += ["--epochs", "1", "--ranks", "3", "30", "--out", str(out)]
    assert experiment.main(options) == 0
    found = json.loads(out.read_text())
    assert [row["kernel"] for row in found["rows"]].count("Dense_1/kernel") == 1
    assert found["rows"][-1]["kernel"] == "all"
    assert all(row["violations"] == 0 for row in found["rows"])
    assert all(row["certified"] <= row["same"] for row in found["rows"])
    assert " Dense_0 " in capsys.readouterr().out


def test_the_experiment_refuses_wrong_options():
    with pytest.raises(ValueError, match="`epochs` must be at least 1, got 0"):
        experiment.Config(epochs=0)
    with pytest.raises(ValueError, match="`ranks` must not be negative"):
        experiment.Config(ranks=(-1,))
