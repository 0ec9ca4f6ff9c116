"""Plans by measured time: what does not win keeps its shape. No test measures anything."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from helpers.linen_checks import Fixed

import rmtjax
from rmtjax import Factors, KernelAxes, planning, ranks
from rmtjax.planning import PlanOptions

GENERAL = KernelAxes((0, 1), (2, 3))


class Clock:
    """In the place of `time_products`: dense kernels take a millisecond, factors `thin`."""

    def __init__(self, thin):
        self.thin, self.seen = thin, []

    def __call__(self, product):
        self.seen.append(product)
        return np.asarray([[1.0 if rank is None else self.thin for rank in product.ranks]] * 5)


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def make_plan(params, clock=None, rank=8, **options):
    options = PlanOptions(**{"rule": Fixed(rank)} | options)
    return planning.make_plan(params, options, clock and functools.cache(clock))


def row_of(kernel, clock=None, name="kernel", **options):
    (row,) = make_plan({name: kernel}, clock, **options).values()
    return row


def num_parameters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


WORDS = "rank 8 of 60, as asked by the rule"


def test_factors_that_win_are_made():
    row = row_of(normal(60, 80), Clock(0.25), batch=128)
    assert (row.action, row.reason) == ("factorize", f"factorized: {WORDS}")
    assert row.cost == (4800, 128 * 4800, 1.0, 1120, 128 * 1120, 0.25)


@pytest.mark.parametrize(("thin", "words"), [(1.5, "1.5"), (1.0, "1"), (0.97, "0.97")])
def test_factors_that_do_not_win_are_not_made_but_the_rank_goes_down(thin, words):
    params = {"kernel": normal(60, 80)}
    plan = make_plan(params, Clock(thin), batch=128)
    row = plan["kernel"]
    assert (row.action, row.rank) == ("truncate", 8)
    assert row.reason == f"truncated: no clear gain in time, {words} ms against 1 ({WORDS})"
    assert row.cost == (4800, 128 * 4800, 1.0) * 2
    lower = rmtjax.factorize(params, plan)["kernel"]
    assert lower.shape == (60, 80)
    assert np.linalg.matrix_rank(lower) == 8


def test_without_a_batch_nothing_is_timed_and_costs_are_counted():
    clock = Clock(2.0)
    row = row_of(normal(60, 80), clock)
    assert row.cost == (4800, 4800, None, 1120, 1120, None)
    assert row.action == "factorize"
    assert not clock.seen


def test_kernels_with_the_same_product_are_timed_once():
    clock = Clock(0.5)
    kernels = [normal(60, 80), normal(60, 80), normal(80, 60), normal(60, 80, dtype=np.float16)]
    params = {f"{i}": {"kernel": kernel} for i, kernel in enumerate(kernels)}
    params |= {"4": {"embedding": normal(60, 80)}, "5": {"embedding": normal(60, 80)}}
    make_plan(params, clock, batch=16)
    timed = [(p.rows, p.sides, p.dtype.name, p.lookup, p.ranks) for p in clock.seen]
    assert timed == [
        (16, (60, 80), "float32", False, (None, 8)),
        (16, (80, 60), "float32", False, (None, 8)),
        (16, (60, 80), "float16", False, (None, 8)),
        (16, (60, 80), "float32", True, (None, 8)),
    ]
    make_plan({"kernel": kernels[0]}, clock, batch=16)
    assert len(clock.seen) == 5  # each plan measures anew


def test_what_stays_is_timed_as_it_is():
    clock = Clock(0.5)
    params = {
        "head": {"kernel": normal(60, 10)},
        "full": {"kernel": normal(60, 64)},
        "no saving": {"kernel": normal(100, 100)},
        "integer": {"kernel": np.ones((60, 80), np.int8)},
        "no matrix": {"kernel": normal(3, 60, 80)},
        "empty": {"kernel": normal(0, 80)},
    }
    plan = make_plan(params, clock, rank=60, batch=4)
    assert [product.ranks for product in clock.seen] == [(None,)] * 3
    assert [row.action for row in plan.values()].count("truncate") == 1
    timed = [row.cost.milliseconds for row in plan.values()]
    assert timed == [row.cost.milliseconds_after for row in plan.values()]
    assert timed == [
        None if path in ("integer/kernel", "no matrix/kernel", "empty/kernel") else 1.0
        for path in plan
    ]
    assert plan["no matrix/kernel"].cost.multiply_adds == 4 * 3 * 60 * 80


def test_each_kernel_has_its_own_rows_and_what_has_none_is_not_timed():
    clock = Clock(2.0)
    params = {name: {"kernel": normal(60, 80)} for name in "abc"}
    plan = make_plan(params, clock, batch={"a/kernel": 2, "c/kernel": np.int64(30)})
    assert [product.rows for product in clock.seen] == [2, 30]
    assert [row.action for row in plan.values()] == ["truncate", "factorize", "truncate"]
    assert [row.cost.multiply_adds for row in plan.values()] == [2 * 4800, 4800, 30 * 4800]
    assert plan["b/kernel"].cost.milliseconds is None


def test_the_members_of_a_stack_are_timed_as_one_and_counted_each():
    clock = Clock(0.5)
    axes = {"kernel": KernelAxes((1,), (2,), (0,))}
    cost = row_of(normal(3, 60, 80), clock, axes=axes, batch=16).cost
    assert (clock.seen[0].sides, cost.milliseconds, cost.milliseconds_after) == ((60, 80), 3.0, 1.5)
    assert cost.multiply_adds_after == 16 * cost.parameters_after == 16 * 3 * 1120


def test_factors_are_timed_against_thinner_ones():
    params = {"kernel": Factors(jnp.asarray(normal(60, 24)), jnp.asarray(normal(24, 80)))}
    times = {24: 1.0, 8: 0.5}
    clock = lambda product: np.asarray([[times[rank] for rank in product.ranks]] * 5)
    row = make_plan(params, clock, batch=16)["kernel"]
    assert row.reason == "factorized again: rank 8 of 24, as asked by the rule"
    assert row.cost == (24 * 140, 16 * 24 * 140, 1.0, 8 * 140, 16 * 8 * 140, 0.5)
    times[8] = 1.0
    plan = make_plan(params, clock, batch=16)
    assert plan["kernel"].reason == (
        "truncated: no clear gain in time, 1 ms against 1 (rank 8 of 24, as asked by the rule)"
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
def test_parameters_are_those_of_the_trees_before_and_after(kernel, name, axes, thin):
    params = {name: kernel}
    plan = make_plan(params, Clock(thin), axes=axes, batch=4)
    assert plan[name].cost.parameters == num_parameters(params)
    assert plan[name].cost.parameters_after == num_parameters(rmtjax.factorize(params, plan))


def test_shrinkage_stays_with_what_does_not_win():
    rule = ranks.bema(tolerance=1.0)
    kernel = normal(60, 80)
    kernel[:, :2] += 5
    shrink = rmtjax.shrinkage.frobenius
    row = row_of(kernel, Clock(2.0), rule=rule, shrink=shrink, batch=4)
    assert (row.action, row.shrink) == ("truncate", shrink)
    assert row.reason.endswith("rank 8, shrunk)")


class Untouchable:
    """A kernel that may not be read."""

    shape, dtype = (60, 80), np.dtype(np.float32)

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("read")


@pytest.mark.parametrize("batch", [0, 1.5, {"kernel": 0}, {"bias": 1}], ids=str)
def test_a_wrong_batch_is_refused_before_anything_is_computed(batch, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"^`batch"):
        rmtjax.plan({"kernel": Untouchable()}, batch=batch)
    with pytest.raises(AssertionError, match="read"):
        rmtjax.plan({"kernel": Untouchable()}, batch=1)
