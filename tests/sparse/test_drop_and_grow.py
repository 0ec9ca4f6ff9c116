"""`drop_and_grow`: the number of entries, what goes, what comes, and moments, against NumPy."""

import functools
import inspect
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.slow import slow_except
from helpers.transform_checks import run_from

import rmtjax
from rmtjax import drop_and_grow, sparsity

STATIC = ("inner", "density", "grow", "mask", "distribution", "group", "seed", "where", "axes")
OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.01)),
    "masked": optax.chain(optax.masked(optax.trace(0.9), {"a": True, "b": False}), optax.sgd(0.1)),
    "factored": optax.adafactor(0.01, min_dim_size_to_factor=4),
}


def make_params(seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {
        "a": {"kernel": normal(12, 20), "bias": normal(20)},
        "b": {"kernel": normal(20, 5), "bias": normal(5)},
    }


def make_gradients(seed):
    return make_params(seed + 100)


def run(optimizer, num_steps, wrap=jax.jit):
    """Parameters and states after each step, from those of this file on."""
    return run_from(make_params(), make_gradients, optimizer, num_steps, wrap)


def masks_of(state):
    return {path: np.asarray(mask) for path, mask in state.sparse.masks.items()}


@pytest.mark.parametrize("name", slow_except(("adamw", "masked"), tuple(OPTIMIZERS)))
def test_the_number_of_entries_is_the_same_after_each_step(name):
    drop = optax.cosine_decay_schedule(0.5, 12)
    history = run(drop_and_grow(OPTIMIZERS[name], 3, density=0.3, drop=drop), 13)
    counts = {path: mask.sum() for path, mask in masks_of(history[0][1]).items()}
    assert sum(counts.values()) == pytest.approx(0.3 * 340, abs=1)
    moves = 0
    for (_, before), (params, state) in itertools.pairwise(history):
        masks = masks_of(state)
        assert {path: mask.sum() for path, mask in masks.items()} == counts
        for path, mask in masks.items():
            kernel = np.asarray(params[path[0]]["kernel"])
            assert not kernel[~mask].any()
            moves += (mask & ~masks_of(before)[path]).sum()
        assert not any((params[name]["bias"] == 0).any() for name in params)
    assert moves > 0.5 * sum(counts.values())


@pytest.mark.parametrize("grow", ["random", "gradient"])
def test_the_smallest_go_and_the_right_ones_come(grow):
    mask = sparsity.random_mask(make_params(), 0.4, seed=3)
    params = jax.tree.map(jnp.multiply, make_params(), mask)
    optimizer = drop_and_grow(optax.sgd(0.1), 1, mask=mask, drop=0.25, grow=grow)
    gradients = make_gradients(0)
    updates, state = optimizer.update(gradients, optimizer.init(params), params)
    landed = optax.apply_updates(params, updates)
    for path, now in masks_of(state).items():
        old = np.asarray(mask[path[0]]["kernel"])
        kernel, gradient = (
            np.asarray(tree[path[0]]["kernel"], np.float64) for tree in (params, gradients)
        )
        moved = np.where(old, kernel - 0.1 * gradient, 0)
        count = round(0.25 * old.sum())
        order = np.argsort(np.where(old, np.abs(moved), np.inf).ravel(), kind="stable")
        stays = old.copy().ravel()
        stays[order[:count]] = False
        np.testing.assert_array_equal(now.ravel()[stays], True)
        grown = now & ~stays.reshape(now.shape)
        assert grown.sum() == count
        assert not (grown & old).any()  # what has just been dropped does not come back at once
        if grow == "gradient":
            score = np.where(old, -1, np.abs(gradient)).ravel()
            np.testing.assert_array_equal(
                np.flatnonzero(grown), np.sort(np.argsort(-score)[:count])
            )
        expected = np.where(stays.reshape(now.shape), moved, 0)
        # One product and one difference are rounded.
        np.testing.assert_allclose(landed[path[0]]["kernel"], expected, atol=1e-6)


def test_moments_are_zero_where_the_mask_was_and_new_entries_begin_afresh():
    optimizer = drop_and_grow(optax.adam(0.01), 4, density=0.3, drop=0.5)
    history = run(optimizer, 9)
    for (_, before), (_, state) in itertools.pairwise(history):
        adam = state.inner_state[0]
        for path, mask in masks_of(state).items():
            stays = mask & masks_of(before)[path]
            for moment in (adam.mu, adam.nu):
                values = np.asarray(moment[path[0]]["kernel"])
                assert not values[~stays].any()
                assert values[stays].all()
        assert np.asarray(adam.nu["a"]["bias"]).all()


def test_random_growth_reaches_all_places_alike():
    grown = np.zeros((12, 20))
    mask = {"a": {"kernel": jnp.zeros((12, 20), bool).at[0].set(True)}}
    params = {"a": {"kernel": jnp.ones((12, 20)) * mask["a"]["kernel"]}}
    for seed in range(60):
        optimizer = drop_and_grow(optax.sgd(0.0), 1, mask=mask, drop=1.0, seed=seed)
        _, state = optimizer.update(optax.tree.zeros_like(params), optimizer.init(params), params)
        grown += np.asarray(state.sparse.masks["a/kernel"])
    assert not grown[0].any()
    # 60 draws of 20 places in 220: chi-squared with 219 degrees has mean 219, deviation 21.
    expected = 60 * 20 / 220
    assert ((grown[1:] - expected) ** 2).sum() / expected < 219 + 4 * 21


def test_gates_of_a_cell_share_their_entries():
    draw = np.random.default_rng(0).normal
    gates = {f"h{gate}": (8, 8) for gate in "ifgo"} | {f"i{gate}": (5, 8) for gate in "ifgo"}
    kernel = lambda shape: {"kernel": jnp.asarray(draw(size=shape), jnp.float32)}
    params = {"cell": {gate: kernel(shape) for gate, shape in gates.items()}}
    optimizer = drop_and_grow(optax.sgd(0.0), 1, density=0.5, drop=0.5, distribution="uniform")
    state = optimizer.init(params)
    # Weights of the forget gate are large, so that the others lose theirs to it or to one another.
    scale = lambda path, leaf: leaf * (100.0 if "hf" in jax.tree_util.keystr(path) else 1.0)
    params = jax.tree_util.tree_map_with_path(scale, params)
    count = lambda state, gates: {
        path: int(mask.sum()) for path, mask in state.sparse.masks.items() if f"/{gates}" in path
    }
    start = count(state, "h")
    assert len(start) == 4
    assert sum(start.values()) == 4 * 64 // 2
    for _ in range(6):
        updates, state = optimizer.update(optax.tree.zeros_like(params), state, params)
        params = optax.apply_updates(params, updates)
        assert sum(count(state, "h").values()) == 4 * 64 // 2
        assert sum(count(state, "i").values()) == 4 * 40 // 2
    assert len(set(count(state, "h").values())) > 1
    alone = drop_and_grow(
        optax.sgd(0.0), 1, density=0.5, distribution="uniform", group=lambda path: path
    )
    counts = {
        int(mask.sum()) for path, mask in alone.init(params).sparse.masks.items() if "/h" in path
    }
    assert counts == {32}


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        (lambda rngs: nnx.LSTMCell(5, 8, rngs=rngs), {"h*/kernel", "i*/kernel"}),
        (lambda rngs: nnx.OptimizedLSTMCell(5, 8, rngs=rngs), {"dense_h/kernel", "dense_i/kernel"}),
        (lambda rngs: nnx.GRUCell(5, 8, rngs=rngs), {"dense_h/kernel", "dense_i/kernel"}),
    ],
    ids=["LSTM", "OptimizedLSTM", "GRU"],
)
def test_gates_of_cells_of_nnx_are_known(cell, names):
    params = nnx.to_pure_dict(nnx.state(cell(nnx.Rngs(0)), nnx.Param))
    paths = [f"{layer}/kernel" for layer, leaves in params.items() if "kernel" in leaves]
    assert {sparsity.cell_gates(path) for path in paths} == names


