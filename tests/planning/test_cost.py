"""The cost of kernels: counts against XLA's own, the verdict on times, and the clock."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, strategies as st

import rmtjax
from rmtjax import Factors, KernelAxes
from rmtjax._axes import KernelLeaf, MatrixView
from rmtjax.planning import _cost
from rmtjax.planning._cost import Cost, Product

MATRIX, CONV, STACK = (
    KernelAxes((0,), (1,)),
    KernelAxes((0, 1, 2), (3,)),
    KernelAxes((1,), (2,), (0,)),
)


def factors_win(product):
    """A clock by which each alternative takes half of the time of the one before."""
    return np.asarray([[0.5**i for i in range(len(product.ranks))]])


def cost_of(leaf, axes, rows=None, *, rank=None, path="kernel"):
    """The cost of a leaf whose factors get a rank; with rows, they win."""
    view = KernelLeaf(path, leaf) if axes is None else MatrixView(path, leaf, axes)
    rank = rank or (view.rank if axes else None)
    return _cost.weigh(view, rank, rows, factors_win)[0]


def flops(function, *arguments):
    """What XLA counts in a compiled function: two for a multiplication with its addition."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis().get("flops", 0)


@pytest.mark.parametrize("rank", [None, 6])
def test_multiply_adds_are_those_that_xla_counts(rank):
    product = Product(50, (24, 18), np.dtype(np.float32), False, (rank,))
    cost = cost_of(jnp.ones((24, 18)), MATRIX, 50, rank=rank)
    counted = flops(partial(_cost.compute, False), *_cost.operands(product, rank))
    assert 2 * cost.multiply_adds_after == counted


def test_an_embedding_multiplies_after_its_lookup():
    product = Product(50, (24, 18), np.dtype(np.float32), True, (6,))
    indices, left, right = _cost.operands(product, 6)
    lookup = partial(_cost.compute, True)
    cost = cost_of(jnp.ones((24, 18)), MATRIX, 50, rank=6, path="Embed_0/embedding")
    # XLA counts the comparisons of indices with their bounds as well.
    counted = flops(lookup, indices, left, right) - flops(lookup, indices, left)
    assert (cost.multiply_adds, 2 * cost.multiply_adds_after) == (0, counted)
    assert (cost.parameters, cost.parameters_after) == (432, 252)


def test_a_convolution_has_the_multiply_adds_of_flax_at_every_position():
    images = jnp.ones((2, 8, 8, 5))
    module = nn.Conv(7, (3, 3), padding="VALID", use_bias=False)
    variables = module.init(jax.random.key(0), images)
    cost = cost_of(variables["params"]["kernel"], CONV, 2 * 6 * 6)
    assert 2 * cost.multiply_adds == flops(module.apply, variables, images)
    grouped = nn.Conv(10, (3, 3), padding="VALID", use_bias=False, feature_group_count=5)
    variables = grouped.init(jax.random.key(0), images)
    cost = cost_of(variables["params"]["kernel"], None, 2 * 6 * 6)
    assert 2 * cost.multiply_adds == flops(grouped.apply, variables, images)


def test_a_stack_costs_what_its_members_do():
    stack, x = jnp.ones((3, 24, 18)), jnp.ones((3, 50, 24))
    cost = cost_of(stack, STACK, 50, rank=4)
    assert 2 * cost.multiply_adds == flops(jnp.matmul, x, stack)
    assert (cost.parameters, cost.parameters_after) == (3 * 24 * 18, 3 * 4 * (24 + 18))
    assert cost.multiply_adds_after == 50 * cost.parameters_after


def test_without_rows_multiply_adds_are_those_of_one():
    assert cost_of(jnp.ones((24, 18)), MATRIX, rank=4) == Cost(432, 432, None, 168, 168, None)
    factors = Factors(jnp.ones((24, 6)), jnp.ones((6, 18)))
    assert cost_of(factors, MATRIX, rank=4) == Cost(252, 252, None, 168, 168, None)
    assert cost_of(1.0, None) == Cost(1, 1, None, 1, 1, None)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_what_is_timed_computes_what_layers_do(transform):
    keys = jax.random.split(jax.random.key(0), 3)
    x, left, right = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, [(5, 24), (24, 6), (6, 18)], strict=True)
    )
    wide = lambda a: np.asarray(a, np.float64)
    compute = lambda lookup, *args: transform(partial(_cost.compute, lookup))(*args)
    # Sums of 24 and of 6 float32 products of normal numbers.
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(compute(False, x, left), wide(x) @ wide(left))
    close(compute(False, x, left, right), wide(x) @ wide(left) @ wide(right))
    rows = np.asarray([3, 0, 3, 23])
    close(compute(True, rows, left), wide(left)[rows])
    close(compute(True, rows, left, right), wide(left)[rows] @ wide(right))


VERDICTS = {
    "half": ([[2, 1]] * 4, True),
    "twice": ([[1, 2]] * 4, False),
    "equal": ([[1, 1]] * 4, False),
    "4 %": ([[1, 0.96]] * 4, False),
    "6 %": ([[1, 0.94]] * 4, True),
    "three of four rounds": ([[1, 0.5]] * 6 + [[1, 3]] * 2, False),  # a quarter lies between
    "four of five": ([[1, 0.5]] * 8 + [[1, 3]] * 2, True),
    "half of the rounds": ([[1, 0.5]] * 4 + [[1, 1]] * 4, False),
    "one round": ([[2, 1]], True),
    "faster by turns, as the machine gets slower": ([[10**k, 0.9 * 10**k] for k in range(5)], True),
}


