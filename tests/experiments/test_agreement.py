"""Agreement and its rivals: every arm and network trains, and the page tells the results."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.slow import slow_except

from experiments.agreement import __main__ as command, arms, cells, tables, trainer
from experiments.agreement.cells import Cell, Run
from experiments.training import MLP
from rmtjax.replicas import merge_replicas

SMALL = Cell("small", "fashion_mnist", images=600, epochs=2, batch=32, network="small")
VALUES = {"label smoothing": 0.2, "SAM": 0.1, "AND-mask": 0.6}
ARMS = [arms.PLAIN, arms.AVERAGED, *arms.OURS, arms.REST, arms.PERIODS[0], *arms.RIVALS]


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setitem(cells.NETWORKS, "small", lambda: cells._from_images(MLP((32,))))


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_learns_in_a_short_run(arm):
    arm = replace(arm, value=VALUES.get(arm.rule, 0.0))
    run = Run(SMALL, arm, 0)
    record = trainer.perform(run, cells.load(SMALL, 0, "sample"), every=1)
    assert record["history"]["epoch"] == [1, 2]
    final = record["final"]
    # Ten classes; the weakest arms see four steps of an epoch and 40 % of wrong labels.
    assert final["test"] > 20
    assert {"wrong", "given", "validation"} <= final.keys()
    assert record["best"]["test"] >= final["test"]


@pytest.mark.parametrize("name", slow_except(["784-512-512-10 of rank 23"], cells.NETWORKS))
def test_every_network_has_kernels_that_are_merged(name):
    network = cells.network(name)
    x = jnp.zeros((2, 28, 28), jnp.uint8)
    params, _ = network.init(jax.random.key(0))
    logits, _ = network.apply((params, {}), x, True, jax.random.key(1))
    assert logits.shape == (2, 10)
    assert len(network.axes) >= 2
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    replicas = jax.tree.map(lambda *leaves: jnp.stack(leaves), params, other)
    shapes = jax.eval_shape(lambda s, r: merge_replicas(s, r, axes=network.axes), params, replicas)
    assert set(shapes.kept) >= set(network.axes)


def test_joining_with_all_of_the_rest_is_the_mean_and_the_chain_adds_up():
    rng = np.random.default_rng(0)
    start = {"kernel": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)}
    replicas = {"kernel": jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32)}
    mean = trainer.join(start, replicas, 1.0, arms.PAIR, None)["kernel"]
    # float32 rounding of numbers near one
    np.testing.assert_allclose(mean, replicas["kernel"].mean(0), atol=1e-6)
    agreed = trainer.join(start, replicas, 0.0, arms.PAIR, None)["kernel"]
    np.testing.assert_array_less(1e-3, np.abs(agreed - mean).max())
    once = trainer.join(start, replicas, 0.0, arms.CHAIN, None)["kernel"] - start["kernel"]
    np.testing.assert_allclose(once, 2 * (agreed - start["kernel"]), atol=1e-5)


def test_medians_and_masks_are_those_of_numpy():
    rng = np.random.default_rng(1)
    three = rng.normal(size=(3, 5, 7)).astype("f4")
    np.testing.assert_array_equal(arms.median_of_three(*three), np.median(three, axis=0))
    # A loss that is linear in the parameters: gradients are the means of the images.
    loss = lambda params, x, y: (params[None] * x).mean(0).sum() + 0 * y.sum()
    x, y = rng.normal(size=(20, 6)).astype("f4"), np.zeros(20)
    found = arms.RULES["M3"].make(0.0)(loss, jnp.zeros(6), x[:18], y[:18])
    median = np.median(x[:18].reshape(3, 6, 6).mean(1), axis=0)
    np.testing.assert_allclose(found, median, atol=1e-6)  # sums in another order
    parts = x.reshape(10, 2, 6).mean(1)
    kept = np.abs(np.sign(parts).mean(0)) >= 0.4
    assert 0 < kept.sum() < 6
    found = arms.RULES["AND-mask"].make(0.4)(loss, jnp.zeros(6), x, y)
    np.testing.assert_allclose(found, parts.mean(0) * kept, atol=1e-6)  # sums in another order


def test_a_rolling_median_takes_two_gradients_before():
    transform = arms.rolling_median()
    state, grads = transform.init(jnp.zeros(3)), np.random.default_rng(2).normal(size=(5, 3))
    padded = np.concatenate([np.zeros((2, 3)), grads])
    for step, grad in enumerate(grads):
        found, state = transform.update(jnp.asarray(grad, jnp.float32), state)
        np.testing.assert_allclose(found, np.median(padded[step : step + 3], axis=0), rtol=1e-6)


def test_sam_takes_the_gradient_uphill():
    loss = lambda params, x, y: jnp.sum(params**2) + 0 * (x + y)
    params = jnp.asarray([3.0, 4.0])
    found = arms.RULES["SAM"].make(0.5)(loss, params, 0.0, 0.0)
    # From the point that is 0.5 further from the origin.
    np.testing.assert_allclose(found, 2 * params * (5.5 / 5), rtol=1e-6)


def test_smoothing_spreads_its_share():
    seen = {}

    def loss(params, x, y):
        seen["y"] = y
        return params.sum()

    arms.RULES["label smoothing"].make(0.2)(loss, jnp.zeros(2), None, jnp.asarray([3]))
    np.testing.assert_allclose(seen["y"][0], np.full(10, 0.02) + 0.8 * np.eye(10)[3], atol=1e-7)


def test_neighbouring_labels_are_wrong_by_one_in_their_share():
    cell = replace(SMALL, asymmetric=True)
    images = cells.load(cell, 0, "sample")
    moved = (np.asarray(images.train.labels) - images.true_labels) % 10
    assert set(moved.tolist()) == {0, 1}
    assert abs(moved.mean() - cell.noise) < 0.1  # five standard errors of 600 draws


def test_replicas_see_disjoint_images_and_keep_states_apart():
    steps, batch = trainer.num_steps(SMALL, arms.FOUR, 600)
    assert (steps, batch) == (600 // 4 // 32, 32)
    assert trainer.num_steps(SMALL, arms.CHAIN, 600)[0] == 18
    assert trainer.num_steps(SMALL, arms.RIVALS[-1], 600)[1] == 40
    network, optimizer = cells.network("small"), optax.sgd(0.05, 0.9)
    params, _ = network.init(jax.random.key(0))
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), optimizer.init(params))
    split = cells.load(SMALL, 0, "sample").train
    epoch = trainer.make_epoch(network, optimizer, arms.PAIR)
    order = np.random.default_rng(0).permutation(600)[:512].reshape(2, 8, 32)
    merged, states = epoch(params, states, split, order, 0.0)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    one, other = jax.tree.leaves(states)[-1]
    assert np.abs(one - other).max() > 1e-3
    # Compiled step by step, as for convolutions, it is the same.
    again, _ = trainer.make_epoch(network, optimizer, arms.PAIR, scan=False)(
        params, jax.tree.map(jnp.zeros_like, states), split, order, 0.0
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), merged, again)


@pytest.mark.parametrize("period", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("fixed", [False, True])
def test_periods_deal_each_image_to_one_replica(period, fixed):
    arm = replace(arms.PAIR, period=period, fixed=fixed)
    dealt = trainer.deal(np.random.default_rng(0), arm, 100, steps=6, batch=8)
    first, second, third = (next(dealt) for _ in range(3))
    assert first.shape == (2, round(6 * period), 8)
    sets = lambda order: [set(replica.ravel().tolist()) for replica in order]
    assert not set.intersection(*sets(first))
    # Each image of a part comes as often as the period has epochs, or once in its two halves.
    counts = np.unique(first[0], return_counts=True)[1]
    assert set(counts.tolist()) == {max(1, int(period))}
    if period < 1:
        assert not sets(first)[0] & sets(second)[0]
        second = third
    else:
        assert (sets(first) == sets(second)) == fixed
    assert not np.array_equal(first, second)


def test_noise_is_added_to_pixels_and_to_targets():
    clean = cells.load(replace(SMALL, noise=0.0), 0, "sample")
    noisy = cells.load(replace(SMALL, noise=0.0, pixel_noise=0.5), 0, "sample")
    moved = np.asarray(noisy.train.images, int) - np.asarray(clean.train.images, int)
    inner = np.asarray(clean.train.images) == 128  # both ends are a deviation away
    assert noisy.train.images.dtype == jnp.uint8
    assert 70 < moved[inner].std() < 110  # 127.5, but a third of the draws is cut off
    np.testing.assert_array_equal(noisy.test.images, clean.test.images)
    targets = cells.load(replace(SMALL, noise=0.0, target_noise=1.0), 0, "sample")
    noise = np.asarray(targets.train.labels) - np.eye(10)[targets.true_labels]
    assert abs(noise.std() - 1) < 0.05  # five standard errors of 6,000 draws
    np.testing.assert_array_equal(targets.test.labels, clean.test.labels)


def test_a_regression_is_measured_by_what_it_explains_and_by_the_noise_that_it_learns():
    cell = replace(SMALL, noise=0.0, target_noise=1.0)
    images, run = cells.load(cell, 0, "sample"), Run(cell, arms.PLAIN, 0)
    record = trainer.perform(run, images, every=1)
    assert -50 < record["final"]["test"] < 100  # it has seen 36 batches
    assert -5 < record["final"]["wrong"] < 50
    labels = images.test.labels
    assert trainer.explained(np.eye(10)[np.asarray(labels)], labels) == 100
    mean = np.eye(10)[np.asarray(labels)].mean(0)[None]
    assert trainer.explained(mean, labels) == pytest.approx(0, abs=1e-6)


def test_a_rival_is_tuned_before_it_runs(monkeypatch):
    monkeypatch.setattr(cells, "PLAN", ((cells.CORE, arms.RIVALS[:1], (0,)),))
    assert all(run.tuning for run in cells.plan_runs(lambda run: None))
    score = lambda run: {"final": {"validation": -abs(run.arm.value - 0.4)}}
    *grid, last = cells.plan_runs(score)
    assert [run.seed for run in grid] == [cells.TUNING_SEED] * len(arms.RULES[last.arm.rule].values)
    assert (last.arm.value, last.seed, last.tuning) == (0.4, 0, False)


def test_the_command_runs_shows_and_does_nothing_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cells, "PLAN", ((SMALL, (arms.PAIR, arms.PLAIN), (0,)),))
    load = cells.load
    monkeypatch.setattr(cells, "load", lambda cell, seed: load(cell, seed, "sample"))
    arguments = ["--cells", "small", "--file", str(tmp_path / "agreement.json")]
    assert command.main(arguments) == 0
    assert "agreement, k = 2" in capsys.readouterr().out
    assert (tmp_path / "agreement.png").read_bytes().startswith(b"\x89PNG")

    def trained(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(trainer, "perform", trained)
    assert command.main(arguments) == 0


def test_the_page_has_the_tables_of_the_committed_results(tmp_path, capsys):
    page = (Path(__file__).parents[2] / "docs" / "agreement_study.md").read_text()
    copy = tmp_path / "agreement.json"  # the figure is drawn beside the file
    copy.write_text(command.RESULTS.read_text())
    assert command.main(["--show-only", "--file", str(copy)]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    shown = {line.strip() for line in page.splitlines()}
    assert not [line for line in lines if line not in shown]
    # The README has some of the rows.
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    part = readme.partition("## What it shows")[2].partition("##")[0]
    rows = part.partition("```text\n")[2].partition("```")[0].splitlines()
    assert len(rows) > 5
    assert not [row for row in rows if row.strip() not in lines]
    # Each number of the text with a decimal point; those of settings stand in `code`.
    code = re.compile(r"```.*?```|`[^`]*`|^    [^\n]*$|\]\([^)]*\)", re.DOTALL | re.MULTILINE)
    told = re.findall(r"\d+\.\d+", code.sub("", page))
    known = {number.lstrip("+-") for number in re.findall(r"[+-]?\d+\.\d+", " ".join(lines))}
    assert len(told) > 10
    assert not {number for number in told if number not in known}


def test_committed_runs_are_those_of_the_plan():
    records = json.loads(command.RESULTS.read_text())["runs"]
    settings = [record["settings"] for record in records]
    planned = {cell.name: cell for cell, _, _ in cells.PLAN}
    assert all(Cell(**one["cell"]) == planned[one["cell"]["name"]] for one in settings)
    assert tables.outcomes_of(cells.CORE, [])  # the study's arms of the same task
    assert not tables.outcomes_of(cells.REGRESSION, [])
    assert not tables.outcomes_of(cells.PIXELS, [])
