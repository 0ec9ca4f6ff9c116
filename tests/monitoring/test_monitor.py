"""Spectra while training: the numbers of a look, what alarms tell, and that nothing changes."""

import json
from collections import namedtuple

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.transform_checks import planted

import rmtjax

SHAPE = (64, 96)
STACK = rmtjax.KernelAxes((1,), (2,), (0,))
NAMES = (
    "spikes",
    "distance",
    "threshold",
    "spectral_norm",
    "stable_rank",
    "hill",
    "alpha_weighted",
)


def steps(optimizer, trees, values=None):
    """States after each step, at parameters that are given."""
    state, states = optimizer.init(trees[0]), []
    # One program for all steps; `value` alone makes another.
    update = jax.jit(lambda p, s, v: optimizer.update(p, s, p, value=v))
    for index, tree in enumerate(trees):
        updates, state = update(tree, state, 1.0 if values is None else values[index])
        jax.tree.map(np.testing.assert_array_equal, updates, tree)
        states.append(state)
    return states


def noise(seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(SHAPE), jnp.float32)


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
def test_a_look_has_the_numbers_of_the_spectrum(scale):
    kernel = scale * planted()
    params = {"one": kernel, "two": jnp.stack([kernel, 2 * kernel]), "bias": jnp.ones(96)}
    monitor = rmtjax.monitor(3, columns=NAMES, where="*o*", axes={"two": STACK})
    (first, *_) = steps(monitor, [params])
    found = jax.device_get(rmtjax.metrics(first))
    assert {name.split("/")[0] for name in found} == {"monitor"}
    for name, matrix in (("one", kernel), ("two/1", 2 * kernel)):
        spectrum = rmtjax.spectrum(matrix / scale)
        fit, metrics = rmtjax.fit_bema(spectrum), rmtjax.metrics_of(spectrum)
        expected = {"spikes": fit.num_spikes, "distance": fit.distance}
        expected |= {"stable_rank": metrics.stable_rank, "hill": metrics.hill}
        expected |= {"spectral_norm": float(metrics.spectral_norm) * scale}
        expected |= {"threshold": float(fit.threshold) * scale**2}
        shift = 2 * float(metrics.alpha) * np.log10(scale)
        expected |= {"alpha_weighted": float(metrics.alpha_weighted) + shift}
        for column, value in expected.items():
            # Another power of two may round to another side of a threshold.
            np.testing.assert_allclose(found[f"monitor/{column}/{name}"], value, rtol=2e-4)


def test_looks_are_at_their_steps_and_in_between_nothing_changes():
    trees = [{"kernel": noise(seed)} for seed in range(6)]
    states = steps(rmtjax.monitor(3, start=2, columns=["spectral_norm"]), trees)
    assert [int(state.measured) for state in states] == [0, 2, 2, 2, 5, 5]
    assert [int(state.looks) for state in states] == [0, 1, 1, 1, 2, 2]
    norms = [float(rmtjax.metrics(s)["monitor/spectral_norm/kernel"]) for s in states]
    expected = [float(rmtjax.metrics_of(rmtjax.spectrum(trees[i]["kernel"]))[0]) for i in (1, 4)]
    np.testing.assert_allclose([norms[1], norms[4]], expected, rtol=1e-5)
    assert norms[0] == 0
    assert norms[1] == norms[3]


def flags(states, name):
    return [int(rmtjax.metrics(state)[f"monitor/{name}/kernel"]) for state in states]


def test_alarms_are_what_has_become_of_the_kernel():
    rng = np.random.default_rng(0)
    product = jnp.asarray(rng.standard_normal((64, 64)) @ rng.standard_normal(SHAPE), jnp.float32)
    trap = noise(0).at[3, 4].set(60.0)
    trees = [{"kernel": kernel} for kernel in (product, noise(0), trap, product, noise(1))]
    states = steps(rmtjax.monitor(1, shuffles=3, columns=["shuffled_rate"]), trees)
    # The law must have fitted before it can be left.
    assert flags(states, "left_law") == [0, 0, 0, 1, 0]
    assert flags(states, "traps") == [0, 0, 1, 0, 0]
    assert float(rmtjax.metrics(states[2])["monitor/shuffled_rate/kernel"]) == 1


