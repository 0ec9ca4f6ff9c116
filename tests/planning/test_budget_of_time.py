"""Budgets of milliseconds, by a clock that is given: no time is measured."""

import numpy as np
import pytest
from helpers.plan_cases import Count, planted

import rmtjax
from rmtjax import Budget, KernelAxes, planning
from rmtjax.planning import PlanOptions
from rmtjax.planning._cost import MOST_RANKS


class Clock:
    """Factors take a millisecond for each 10,000 products and `start`; others `dense` as long."""

    def __init__(self, start=0.1, dense=1.0):
        self.start, self.dense, self.seen = start, dense, []

    def time(self, product, rank):
        (m, n), rows = product.sides, product.rows
        numbers = m * n * self.dense if rank is None else rank * (m + n)
        return self.start + rows * numbers / 1e4

    def __call__(self, product):
        self.seen.append(product)
        return np.asarray([[self.time(product, rank) for rank in product.ranks]] * 3)


PARAMS = {name: {"kernel": planted((60, 80), seed=seed)} for seed, name in enumerate("abc", 3)}


def plan_in(milliseconds, params=PARAMS, clock=None, **options):
    known = {"rule": Count(1), "min_size": 1, "batch": 1} | options
    known["budget"] = Budget(milliseconds=milliseconds)
    return planning.make_plan(params, PlanOptions(**known), clock or Clock())


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_plan_takes_at_most_the_time_and_a_step_less(share):
    whole = 3 * Clock().time(planning._cost.Product(1, (60, 80), np.float32, False, ()), None)
    clock = Clock()
    plan = plan_in(share * whole, clock=clock)
    cost = rmtjax.Report(plan).totals
    np.testing.assert_allclose(cost.milliseconds, whole)
    step = 8 * 140 / 1e4  # of a rank, rounded up to eight
    assert share * whole - step <= cost.milliseconds_after <= share * whole
    assert {row.rank % 8 for row in plan.values() if row.action == "factorize"} == {0}
    # A kernel is timed once, with all ranks that save numbers, and no more for its row.
    assert {product.ranks for product in clock.seen} == {(None, 8, 16, 24, 32)}
    assert len(clock.seen) == len(PARAMS)


def test_ranks_that_are_slower_than_the_kernel_are_not_chosen():
    # By this clock factors win at rank 8 alone: 0.1 + 0.112 ms against 0.1 + 0.12.
    clock = Clock(dense=0.25, start=0.0)
    plan = plan_in(0.35, clock=clock)
    cut = [row for row in plan.values() if row.action == "factorize"]
    assert {row.rank for row in cut} == {8}
    assert rmtjax.Report(plan).totals.milliseconds_after <= 0.35
    kept = [row for row in plan.values() if row.action == "keep"]
    assert {row.reason for row in kept} <= {"kept: whole under the budget"}


def test_a_large_kernel_is_timed_at_few_ranks():
    clock = Clock()
    params = {"kernel": planted((60, 80))}
    plan = plan_in(0.4, params, clock, multiple=1)
    (product,) = clock.seen
    assert len(product.ranks) == 1 + MOST_RANKS
    assert plan["kernel"].rank in product.ranks


def test_stacks_take_turns_and_kernels_without_rows_stay():
    axes = {"s/kernel": KernelAxes((1,), (2,), (0,)), "a/kernel": KernelAxes((0,), (1,))}
    params = {"s": {"kernel": planted((3, 60, 80))}, "a": PARAMS["a"]}
    dense = 0.1 + 0.48
    plan = plan_in(2.5 * dense, params, axes=axes, batch={"s/kernel": 1})
    cost = plan["s/kernel"].cost
    np.testing.assert_allclose(cost.milliseconds, 3 * dense)
    assert cost.milliseconds_after <= 2.5 * dense
    assert plan["a/kernel"].reason == "kept: not timed, so that a budget of time does not cut it"


def test_a_budget_of_time_that_cannot_be_met_names_kernel_and_remedy():
    with pytest.raises(ValueError, match="`batch` must be given with a budget of milliseconds"):
        plan_in(1.0, batch=None)
    words = (
        r"`budget` allows 0.3 ms, and the smallest plan has 0.\d+ ms: of these, 0.212 ms are in "
        "'[abc]/kernel', at its smallest, .* lower `min_rank`"
    )
    with pytest.raises(ValueError, match=words):
        plan_in(0.3)
    with pytest.raises(ValueError, match="'a/kernel', which cannot be cut"):
        plan_in(0.3, {"a": {"kernel": planted((60, 80)) * np.nan}, "b": PARAMS["b"]})
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="`milliseconds` of a `Budget` must be a number above"):
            Budget(milliseconds=wrong)
