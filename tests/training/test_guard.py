"""`prune_spectrum` with `value_fn`: no step raises the loss by more than it is allowed to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.transform_checks import assert_close, assert_same_bits, planted

import rmtjax
from rmtjax import prune_spectrum

PARAMS = {"a": {"kernel": planted(0)}, "b": {"kernel": planted(1)}, "bias": jnp.ones(96)}
PATHS = ("a/kernel", "b/kernel")
SIZE, RANK = 64, 3


def squares(path):
    """The squared singular values of a kernel, by the reference, in float64."""
    kernel = np.asarray(PARAMS[path[0]]["kernel"], np.float64)
    return np.linalg.svd(kernel, compute_uv=False) ** 2


def loss_with(weights):
    """A loss that is quadratic around the parameters: a cut costs the squares that it removes."""

    def loss(params):
        apart = lambda name: jnp.sum(jnp.square(params[name]["kernel"] - PARAMS[name]["kernel"]))
        return sum(weight * apart(name) for name, weight in weights.items())

    return loss


def gain(weights):
    return sum(weight * squares(name).sum() for name, weight in weights.items())


def step(weights, params=PARAMS, optimizer=None, **options):
    """What a pruning step lands on, and its state."""
    optimizer = prune_spectrum(1, **options) if optimizer is None else optimizer
    zeros, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
    update = functools.partial(optimizer.update, value_fn=loss_with(weights))
    updates, state = jax.jit(update)(zeros, state, params)
    return optax.apply_updates(params, updates), state


EQUAL = {"a": 1.0, "b": 1.0}
CHEAP_B = {"a": 1.0, "b": 1e-4}


def test_a_loss_that_allows_all_changes_nothing():
    optimizer = prune_spectrum(1, max_removed=1.0)
    zeros, state = jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS)
    updates, without = jax.jit(optimizer.update)(zeros, state, PARAMS)
    landed, state = step(EQUAL, max_rise=1.0)
    assert_same_bits(landed, optax.apply_updates(PARAMS, updates))
    unknown = without.costs
    assert all(np.isnan(cost) for cost in unknown.values())
    assert_same_bits(state._replace(costs=unknown), without)


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
    assert {row.reason for row in plan.values()} == {"kept: pruning left it alone while training"}


@pytest.mark.parametrize("weights", [EQUAL, CHEAP_B, {"a": 0.3, "b": 2.0}])
def test_costs_are_exact_where_the_loss_is_quadratic(weights):
    _, state = step(weights, max_rise=0.0)
    for path in PATHS:
        expected = weights[path[0]] * squares(path)[RANK:].sum()
        # The sum of 6,144 products in float32.
        np.testing.assert_allclose(state.costs[path], expected, rtol=1e-4)


@pytest.mark.parametrize("max_rise", [0.01, 0.1, 0.3])
def test_the_cheapest_is_cut_first_and_the_rest_of_the_rise_is_used(max_rise):
    landed, state = step(CHEAP_B, max_rise=max_rise)
    allowed = max_rise * gain(CHEAP_B)
    assert int(state.ranks["b/kernel"]) == RANK
    assert float(loss_with(CHEAP_B)(landed)) <= allowed * 1.0001
    left = allowed - 1e-4 * squares("b")[RANK:].sum()
    lost = np.cumsum(squares("a")[::-1]) <= left  # with this many of the smallest removed
    best = SIZE - lost.sum()
    # Each kernel has 32 ranks to end at, 61 directions apart: at most one other lies between.
    assert best <= int(state.ranks["a/kernel"]) <= best + 2
    assert np.linalg.matrix_rank(landed["a"]["kernel"]) == int(state.ranks["a/kernel"])
    removed = squares("a")[int(state.ranks["a/kernel"]) :].sum() / squares("a").sum()
    np.testing.assert_allclose(state.removed["a/kernel"], removed, rtol=1e-3)


@pytest.mark.parametrize("max_rise", [0.1, 0.3])
def test_a_plan_goes_no_further_than_the_loss_allowed(max_rise):
    landed, state = step(CHEAP_B, max_rise=max_rise)
    plan = rmtjax.plan(landed, fits=rmtjax.noise_levels(state), multiple=1)
    rank = int(state.ranks["a/kernel"])
    # A rule that finds half of the directions above the noise keeps them all.
    expected = SIZE if rank >= SIZE // 2 else rank
    assert {path: row.rank for path, row in plan.items()} == {PATHS[0]: expected, PATHS[1]: RANK}
    assert (rank < SIZE // 2) == (max_rise == 0.3)


def test_the_next_step_goes_on_where_the_loss_allows_more():
    optimizer = prune_spectrum(1, max_rise=0.1)
    landed, first = step(CHEAP_B, optimizer=optimizer)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    free = lambda params: loss_with(EQUAL)(params) * 0 - jnp.sum(params["b"]["kernel"] ** 2)
    _, second = optimizer.update(zeros, first, landed, value_fn=free)
    assert int(first.ranks["a/kernel"]) > RANK
    assert {path: int(rank) for path, rank in second.ranks.items()} == dict.fromkeys(PATHS, RANK)
    assert np.isnan(second.floors["a/kernel"])
    assert_same_bits(second.fits, first.fits)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_allows_nothing(value):
    optimizer = prune_spectrum(1)
    zeros, state = jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS)
    lost = lambda params: loss_with(EQUAL)(params) + value
    updates, state = optimizer.update(zeros, state, PARAMS, value_fn=lost)
    assert_same_bits(updates, zeros)
    assert set(map(int, state.ranks.values())) == {SIZE}


def test_a_loss_without_a_value_at_zeros_is_compared_with_itself():
    def normalized(params):  # 0 / 0 at zeros
        kernel = params["a"]["kernel"]
        return 2 - jnp.sum(kernel / jnp.linalg.norm(kernel) * PARAMS["a"]["kernel"]) / 11

    optimizer = prune_spectrum(1, max_rise=0.2)
    zeros, state = jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS)
    updates, state = optimizer.update(zeros, state, PARAMS, value_fn=normalized)
    landed = optax.apply_updates(PARAMS, updates)
    assert RANK <= int(state.ranks["a/kernel"]) < SIZE
    assert normalized(landed) <= normalized(PARAMS) * 1.2


def test_a_pruning_step_takes_at_most_fifteen_passes_and_others_none():
    passes = []

    def counted(params):
        jax.debug.callback(lambda: passes.append(1))
        return loss_with(EQUAL)(params)

    optimizer = prune_spectrum(2, max_rise=0.01)
    update = jax.jit(lambda *args: optimizer.update(*args, value_fn=counted))
    zeros, state = jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS)
    counts = []
    for _ in range(4):
        _, state = update(zeros, state, PARAMS)
        jax.effects_barrier()
        counts.append(len(passes))
        passes.clear()
    assert counts[0] == counts[2] == 0
    # The two with a gradient count as three each.
    assert 5 < counts[1] + 4 <= 15
    assert counts[3] == counts[1]
    assert update._cache_size() == 1


def test_a_step_outside_jit_is_the_same():
    optimizer = prune_spectrum(1, max_rise=0.1)
    zeros, state = jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS)
    updates, eager = optimizer.update(zeros, state, PARAMS, value_fn=loss_with(CHEAP_B))
    landed, compiled = step(CHEAP_B, optimizer=optimizer)
    assert_close(optax.apply_updates(PARAMS, updates), landed)
    assert_same_bits(eager.ranks, compiled.ranks)


def test_a_stack_gets_one_rank_and_its_matrices_their_levels():
    stack = {"layers": {"kernel": jnp.stack([planted(0), planted(1)])}}
    axes = {"layers/kernel": rmtjax.KernelAxes((1,), (2,), (0,))}
    optimizer = prune_spectrum(1, axes=axes, max_rise=0.3)
    zeros, state = jax.tree.map(jnp.zeros_like, stack), optimizer.init(stack)
    loss = lambda params: jnp.sum((params["layers"]["kernel"] - stack["layers"]["kernel"]) ** 2)
    updates, state = optimizer.update(zeros, state, stack, value_fn=loss)
    rank = int(state.ranks["layers/kernel"])
    assert RANK < rank < SIZE
    landed = optax.apply_updates(stack, updates)
    assert set(np.linalg.matrix_rank(landed["layers"]["kernel"])) == {rank}
    plan = rmtjax.plan(landed, fits=rmtjax.noise_levels(state), axes=axes, multiple=1)
    assert plan["layers/kernel"].rank == rank


def test_an_ensemble_is_guarded_one_by_one():
    optimizer = prune_spectrum(1, max_rise=0.1)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PARAMS)
    zeros, state = jax.tree.map(jnp.zeros_like, both), jax.vmap(optimizer.init)(both)
    weights = jnp.array([1.0, 1e-4])

    def update(zeros, state, params, weight):
        loss = lambda params: loss_with({"a": weight, "b": 1e-4})(params)
        return optimizer.update(zeros, state, params, value_fn=loss)

    _, state = jax.jit(jax.vmap(update))(zeros, state, both, weights)
    first, second = state.ranks["a/kernel"].tolist()
    assert first > second > RANK
    _, alone = step(CHEAP_B, optimizer=optimizer)
    assert first == int(alone.ranks["a/kernel"])


def test_it_works_in_wrappers_that_pass_extra_arguments_on():
    schedule = optax.constant_schedule(0.1)
    static = ("rule", "min_size", "where", "axes")
    injected = optax.inject_hyperparams(prune_spectrum, static_args=static)(1, max_rise=schedule)
    _, alone = step(CHEAP_B, max_rise=0.1)
    for optimizer in (
        injected,
        optax.chain(optax.sgd(0.1), prune_spectrum(1, max_rise=0.1)),
        optax.MultiSteps(prune_spectrum(1, max_rise=0.1), 1),
    ):
        _, state = step(CHEAP_B, optimizer=optimizer)
        assert_same_bits(optax.tree.get(state, "ranks"), alone.ranks)


def test_hidden_parameters_are_an_error_that_names_the_way():
    optimizer = optax.masked(prune_spectrum(1), {"a": True, "b": False, "bias": False})
    with pytest.raises(ValueError, match="Choose its kernels by `where` instead"):
        step(EQUAL, optimizer=optimizer)


def test_an_optimizer_of_nnx_passes_the_loss_on():
    class Model(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(64, 96, rngs=nnx.Rngs(0))
            self.first.kernel[...] = planted(0)

        def __call__(self, x):
            return self.first(x)

    model = Model()
    x = jax.random.normal(jax.random.key(0), (256, 64))
    target = model(x)
    loss = lambda model: jnp.mean((model(x) - target) ** 2)
    ranks = {}
    for max_rise in (0.0, 0.05, 1.0):
        model = Model()
        chain = optax.chain(optax.sgd(0.0), prune_spectrum(1, max_rise=max_rise))
        optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)

        @nnx.jit
        def train_step(model, optimizer):
            graph, _, rest = nnx.split(model, nnx.Param, ...)
            value_fn = lambda params: loss(nnx.merge(graph, params, rest))
            optimizer.update(model, nnx.grad(loss)(model), value_fn=value_fn)

        train_step(model, optimizer)
        found = rmtjax.metrics(optimizer.opt_state)
        ranks[max_rise] = int(found["rank/first/kernel"])
        assert float(loss(model)) <= max(max_rise, 1e-6) * float(jnp.mean(target**2)) * 1.001
    assert ranks[0.0] == SIZE > ranks[0.05] > ranks[1.0] == RANK


@pytest.mark.parametrize("value", [-0.1, 1.5, "0.1"])
def test_a_rise_that_is_no_share_is_refused(value):
    with pytest.raises((ValueError, TypeError), match="max_rise"):
        prune_spectrum(1, max_rise=value)