def test_spikes_that_grow_count_only_while_the_loss_is_flat():
    trees = [{"kernel": planted(num_spikes=n)} for n in (1, 2, 3, 4, 5, 5, 6)]
    values = [5.0, 4.0, 3.999, 3.998, 3.997, 3.996, 3.0]
    monitor = rmtjax.monitor(1, columns=["spikes"])
    states = steps(monitor, trees, values)
    assert flags(states, "spikes") == [1, 2, 3, 4, 5, 5, 6]
    assert flags(states, "growing") == [0, 0, 1, 2, 3, 0, 0]
    # A loss that is not known, or not finite, is not flat.
    quiet = steps(monitor, trees[:3], [np.nan, np.inf, np.nan])
    assert flags(quiet, "growing") == [0, 0, 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(quiet[-1]))


def test_a_state_is_finite_and_what_is_not_is_measured_as_zero():
    params = {"kernel": noise(0).at[0, 0].set(jnp.nan), "zero": {"kernel": jnp.zeros(SHAPE)}}
    with jax.debug_nans(False):
        (state,) = steps(rmtjax.monitor(1, columns=NAMES), [{"zero": params["zero"]}])
        updates = jax.jit(rmtjax.monitor(1, columns=NAMES).update)
        monitor = rmtjax.monitor(1, columns=NAMES)
        _, broken = updates(params, monitor.init(params), params)
    for tree in (state, broken, rmtjax.metrics(broken)):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


Pair = namedtuple("Pair", ["weight", "bias"])
KERNEL, BIAS = planted(), jnp.ones(96)
TREES = {
    "array": (KERNEL, ""),
    "list": ([BIAS, [KERNEL]], "1/0"),
    "NamedTuple": (Pair(KERNEL, BIAS), "weight"),
    "None": ({"gone": None, "w": KERNEL, "count": 3}, "w"),
    "FrozenDict": (flax.core.freeze({"a": {"kernel": KERNEL}}), "a/kernel"),
    "State": (nnx.State({"a": {"kernel": nnx.Param(KERNEL)}}), "a/kernel"),
    "factors": ({"f": rmtjax.factorize_matrix(KERNEL, 4), "w": KERNEL}, "w"),
    "half": ({"w": KERNEL.astype(jnp.bfloat16)}, "w"),
}


@pytest.mark.parametrize(("params", "path"), TREES.values(), ids=TREES)
def test_a_kernel_is_measured_in_any_tree(params, path):
    monitor = rmtjax.monitor(1, columns=["spikes"], where=lambda name, leaf: name == path)
    updates, state = monitor.update(params, monitor.init(params), params)
    assert jax.tree.all(jax.tree.map(lambda new, old: new is old, updates, params))
    assert list(state.kernels) == [path]
    assert int(state.kernels[path].spikes) == 3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: optax.chain(optax.adam(0.1), t),
        lambda t: optax.masked(t, {"a": True, "b": False}),
        lambda t: optax.partition({"x": t, "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}),
        lambda t: optax.MultiSteps(optax.chain(t, optax.sgd(0.1)), 2).gradient_transformation(),
    ],
    ids=["chain", "masked", "partition", "multi steps"],
)
def test_it_works_in_wrappers_under_scan(wrap):
    params = {"a": {"kernel": noise(0)}, "b": {"kernel": planted()}}
    optimizer = wrap(rmtjax.monitor(2, columns=["spikes"]))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    (_, state), _ = jax.jit(lambda start: jax.lax.scan(step, start, length=4))(start)
    assert int(rmtjax.metrics(state)["monitor/spikes/a/kernel"]) == 0
    assert rmtjax.History().add(state)["step"] in (1, 3)


