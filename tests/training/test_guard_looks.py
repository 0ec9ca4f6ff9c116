"""`prune_spectrum` with `value_fn`: when kernels are cut, and in which programs and wrappers."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.guarded_steps import (
    CHEAP_B,
    EQUAL,
    EVEN,
    gain,
    loss_with,
    PARAMS,
    passes_of,
    PATHS,
    RANK,
    SIZE,
    squares,
    step,
    step_of,
    update,
)
from helpers.transform_checks import assert_close, assert_same_bits, planted

import rmtjax
from rmtjax import prune_spectrum


def test_the_next_step_goes_on_where_the_loss_allows_more():
    landed, first = step(CHEAP_B, max_rise=0.1)
    assert SIZE > int(first.ranks["a/kernel"]) > RANK
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    free = {"a": 0.0, "b": 0.0}  # a loss that no cut changes
    _, second = update(zeros, first, landed, free, 0.3)
    assert {path: int(rank) for path, rank in second.ranks.items()} == dict.fromkeys(PATHS, RANK)
    assert second.floors["a/kernel"] == 0
    assert_same_bits(second.fits, first.fits)


def test_what_was_cut_is_cut_again_at_looks_two_four_and_eight():
    params, state, cut = PARAMS, prune_spectrum(1).init(PARAMS), []
    for look in range(1, 10):
        # Something small is added to the kernels at each step, as by training.
        grown = jax.tree.map(lambda leaf, look=look: 1e-4 * jnp.roll(leaf, look), PARAMS)
        updates, state = update(grown, state, params, EQUAL, 1.0)
        assert set(map(int, state.ranks.values())) == {RANK}
        params = optax.apply_updates(params, updates)
        cut.append(np.linalg.matrix_rank(params["a"]["kernel"]) == RANK)
        assert set(map(int, state.reasons.values())) == {0 if cut[-1] else 7}
        if not cut[-1]:
            assert_same_bits(updates, grown)
            assert set(map(float, state.removed.values())) == {0}
        # Also between, a plan is told how far it may go.
        plan = rmtjax.plan(params, fits=rmtjax.noise_levels(state), multiple=1)
        assert {row.rank for row in plan.values()} == {RANK}
    assert [look for look, done in enumerate(cut, 1) if done] == [1, 2, 4, 8]


def test_a_cut_that_waits_has_no_say_in_the_first_cut_of_another():
    noise = {**PARAMS, "b": {"kernel": planted(1, num_spikes=0)}}  # with nothing to keep
    zeros, state = jax.tree.map(jnp.zeros_like, noise), prune_spectrum(1).init(noise)
    params = noise
    for _ in range(2):
        updates, state = update(zeros, state, params, EQUAL, 1.0)
        params = optax.apply_updates(params, updates)
        assert tuple(map(int, state.ranks.values())) == (RANK, SIZE)
    # Training has added what the loss needs to the first kernel, and signal to the second.
    state = state._replace(reference=PARAMS)
    updates, state = update(zeros, state, PARAMS, CHEAP_B, 0.01)
    assert tuple(map(int, state.ranks.values())) == (RANK, RANK)
    assert_same_bits(updates["a"], zeros["a"])


@pytest.mark.parametrize("max_rise", [0.2, 0.3])
def test_between_cuts_a_plan_keeps_what_the_loss_needs_and_no_more(max_rise):
    zeros, state = jax.tree.map(jnp.zeros_like, PARAMS), prune_spectrum(1).init(PARAMS)
    params, only = PARAMS, {"a": 1.0, "b": 0.0}
    for _ in range(2):
        updates, state = update(zeros, state, params, only, 1.0)
        params = optax.apply_updates(params, updates)
    # Training has brought back what was cut.
    updates, state = update(zeros, state, PARAMS, only, max_rise)
    assert_same_bits(updates, zeros)
    with pytest.warns(UserWarning, match="the last cut of 'a/kernel' is not in the parameters"):
        levels = rmtjax.noise_levels(state)
    plan = rmtjax.plan(PARAMS, fits=levels, multiple=1)
    best = SIZE - (np.cumsum(squares("a")[::-1]) <= max_rise * gain(only)).sum()
    assert best < EVEN
    assert best <= plan["a/kernel"].rank <= 1.1 * best + 1


@pytest.mark.slow
def test_a_schedule_cuts_at_each_look():
    optimizer = prune_spectrum(1, keep=optax.linear_schedule(0.4, 0.0, 4), max_rise=1.0)
    update = jax.jit(functools.partial(optimizer.update, value_fn=loss_with(EQUAL)))
    params, state = PARAMS, optimizer.init(PARAMS)
    for look in range(5):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = update(zeros, state, params)
        params = optax.apply_updates(params, updates)
        expected = RANK + int(0.1 * (4 - look) * (SIZE - RANK) + 1e-5)
        assert set(map(int, state.ranks.values())) == {expected}
        assert np.linalg.matrix_rank(params["a"]["kernel"]) == expected


def test_a_network_that_learns_fast_is_not_cut_for_the_first_time():
    zeros, ranks, reasons = jax.tree.map(jnp.zeros_like, PARAMS), [], []
    shares = [1.0, 0.2, 0.1, 0.1, 0.1]  # what is not learnt yet, of the squares
    params, state = zeros, prune_spectrum(1).init(zeros)
    for share in shares:
        params = jax.tree.map(lambda leaf, share=share: leaf * (1 - share**0.5), PARAMS)
        _, state = update(zeros, state, params, EQUAL, 0.5)
        ranks.append(min(map(int, state.ranks.values())))
        reasons.append(set(map(int, state.reasons.values())))
    # Of two periods the mean has to be below a fiftieth of all gain.
    assert ranks[:4] == [SIZE] * 4
    assert ranks[4] < SIZE
    assert reasons[1:] == [{5}, {5}, {5}, {0}]


@pytest.mark.slow
def test_a_fall_that_is_not_finite_is_no_reason_to_cut():
    largest = jnp.max(jnp.abs(PARAMS["a"]["kernel"]))

    def loss(params):
        spiked = jnp.max(jnp.abs(params["a"]["kernel"])) > 1.5 * largest
        return jnp.where(spiked, jnp.inf, loss_with(EQUAL)(params))

    optimizer = prune_spectrum(1, max_rise=0.5)
    update = jax.jit(functools.partial(optimizer.update, value_fn=loss))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    state = optimizer.init(jax.tree.map(lambda leaf: 2 * leaf, PARAMS))
    _, first = update(zeros, state, PARAMS)
    assert set(map(int, first.ranks.values())) == {SIZE}
    _, second = update(zeros, first, PARAMS)
    assert min(map(int, second.ranks.values())) < SIZE


@pytest.mark.slow
def test_a_late_start_compares_with_the_period_before_it():
    zeros, ranks = jax.tree.map(jnp.zeros_like, PARAMS), {}
    for learnt in (3, 5):  # the step at which all is learnt
        params, state = zeros, prune_spectrum(1).init(zeros)
        for number in range(1, 7):
            params = PARAMS if number == learnt else params
            _, state = update(zeros, state, params, EQUAL, 0.5, every=2, start=6)
        ranks[learnt] = set(map(int, state.ranks.values()))
    assert ranks[5] == {SIZE}
    assert min(ranks[3]) < SIZE


def test_without_max_rise_the_loss_is_not_asked_and_no_copy_is_kept():
    def asked(params):
        raise AssertionError("the loss was asked")

    optimizer = prune_spectrum(1, max_rise=None)
    state = optimizer.init(PARAMS)
    assert state.reference is None
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    _, state = optimizer.update(zeros, state, PARAMS, value_fn=asked)
    assert set(map(int, state.ranks.values())) == {RANK}


@pytest.mark.slow
def test_a_pruning_step_takes_at_most_fifteen_passes_and_others_none():
    counts, programs = passes_of(prune_spectrum(2, max_rise=0.01))
    assert counts[0] == counts[2] == 0
    # The two with a gradient count as three each.
    assert 5 < counts[1] + 4 <= 15
    assert counts[3] == counts[1]
    assert programs == 1


@pytest.mark.slow
def test_a_loss_in_float64_keeps_the_dtypes_of_the_state():
    with jax.enable_x64(True):
        params = {"kernel": jnp.asarray(np.asarray(planted(0)), jnp.float64)}
        optimizer = prune_spectrum(1, max_rise=0.1)
        loss = lambda tree: jnp.sum((tree["kernel"] - params["kernel"]) ** 2)
        update = jax.jit(functools.partial(optimizer.update, value_fn=loss))
        first = optimizer.init(params)
        _, state = update(jax.tree.map(jnp.zeros_like, params), first, params)
        assert RANK < int(state.ranks["kernel"]) < SIZE
        types = lambda tree: jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), tree)
        assert types(state) == types(first)


@pytest.mark.slow
def test_a_step_outside_jit_is_the_same():
    optimizer = prune_spectrum(1, max_rise=0.3, max_removed=1.0)
    zeros, state = jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS)
    updates, eager = optimizer.update(zeros, state, PARAMS, value_fn=loss_with(CHEAP_B))
    landed, compiled = step(CHEAP_B, max_rise=0.3)
    assert_close(optax.apply_updates(PARAMS, updates), landed)
    assert_same_bits(eager.ranks, compiled.ranks)


@pytest.mark.slow
def test_an_ensemble_is_guarded_one_by_one():
    optimizer = prune_spectrum(1, max_rise=0.1)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, both)
    state = jax.vmap(optimizer.init)(both)
    weights = jnp.array([1.0, 1e-6])

    def update(zeros, state, params, weight):
        loss = lambda params: loss_with({"a": weight, "b": 1e-4})(params)
        return optimizer.update(zeros, state, params, value_fn=loss)

    _, state = jax.jit(jax.vmap(update))(zeros, state, both, weights)
    first, second = state.ranks["a/kernel"].tolist()
    assert first > second == RANK
    _, alone = step(CHEAP_B, max_rise=0.1)
    assert first == int(alone.ranks["a/kernel"])


INJECTED = optax.inject_hyperparams(
    prune_spectrum, static_args=("rule", "min_size", "where", "axes", "max_removed")
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        INJECTED(1, max_rise=optax.constant_schedule(0.3)),
        optax.chain(optax.sgd(0.1), prune_spectrum(1, max_rise=0.3)),
        optax.MultiSteps(prune_spectrum(1, max_rise=0.3), 1),
    ],
    ids=["inject_hyperparams", "chain", "MultiSteps"],
)
def test_it_works_in_wrappers_that_pass_extra_arguments_on(optimizer):
    _, alone = step(CHEAP_B, max_rise=0.3)
    _, state = step_of(optimizer, CHEAP_B)
    assert_same_bits(optax.tree.get(state, "ranks"), alone.ranks)


def test_hidden_parameters_are_an_error_that_names_the_way():
    optimizer = optax.masked(prune_spectrum(1), {"a": True, "b": False, "bias": False})
    with pytest.raises(ValueError, match="by `where` instead, or pass `max_rise=None`"):
        step_of(optimizer, EQUAL)


@pytest.mark.slow
def test_an_optimizer_of_nnx_passes_the_loss_on():
    x = jax.random.normal(jax.random.key(0), (256, 64))
    target = x @ planted(0)
    loss = lambda model: jnp.mean((model(x) - target) ** 2)
    ranks = {}
    for max_rise in (0.0, 0.1, 1.0):
        model = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
        model.kernel[...] = planted(0)
        chain = optax.chain(optax.sgd(0.0), prune_spectrum(1, max_rise=max_rise))
        optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)

        @nnx.jit
        def train_step(model, optimizer):
            graph, _, rest = nnx.split(model, nnx.Param, ...)
            value_fn = lambda params: loss(nnx.merge(graph, params, rest))
            optimizer.update(model, nnx.grad(loss)(model), value_fn=value_fn)

        train_step(model, optimizer)
        ranks[max_rise] = int(rmtjax.metrics(optimizer.opt_state)["rank/kernel"])
        assert float(loss(model)) <= max(max_rise, 1e-6) * float(jnp.mean(target**2)) * 1.001
    assert ranks[0.0] == SIZE > ranks[0.1] > ranks[1.0] == RANK


@pytest.mark.slow
def test_the_guard_of_nnx_leaves_statistics_and_keys_alone():
    x = jax.random.normal(jax.random.key(0), (256, 64))
    copy: Any = {"copy": True} if "copy" in inspect.signature(nnx.merge).parameters else {}
    after = []
    for guarded in (False, True):
        rngs = nnx.Rngs(0)
        norm, dropout = nnx.BatchNorm(96, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        model = nnx.Sequential(nnx.Linear(64, 96, rngs=rngs), norm, dropout)
        model.layers[0].kernel[...] = planted(0)
        prune = prune_spectrum(1, max_rise=0.5 if guarded else None)
        optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.0), prune), wrt=nnx.Param)
        loss = lambda model: jnp.mean(model(x) ** 2)

        @nnx.jit
        def train_step(model, optimizer, guarded=guarded, loss=loss):
            grads = nnx.grad(loss)(model)
            graph, _, rest = nnx.split(model, nnx.Param, ...)
            value_fn = lambda params: loss(nnx.merge(graph, params, rest, **copy))
            optimizer.update(model, grads, **({"value_fn": value_fn} if guarded else {}))

        train_step(model, optimizer)
        after.append(nnx.state(model, nnx.filterlib.Not(nnx.Param)))
    one, other = (jax.tree.map(str, nnx.to_pure_dict(state)) for state in after)
    assert one == other
    assert not np.allclose(model.layers[1].mean[...], 0)


@pytest.mark.parametrize("value", [-0.1, 1.5, "0.1"])
def test_a_rise_that_is_no_share_is_refused(value):
    with pytest.raises((ValueError, TypeError), match="max_rise"):
        prune_spectrum(1, max_rise=value)