def test_gates_of_a_cell_of_linen_are_known():
    params = nn.GRUCell(8).init(jax.random.key(0), jnp.ones((2, 8)), jnp.ones((2, 5)))["params"]
    names = {sparsity.cell_gates(f"{layer}/kernel") for layer in params}
    assert names == {"h*/kernel", "i*/kernel"}


def test_nothing_is_compiled_again_and_scan_is_the_loop():
    optimizer = drop_and_grow(
        optax.adam(0.1), 2, density=0.3, drop=optax.linear_schedule(0.6, 0, 4)
    )
    traces = []

    def step(carry, gradients):
        traces.append(1)
        params, state = carry
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    gradients = [make_gradients(seed) for seed in range(5)]
    carry, compiled = (make_params(), optimizer.init(make_params())), jax.jit(step)
    for one in gradients:
        carry, _ = compiled(carry, one)
    assert len(traces) == 1
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    start = make_params(), optimizer.init(make_params())
    scanned, _ = jax.lax.scan(step, start, stacked)
    for path, mask in masks_of(carry[1]).items():
        np.testing.assert_array_equal(mask, masks_of(scanned[1])[path])
    # Two programs, which the compiler may have rounded in other places.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), carry[0], scanned[0])


def test_works_in_masked_partition_multi_steps_and_inject_hyperparams():
    sparse = drop_and_grow(optax.sgd(0.1), 1, density=0.25, drop=0.0, distribution="uniform")
    choose = lambda labels: optax.partition({"sparse": sparse, "plain": optax.sgd(0.1)}, labels)
    for optimizer in (
        optax.masked(sparse, {"a": True, "b": False}),
        choose({"a": "sparse", "b": "plain"}),
    ):
        params, _ = run(optimizer, 2)[2]
        assert (params["a"]["kernel"] != 0).sum() == 60
        assert (params["b"]["kernel"] != 0).all()
    params, _ = run(optax.MultiSteps(sparse, 2).gradient_transformation(), 4)[4]
    assert (params["a"]["kernel"] != 0).sum() == 60
    injected = optax.inject_hyperparams(drop_and_grow, STATIC)
    plain = {"every": 2, "density": 0.25, "drop": 0.5}
    one, other = (run(make(optax.sgd(0.1), **plain), 4)[4] for make in (injected, drop_and_grow))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), one[0], other[0])