@pytest.mark.parametrize(("times", "wins"), VERDICTS.values(), ids=VERDICTS.keys())
def test_a_win_is_clear_in_most_rounds(times, wins):
    assert _cost.is_faster(np.asarray(times, float)) is wins


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=12))
def test_what_wins_does_not_lose_as_well(times):
    times = np.asarray(times)
    assert not (_cost.is_faster(times) and _cost.is_faster(times[:, ::-1]))
    # Neighbours that come and go slow both of a round; powers of two round nothing.
    load = 2.0 ** np.arange(len(times))[:, None]
    assert _cost.is_faster(times * load) == _cost.is_faster(times)


PRODUCT = Product(128, (784, 1000), np.dtype(np.float32), False, (None, 32))


def test_real_times_are_positive_numbers():
    times = _cost.time_products(PRODUCT)
    assert _cost.FEWEST_ROUNDS <= len(times) <= _cost.ROUNDS
    assert times.shape[1] == 2
    assert np.isfinite(times).all()
    assert (times > 0).all()


class Bursts:
    """A clock for tests: what is called for how often, at so many seconds a call."""

    def __init__(self, *seconds):
        self.seconds, self.seen, self.shapes = seconds, [], []

    def __call__(self, call, calls):
        operands = call.args
        self.shapes.append(operands[0].shape)
        self.seen.append((len(operands) - 2, calls))  # 0 dense, 1 thin
        return self.seconds[len(operands) - 2]


def small(rows=8, **changes):
    product = Product(rows, (12, 10), np.dtype(np.float32), False, (None, 3))
    return product._replace(**changes)


def test_alternatives_take_turns_in_bursts():
    bursts = Bursts(1e-4, 5e-6)
    times = _cost.time_products(small(), bursts)
    np.testing.assert_allclose(times, [[0.1, 0.005]] * 11, rtol=1e-12)
    warm, rounds = bursts.seen[:2], bursts.seen[2:]
    assert warm == [(0, 1), (1, 1)]
    assert rounds[:4] == [(1, 100), (0, 20), (0, 20), (1, 100)]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.4, 3), (2.0, 3), (0.05, 5), (0.001, 11)])
def test_a_slow_product_is_timed_a_few_times_only(seconds, rounds):
    bursts = Bursts(seconds, seconds)
    assert _cost.time_products(small(), bursts).shape == (rounds, 2)
    calls = sum(count for _, count in bursts.seen)
    assert calls * seconds <= max(_cost.BUDGET * 1.5, 8 * seconds)


def test_more_rows_than_fit_into_memory_are_told_from_fewer():
    bursts = Bursts(1e-3, 1e-3)
    times = _cost.time_products(small(rows=1000), bursts, most=120)
    assert set(bursts.shapes) == {(10, 12)}
    np.testing.assert_allclose(times, 100.0, rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_operands_have_the_shapes_and_the_dtype_of_the_kernel(dtype):
    product = small(dtype=np.dtype(dtype))
    shapes = lambda *args: [a.shape for a in _cost.operands(*args)]
    assert shapes(product, None) == [(8, 12), (12, 10)]
    assert shapes(product, 3) == [(8, 12), (12, 3), (3, 10)]
    assert {a.dtype for a in _cost.operands(product, 3)} == {np.dtype(dtype)}
    indices, table = _cost.operands(product._replace(lookup=True, rows=400), None)
    assert table.shape == (12, 10)
    assert set(indices.tolist()) == set(range(12))


def test_costs_add_up_with_or_without_times():
    assert _cost.add_costs([]) == Cost(0, 0, None, 0, 0, None)
    untimed, timed = Cost(1, 2, None, 3, 4, None), Cost(10, 20, 0.5, 30, 40, 0.25)
    assert _cost.add_costs([untimed, untimed]) == Cost(2, 4, None, 6, 8, None)
    assert _cost.add_costs([untimed, timed, timed]) == Cost(21, 42, 1.0, 63, 84, 0.5)


def test_rows_are_given_for_all_kernels_or_for_each():
    paths = ["a/kernel", "b/kernel"]
    assert _cost.rows_by_path(None, paths) == {}
    assert _cost.rows_by_path(7, paths) == {"a/kernel": 7, "b/kernel": 7}
    assert _cost.rows_by_path({"b/kernel": 3}, paths) == {"b/kernel": 3}


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8", None])
def test_wrong_rows_are_named_with_their_value(value, monkeypatch):
    # As users have it: the type checker of the tests would speak first, in its own words.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    make = partial(rmtjax.plan, {})
    if value is not None:
        with pytest.raises(ValueError, match=rf"^`batch` must be an integer .* got {value!r}\.$"):
            make(batch=value)
    with pytest.raises(ValueError, match=rf"^`batch\['kernel'\]` must be .* got {value!r}\.$"):
        make(batch={"kernel": value})


def test_rows_of_a_kernel_that_is_not_there_are_refused():
    with pytest.raises(ValueError, match=r"`batch` has 'b', which is none .*, such as 'a/kernel'"):
        _cost.rows_by_path({"a/kernel": 1, "b": 1}, ["c/kernel", "a/kernel"])
    with pytest.raises(ValueError, match=r"`batch` has 'b', which is none .*; there are none"):
        _cost.rows_by_path({"b": 1}, [])
