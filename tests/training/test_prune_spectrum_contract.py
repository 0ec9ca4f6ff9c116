"""`prune_spectrum` held to what optax asks of the transforms in `optax.contrib`."""

import functools
import inspect
import itertools

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
    ranks_of,
    run,
    truncated,
)

from rmtjax import prune_spectrum, ranks

STATIC = ("min_size", "rule", "where", "axes")
# As users have it: the type checker of the tests would speak first, in its own words.
UNCHECKED = inspect.unwrap(prune_spectrum)


@pytest.mark.parametrize(
    "inner",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adam(1e-3),
        optax.adamw(1e-3, weight_decay=0.1),
        optax.chain(optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.1), optax.sgd(0.5)),
    ],
    ids=["momentum", "adam", "adamw", "clip"],
)
def test_last_in_a_chain_it_prunes_what_the_others_would_land_on(inner):
    history = run(optax.chain(inner, prune_spectrum(2)), 3)
    plain = run(inner, 2)
    assert_close(history[1][0], plain[1][0])
    expected = plain[2][0]
    for name in ("a", "b"):
        expected[name]["kernel"] = truncated(expected[name]["kernel"])
    assert_close(history[2][0], expected)
    assert ranks_of(history[3][1]) == {"a/kernel": 3, "b/kernel": 3}
    assert optax.tree.get(history[3][1], "fits")["a/kernel"].threshold > 0


def test_masked_prunes_what_the_mask_names():
    params, state = run(optax.masked(prune_spectrum(1), {"a": True, "b": False}), 1)[1]
    assert ranks_of(state) == {"a/kernel": 3}
    landed = optax.apply_updates(make_params(), make_gradients())
    np.testing.assert_allclose(params["a"]["kernel"], truncated(landed["a"]["kernel"]), atol=ATOL)
    assert_same_bits(params["b"], landed["b"])


def test_partition_prunes_one_group():
    transforms = {
        "pruned": optax.chain(optax.sgd(1.0), prune_spectrum(1)),
        "plain": optax.sgd(1.0),
    }
    labels = {"a": "plain", "b": "pruned"}
    params, state = run(optax.partition(transforms, labels), 1)[1]
    landed = optax.apply_updates(make_params(), optax.tree.scale(-1, make_gradients()))
    np.testing.assert_allclose(params["b"]["kernel"], truncated(landed["b"]["kernel"]), atol=ATOL)
    assert_same_bits(params["a"], landed["a"])
    assert ranks_of(state) == {"b/kernel": 3}


def test_multi_steps_counts_the_real_steps():
    optimizer = optax.MultiSteps(optax.chain(optax.sgd(0.1), prune_spectrum(2)), 2)
    history = run(optimizer, 5)
    full, pruned = {"a/kernel": 64, "b/kernel": 64}, {"a/kernel": 3, "b/kernel": 3}
    assert [ranks_of(state) for _, state in history] == [*[full] * 4, *[pruned] * 2]
    kernels = [params["a"]["kernel"] for params, _ in history]
    moved = [bool((a != b).any()) for a, b in itertools.pairwise(kernels)]
    assert moved == [False, True, False, True, False]


def test_inject_hyperparams_changes_nothing():
    options = {"start": 1, "keep": 0.3, "min_rank": 2}
    injected = optax.inject_hyperparams(prune_spectrum, STATIC)(2, **options)
    plain, wrapped = run(prune_spectrum(2, **options), 3), run(injected, 3)
    assert ranks_of(wrapped[3][1]) == {"a/kernel": 21, "b/kernel": 21}
    assert_close((wrapped[3][0], wrapped[3][1].inner_state), plain[3])
    assert describe(wrapped[1][1]) == describe(wrapped[3][1])


@pytest.mark.slow
def test_injected_hyperparams_can_be_changed_and_scheduled():
    optimizer = optax.inject_hyperparams(prune_spectrum, STATIC)(
        100, keep=optax.linear_schedule(0.5, 0.0, 2)
    )
    update, params = optimizer.update, {"kernel": planted()}
    state = optimizer.init(params)
    _, state = update(optax.tree.zeros_like(params), state, params)
    assert ranks_of(state) == {"kernel": 64}
    state.hyperparams["every"] = jnp.asarray(1)
    _, state = update(optax.tree.zeros_like(params), state, params)
    keep = float(state.hyperparams["keep"])
    assert 0 < keep < 1
    assert ranks_of(state) == {"kernel": 3 + int(keep * 61)}


def test_inject_hyperparams_with_a_static_schedule_and_callables():
    options = {
        "keep": optax.linear_schedule(1.0, 0.0, 2),
        "rule": ranks.fixed(4),
        "where": lambda path, leaf: path == "b/kernel",
    }
    factory = optax.inject_hyperparams(prune_spectrum, (*STATIC, "keep"))
    history = run(factory(1, **options), 2)
    assert [ranks_of(state) for _, state in history[1:]] == [{"b/kernel": 64}, {"b/kernel": 34}]


