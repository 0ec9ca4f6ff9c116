"""`shrink_tail` against NumPy in float64, and in the wrappers of optax."""

import functools
import inspect
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers.transform_checks import (
    assert_close,
    assert_same_bits,
    ATOL,
    describe,
    make_gradients,
    make_params,
    planted,
    run,
)
from helpers.virtual_devices import EXPLICIT, run_on_devices, TESTS

import rmtjax
from rmtjax import KernelAxes, ranks
from rmtjax.lowrank import prox_tail, shrink_tail

STATIC = ("min_size", "rule", "where", "axes")
UNCHECKED = inspect.unwrap(shrink_tail)


def shrunk(matrix, strength, rank=3):
    """The reference, in float64."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    s[..., rank:] = np.maximum(s[..., rank:] - strength, 0)
    return u * s[..., None, :] @ vt


def cuts(state):
    return {
        path: np.asarray(rank).tolist() for path, rank in optax.tree.get(state, "ranks").items()
    }


def shrink_once(params, updates=None, **options):
    """Parameters and state after one step."""
    optimizer = shrink_tail(1, **{"strength": 0.5, **options})
    updates = optax.tree.zeros_like(params) if updates is None else updates
    updates, state = optimizer.update(updates, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize(
    "inner", [optax.sgd(0.1, momentum=0.9), optax.adam(1e-3)], ids=["sgd", "adam"]
)
def test_last_in_a_chain_it_shrinks_what_the_others_would_land_on(inner):
    history = run(optax.chain(inner, shrink_tail(2, strength=0.5)), 3)
    plain = run(inner, 2)
    assert_close(history[1][0], plain[1][0])
    expected = plain[2][0]
    for name in ("a", "b"):
        expected[name]["kernel"] = shrunk(expected[name]["kernel"], 0.5)
    assert_close(history[2][0], expected)
    assert cuts(history[1][1]) == {"a/kernel": 64, "b/kernel": 64}
    assert cuts(history[3][1]) == {"a/kernel": 3, "b/kernel": 3}


def test_the_noise_level_of_the_first_step_is_carried():
    optimizer, params = shrink_tail(1, strength=1.0), {"kernel": planted()}
    state, levels = optimizer.init(params), []
    assert state.fits["kernel"].threshold == 0
    for _ in range(4):
        updates, state = optimizer.update(optax.tree.zeros_like(params), state, params)
        params = optax.apply_updates(params, updates)
        levels.append(float(state.fits["kernel"].threshold))
        # A bulk of which four steps have left nothing has no noise to fit.
        assert cuts(state) == {"kernel": 3}
    assert levels == levels[:1] * 4
    np.testing.assert_allclose(params["kernel"], shrunk(planted(), 4.0), atol=2 * ATOL)
    assert rmtjax.noise_levels(state)["kernel"].threshold == levels[0]
    planned = rmtjax.plan(params, fits=rmtjax.noise_levels(state), multiple=1)
    assert planned["kernel"].rank == 3


def test_metrics_tell_the_cut_and_the_share_removed():
    params, state = shrink_once({"kernel": planted()})
    numbers = rmtjax.metrics(state)
    lost = 1 - np.sum(shrunk(planted(), 0.5) ** 2) / np.sum(np.asarray(planted(), np.float64) ** 2)
    assert numbers["cut/kernel"] == 3
    np.testing.assert_allclose(numbers["shrunk/kernel"], lost, rtol=1e-4)
    del params


def test_a_cut_by_hand_needs_no_noise():
    params, state = shrink_once({"kernel": planted()}, rule=ranks.fixed(10))
    np.testing.assert_allclose(params["kernel"], shrunk(planted(), 0.5, 10), atol=ATOL)
    assert state.fits["kernel"].threshold == 0


@pytest.mark.parametrize(
    "kernel",
    [
        np.random.default_rng(0).normal(size=(64, 96)),  # nothing stands out
        np.random.default_rng(0).standard_t(1, size=(64, 96)),  # the law does not fit
        np.full((64, 96), np.nan),
    ],
    ids=["noise", "heavy tails", "nan"],
)
def test_kernels_without_a_cut_that_holds_keep_their_updates(kernel):
    params = {"kernel": jnp.asarray(kernel, jnp.float32)}
    updates = {"kernel": jnp.full((64, 96), 1e-3)}
    optimizer = shrink_tail(1, strength=0.5)
    moved, state = optimizer.update(updates, optimizer.init(params), params)
    assert_same_bits(moved, updates)
    assert cuts(state) == {"kernel": 64}
    assert state.removed["kernel"] == 0


@pytest.mark.slow
def test_each_matrix_of_a_stack_and_of_a_convolution_is_shrunk_alone():
    stack = jnp.stack([planted(0, num_spikes=2), planted(1, num_spikes=4)])
    conv = {"kernel": planted().reshape(2, 4, 8, 96), "bias": jnp.zeros(96)}
    params = {"scan": {"kernel": stack}, "Conv_0": conv}
    axes = {"scan/kernel": KernelAxes((1,), (2,), (0,))}
    landed, state = shrink_once(params, axes=axes)
    assert cuts(state) == {"Conv_0/kernel": 3, "scan/kernel": [2, 4]}
    for member, rank in enumerate((2, 4)):
        np.testing.assert_allclose(
            landed["scan"]["kernel"][member], shrunk(stack[member], 0.5, rank), atol=ATOL
        )
    conv = landed["Conv_0"]["kernel"].reshape(64, 96)
    np.testing.assert_allclose(conv, shrunk(planted(), 0.5), atol=ATOL)
    assert {*rmtjax.metrics(state)} >= {"cut/scan/kernel/0", "shrunk/scan/kernel/1"}


def test_bfloat16_lands_on_the_rounded_kernel():
    params = {"kernel": planted().astype(jnp.bfloat16)}
    landed, state = shrink_once(params)
    assert landed["kernel"].dtype == jnp.bfloat16
    assert state.removed["kernel"].dtype == jnp.float32
    # Entries up to 1, rounded by 2^-9 twice: as the update, and where it lands.
    expected = shrunk(params["kernel"].astype(jnp.float32), 0.5)
    np.testing.assert_allclose(np.asarray(landed["kernel"], np.float64), expected, atol=2**-7)


def test_factors_and_small_kernels_are_left_alone():
    params = {
        "a": {"kernel": rmtjax.factorize_matrix(planted(), 8)},
        "b": {"kernel": jnp.ones((10, 20))},
    }
    landed, state = shrink_once(params)
    assert_same_bits(landed, params)
    assert cuts(state) == {}


@pytest.mark.slow  # three wrappers, each with programs of its own
def test_masked_partition_and_multi_steps():
    landed = optax.apply_updates(make_params(), make_gradients())
    masked = optax.masked(shrink_tail(1, strength=0.5), {"a": True, "b": False})
    params, state = run(masked, 1)[1]
    assert cuts(state) == {"a/kernel": 3}
    assert_close(params["a"]["kernel"], shrunk(landed["a"]["kernel"], 0.5))
    assert_same_bits(params["b"], landed["b"])
    groups = {"tail": shrink_tail(1, strength=0.5), "plain": optax.identity()}
    params, state = run(optax.partition(groups, {"a": "plain", "b": "tail"}), 1)[1]
    assert cuts(state) == {"b/kernel": 3}
    assert_close(params["b"]["kernel"], shrunk(landed["b"]["kernel"], 0.5))
    assert_same_bits(params["a"], landed["a"])
    history = run(optax.MultiSteps(optax.chain(optax.sgd(0.1), shrink_tail(2, strength=0.5)), 2), 5)
    seen = [cuts(state)["a/kernel"] for _, state in history]
    assert seen == [64, 64, 64, 64, 3, 3]


def test_inject_hyperparams_changes_nothing_and_schedules():
    injected = optax.inject_hyperparams(shrink_tail, STATIC)(2, strength=0.5, start=1)
    plain, wrapped = run(shrink_tail(2, strength=0.5, start=1), 3), run(injected, 3)
    assert_close((wrapped[3][0], wrapped[3][1].inner_state), plain[3])
    assert describe(wrapped[1][1]) == describe(wrapped[3][1])
    schedule = optax.linear_schedule(1.0, 0.0, 4)
    scheduled = run(optax.inject_hyperparams(shrink_tail, STATIC)(1, strength=schedule), 2)
    assert_close(scheduled[2][0], run(shrink_tail(1, strength=schedule), 2)[2][0])
    # 1 before any step, and 3/4 after one.
    landed = optax.apply_updates(make_params(), make_gradients(0))["b"]["kernel"]
    landed = shrunk(landed, 1.0) + make_gradients(1)["b"]["kernel"]
    assert_close(scheduled[2][0]["b"]["kernel"], shrunk(landed, 0.75))


def test_inject_hyperparams_says_that_min_size_is_static():
    factory = optax.inject_hyperparams(UNCHECKED, static_args=("rule",))
    with pytest.raises(TypeError, match=r"`min_size` .* static_args"):
        factory(2, strength=0.5).init(make_params())


@pytest.mark.slow
def test_scan_over_steps_is_the_loop_and_nothing_is_compiled_again():
    optimizer, traces = shrink_tail(2, strength=optax.linear_schedule(1.0, 0.0, 4)), []

    def step(carry, gradients):
        traces.append(1)
        params, state = carry
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), state.ranks["a/kernel"]

    start = (make_params(), optimizer.init(make_params()))
    gradients = [make_gradients(seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    end, seen = jax.jit(functools.partial(jax.lax.scan, step))(start, stacked)
    assert seen.tolist() == [64, 3, 3, 3]
    expected = run(optimizer, 4)
    assert_close(end, expected[4])
    traces.clear()
    carry, compiled = start, jax.jit(step)
    for gradient, (_, state) in zip(gradients, expected[1:], strict=True):
        carry, rank = compiled(carry, gradient)
        assert rank == state.ranks["a/kernel"]
    assert len(traces) == 1


def test_flax_train_state_and_vmap_over_an_ensemble():
    optimizer = optax.chain(optax.sgd(0.1), shrink_tail(1, strength=0.5))
    state = TrainState.create(apply_fn=lambda: None, params=make_params(), tx=optimizer)
    state = state.apply_gradients(grads=make_gradients())
    assert cuts(state.opt_state) == {"a/kernel": 3, "b/kernel": 3}
    members = [planted(seed, num_spikes=seed + 1) for seed in range(3)]
    ensemble = {"kernel": jnp.stack(members)}
    shrink = shrink_tail(1, strength=0.5)
    states = jax.vmap(shrink.init)(ensemble)
    zeros = optax.tree.zeros_like(ensemble)
    updates, states = jax.jit(jax.vmap(shrink.update))(zeros, states, ensemble)
    assert states.ranks["kernel"].tolist() == [1, 2, 3]
    landed = optax.apply_updates(ensemble, updates)["kernel"]
    for rank, member in enumerate(members):
        np.testing.assert_allclose(landed[rank], shrunk(member, 0.5, rank + 1), atol=ATOL)


def test_it_minimises_the_loss_with_the_tail_sum():
    """Proximal gradient descent ends where the proximal step of the target is."""
    target, rule = planted(num_spikes=2), ranks.fixed(2)
    # For the loss |X - target|^2 / 2 the minimum of loss + tail sum is known.
    expected = prox_tail(target, 2, 0.5)
    rate = 0.5
    optimizer = optax.chain(optax.sgd(rate), shrink_tail(1, strength=rate * 0.5, rule=rule))
    params = {"kernel": target}
    state = optimizer.init(params)
    for _ in range(30):
        gradients = {"kernel": params["kernel"] - target}
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    # Errors halve with each of thirty steps, so rounding is left.
    np.testing.assert_allclose(params["kernel"], expected, atol=2 * ATOL)


@pytest.mark.parametrize(
    ("name", "value"),
    [("every", 0), ("every", 1.5), ("start", -1), ("min_size", 0), ("strength", -0.5)],
)
def test_wrong_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be .* got {value}"):
        UNCHECKED(**{"every": 2, "strength": 0.5, name: value})


def test_params_and_known_kernels_are_needed():
    optimizer = shrink_tail(1, strength=0.5)
    state = optimizer.init(make_params())
    with pytest.raises(ValueError, match=r"`params` must be given"):
        optimizer.update(make_gradients(), state)
    other = {"c": {"kernel": planted()}}
    with pytest.raises(ValueError, match=r"kernel 'c/kernel', which is not in the state"):
        optimizer.update(other, state, other)
    with pytest.raises(TypeError, match=r"^`rule` must be a rank rule"):
        UNCHECKED(1, strength=0.5, rule="bema")


ON_A_MESH = """
import sys

