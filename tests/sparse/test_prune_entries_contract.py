"""`prune_entries` held to what optax asks of the transforms in `optax.contrib`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.transform_checks import run_from

from rmtjax import prune_entries, sparsity

STATIC = ("where", "budget", "axes", "pattern")
HALF = {"a/kernel": 120, "b/kernel": 50}


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "a": {"kernel": normal(12, 20), "bias": normal(20)},
        "b": {"kernel": normal(20, 5)},
    }


def make_gradients(seed=0):
    return optax.tree.scale(0.1, make_params(seed + 100))


def run(optimizer, num_steps, wrap=lambda step: step):
    """Parameters and states after each step, from those of this file on."""
    return run_from(make_params(), make_gradients, optimizer, num_steps, wrap)


def removed(state):
    """Entries removed, by path."""
    masks = optax.tree.get(state, "masks")
    return {path: int((~mask).sum()) for path, mask in masks.items()}


def total(state):
    return sum(removed(state).values())


def num_zeros(tree):
    return sum(int((leaf == 0).sum()) for leaf in jax.tree.leaves(tree))


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def describe(tree):
    """What decides whether `jit` compiles again."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def test_masked_prunes_what_the_mask_names():
    optimizer = optax.masked(prune_entries(every=1, sparsity=0.5), {"a": True, "b": False})
    params, state = run(optimizer, 1)[1]
    assert removed(state) == {"a/kernel": 120}
    landed = optax.apply_updates(make_params(), make_gradients())
    assert_same_bits(params["b"], landed["b"])


def test_partition_prunes_one_group_and_takes_the_mask_of_the_whole():
    mask = sparsity.magnitude_mask(make_params(5), 0.2)
    pruned = optax.chain(optax.sgd(1.0), prune_entries(every=1, sparsity=0.5, mask=mask))
    groups = {"pruned": pruned, "plain": optax.sgd(1.0)}
    params, state = run(optax.partition(groups, {"a": "plain", "b": "pruned"}), 1)[1]
    assert removed(state) == {"b/kernel": 50}
    landed = optax.apply_updates(make_params(), optax.tree.scale(-1, make_gradients()))
    assert_same_bits(params["a"], landed["a"])


def test_multi_steps_counts_the_real_steps():
    optimizer = optax.MultiSteps(
        optax.chain(optax.sgd(0.1), prune_entries(every=2, sparsity=0.5)), 2
    )
    history = run(optimizer, 6)
    assert [total(state) for _, state in history] == [0, 0, 0, 0, 170, 170, 170]
    assert [num_zeros(params) for params, _ in history] == [0, 0, 0, 0, 170, 170, 170]


def test_inject_hyperparams_changes_nothing():
    injected = optax.inject_hyperparams(prune_entries, STATIC)(0.5, every=2, start=1)
    plain, wrapped = run(prune_entries(every=2, start=1, sparsity=0.5), 3), run(injected, 3)
    assert_same_bits((wrapped[3][0], wrapped[3][1].inner_state), plain[3])
    assert describe(wrapped[1][1]) == describe(wrapped[3][1])


def test_injected_sparsity_can_be_changed_and_scheduled():
    schedule = optax.linear_schedule(0.0, 0.5, 2)
    factory = optax.inject_hyperparams(prune_entries, STATIC)
    mask = sparsity.magnitude_mask(make_params(), 0.1)
    weights = lambda share: dict.fromkeys(HALF, 1.0)
    history = run(factory(schedule, mask=mask, budget=weights), 3)
    assert [total(state) for _, state in history] == [34, 34, 85, 170]
    optimizer, params = factory(0.0), make_params()
    state = optimizer.init(params)
    state.hyperparams["sparsity"] = jnp.asarray(0.5)
    _, state = optimizer.update(make_gradients(), state, params)
    assert total(state) == 170


def test_extra_arguments_are_ignored_and_skipped_steps_are_skipped():
    optimizer, params = (
        optax.apply_if_finite(prune_entries(every=2, sparsity=0.5), 5),
        make_params(),
    )
    bad = optax.tree.scale(jnp.nan, make_gradients())
    update, state, steps = optimizer.update, optimizer.init(params), []
    for gradients in (make_gradients(), bad, make_gradients()):
        _, state = update(gradients, state, params, value=1.0, unheard_of=2)
        steps.append((int(state.inner_state.step), total(state)))
    assert steps == [(1, 0), (1, 0), (2, 170)]


