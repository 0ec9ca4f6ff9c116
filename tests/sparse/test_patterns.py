"""Patterns N:M against all patterns in float64, and orders of inputs."""

import inspect
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import patterns

PATTERNS = [(1, 2), (2, 4), (3, 4), (4, 8)]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_a_pattern_does_not_depend_on_the_scale(scale):
    kernel = draw(16, 6).astype(np.float32)
    wanted = patterns.nm_mask({"kernel": kernel}, (2, 4))["kernel"]
    scaled = {"kernel": kernel * np.float32(scale)}
    for inputs in (None, {"kernel": np.eye(16, dtype=np.float32)}):
        np.testing.assert_array_equal(
            patterns.nm_mask(scaled, (2, 4), inputs=inputs)["kernel"], wanted
        )


@pytest.mark.parametrize("dtype", [">f4", "f8", "i4"])
def test_a_reordered_leaf_of_numpy_keeps_its_dtype(dtype):
    kernel, order = (10 * draw(8, 3)).astype(dtype), np.arange(8)[::-1]
    moved = patterns.permute({"kernel": kernel}, order, {"kernel": 0})["kernel"]
    assert moved.dtype == kernel.dtype
    np.testing.assert_array_equal(moved, kernel[::-1])


def best_of_all(matrix, pattern, moments, prior=None, strength=0.0):
    """The mask of lowest cost: each group and output alone, over all patterns, in float64."""
    n, m = pattern
    mask = np.zeros(matrix.shape, bool)
    for start in range(0, len(matrix), m):
        rows = slice(start, start + m)
        block = moments[rows, rows]
        unit = strength * np.mean(matrix[rows] ** 2 * np.diag(block)[:, None])
        for column in range(matrix.shape[1]):
            u, costs = matrix[rows, column], {}
            for kept in itertools.combinations(range(m), n):
                stays = np.isin(np.arange(m), kept)
                d = np.where(stays, 0, u)
                far = 0 if prior is None else (stays != prior[rows, column]).sum()
                costs[kept] = d @ block @ d + unit * far
            mask[list(np.add(min(costs, key=costs.get), start)), column] = True
    return mask


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_largest_of_each_group_stay(wrap, pattern):
    matrix = draw(16, 6)
    mask_of = wrap(lambda params: patterns.nm_mask(params, pattern))
    mask = mask_of({"kernel": jnp.asarray(matrix, jnp.float32)})["kernel"]
    np.testing.assert_array_equal(mask, best_of_all(matrix, pattern, np.eye(16)))
    assert (mask.reshape(-1, pattern[1], 6).sum(1) == pattern[0]).all()


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("full", [False, True], ids=["squares", "products"])
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)], ids=str)
def test_moments_of_the_inputs_and_an_earlier_mask_decide(pattern, full, strength):
    matrix, data = draw(16, 6), draw(50, 16, seed=1) @ draw(16, 16, seed=2)
    moments, prior = data.T @ data / 50, draw(16, 6, seed=3) > 0
    if not full:
        moments = np.diag(np.diag(moments))
    inputs = {"kernel": moments if full else np.diag(moments)}
    mask = patterns.nm_mask(
        {"kernel": jnp.asarray(matrix, jnp.float32)},
        pattern,
        inputs=inputs,
        prior={"kernel": jnp.asarray(prior)},
        strength=strength,
    )["kernel"]
    expected = best_of_all(matrix, pattern, moments, prior, strength)
    np.testing.assert_array_equal(mask, expected)
    plain = patterns.nm_mask({"kernel": jnp.asarray(matrix, jnp.float32)}, pattern)["kernel"]
    assert (np.asarray(plain) != expected).any()


def test_groups_lie_along_the_input_channels_of_a_convolution_and_in_each_matrix_of_a_stack():
    conv = jnp.asarray(draw(3, 3, 8, 5), jnp.float32)
    layer = {"kernel": conv, "bias": jnp.zeros(5)}
    mask = patterns.nm_mask({"Conv_0": layer}, (2, 4))["Conv_0"]["kernel"]
    assert (mask.reshape(3, 3, 2, 4, 5).sum(3) == 2).all()
    stack = jnp.asarray(draw(3, 8, 5), jnp.float32)
    axes = lambda path, leaf: rmtjax.KernelAxes((1,), (2,), batch=(0,))
    mask = patterns.nm_mask({"kernel": stack}, (2, 4), axes=axes)["kernel"]
    for one, matrix in zip(mask, stack, strict=True):
        np.testing.assert_array_equal(one, patterns.nm_mask({"kernel": matrix}, (2, 4))["kernel"])


