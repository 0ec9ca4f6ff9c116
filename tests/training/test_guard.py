"""`prune_spectrum` with `value_fn`: no step undoes more of the gain than it is allowed to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.guarded_steps import (
    CHEAP_B,
    EQUAL,
    EVEN,
    gain,
    loss_with,
    PARAMS,
    PATHS,
    RANK,
    SIZE,
    squares,
    step,
    update,
)
from helpers.transform_checks import assert_same_bits, planted

import rmtjax
from rmtjax import prune_spectrum


def test_a_loss_that_allows_all_changes_nothing():
    optimizer = prune_spectrum(1, max_removed=1.0)
    zeros, state = jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS)
    updates, without = jax.jit(optimizer.update)(zeros, state, PARAMS)
    landed, state = step(EQUAL, max_rise=1.0)
    assert_same_bits(landed, optax.apply_updates(PARAMS, updates))
    assert all(cost == 0 for cost in without.costs.values())
    same = {name: getattr(without, name) for name in ("costs", "fall", "reference")}
    state = state._replace(**same)
    assert_same_bits(state, without)


def test_a_loss_that_allows_nothing_leaves_all_as_it_is():
    landed, state = step(EQUAL, max_rise=0.0)
    assert_same_bits(landed, PARAMS)
    found = rmtjax.metrics(state)
    for path in PATHS:
        assert found[f"rank/{path}"] == SIZE
        assert found[f"signal/{path}"] == RANK
        assert found[f"removed/{path}"] == 0
        share = squares(path)[RANK:].sum() / squares(path).sum()
        np.testing.assert_allclose(found[f"refused/{path}"], share, rtol=1e-4)
    plan = rmtjax.plan(landed, fits=rmtjax.noise_levels(state))
    words = "kept: pruning left it alone while training: the loss would have risen; train longer, "
    assert {row.reason for row in plan.values()} == {f"{words}or raise `max_rise`"}


@pytest.mark.parametrize("weights", [EQUAL, CHEAP_B, {"a": 0.3, "b": 2.0}])
def test_costs_are_exact_where_the_loss_is_quadratic(weights):
    _, state = step(weights, max_rise=0.0)
    for path in PATHS:
        expected = weights[path[0]] * squares(path)[RANK:].sum()
        # The sum of 6,144 products in float32.
        np.testing.assert_allclose(state.costs[path], expected, rtol=1e-4)


@pytest.mark.parametrize("max_rise", [0.01, 0.1, 0.3, 0.5])
def test_the_cheapest_is_cut_first_and_the_rest_of_the_rise_is_used(max_rise):
    landed, state = step(CHEAP_B, max_rise=max_rise)
    allowed = max_rise * gain(CHEAP_B)
    assert int(state.ranks["b/kernel"]) == RANK
    assert float(loss_with(CHEAP_B)(landed)) <= allowed * 1.0001
    left = allowed - 1e-4 * squares("b")[RANK:].sum()
    lost = np.cumsum(squares("a")[::-1]) <= left  # with this many of the smallest removed
    best = SIZE - lost.sum()
    if best > EVEN:  # a smaller cut would not make the kernel smaller
        assert int(state.ranks["a/kernel"]) == SIZE
        assert_same_bits(landed["a"], PARAMS["a"])
        return
    # Each kernel has 32 ranks to end at, a factor of (38.4 / 3)^(1 / 32) < 1.1 apart, and rounded.
    assert best <= int(state.ranks["a/kernel"]) <= 1.1 * best + 1
    assert np.linalg.matrix_rank(landed["a"]["kernel"]) == int(state.ranks["a/kernel"])
    removed = squares("a")[int(state.ranks["a/kernel"]) :].sum() / squares("a").sum()
    np.testing.assert_allclose(state.removed["a/kernel"], removed, rtol=1e-3)


@pytest.mark.parametrize("max_rise", [0.01, 0.3])
def test_a_plan_goes_no_further_than_the_loss_allowed(max_rise):
    landed, state = step(CHEAP_B, max_rise=max_rise)
    plan = rmtjax.plan(landed, fits=rmtjax.noise_levels(state), multiple=1)
    found = {path: row.rank or SIZE for path, row in plan.items()}
    assert found == {path: int(rank) for path, rank in state.ranks.items()}
    assert found["b/kernel"] == RANK
    assert (found["a/kernel"] < SIZE) == (max_rise == 0.3)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_allows_nothing(value):
    zeros, state = jax.tree.map(jnp.zeros_like, PARAMS), prune_spectrum(1).init(PARAMS)
    updates, state = update(zeros, state, PARAMS, EQUAL, 1.0, offset=value)
    assert_same_bits(updates, zeros)
    assert set(map(int, state.ranks.values())) == {SIZE}


@pytest.mark.slow
def test_a_stack_gets_one_rank_and_its_matrices_their_levels():
    stack = {"layers": {"kernel": jnp.stack([planted(0), planted(1)])}}
    axes = {"layers/kernel": rmtjax.KernelAxes((1,), (2,), (0,))}
    optimizer = prune_spectrum(1, axes=axes, max_rise=0.1)
    zeros, state = jax.tree.map(jnp.zeros_like, stack), optimizer.init(stack)
    loss = lambda params: jnp.sum((params["layers"]["kernel"] - stack["layers"]["kernel"]) ** 2)
    updates, state = optimizer.update(zeros, state, stack, value_fn=loss)
    rank = int(state.ranks["layers/kernel"])
    assert RANK < rank < SIZE
    landed = optax.apply_updates(stack, updates)
    assert set(np.linalg.matrix_rank(landed["layers"]["kernel"])) == {rank}
    plan = rmtjax.plan(landed, fits=rmtjax.noise_levels(state), axes=axes, multiple=1)
    assert plan["layers/kernel"].rank == rank
