"""The state of `prune_spectrum`: its form, which nothing changes, saved, donated and shaped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.transform_checks import (
    assert_same_bits,
    describe,
    make_gradients,
    make_params,
    planted,
    ranks_of,
    run,
    SHAPE,
)

from rmtjax import prune_spectrum, PruneState, ranks


@pytest.mark.parametrize(
    ("dtype", "update_dtype"),
    [
        ("float32", "float32"),
        pytest.param("bfloat16", "bfloat16", marks=pytest.mark.slow),
        pytest.param("float16", "float16", marks=pytest.mark.slow),
        ("bfloat16", "float32"),
        pytest.param("float32", "bfloat16", marks=pytest.mark.slow),
        pytest.param("float32", "float64", marks=pytest.mark.slow),
        pytest.param("float64", "float64", marks=pytest.mark.slow),
    ],
)
def test_updates_keep_their_dtype_and_the_state_its_form(dtype, update_dtype):
    with jax.enable_x64("float64" in (dtype, update_dtype)):
        params = {"kernel": planted().astype(dtype)}
        updates = {"kernel": jnp.zeros(SHAPE, update_dtype)}
        optimizer = prune_spectrum(1)
        state = optimizer.init(params)
        pruned, later = optimizer.update(updates, state, params)
        assert pruned["kernel"].dtype == update_dtype
        assert describe(later) == describe(state)
        assert ranks_of(later) == {"kernel": 3}


def test_the_state_is_a_tree_of_arrays():
    _, state = run(prune_spectrum(1), 1)[1]
    assert isinstance(state, PruneState)
    leaves, treedef = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert_same_bits(jax.tree.unflatten(treedef, leaves), state)
    assert optax.tree.get(state, "fits") is state.fits


def test_a_state_saved_as_numpy_arrays_goes_on_as_if_nothing_had_happened():
    optimizer = optax.chain(optax.adam(1e-3), prune_spectrum(2))
    update = optimizer.update
    params, state = run(optimizer, 3)[3]
    saved = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    restored = jax.tree.unflatten(jax.tree.structure(optimizer.init(make_params())), saved)
    expected = update(make_gradients(), state, params)
    assert_same_bits(update(make_gradients(), restored, params), expected)


@pytest.mark.parametrize(
    "rule", [pytest.param(ranks.bema(), marks=pytest.mark.slow), ranks.fixed(3)], ids=str
)
def test_buffers_can_be_donated_from_the_first_step_on(rule):
    optimizer = optax.chain(optax.adam(1e-3), prune_spectrum(2, rule=rule))
    params, state = make_params(), optimizer.init(make_params())
    before = jax.tree.leaves((params, state))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for seed in range(4):
        params, state = step(params, state, make_gradients(seed))
    assert all(leaf.is_deleted() for leaf in before)
    assert_same_bits(params, run(optimizer, 4, jax.jit)[4][0])


def test_init_can_be_compiled_or_only_shaped():
    optimizer, params = prune_spectrum(1), make_params()
    state = optimizer.init(params)
    assert_same_bits(jax.jit(optimizer.init)(params), state)
    shapes = jax.eval_shape(optimizer.init, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
