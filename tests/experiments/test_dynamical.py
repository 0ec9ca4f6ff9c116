"""Dynamical low-rank training: its integrator against dense slopes, and LeNet5 on MNIST."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmtjax
from experiments.neighbours import claims, dynamical, lenet, sizes, tracks

# As `test_neighbours.py`.
pytestmark = pytest.mark.slow

ADAM = optax.scale_by_adam()
PAGE = Path(__file__).parents[2] / "docs" / "neighbours.md"


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_the_lenet5_of_dynamical_low_rank_training_has_the_published_weights():
    assert claims.lenet_weights() == 430_500


def test_the_count_of_dynamical_low_rank_training_leaves_out_a_basis():
    """The ranks 8, 8 and 15 of its table are 13,091 weights as counted, and 29,260 as stored."""
    shapes = {"Conv_0/kernel": (25, 20), "Conv_1/kernel": (500, 50), "Dense_0/kernel": (800, 500)}
    leaves = {
        path: rmtjax.Factors(np.zeros((m, rank)), np.zeros((rank, n)))
        for (path, (m, n)), rank in zip(shapes.items(), (8, 8, 15), strict=True)
    }
    leaves["Dense_1/kernel"] = np.zeros((500, 10))
    assert lenet.counted(leaves) == 13_091
    assert sum(map(sizes.numbers, leaves.values())) == 29_260


def test_dynamical_low_rank_training_at_full_rank_is_gradient_descent():
    kernel, target, inputs = draw(0, 6, 4), draw(1, 9, 4), draw(2, 9, 6)
    params = {"layer": {"kernel": kernel, "bias": jnp.zeros(4)}}

    def loss(params):
        layer = params["layer"]
        weights = rmtjax.merge(layer["kernel"])
        return jnp.square(inputs @ weights + layer["bias"][None] - target).sum()

    bases = dynamical.hold(params, {"layer/kernel": 4})
    rate, optimizer = 0.01, optax.sgd(0.01)
    shapes = {"layer/kernel": (6, 4)}
    step = lambda bases: dynamical.step(
        loss, bases, shapes, rate, 0.0, optimizer, dynamical.init(bases, optimizer)
    )
    slope = jax.grad(loss)(params)["layer"]
    for after, _ in (step(bases), jax.jit(step)(bases)):
        low = after.low["layer/kernel"]
        np.testing.assert_allclose(
            low.u @ low.s @ low.v.T, kernel - rate * slope["kernel"], atol=1e-4
        )
        np.testing.assert_allclose(after.rest["layer"]["bias"], -rate * slope["bias"], atol=1e-5)


def test_dynamical_low_rank_training_cuts_a_tail():
    u, v = jnp.eye(6, 4), jnp.eye(5, 4)
    s = jnp.diag(jnp.array([3.0, 1.0, 0.02, 0.01]))
    cut = dynamical._truncate(u, s, v, rank=3, tau=0.05)
    np.testing.assert_allclose(jnp.diag(cut.s), [3, 1, 0], atol=1e-6)
    np.testing.assert_allclose((cut.u @ cut.s @ cut.v.T)[:2, :2], jnp.diag(jnp.array([3.0, 1])))


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_moments_of_dynamical_low_rank_training_turn_with_the_bases(transform):
    """After a step the first ones are a tenth of the dense slope, as seen in the new bases."""
    params = {"kernel": draw(0, 12, 9)}
    loss = lambda params: jnp.square(draw(2, 15, 12) @ rmtjax.merge(params["kernel"])).sum()
    bases, optimizer, scale = dynamical.hold(params, {"kernel": 3}), optax.sgd(0.0), ADAM
    states = dynamical.init(bases, optimizer, scale)
    step = lambda bases, states: dynamical.step(
        loss, bases, {"kernel": (12, 9)}, 0.1, 0.0, optimizer, states, scale
    )
    after, states = transform(step)(bases, states)
    old, new = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), one.low["kernel"])
        for one in (bases, after)
    )
    x = np.asarray(draw(2, 15, 12), np.float64)
    # The doubled bases hold the old ones, so that all slopes are those of the kernel before.
    slope = 2 * x.T @ x @ old.u @ old.s @ old.v.T
    onto = lambda basis: basis @ basis.T
    found = {name: np.asarray(getattr(states, name).mu["kernel"]) for name in "kls"}
    inside = 0.1 * onto(new.u) @ slope @ onto(new.v)
    close = partial(np.testing.assert_allclose, atol=1e-5 * np.abs(slope).max())  # float32
    close(new.u @ found["s"] @ new.v.T, inside)
    close(found["k"] @ new.v.T, 0.1 * slope @ onto(old.v) @ onto(new.v))
    close(found["l"] @ new.u.T, 0.1 * slope.T @ onto(old.u) @ onto(new.u))
    assert all((np.asarray(getattr(states, name).nu["kernel"]) >= 0).all() for name in "kls")


def test_a_basis_leaves_out_directions_that_were_cut():
    first, second = draw(0, 9, 3).at[:, 2].set(0), draw(1, 9, 3).at[:, 2].set(0)
    for basis in (dynamical._basis, jax.jit(dynamical._basis)):
        q = np.asarray(basis(first, second), np.float64)
        np.testing.assert_allclose(q.T @ q, np.diag([1, 1, 1, 1, 0, 0]), atol=1e-6)
        for columns in (first, second):
            np.testing.assert_allclose(q @ (q.T @ columns), columns, atol=1e-5)


def few_digits():
    x, y = np.asarray(draw(0, 300, 28, 28)), np.arange(300, dtype=np.int32) % 10
    return tracks.Splits(*((x[i : i + 100], y[i : i + 100]) for i in (0, 100, 200)))


TINY = replace(lenet.TRACK, load=few_digits)


def test_lenet_trains_in_short_and_is_not_trained_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lenet, "perform", partial(lenet.perform, track=TINY))
    monkeypatch.setattr(lenet, "CASES", ((0.6, (4, 5, 6)),))
    options = ["--seeds", "1", "--steps", "3", "--file", str(tmp_path / "lenet.json")]
    assert lenet.main(options) == 0
    (record,) = json.loads((tmp_path / "lenet.json").read_text())["runs"]
    ranks, sides = np.array(record["ranks"]), np.array([(25, 20), (500, 50), (800, 500)])
    assert (ranks >= 1).all()
    assert (ranks < [4, 5, 6]).any()  # at the start the values are near one another: a tail is cut
    assert record["stored"] == ranks @ sides.sum(1) + 5000
    assert record["counted"] == ranks @ (sides[:, 1] + 1) + 5000
    monkeypatch.setattr(lenet, "perform", None)
    assert lenet.main(options) == 0
    assert f"{record['counted']:,}" in capsys.readouterr().out


def test_the_page_has_the_table_of_lenet(capsys):
    assert lenet.main(["--show-only"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) > 2
    assert "\n".join(lines) in PAGE.read_text()