def test_scan_over_steps_is_the_loop():
    optimizer = optax.chain(
        optax.adam(0.1), prune_entries(every=2, sparsity=optax.linear_schedule(0.0, 0.6, 3))
    )

    def step(carry, gradients):
        params, state = carry
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(make_gradients, range(4)))
    start = (make_params(), optimizer.init(make_params()))
    (params, state), _ = jax.jit(functools.partial(jax.lax.scan, step))(start, stacked)
    expected, expected_state = run(optimizer, 4)[4]
    # Two programs, which the compiler may have rounded in other places.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), params, expected)
    assert removed(state) == removed(expected_state)
    assert total(state) == 204


def test_vmap_over_an_ensemble():
    optimizer, members = (
        prune_entries(every=1, sparsity=0.5),
        [make_params(seed) for seed in range(3)],
    )
    ensemble = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    state = jax.vmap(optimizer.init)(ensemble)
    zeros = optax.tree.zeros_like(ensemble)
    updates, state = jax.jit(jax.vmap(optimizer.update))(zeros, state, ensemble)
    for index, member in enumerate(members):
        mask = sparsity.magnitude_mask(member, 0.5)
        expected = jax.tree.map(lambda leaf, kept: jnp.where(kept, leaf, 0), member, mask)
        one = jax.tree.map(lambda leaf: leaf[index], updates)  # noqa: B023
        assert_same_bits(optax.apply_updates(member, one), expected)


def test_nothing_is_compiled_again_and_the_state_keeps_its_form():
    traces = []
    schedule = optax.linear_schedule(0.0, 0.6, 6)
    optimizer = optax.chain(
        optax.sgd(0.1, momentum=0.9), prune_entries(every=2, start=3, sparsity=schedule)
    )

    @jax.jit
    def step(params, state, gradients):
        traces.append(1)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = make_params(), optimizer.init(make_params())
    form, seen = describe(state), set()
    for seed in range(7):
        params, state = step(params, state, make_gradients(seed))
        seen.add(total(state))
        assert describe(state) == form
    assert (len(seen), len(traces)) == (4, 1)


@pytest.mark.parametrize(
    ("dtype", "update_dtype", "steps"),
    # Where an update has 8 bits, three of them make up the 24 of a float32.
    [("float32", "float64", 1), ("float64", "float64", 1), ("float32", "bfloat16", 3)],
)
def test_mixed_precision(dtype, update_dtype, steps):
    with jax.enable_x64("float64" in (dtype, update_dtype)):
        params = optax.tree.cast(make_params(), dtype)
        zeros = optax.tree.cast(optax.tree.zeros_like(params), update_dtype)
        optimizer = prune_entries(every=1, sparsity=0.5)
        state = optimizer.init(params)
        form, update = describe(state), optimizer.update
        for _ in range(steps):
            updates, state = update(zeros, state, params)
            assert updates["a"]["kernel"].dtype == update_dtype
            assert describe(state) == form
            params = optax.apply_updates(params, updates)
        gone = {path: int((params[path[0]]["kernel"] == 0).sum()) for path in HALF}
        assert gone == removed(state)
        assert sum(gone.values()) == 170


@pytest.mark.parametrize("given", [False, True], ids=["whole", "mask"])
def test_buffers_can_be_donated_from_the_first_step_on(given):
    mask = sparsity.magnitude_mask(make_params(), 0.2) if given else None
    optimizer = optax.chain(optax.adam(1e-3), prune_entries(every=2, sparsity=0.5, mask=mask))
    donate = functools.partial(jax.jit, donate_argnums=(0, 1))
    plain, donated = run(optimizer, 4, jax.jit), run(optimizer, 4, donate)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated[0]))
    assert_same_bits(donated[4], plain[4])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(mask))


def test_init_can_be_compiled_or_only_shaped_and_a_saved_state_goes_on():
    optimizer, params = prune_entries(every=1, sparsity=0.5), make_params()
    state = optimizer.init(params)
    assert_same_bits(jax.jit(optimizer.init)(params), state)
    assert jax.tree.structure(jax.eval_shape(optimizer.init, params)) == jax.tree.structure(state)
    update = optimizer.update
    saved = jax.tree.map(np.asarray, state)
    expected = update(make_gradients(), state, params)
    assert_same_bits(update(make_gradients(), saved, params), expected)