def planted(groups, m, seed=0):
    """Inputs of two sizes, so that all large ones share groups."""
    scale = np.repeat([1.0, 0.01], groups * m // 2)
    return draw(groups * m, 7, seed=seed) * scale[:, None]


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)], ids=str)
def test_an_order_of_inputs_keeps_more(pattern):
    n, m = pattern
    matrix = planted(6, m)
    order, before, after = patterns.permute_inputs(matrix, pattern)
    kept = lambda matrix: np.sort(np.abs(matrix).reshape(-1, m, 7), axis=1)[:, m - n :].sum()
    np.testing.assert_allclose([before, after], [kept(matrix), kept(matrix[order])], rtol=1e-12)
    assert sorted(order) == list(range(6 * m))
    assert after > 1.2 * before


def test_the_search_finds_the_best_order_of_two_groups_and_never_loses():
    gains = []
    for seed in range(20):
        matrix = np.abs(draw(8, 3, seed=seed)) ** 3
        _order, before, after = patterns.permute_inputs(matrix, (2, 4), sweeps=5)
        kept = lambda rows: np.sort(matrix[list(rows)], axis=0)[2:].sum()  # noqa: B023
        best = max(
            kept(rows) + kept(set(range(8)) - set(rows))
            for rows in itertools.combinations(range(8), 4)
        )
        assert before <= after <= best * (1 + 1e-12)
        gains.append(after / best)
    # Swaps of two inputs end in a local optimum, of which most are the best of all.
    assert np.mean(np.isclose(gains, 1, rtol=1e-9)) > 0.8


def test_power_scales_the_inputs():
    matrix = planted(4, 4)
    power = draw(16, seed=5) ** 2
    one = patterns.permute_inputs(matrix, (2, 4), power=power)
    other = patterns.permute_inputs(matrix * np.sqrt(power)[:, None], (2, 4))
    np.testing.assert_array_equal(one.order, other.order)


def test_a_network_with_its_layers_in_another_order_computes_the_same():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.GroupNorm(1)(nn.Conv(8, (3, 3))(x)))
            x = nn.relu(nn.Conv(16, (3, 3))(x)).mean((1, 2))
            return nn.Dense(4)(x)

    net, x = Net(), jnp.asarray(draw(2, 5, 5, 3), jnp.float32)
    params = net.init(jax.random.key(0), x)["params"]
    # Of the second convolution, the channels of all places of its window together.
    kernel = np.moveaxis(np.asarray(params["Conv_1"]["kernel"]), 2, 0).reshape(8, -1)
    first = patterns.permute_inputs(kernel, (2, 4))
    between = {"Conv_0/kernel": 3, "Conv_0/bias": 0, "GroupNorm_0/scale": 0}
    between |= {"GroupNorm_0/bias": 0, "Conv_1/kernel": 2}
    same = patterns.permute(params, first.order, between)
    second = patterns.permute_inputs(same["Dense_0"]["kernel"], (2, 4))
    between = {"Conv_1/kernel": -1, "Conv_1/bias": -1, "Dense_0/kernel": 0}
    same = patterns.permute(same, second.order, between)
    assert (np.asarray(same["Conv_1"]["kernel"]) != params["Conv_1"]["kernel"]).any()
    # Sums in another order.
    np.testing.assert_allclose(
        net.apply({"params": same}, x), net.apply({"params": params}, x), atol=1e-5
    )


MASK, ORDER = map(inspect.unwrap, (patterns.nm_mask, patterns.permute_inputs))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: MASK(p, (4, 2)), r"`pattern` must be two integers \(N, M\) .* got \(4, 2\)"),
        (
            lambda p: MASK(p, (2, 5)),
            "`pattern` must divide .* groups of 5, and 'kernel' .* 8 inputs",
        ),
        (lambda p: MASK(p, (2, 4), strength=-1.0), "`strength` must be at least 0"),
        (lambda p: MASK(p, (2, 4), inputs={}), "`inputs` must have an entry .* none for 'kernel'"),
        (
            lambda p: MASK(p, (2, 4), inputs={"kernel": np.ones(3)}),
            r"`inputs` must have shape \(8,\)",
        ),
        (
            lambda p: ORDER(np.ones((6, 2)), (2, 4)),
            r"`matrix` must be .* groups of 4, got shape \(6, 2\)",
        ),
        (lambda p: ORDER(np.full((8, 2), np.nan), (2, 4)), "`matrix` must be finite"),
        (
            lambda p: patterns.permute(p, np.zeros(8, int), {"kernel": 0}),
            "`order` must have each index",
        ),
        (
            lambda p: patterns.permute(p, np.arange(8), {"kernel": 1}),
            r"`axes` must name leaves with an axis of length 8, got axis 1 of 'kernel', of shape",
        ),
        (
            lambda p: patterns.permute(p, np.arange(8), {"other": 0}),
            "`axes` must name leaves .* 'other', which is not in the tree",
        ),
    ],
    ids=range(10),
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call({"kernel": jnp.ones((8, 3))})