def test_metrics_tell_density_and_what_has_moved():
    _, state = run(
        drop_and_grow(optax.sgd(0.1), 1, density=0.25, distribution="uniform", drop=0.2), 1
    )[1]
    found = rmtjax.metrics(state)
    assert found["density/a/kernel"] == 0.25
    np.testing.assert_allclose(found["moved/a/kernel"], 12 / 60, rtol=1e-6)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("distribution", ["erdos_renyi", "erdos_renyi_kernel", "uniform"])
def test_densities_are_those_of_their_formula(density, distribution):
    shapes = {
        "conv_0/kernel": (3, 3, 4, 16),
        "conv_1/kernel": (5, 1, 16, 8),
        "out/kernel": (64, 10),
    }
    layer = lambda shape: {"kernel": jnp.ones(shape), "bias": jnp.zeros(shape[-1:])}
    params = {path.split("/")[0]: layer(shape) for path, shape in shapes.items()}
    found = sparsity.layer_densities(params, density, distribution=distribution)
    sizes = {path: np.prod(shape) for path, shape in shapes.items()}
    total = sum(found[path] * sizes[path] for path in shapes)
    np.testing.assert_allclose(total, density * sum(sizes.values()), rtol=1e-12)

    def raw(shape):
        sides = {"uniform": [1], "erdos_renyi": shape[-2:], "erdos_renyi_kernel": shape}[
            distribution
        ]
        return sum(sides) / np.prod(sides)

    ratios = [found[path] / raw(shapes[path]) for path in shapes if found[path] < 1]
    np.testing.assert_allclose(ratios, ratios[:1] * len(ratios), rtol=1e-12)
    assert all(0 < value <= 1 for value in found.values())
    for path in shapes:  # a layer is full only if the common factor would make it more than full
        assert found[path] < 1 or max(ratios, default=0) * raw(shapes[path]) >= 1 - 1e-9


def test_random_masks_have_exact_counts_and_another_seed_is_another_mask():
    params = make_params()
    mask = sparsity.random_mask(params, {"a/kernel": 0.1, "b/kernel": 0.5})
    assert [int(mask[name]["kernel"].sum()) for name in "ab"] == [24, 50]
    assert mask["a"]["bias"].all()
    other = sparsity.random_mask(params, {"a/kernel": 0.1, "b/kernel": 0.5}, seed=1)
    assert (mask["a"]["kernel"] != other["a"]["kernel"]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, r"`density` must be in \(0, 1\], got 0.0"),
        ({"density": {"a/kernel": 2.0}}, r"`density` must be in \(0, 1\], got 2.0"),
        ({"density": {"a/kernel": 0.5}}, "`density` must have an entry .* none for 'b/kernel'"),
        ({"drop": 1.5}, r"`drop` must be in \[0, 1\], got 1.5"),
        ({"grow": "both"}, "`grow` must be .* got 'both'"),
        ({"every": 0}, "`every` must be an integer of at least 1, got 0"),
        ({"distribution": "normal"}, "`distribution` must be one of .* got 'normal'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, message):
    make = inspect.unwrap(drop_and_grow)
    with pytest.raises(ValueError, match=message):
        make(optax.sgd(0.1), **{"every": 1, **arguments}).init(make_params())


@pytest.mark.slow
def test_moments_inside_follow_factors_and_masks_stay():
    params = {
        "kernel": jnp.asarray(np.random.default_rng(0).normal(size=(80, 60)) + 1, jnp.float32)
    }
    optimizer = drop_and_grow(optax.trace(0.9), 1, density=0.5)
    _, state = optimizer.update(params, optimizer.init(params), params)
    thin = rmtjax.factorize(params, rmtjax.plan(params))
    moved = rmtjax.transfer_opt_state(state, params, thin)
    assert jax.tree.structure(moved.inner_state.trace) == jax.tree.structure(thin)
    np.testing.assert_array_equal(moved.sparse.masks["kernel"], state.sparse.masks["kernel"])
    # Factors have no entries to mask. They train on.
    updates, _ = optimizer.update(thin, moved, thin)
    assert jax.tree.all(jax.tree.map(lambda leaf: jnp.all(leaf != 0), updates))


def test_a_kernel_without_entries_has_no_mask():
    params = {"a": {"kernel": jnp.ones((60, 50))}, "none": {"kernel": jnp.zeros((0, 50))}}
    optimizer = rmtjax.drop_and_grow(optax.sgd(0.1), every=1, density=0.5)
    state = optimizer.init(params)
    assert state.sparse.masks.keys() == {"a/kernel"}
    updates, _ = optimizer.update(params, state, params)
    assert updates["none"]["kernel"].shape == (0, 50)
