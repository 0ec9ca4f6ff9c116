"""Plans by measured time: what does not win keeps its shape. No test measures anything."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from helpers.linen_checks import Fixed

import rmtjax
from rmtjax import Factors, KernelAxes, ranks
from rmtjax.planning import _cost, _plan

GENERAL = KernelAxes((0, 1), (2, 3))


class Clock:
    """In the place of `time_products`: dense kernels take a millisecond, factors `thin`."""

    def __init__(self, thin):
        self.thin, self.seen = thin, []

    def __call__(self, product):
        self.seen.append(product)
        return np.asarray([[1.0 if rank is None else self.thin for rank in product.ranks]] * 5)


@pytest.fixture
def clock(monkeypatch):
    """Sets a clock for a test."""

    def set_clock(thin):
        clock = Clock(thin)
        monkeypatch.setattr(_cost, "time_products", clock)
        return clock

    return set_clock


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def make_plan(params, rank=8, **options):
    return rmtjax.plan(params, rule=Fixed(rank), **options)


def row_of(kernel, name="kernel", **options):
    (row,) = make_plan({name: kernel}, **options).values()
    return row


def num_parameters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


WORDS = "8 of 60 are signal, rank 8"


def test_factors_that_win_are_made(clock):
    clock(0.25)
    row = row_of(normal(60, 80), batch=128)
    assert (row.action, row.reason) == ("factorize", f"factorized: {WORDS}")
    assert row.cost == (4800, 128 * 4800, 1.0, 1120, 128 * 1120, 0.25)


@pytest.mark.parametrize(("thin", "told"), [(1.5, "1.5"), (1.0, "1"), (0.97, "0.97")])
def test_factors_that_do_not_win_are_not_made_but_the_rank_goes_down(clock, thin, told):
    clock(thin)
    params = {"kernel": normal(60, 80)}
    plan = make_plan(params, batch=128)
    row = plan["kernel"]
    assert (row.action, row.rank) == ("truncate", 8)
    assert row.reason == f"truncated: no clear gain in time, {told} ms against 1 ({WORDS})"
    assert row.cost == (4800, 128 * 4800, 1.0) * 2
    lower = rmtjax.factorize(params, plan)["kernel"]
    assert lower.shape == (60, 80)
    assert np.linalg.matrix_rank(lower) == 8


def test_without_a_batch_nothing_is_timed_and_costs_are_told(clock):
    assert row_of(normal(60, 80)).cost == (4800, 4800, None, 1120, 1120, None)
    seen = clock(2.0).seen
    assert row_of(normal(60, 80)).action == "factorize"
    assert not seen


def test_kernels_that_are_alike_are_timed_once(clock):
    seen = clock(0.5).seen
    kernels = [normal(60, 80), normal(60, 80), normal(80, 60), normal(60, 80, dtype=np.float16)]
    params = {f"{i}": {"kernel": kernel} for i, kernel in enumerate(kernels)}
    params |= {"4": {"embedding": normal(60, 80)}, "5": {"embedding": normal(60, 80)}}
    make_plan(params, batch=16)
    told = [(p.rows, p.sides, p.dtype.name, p.lookup, p.ranks) for p in seen]
    assert told == [
        (16, (60, 80), "float32", False, (None, 8)),
        (16, (80, 60), "float32", False, (None, 8)),
        (16, (60, 80), "float16", False, (None, 8)),
        (16, (60, 80), "float32", True, (None, 8)),
    ]
    make_plan({"kernel": kernels[0]}, batch=16)
    assert len(seen) == 5  # each plan measures anew


def test_what_stays_is_timed_as_it_is(clock):
    seen = clock(0.5).seen
    params = {
        "head": {"kernel": normal(60, 10)},
        "full": {"kernel": normal(60, 64)},
        "no saving": {"kernel": normal(100, 100)},
        "integer": {"kernel": np.ones((60, 80), np.int8)},
        "no matrix": {"kernel": normal(3, 60, 80)},
        "empty": {"kernel": normal(0, 80)},
    }
    plan = make_plan(params, rank=60, batch=4)
    assert [product.ranks for product in seen] == [(None,)] * 3
    assert [row.action for row in plan.values()].count("truncate") == 1
    timed = [row.cost.milliseconds for row in plan.values()]
    assert timed == [row.cost.milliseconds_after for row in plan.values()]
    assert timed == [
        None if path in ("integer/kernel", "no matrix/kernel", "empty/kernel") else 1.0
        for path in plan
    ]
    assert plan["no matrix/kernel"].cost.multiply_adds == 4 * 3 * 60 * 80


def test_each_kernel_has_its_own_rows_and_what_has_none_is_not_timed(clock):
    seen = clock(2.0).seen
    params = {name: {"kernel": normal(60, 80)} for name in "abc"}
    plan = make_plan(params, batch={"a/kernel": 2, "c/kernel": np.int64(30)})
    assert [product.rows for product in seen] == [2, 30]
    assert [row.action for row in plan.values()] == ["truncate", "factorize", "truncate"]
    assert [row.cost.multiply_adds for row in plan.values()] == [2 * 4800, 4800, 30 * 4800]
    assert plan["b/kernel"].cost.milliseconds is None


def test_the_members_of_a_stack_are_timed_as_one_and_counted_each(clock):
    seen = clock(0.5).seen
    axes = {"kernel": KernelAxes((1,), (2,), (0,))}
    cost = row_of(normal(3, 60, 80), axes=axes, batch=16).cost
    assert (seen[0].sides, cost.milliseconds, cost.milliseconds_after) == ((60, 80), 3.0, 1.5)
    assert cost.multiply_adds_after == 16 * cost.parameters_after == 16 * 3 * 1120


def test_factors_are_timed_against_thinner_ones(monkeypatch):
    params = {"kernel": Factors(jnp.asarray(normal(60, 24)), jnp.asarray(normal(24, 80)))}
    times = {24: 1.0, 8: 0.5}
    monkeypatch.setattr(
        _cost, "time_products", lambda product: np.asarray([[times[r] for r in product.ranks]] * 5)
    )
    row = make_plan(params, batch=16)["kernel"]
    assert row.reason == "factorized again: 8 of 24 are signal, rank 8"
    assert row.cost == (24 * 140, 16 * 24 * 140, 1.0, 8 * 140, 16 * 8 * 140, 0.5)
    times[8] = 1.0
    plan = make_plan(params, batch=16)
    assert plan["kernel"].reason == (
        "truncated: no clear gain in time, 1 ms against 1 (8 of 24 are signal, rank 8)"
    )
    assert plan["kernel"].cost == (24 * 140, 16 * 24 * 140, 1.0) * 2
    assert rmtjax.factorize(params, plan)["kernel"].left.shape == (60, 24)


KINDS = {
    "dense": (normal(60, 80), "kernel", None),
    "embedding": (normal(90, 60), "embedding", None),
    "convolution": (normal(3, 3, 20, 60), "kernel", {"kernel": KernelAxes((0, 1, 2), (3,))}),
    "several": (normal(6, 10, 4, 20), "kernel", {"kernel": GENERAL}),
    "stack": (normal(3, 60, 80), "kernel", {"kernel": KernelAxes((1,), (2,), (0,))}),
    "turned": (normal(60, 80), "kernel", {"kernel": KernelAxes((1,), (0,))}),
    "factors": (Factors(jnp.ones((60, 24)), jnp.asarray(normal(24, 80))), "kernel", None),
    "stack of factors": (
        Factors(jnp.asarray(normal(3, 60, 24)), jnp.asarray(normal(3, 24, 80))),
        "kernel",
        None,
    ),
}


@pytest.mark.parametrize(("kernel", "name", "axes"), KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("thin", [0.5, 1.5])
def test_parameters_are_those_of_the_trees_before_and_after(kernel, name, axes, thin, clock):
    clock(thin)
    params = {name: kernel}
    plan = make_plan(params, axes=axes, batch=4)
    assert plan[name].cost.parameters == num_parameters(params)
    assert plan[name].cost.parameters_after == num_parameters(rmtjax.factorize(params, plan))


def test_shrinkage_stays_with_what_does_not_win(clock):
    clock(2.0)
    rule = ranks.bema(tolerance=1.0)
    kernel = normal(60, 80)
    kernel[:, :2] += 5
    shrink = rmtjax.shrinkage.frobenius
    row = rmtjax.plan({"kernel": kernel}, rule=rule, shrink=shrink, batch=4)["kernel"]
    assert (row.action, row.shrink) == ("truncate", shrink)
    assert row.reason.endswith("rank 8, shrunk)")


@pytest.mark.parametrize("batch", [0, 1.5, {"kernel": 0}, {"bias": 1}], ids=str)
def test_a_wrong_batch_is_refused_before_anything_is_computed(batch, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(_plan, "measure", None)
    with pytest.raises(ValueError, match=r"^`batch"):
        rmtjax.plan({"kernel": normal(60, 80)}, batch=batch)