import jax
import numpy as np
import optax
from helpers.transform_checks import planted
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from rmtjax import lowrank, ranks

devices = np.array(jax.devices()).reshape(2, 2)
mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType[sys.argv[1]],) * 2)
params = {"kernel": planted()}
placed = jax.device_put(params, NamedSharding(mesh, P("data", "model")))


def step(params):
    optimizer = lowrank.shrink_tail(1, strength=0.5)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state.ranks["kernel"]


(wanted, one), (found, other) = step(params), step(placed)
assert one == other == 3
# Sums over parts of float32 in another order, of entries up to 1.
np.testing.assert_allclose(found["kernel"], wanted["kernel"], atol=1e-4)
assert found["kernel"].sharding.spec == P("data", "model"), found["kernel"].sharding
held = lowrank.to_spectral(placed, rank=6)["kernel"]
assert (held.u.sharding.spec, held.v.sharding.spec) == (P("data", None), P(None, "model"))
fit = lowrank.tensor_train(placed["kernel"], ((8, 8), (8, 12)), rule=ranks.fixed(4))
alone = lowrank.tensor_train(params["kernel"], ((8, 8), (8, 12)), rule=ranks.fixed(4))
np.testing.assert_allclose(fit.train.multiply(), alone.train.multiply(), atol=1e-4)
print("alike")
"""


@pytest.mark.slow  # starts a process
@pytest.mark.parametrize("kind", ["Auto", pytest.param("Explicit", marks=EXPLICIT)])
def test_divided_over_a_mesh(kind, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)
    assert run_on_devices(4, ON_A_MESH, kind) == "alike"


def test_a_kernel_of_numpy_in_float64_starts_without_a_warning():
    state = shrink_tail(1, strength=0.1).init({"kernel": np.ones((60, 90))})
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(state)}
    assert dtypes <= {jnp.dtype("float32"), jnp.dtype("int32"), jnp.dtype("bool")}