def test_inject_hyperparams_needs_no_static_argument_but_min_size():
    optimizer = optax.inject_hyperparams(prune_spectrum, static_args=("min_size",))(2)
    assert ranks_of(optimizer.init(make_params())) == ranks_of(
        prune_spectrum(2).init(make_params())
    )


def test_inject_hyperparams_says_that_min_size_is_static():
    factory = optax.inject_hyperparams(UNCHECKED, static_args=("rule",))
    with pytest.raises(TypeError, match=r"`min_size` .* static_args"):
        factory(2).init(make_params())


def test_unknown_extra_arguments_are_ignored():
    optimizer, params = optax.chain(optax.sgd(0.1), prune_spectrum(1)), make_params()
    state = optimizer.init(params)
    update = optimizer.update
    plain = update(make_gradients(), state, params)
    extra = update(make_gradients(), state, params, value=1.0, unheard_of=2)
    assert_same_bits(extra, plain)


@pytest.mark.slow
def test_apply_if_finite_keeps_the_state_of_a_skipped_step():
    optimizer, params = optax.apply_if_finite(prune_spectrum(2), 5), make_params()
    bad = jax.tree.map(lambda a: a * jnp.nan, make_gradients())
    update, state = optimizer.update, optimizer.init(params)
    steps = []
    for gradients in (make_gradients(), bad, make_gradients()):
        updates, state = update(gradients, state, params)
        steps.append(int(state.inner_state.step))
    assert steps == [1, 1, 2]
    landed = optax.apply_updates(params, updates)["b"]["kernel"]
    expected = truncated(params["b"]["kernel"] + make_gradients()["b"]["kernel"])
    np.testing.assert_allclose(landed, expected, atol=ATOL)


def test_flax_train_state():
    optimizer = optax.chain(optax.sgd(0.1), prune_spectrum(1))
    state = TrainState.create(apply_fn=lambda: None, params=make_params(), tx=optimizer)
    state = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))(
        state, make_gradients()
    )
    assert ranks_of(state.opt_state) == {"a/kernel": 3, "b/kernel": 3}
    assert np.linalg.matrix_rank(state.params["a"]["kernel"], tol=1e-4) == 3


@pytest.mark.slow
def test_scan_over_steps_is_the_loop():
    optimizer = prune_spectrum(2, keep=optax.linear_schedule(0.5, 0.0, 4))
    gradients = [make_gradients(seed) for seed in range(4)]

    def step(carry, gradients):
        params, state = carry
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), state.ranks["a/kernel"]

    start = (make_params(), optimizer.init(make_params()))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    end, seen = jax.jit(functools.partial(jax.lax.scan, step))(start, stacked)
    # 3 + floor(keep * 61) for keep = 0.375 after one step and 0.125 after three.
    assert seen.tolist() == [64, 25, 25, 10]
    assert_close(end, run(optimizer, 4)[4])


def test_vmap_over_an_ensemble():
    optimizer = prune_spectrum(1, max_removed=1.0)
    members = [{"kernel": planted(seed, num_spikes=seed + 1)} for seed in range(3)]
    ensemble = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    state = jax.vmap(optimizer.init)(ensemble)
    zeros = optax.tree.zeros_like(ensemble)
    updates, state = jax.jit(jax.vmap(optimizer.update))(zeros, state, ensemble)
    assert state.ranks["kernel"].tolist() == [1, 2, 3]
    landed = optax.apply_updates(ensemble, updates)["kernel"]
    for rank, member in enumerate(members):
        np.testing.assert_allclose(landed[rank], truncated(member["kernel"], rank + 1), atol=ATOL)


def test_nothing_is_compiled_again():
    traces = []
    optimizer = optax.chain(
        optax.sgd(0.1, momentum=0.9),
        prune_spectrum(2, start=3, keep=optax.linear_schedule(0.5, 0.0, 6)),
    )

    @jax.jit
    def step(params, state, gradients):
        traces.append(1)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = make_params(), optimizer.init(make_params())
    seen = set()
    for seed in range(7):
        params, state = step(params, state, make_gradients(seed))
        seen.add(ranks_of(state)["a/kernel"])
    assert len(seen) == 4  # full, and three ranks of the schedule
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("every", 0),
        ("every", -1),
        ("every", 1.5),
        ("every", True),
        ("start", -1),
        ("start", 0.5),
        ("keep", -0.1),
        ("keep", 1.1),
        ("keep", float("nan")),
        ("min_rank", 0),
        ("min_size", 0),
    ],
)
def test_wrong_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be .* got {value}"):
        UNCHECKED(**{"every": 2, name: value})


def test_params_are_needed():
    optimizer = prune_spectrum(1)
    with pytest.raises(ValueError, match=r"`params` must be given"):
        optimizer.update(make_gradients(), optimizer.init(make_params()))