@pytest.mark.slow
def test_it_stands_beside_other_transforms():
    params = {"kernel": planted()}
    optimizer = optax.chain(rmtjax.monitor(1), optax.sgd(0.0), rmtjax.prune_spectrum(1))
    _, state = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    found = rmtjax.metrics(state)
    assert int(found["monitor/spikes/kernel"]) == int(found["signal/kernel"]) == 3


def test_a_history_keeps_each_look_once_and_reads_its_file(tmp_path):
    path = tmp_path / "log.jsonl"
    history = rmtjax.History(path)
    trees = [{"kernel": noise(seed)} for seed in range(4)]
    for index, state in enumerate(steps(rmtjax.monitor(2, columns=["spikes"]), trees)):
        record = history.add(state, loss=jnp.float32(index))
        assert (record is None) == (index % 2 == 1)
    assert [record["step"] for record in history] == [1, 3]
    assert type(history.records[0]["monitor/spikes/kernel"]) is int
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [0, 2]
    again = rmtjax.History(path)
    assert again.records == history.records
    assert again.add(state) is None
    assert len(again) == 2
    with pytest.raises(ValueError, match=r"`opt_state` must have the state of `rmtjax.monitor`"):
        history.add(optax.sgd(0.1).init(trees[0]))


def test_a_loss_that_is_not_finite_is_null_in_the_file(tmp_path):
    history = rmtjax.History(tmp_path / "log.jsonl")
    (state,) = steps(rmtjax.monitor(1, columns=["spikes"]), [{"kernel": noise(0)}])
    record = history.add(state, loss=jnp.nan, norm=np.inf)
    assert np.isnan(record["loss"])
    assert np.isinf(record["norm"])
    (again,) = rmtjax.History(history.path)
    assert again == {**record, "loss": None, "norm": None}


def test_half_a_line_of_a_history_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    with pytest.raises(ValueError, match=r"log.jsonl' has a line that is no record, '{\"step\": 2"):
        rmtjax.History(path)


def test_a_loss_is_one_number():
    params, monitor = {"kernel": noise(0)}, rmtjax.monitor(1, columns=["spikes"])
    state = monitor.init(params)
    _, seen = monitor.update(params, state, params, value=jnp.ones((1,)))
    assert seen.loss.shape == seen.total.shape == ()
    with pytest.raises(ValueError, match=r"`value` must be one number, got .* shape \(3,\)"):
        monitor.update(params, state, params, value=jnp.ones(3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "`every` must be an integer of at least 1"),
        ({"start": 0}, "`start` must be"),
        ({"columns": ["rank"]}, r"`columns` must be some of .* got 'rank'"),
        ({"columns": ["shuffled_rate"]}, "needs `shuffles` of at least 1"),
        ({"flat": 2.0}, r"`flat` must be in \[0, 1\]"),
        ({"rule": rmtjax.ranks.bema(equalize=True)}, "`rule` must have `equalize=False`"),
    ],
)
def test_wrong_options_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        rmtjax.monitor(**options)


def test_a_tree_without_kernels_is_a_warning_and_passes():
    params = {"bias": jnp.ones(3)}
    monitor = rmtjax.monitor(1)
    with pytest.warns(UserWarning, match="`monitor` will never change a kernel"):
        state = monitor.init(params)
    updates, state = monitor.update(params, state, params)
    assert updates is params
    with pytest.raises(ValueError, match="`params` must be given"):
        monitor.update(params, state)


def test_the_state_of_an_nnx_optimizer_is_read():
    model = nnx.Linear(96, 64, rngs=nnx.Rngs(0))
    model.kernel[...] = KERNEL.T
    optimizer = nnx.Optimizer(model, optax.chain(rmtjax.monitor(1), optax.sgd(0.0)), wrt=nnx.Param)
    gradients = nnx.grad(lambda model: model(jnp.ones((1, 96))).sum())(model)
    optimizer.update(model, gradients, value=jnp.float32(1))
    record = rmtjax.History().add(optimizer.opt_state)
    assert record["step"] == 1
    assert next(n for name, n in record.items() if name.startswith("monitor/spikes")) == 3
