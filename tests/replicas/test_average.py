"""Averaged parameters and the trigger of NT-ASGD against a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.virtual_devices import EXPLICIT, run_on_devices
from hypothesis import given, settings, strategies as st

from rmtjax import average_params, averaged

LOSSES = st.lists(st.integers(0, 9), min_size=1, max_size=20)


def first_stall(losses, patience):
    """The step of the trigger, as its paper has it: a loss above all but the last ones before."""
    for step, loss in enumerate(losses):
        older = losses[: max(step - patience, 0)]
        if older and loss > min(older):
            return step
    return None


@settings(max_examples=60)
@given(LOSSES, st.integers(1, 4))
def test_the_trigger_and_the_mean_are_those_of_the_paper(losses, patience):
    optimizer = average_params(patience)
    params = {"w": jnp.asarray([1.0, 2.0]), "count": 3}
    state, seen = optimizer.init(params), []
    for step, loss in enumerate(losses):
        updates = {"w": jnp.asarray([0.5, -1.0 * step]), "count": 0}
        updates, state = optimizer.update(updates, state, params, value=float(loss))
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["w"], np.float64))
    start = first_stall(losses, patience)
    assert bool(state.averaging) == (start is not None)
    expected = seen[-1] if start is None else np.mean(seen[start:], axis=0)
    # Twenty means of float32, of numbers up to 200.
    np.testing.assert_allclose(averaged(state, params)["w"], expected, rtol=2e-6, atol=1e-5)


def test_steps_without_a_loss_are_not_recorded():
    optimizer, params = average_params(2), {"w": jnp.ones(2)}

    @jax.jit
    def step(state, value):
        return optimizer.update(params, state, params, value=value)[1]

    states = [optimizer.init(params)] * 2
    for loss in (5.0, 1.0, 2.0, 3.0):
        states = [step(state, loss) for state in states]
        for _ in range(3):
            states[1] = step(states[1], jnp.nan)
    assert [bool(state.averaging) for state in states] == [False, False]
    assert [bool(step(state, 5.5).averaging) for state in states] == [True, True]
    np.testing.assert_array_equal(states[0].recent, states[1].recent)


def test_an_entry_that_was_zero_begins_anew():
    optimizer = optax.chain(optax.identity(), average_params(1, reset_zeros=True))
    path = np.array(
        [[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 0.0, 3.0, 4.0, 5.0], [1.0, 0.0, 0.0, 0.0, 7.0]]
    )
    params = {"w": jnp.asarray(path[:, 0] - 1)}
    state = optimizer.init(params)
    for index, loss in enumerate((1.0, 2.0, 3.0, 3.0, 3.0)):  # the third is above the first
        updates = {"w": jnp.asarray(path[:, index], jnp.float32) - params["w"]}
        updates, state = optimizer.update(updates, state, params, value=loss)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(averaged(state, params)["w"], [4.0, 4.0, 7.0], rtol=1e-6)


def test_the_mean_is_in_float32_and_comes_back_in_the_dtype():
    optimizer, params = average_params(), {"w": jnp.ones(3, jnp.bfloat16)}
    state = optimizer.init(params)
    _, state = optimizer.update(params, state, params, value=jnp.asarray(1.0, jnp.float16))
    assert state.average["w"].dtype == jnp.float32
    assert averaged(state, params)["w"].dtype == jnp.bfloat16


def test_an_infinity_that_stays_is_its_own_mean():
    params = {"mask": jnp.array([0.0, -jnp.inf])}
    transform = average_params(1)
    state, zero = transform.init(params), {"mask": jnp.zeros(2)}
    for loss in (1.0, 2.0, 3.0):
        _, state = transform.update(zero, state, params, value=loss)
    assert averaged(state, params)["mask"].tolist() == [0.0, -np.inf]


@pytest.mark.parametrize("wrap", ["masked", "partition"])
def test_what_a_wrapper_leaves_out_is_its_own_mean(wrap):
    params = {"a": {"kernel": jnp.zeros(2), "bias": jnp.zeros(())}, "b": jnp.zeros(3)}
    inner = average_params(1)
    if wrap == "masked":
        optimizer = optax.masked(inner, {"a": {"kernel": True, "bias": False}, "b": False})
    else:
        labels = {"a": {"kernel": "mean", "bias": "rest"}, "b": "rest"}
        optimizer = optax.partition({"mean": inner, "rest": optax.identity()}, labels)
    state = optimizer.init(params)
    for loss in (1.0, 2.0, 3.0, 3.0):  # the third is above the first
        updates = jax.tree.map(jnp.ones_like, params)
        updates, state = optimizer.update(updates, state, params, value=loss)
        params = optax.apply_updates(params, updates)
    mean = averaged(state, params)
    assert mean["a"]["kernel"].tolist() == [3.5, 3.5]
    assert float(mean["a"]["bias"]) == 4
    assert mean["b"].tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="`params` must be the tree that is averaged, with 2"):
        averaged(state, {"w": jnp.ones(3)})


def test_wrong_use_is_named():
    with pytest.raises(ValueError, match="`patience` must be an integer of at least 1, got 0"):
        average_params(0)
    params = {"w": jnp.ones(2)}
    state = average_params().init(params)
    with pytest.raises(ValueError, match="`params` must be given"):
        average_params().update(params, state)
    with pytest.raises(ValueError, match=r"`value` must be one number, got .* shape \(3,\)"):
        average_params().update(params, state, params, value=jnp.ones(3))
    with pytest.raises(ValueError, match=r"`opt_state` must have one state .* got 2"):
        averaged((state, state), params)
    with pytest.raises(ValueError, match="`params` must be the tree that is averaged, with 1"):
        averaged(state, {"w": jnp.ones(3)})


@EXPLICIT
@pytest.mark.slow
def test_an_empty_array_on_a_mesh_with_explicit_axes_is_averaged_and_merged():
    code = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import rmtjax
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
empty = jax.device_put(jnp.zeros((0, 50)), NamedSharding(mesh, P(None, "a")))
params, transform = {"w": empty}, rmtjax.average_params(1)
state = transform.init(params)
for loss in (1.0, 2.0, 3.0):
    _, state = transform.update(params, state, params, value=loss)
empty = {"count": empty.astype(jnp.int32)}
merged = rmtjax.merge_replicas(empty, rmtjax.replicate(empty, 2)).params
print(rmtjax.averaged(state, params)["w"].shape, merged["count"].shape)
"""
    assert run_on_devices(4, code) == "(0, 50) (0, 50)"
