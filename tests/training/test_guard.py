"""`prune_spectrum` with `value_fn`: no step undoes more of the gain than it is allowed to."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import draws
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
from rmtjax import prune_spectrum, ranks


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
    assert {row.reason for row in plan.values()} == {f"{words}raise `max_rise`, or cut less"}


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


def _count(jaxpr, name):
    """How often a primitive is in a program, in all of its parts."""
    found = 0
    for equation in jaxpr.eqns:
        parts = [part for part in jax.tree.leaves(equation.params) if hasattr(part, "jaxpr")]
        found += (equation.primitive.name == name) + sum(_count(part.jaxpr, name) for part in parts)
    return found


def test_kernels_of_one_size_share_a_program_whatever_their_axes():
    one, wide = {"a": jnp.ones((60, 90))}, jnp.ones((90, 60))
    several = one | {"b": wide, "c": wide.reshape(90, 4, 15), "d": wide.reshape(5, 18, 60)}
    where = {"b": ((0,), (1,)), "c": ((0,), (1, 2)), "d": ((0, 1), (2,)), "a": ((0,), (1,))}
    axes = lambda path, leaf: rmtjax.KernelAxes(*where[path])
    optimizer = prune_spectrum(1, where=lambda path, leaf: True, axes=axes)
    value_fn = lambda params: sum(jnp.sum(leaf**2) for leaf in params.values())

    def decompositions(params):
        update = functools.partial(optimizer.update, value_fn=value_fn)
        state = optimizer.init(params)
        return _count(jax.make_jaxpr(update)(params, state, params).jaxpr, "eigh")

    assert 0 < decompositions(several) == decompositions(one)


@pytest.mark.slow
def test_the_guard_works_on_steps_that_are_accumulated():
    """A pruning step is one of what `optax.MultiSteps` has accumulated."""
    optimizer = optax.MultiSteps(prune_spectrum(1, max_rise=0.1, max_removed=1.0), 2)
    update = jax.jit(functools.partial(optimizer.update, value_fn=loss_with(CHEAP_B)))
    zeros, params, ranks = jax.tree.map(jnp.zeros_like, PARAMS), PARAMS, []
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = update(zeros, state, params)
        params = optax.apply_updates(params, updates)
        ranks.append([int(rank) for rank in state.inner_opt_state.ranks.values()])
    expected = step(CHEAP_B, max_rise=0.1)[1]
    assert ranks == [[SIZE, SIZE], [int(rank) for rank in expected.ranks.values()]]
    assert np.linalg.matrix_rank(params["a"]["kernel"]) == ranks[1][0] < SIZE
    assert bool(rmtjax.metrics(state)["landed/a/kernel"])


@pytest.mark.parametrize(
    ("value_fn", "words"),
    [
        (jnp.float32(1), r"must be a function of the parameters, got an array: pass `loss`, not"),
        (1.0, r"must be a function of the parameters, got 1\.0"),
        (lambda p, x: x, r"called with the parameters alone, got a function of \(p, x\): close"),
        (lambda: 0.0, r"called with the parameters alone, got a function of \(\)"),
    ],
)
def test_a_loss_that_is_no_function_of_the_parameters_is_refused(value_fn, words):
    optimizer = optax.chain(optax.identity(), prune_spectrum(1))
    with pytest.raises(TypeError, match=f"`value_fn` .*{words}"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, value_fn=value_fn)


def test_an_error_of_the_loss_is_its_own():
    def value_fn(params, scale=1.0):
        raise TypeError("missing 1 required positional argument")

    optimizer = prune_spectrum(1)
    with pytest.raises(TypeError, match=r"^missing 1 required positional argument"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, value_fn=value_fn)


# (height, width, inputs, outputs): a kernel of a convolution as a matrix.
AXES = {"Conv_0/kernel": rmtjax.KernelAxes((0, 1, 2), (3,))}


@pytest.mark.parametrize("options", [{}, {"rule": ranks.size(0.45), "fade": 0.6}])
def test_convolutions_have_the_fast_layout_and_masks_are_no_kernels(options):
    """Whatever the loss is asked for, on CPU no gradient is left to the slow code for branches."""
    kernel = draws.normal(0, 3, 3, 8, 16)
    params = {"Conv_0": {"kernel": kernel}, "mask": jnp.ones((3, 3, 1, 1), bool)}
    x, optimizer = draws.normal(1, 2, 6, 5, 8), prune_spectrum(1, min_size=8, axes=AXES, **options)

    def loss(params):
        masked = params["Conv_0"]["kernel"] * params["mask"]
        spec = ("NHWC", "HWIO", "NHWC")
        outputs = jax.lax.conv_general_dilated(x, masked, (1, 1), "SAME", dimension_numbers=spec)
        return jnp.mean(jnp.sin(outputs))

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    update = jax.jit(lambda state: optimizer.update(zeros, state, params, value_fn=loss)[0])
    compiled = update.lower(optimizer.init(params)).compile()
    if jax.default_backend() == "cpu":
        layouts = set(re.findall(r"dim_labels=([^,\s]+)", compiled.as_text()))
        assert layouts == {"b01f_01io->b01f"}
    assert not jnp.any(compiled(optimizer.init(params))["mask"])
