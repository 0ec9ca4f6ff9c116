"""A transform that is not the last finds out, and no plan believes ranks that never landed."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.slow import slow_except
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


@pytest.mark.parametrize(
    ("every", "dtype"),
    [
        pytest.param(1, jnp.float32, marks=pytest.mark.slow),
        (2, jnp.bfloat16),
        pytest.param(2, jnp.float16, marks=pytest.mark.slow),
    ],
)
def test_the_last_of_a_chain_lands(every, dtype):
    optimizer = optax.chain(optax.sgd(0.01, momentum=0.9), prune_spectrum(every))
    _, state = train(optimizer, dtype=dtype)
    assert landed(state) == [True, True]
    assert all(norm > 0 for norm in optax.tree.get(state, "norms").values())
    assert set(ranks_of(state).values()) == {3}


# `noise_levels` warns of lost cuts, which are what most of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:the last cut of")

FIRST = {
    "before Adam": optax.chain(prune_spectrum(2), optax.adam(1e-3)),
    "before a learning rate": optax.chain(prune_spectrum(2), optax.scale(-0.1)),
    "before a mean of updates": optax.chain(prune_spectrum(2), optax.ema(0.9, debias=False)),
}


@pytest.mark.parametrize("name", slow_except(("before Adam",), FIRST))
def test_what_changes_updates_again_is_noticed_at_the_next_step(name):
    params, state = train(FIRST[name], steps=2)
    # Only the next step has the parameters.
    assert landed(state) == [True, True]
    params, state = train(FIRST[name], steps=3)
    assert landed(state) == [False, False]
    assert set(ranks_of(state).values()) == {64}
    with pytest.warns(UserWarning, match="is not in the parameters .* Put `prune_spectrum` last"):
        fits = rmtjax.noise_levels(state)
    assert all(fit.threshold == 0 for fit in fits.values())
    # A plan fits the kernels as they are.
    plan, anew = rmtjax.plan(params, fits=fits), rmtjax.plan(params)
    assert {path: row.reason for path, row in plan.items()} == {
        path: row.reason for path, row in anew.items()
    }


KERNEL = {"kernel": planted(0)}
ZEROS = {"kernel": jnp.zeros((64, 96))}
REGROWN = {"kernel": 0.05 * jax.random.normal(jax.random.key(3), (64, 96))}


def walk(optimizer, steps, params=KERNEL):
    """Parameters and state after steps, each with its update and whether it is applied."""
    state = optimizer.init(params)
    for update, applied in steps:
        updates, state = optimizer.update(update, state, params)
        params = optax.apply_updates(params, updates) if applied else params
    return params, state


def test_a_later_cut_that_lands_is_believed_again():
    steps = [(ZEROS, True), (ZEROS, False), (ZEROS, True), (ZEROS, True), (ZEROS, True)]
    _, state = walk(prune_spectrum(2), steps)
    assert bool(rmtjax.metrics(state)["landed/kernel"])
    assert ranks_of(state) == {"kernel": 3}


def test_a_lost_second_cut_leaves_the_first():
    steps = [(ZEROS, True), (ZEROS, True), (REGROWN, True), (ZEROS, False), (ZEROS, True)]
    params, state = walk(prune_spectrum(2), steps)
    assert not bool(rmtjax.metrics(state)["landed/kernel"])
    # The kernel is truncated, and what has grown again: it must not be fitted as if it were whole.
    assert ranks_of(state) == {"kernel": 3}
    plan = rmtjax.plan(params, fits=rmtjax.noise_levels(state), multiple=1)
    assert plan["kernel"].rank == 3


def test_what_a_step_held_back_stays_held_back_after_a_lost_cut():
    optimizer = prune_spectrum(2, max_removed=0.9)
    params, state = walk(optimizer, [(ZEROS, True), (ZEROS, False), (ZEROS, True)])
    assert not bool(rmtjax.metrics(state)["landed/kernel"])
    refusing = prune_spectrum(2, max_removed=0.1)
    for _ in range(2):
        _, state = refusing.update(ZEROS, state, params)
    plan = rmtjax.plan(params, fits=rmtjax.noise_levels(state))
    assert plan["kernel"].reason.startswith("kept: pruning left it alone while training: ")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_a_small_cut_of_entries_with_a_mean_lands(dtype):
    entries = 1.0 + 0.02 * jax.random.normal(jax.random.key(0), (80, 60))
    params = {"kernel": entries.astype(dtype)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = walk(prune_spectrum(2), [(zeros, True)] * 3, params)
    assert state.norms["kernel"] > 0
    assert bool(rmtjax.metrics(state)["landed/kernel"])


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_part_of_a_cut_has_not_landed(share):
    optimizer = optax.chain(prune_spectrum(2), optax.scale(share))
    _, state = walk(optimizer, [(ZEROS, True)] * 3)
    assert not bool(rmtjax.metrics(state)["landed/kernel"])


@pytest.mark.slow
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


@pytest.mark.slow
def test_an_ensemble_finds_out_one_by_one():
    optimizer = prune_spectrum(2)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), KERNEL)
    zeros, state = jax.tree.map(jnp.zeros_like, both), jax.vmap(optimizer.init)(both)
    update = jax.jit(jax.vmap(optimizer.update))
    for _ in range(2):
        updates, state = update(zeros, state, both)
    half = jax.tree.map(lambda leaf: leaf.at[1].set(0), updates)
    _, state = update(zeros, state, optax.apply_updates(both, half))
    assert state.landed["kernel"].tolist() == [True, False]


@pytest.mark.slow
def test_a_scan_lands():
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
