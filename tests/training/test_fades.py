"""`prune_spectrum` with `fade`: what is beyond the rank gets smaller, if the loss allows it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.guarded_steps import (
    CHEAP_B,
    EQUAL,
    gain,
    loss_with,
    PARAMS,
    passes_of,
    PATHS,
    SIZE,
    squares,
)
from helpers.transform_checks import assert_same_bits, ATOL, planted, prune_once

import rmtjax
from rmtjax import prune_spectrum, ranks

RULE = ranks.fixed(8)
STATIC = ("rule", "min_size", "where", "axes", "max_rise")


def faded(kernel, fade, rank=8):
    """The reference, in float64."""
    u, s, vt = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    return u * np.where(np.arange(s.shape[-1]) < rank, s, fade * s)[..., None, :] @ vt


def beyond(path):
    """The squares beyond the rank, and their share."""
    tail = squares(path)[8:].sum()
    return tail, tail / squares(path).sum()


# One program for most tests: the options and the weights of the loss are traced.
@jax.jit
def update(updates, state, params, weights, max_rise, fade):
    optimizer = prune_spectrum(1, rule=RULE, fade=fade, max_rise=max_rise)
    return optimizer.update(updates, state, params, value_fn=loss_with(weights))


def steps(weights, max_rise, fade=0.6, count=1, params=PARAMS):
    """What some pruning steps land on, and the states after each; all may undo `max_rise`."""
    zeros, states = jax.tree.map(jnp.zeros_like, params), [prune_spectrum(1).init(params)]
    for _ in range(count):
        updates, state = update(zeros, states[-1], params, weights, max_rise / 7, fade)
        params, states = optax.apply_updates(params, updates), [*states, state]
    return params, states[1:]


def plan_of(params, state, **options):
    return rmtjax.plan(params, rule=RULE, fits=rmtjax.noise_levels(state), multiple=1, **options)


@pytest.mark.parametrize("fade", [0.0, 0.6])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_beyond_the_rank_fades_and_the_state_does_not_claim_a_rank(fade, dtype):
    kernel = planted().astype(dtype)
    params, state = prune_once({"kernel": kernel}, rule=RULE, fade=fade)
    expected = faded(kernel.astype(jnp.float32), fade)
    # What lands is rounded, to 2^-8 of the largest entry, about 2, in bfloat16.
    atol = ATOL if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(params["kernel"].astype(jnp.float32), expected, atol=atol)
    assert params["kernel"].dtype == dtype
    found, s = rmtjax.metrics(state), np.linalg.svd(np.float64(kernel), compute_uv=False)
    share = np.square(s[8:]).sum() / np.square(s).sum()
    assert found["rank/kernel"] == SIZE
    np.testing.assert_allclose(found["removed/kernel"], (1 - fade**2) * share, rtol=1e-4)
    # A difference of two shares in float32.
    np.testing.assert_allclose(found["refused/kernel"], fade**2 * share, rtol=1e-3, atol=1e-6)
    assert plan_of(params, state)["kernel"].rank == 8


def test_a_stack_fades_by_one_rank():
    stack = jnp.stack([planted(0), planted(1, num_spikes=6)])
    axes = {"kernel": rmtjax.KernelAxes((1,), (2,), (0,))}
    params, state = prune_once({"kernel": stack}, axes=axes, fade=0.5)
    expected = [faded(kernel, 0.5, rank=6) for kernel in stack]
    np.testing.assert_allclose(params["kernel"], expected, atol=ATOL)
    # Of a rule with a noise level the first fade takes it, and a plan counts by it.
    plan = rmtjax.plan(params, axes=axes, fits=rmtjax.noise_levels(state), multiple=1)
    assert plan["kernel"].rank == 6


def test_a_loss_that_allows_all_lets_all_fade():
    params, (state,) = steps(EQUAL, max_rise=7.0)
    plain, without = prune_once(PARAMS, rule=RULE, fade=0.6)
    for path in PATHS:
        landed, expected = (tree[path[0]]["kernel"] for tree in (params, plain))
        np.testing.assert_allclose(landed, expected, atol=ATOL)
        for name in ("removed", "refused"):
            numbers = [getattr(found, name)[path] for found in (state, without)]
            np.testing.assert_allclose(*numbers, rtol=1e-4)
    assert {row.rank for row in plan_of(params, state).values()} == {8}


def test_a_loss_that_allows_nothing_leaves_all_as_it_is():
    params, (state,) = steps(EQUAL, max_rise=0.0)
    assert_same_bits(params, PARAMS)
    found = rmtjax.metrics(state)
    for path in PATHS:
        assert found[f"removed/{path}"] == 0
        np.testing.assert_allclose(found[f"refused/{path}"], beyond(path)[1], rtol=1e-4)
        np.testing.assert_allclose(found[f"cost/{path}"], beyond(path)[0], rtol=1e-4)
        assert found[f"threshold/{path}"] == 0
    plan = plan_of(params, state)
    assert {row.reason for row in plan.values()} == {"kept: pruning left it alone while training"}


@pytest.mark.parametrize("weights", [EQUAL, CHEAP_B])
@pytest.mark.parametrize("max_rise", [0.02, 0.1, 0.2])
def test_one_step_spends_a_third_of_what_all_may_and_the_cheapest_goes_first(weights, max_rise):
    params, (state,) = steps(weights, max_rise)
    most = max_rise * gain(weights) / 3
    rise = float(loss_with(weights)(params))
    assert rise <= most * (1 + 1e-5)
    np.testing.assert_allclose(state.spent, rise / gain(weights), rtol=1e-3, atol=1e-6)
    # The share that has gone of what is beyond, from the squares that are left.
    gone = {}
    for path in PATHS:
        removed, total = float(state.removed[path]), beyond(path)[1]
        gone[path[0]] = 1 - np.sqrt(1 - removed / total)
        expected = faded(PARAMS[path[0]]["kernel"], 1 - gone[path[0]])
        np.testing.assert_allclose(params[path[0]]["kernel"], expected, atol=ATOL)
    cheap, dear = sorted("ab", key=lambda name: weights[name] * beyond(name)[0])
    cost = {name: weights[name] * beyond(name)[0] for name in "ab"}
    # It goes the less far, the more its cut would cost, but for a factor of four at most.
    ratio = min(cost[dear] / cost[cheap], 4)
    np.testing.assert_allclose(gone[cheap], min(gone[dear] * ratio, 0.4), rtol=1e-2)
    # The way has 64 steps. The end and four halvings are tried: four steps on is too far.
    further = min(gone[dear] + 0.4 / 16, 0.4)
    rise = cost[dear] * further**2 + cost[cheap] * min(further * ratio, 0.4) ** 2
    assert rise > most * (1 - 1e-3) or gone[dear] > 0.399


@pytest.mark.parametrize(
    ("weights", "max_rise", "number"), [(EQUAL, 0.05, 0), (CHEAP_B, 0.05, 1), (EQUAL, 1.0, 2)]
)
def test_all_steps_and_the_cut_at_the_end_together_keep_to_the_rise(weights, max_rise, number):
    params, states = steps(weights, max_rise, count=8)
    for state in states:
        assert float(state.spent) <= max_rise * (1 + 1e-5)
    plan = plan_of(params, states[-1])
    loss = float(loss_with(weights)(rmtjax.truncate(params, plan)))
    # A seventh of it more for the cut.
    assert loss <= 8 / 7 * max_rise * gain(weights) * (1 + 1e-4)
    assert [row.rank == 8 for row in plan.values()].count(True) == number


def test_a_network_that_learns_fast_does_not_fade():
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    state = prune_spectrum(1).init(zeros)
    updates, state = update(PARAMS, state, zeros, EQUAL, 1.0, 0.6)  # all is learnt in one period
    assert_same_bits(updates, PARAMS)
    assert set(map(float, state.floors.values())) == {-1}
    for _ in range(2):  # of two periods the mean counts
        _, state = update(zeros, state, PARAMS, EQUAL, 1.0, 0.6)
    assert min(map(float, state.removed.values())) > 0


def test_a_step_takes_at_most_fifteen_passes_and_is_compiled_once():
    counts, programs = passes_of(prune_spectrum(2, rule=RULE, fade=0.6, max_rise=0.01))
    assert counts[0] == counts[2] == 0
    # The two with a gradient count as three each.
    assert 5 < counts[1] + 4 <= 15
    assert programs == 1


def test_a_schedule_of_the_fade_is_injected_and_scanned():
    factory = optax.inject_hyperparams(prune_spectrum, static_args=STATIC)
    optimizer = factory(1, rule=RULE, fade=optax.linear_schedule(0.8, 0.4, 2), max_rise=None)
    params = {"kernel": planted()}

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(optax.tree.zeros_like(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (landed, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=3)
    expected = faded(params["kernel"], 0.8 * 0.6 * 0.4)
    np.testing.assert_allclose(landed["kernel"], expected, atol=ATOL)


def test_a_fade_that_is_undone_is_forgotten():
    zeros = {"kernel": jnp.zeros_like(planted())}
    optimizer = prune_spectrum(1, rule=RULE, fade=0.6)
    step = jax.jit(optimizer.update)
    updates, state = step(zeros, optimizer.init({"kernel": planted()}), {"kernel": planted()})
    landed = optax.apply_updates({"kernel": planted()}, updates)
    assert rmtjax.metrics(step(zeros, state, landed)[1])["landed/kernel"]
    assert not rmtjax.metrics(step(zeros, state, {"kernel": planted()})[1])["landed/kernel"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fade": 1.0}, r"`fade` must be in \[0, 1\), got 1.0"),
        ({"fade": -0.1}, r"`fade` must be in \[0, 1\), got -0.1"),
        ({"fade": 0.5, "noise": "refit"}, '`noise` must be "first" with `fade`'),
    ],
)
def test_a_fade_out_of_range_or_with_a_fit_of_what_fades_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        prune_spectrum(1, **options)
