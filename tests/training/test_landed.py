"""A transform that is not the last finds out, and no plan believes ranks that never landed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.transform_checks import make_gradients, make_params, planted, ranks_of

import rmtjax
from rmtjax import prune_spectrum

PATHS = ("a/kernel", "b/kernel")


def train(optimizer, steps=3, dtype=jnp.float32):
    """Parameters and state after some steps."""
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), make_params())
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for seed in range(steps):
        gradients = jax.tree.map(lambda leaf: leaf.astype(dtype), make_gradients(seed))
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def landed(state):
    found = rmtjax.metrics(state)
    return [bool(found[f"landed/{path}"]) for path in PATHS]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("every", [1, 2])
def test_the_last_of_a_chain_lands(every, dtype):
    optimizer = optax.chain(optax.sgd(0.01, momentum=0.9), prune_spectrum(every))
    _, state = train(optimizer, dtype=dtype)
    assert landed(state) == [True, True]
    assert set(ranks_of(state).values()) == {3}


FIRST = {
    "before Adam": optax.chain(prune_spectrum(2), optax.adam(1e-3)),
    "before a learning rate": optax.chain(prune_spectrum(2), optax.scale(-0.1)),
    "before a mean of updates": optax.chain(prune_spectrum(2), optax.ema(0.9, debias=False)),
}


@pytest.mark.parametrize("name", FIRST)
def test_what_changes_updates_again_is_noticed_at_the_next_step(name):
    params, state = train(FIRST[name], steps=2)
    # Only the next step has the parameters.
    assert landed(state) == [True, True]
    params, state = train(FIRST[name], steps=3)
    assert landed(state) == [False, False]
    assert set(ranks_of(state).values()) == {64}
    fits = rmtjax.noise_levels(state)
    assert all(np.isnan(fit.threshold) for fit in fits.values())
    # A plan fits the kernels as they are.
    plan, anew = rmtjax.plan(params, fits=fits), rmtjax.plan(params)
    assert {path: row.reason for path, row in plan.items()} == {
        path: row.reason for path, row in anew.items()
    }


def test_a_later_cut_that_lands_is_believed_again():
    params = {"kernel": planted(0)}
    optimizer = prune_spectrum(2)
    zeros, state = {"kernel": jnp.zeros((64, 96))}, optimizer.init(params)
    for apply in (True, False, True, True, True):
        updates, state = optimizer.update(zeros, state, params)
        params = optax.apply_updates(params, updates) if apply else params
    assert bool(rmtjax.metrics(state)["landed/kernel"])
    assert ranks_of(state) == {"kernel": 3}


def test_a_cut_at_any_scale_is_found():
    for scale in (1e-15, 1.0, 1e15):
        params = {"kernel": planted(0) * jnp.float32(scale)}
        optimizer = prune_spectrum(2)
        zeros, state = {"kernel": jnp.zeros((64, 96))}, optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(zeros, state, params)
            params = optax.apply_updates(params, updates)
        assert bool(rmtjax.metrics(state)["landed/kernel"])
        assert ranks_of(state) == {"kernel": 3}


def test_an_ensemble_and_a_scan_land():
    optimizer = optax.chain(optax.sgd(0.01), prune_spectrum(2))
    params = make_params()

    def step(carry, gradients):
        params, state = carry
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    gradients = jax.tree.map(lambda *g: jnp.stack(g), *map(make_gradients, range(3)))
    (_, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, gradients))(
        (params, optimizer.init(params))
    )
    assert landed(state) == [True, True]
