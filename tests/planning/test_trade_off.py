"""Size against energy: every point is a plan, and one pass serves all of them."""

import numpy as np
import pytest
from helpers.plan_cases import planted

import rmtjax
from rmtjax import Budget

PARAMS = {f"{i}": {"kernel": planted((60, 80), 4 * i, i)} for i in range(3)}
PARAMS["small"] = {"kernel": np.ones((2, 3), np.float32)}


@pytest.fixture(scope="module")
def curve():
    return rmtjax.trade_off(PARAMS)


def test_the_curve_falls_in_size_and_rises_in_loss(curve):
    assert curve.sizes[0] == 3 * 4800 + 6
    assert curve.sizes[-1] == 3 * 8 * 140 + 6
    assert (np.diff(curve.sizes) < 0).all()
    assert (np.diff(curve.removed) >= 0).all()
    assert (curve.removed[0], curve.shares[0]) == (0, 1)
    # The steps that cost least come first.
    slopes = np.diff(curve.removed) / -np.diff(curve.sizes)
    assert (np.diff(slopes) > -1e-12).all()


def test_each_point_is_the_plan_of_its_size(curve):
    for place in (0, 3, len(curve.sizes) - 1):
        plan = curve.plan(Budget(parameters=int(curve.sizes[place])))
        assert plan.keys() == rmtjax.plan(PARAMS, budget=0.5).keys()
        rows = rmtjax.Report(plan).rows
        assert sum(row.parameters_after for row in rows) == curve.sizes[place]
        removed = [row.removed for row in rows if row.removed is not None]
        # Shares in float32.
        assert np.mean(removed) == pytest.approx(curve.removed[place], rel=1e-4, abs=1e-6)


def test_a_plan_of_the_curve_is_that_of_plan(curve):
    again = rmtjax.plan(PARAMS, budget=0.6)
    assert {p: row.reason for p, row in curve.plan(0.6).items()} == {
        p: row.reason for p, row in again.items()
    }


def test_a_curve_is_shown_without_what_was_measured(curve):
    assert repr(curve).startswith("TradeOff(sizes=array([14406,")
    assert "findings" not in repr(curve)


def test_a_tree_that_cannot_be_cut_has_one_point():
    curve = rmtjax.trade_off({"kernel": np.ones((2, 3), np.float32)})
    np.testing.assert_array_equal(curve.sizes, [6])
    np.testing.assert_array_equal(curve.removed, [0])
