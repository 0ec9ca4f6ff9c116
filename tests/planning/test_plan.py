"""Plans: a row with a reason for every kernel, whatever it is."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.plan_cases import assert_same_row, Count, GOOD, MATRIX, row_of, STACK

import rmtjax
from rmtjax import Factors, KernelAxes, ranks

NO_NOISE = "kept: no noise above rounding; of a truncated kernel `fits` must tell it"
BAD = {
    "NaN": (np.where(GOOD > 3, np.nan, GOOD), MATRIX, "kept: not finite"),
    "infinite": (np.where(GOOD > 3, np.inf, GOOD), MATRIX, "kept: not finite"),
    "zero": (np.zeros((60, 80), np.float32), MATRIX, "kept: all zero"),
    "rank one": (np.ones((60, 80), np.float32), MATRIX, NO_NOISE),
    "1 x 1": (np.ones((1, 1), np.float32), MATRIX, "kept: short side 1 under 50"),
    "empty": (np.ones((0, 80), np.float32), MATRIX, "kept: empty (shape (0, 80))"),
    "empty stack": (
        np.ones((0, 60, 80), np.float32),
        STACK,
        "kept: empty (shape (0, 60, 80))",
    ),
    "integer": (np.ones((60, 80), np.int8), MATRIX, "kept: not floating (int8)"),
    "complex": (np.ones((60, 80), np.complex64), MATRIX, "kept: not floating (complex64)"),
    "float8": (np.ones((60, 80), jnp.float8_e4m3fn), MATRIX, "kept: too few bits (float8_e4m3fn)"),
    "number": (1.0, MATRIX, "kept: no matrix (shape ())"),
    "scalar": (np.float32(1), MATRIX, "kept: no matrix (shape ())"),
    "vector": (np.ones(80, np.float32), MATRIX, "kept: no matrix (shape (80,))"),
    "no axes": (GOOD, None, "kept: no matrix (shape (60, 80)), unless `axes` says how it is one"),
    "factors": (
        Factors(jnp.ones((60, 4)), jnp.ones((4, 80))),
        MATRIX,
        "kept: factorized, and `fits` has no noise level for it",
    ),
    "short factors": (
        Factors(jnp.ones((20, 4)), jnp.ones((4, 80))),
        MATRIX,
        "kept: short side 20 under 50",
    ),
    "integer factors": (
        Factors(jnp.ones((60, 4), jnp.int8), jnp.ones((4, 80), jnp.int8)),
        MATRIX,
        "kept: not floating (int8)",
    ),
    "NaN in a stack": (
        np.stack([GOOD, np.where(GOOD > 3, np.nan, GOOD)]),
        STACK,
        "kept: not finite",
    ),
    "zero in a stack": (
        np.stack([GOOD, np.zeros_like(GOOD)]),
        STACK,
        NO_NOISE,
    ),
}


@pytest.mark.parametrize(("kernel", "axes", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_kernel_is_kept_with_a_reason_and_costs_the_others_nothing(kernel, axes, reason):
    params = {"bad": {"kernel": kernel}, "good": {"kernel": GOOD}}
    named = lambda path, leaf: MATRIX if path == "good/kernel" or np.ndim(leaf) < 2 else axes
    plan = rmtjax.plan(params, axes=named if axes is not MATRIX else None)
    assert plan["bad/kernel"].reason == reason
    assert plan["bad/kernel"].action == "keep"
    alone = rmtjax.plan({"good": {"kernel": GOOD}})
    assert plan["good/kernel"].reason == "factorized: 2 of 60 are signal, rank 8"
    assert_same_row(plan["good/kernel"], alone["good/kernel"])
    dense = rmtjax.truncate(params, plan)
    assert dense["bad"]["kernel"] is kernel
    assert dense["good"]["kernel"] is not GOOD


TURNED = KernelAxes((1,), (0,))
GENERAL = KernelAxes((0, 1), (2, 3))
REASONS = {
    "factorized": (
        (60, 80),
        6,
        {},
        "factorize",
        8,
        "factorized: rank 8 of 60, where the rule asks for 6",
    ),
    "no saving": (
        (60, 80),
        35,
        {},
        "truncate",
        40,
        "truncated: no saving from factors (rank 40 of 60, where the rule asks for 35)",
    ),
    "as many numbers": (
        (16, 16),
        8,
        {},
        "truncate",
        8,
        "truncated: no saving from factors (rank 8 of",
    ),
    "full rank": (
        (60, 80),
        57,
        {},
        "keep",
        60,
        "kept: full rank (rank 60 of 60, where the rule asks for 57)",
    ),
    "just long": (
        (60, 80),
        57,
        {"min_size": 60},
        "keep",
        60,
        "kept: full rank (rank 60 of 60, where",
    ),
    "short": ((60, 80), 6, {"min_size": 61}, "keep", None, "kept: short side 60 under 61"),
    "turned": (
        (60, 80),
        6,
        {"axes": lambda path, leaf: TURNED},
        "truncate",
        8,
        "truncated: factors have their axes in another order (rank 8 of 60",
    ),
    "stacked last": (
        (60, 80, 3),
        6,
        {"axes": lambda path, leaf: KernelAxes((0,), (1,), (2,))},
        "truncate",
        8,
        "truncated: factors have their axes in another order (rank 8 of 60",
    ),
    "stacked": (
        (3, 60, 80),
        6,
        {"axes": lambda path, leaf: STACK},
        "factorize",
        8,
        "factorized: rank 8 of 60, where the rule asks for 6",
    ),
}


@pytest.mark.parametrize(
    ("shape", "count", "options", "action", "rank", "reason"), REASONS.values(), ids=REASONS.keys()
)
def test_each_action_has_its_reason(shape, count, options, action, rank, reason):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    options = {"min_size": 1} | options
    row = row_of(kernel, rule=Count(count), **options)
    assert (row.action, row.rank, row.shape) == (action, rank, shape)
    assert row.reason.startswith(reason)
    assert (row.fit is None) == (row.spectrum is None) == (rank is None)


def test_factors_that_merge_could_misread_are_not_made():
    # Left (8, 4, 8) and right (8, 8, 6): a stack of eight, by their shapes.
    kernel = np.random.default_rng(0).normal(size=(8, 4, 8, 6)).astype(np.float32)
    params, axes = {"kernel": kernel}, lambda path, leaf: GENERAL
    plan = rmtjax.plan(params, rule=Count(8), axes=axes, min_size=8)
    merged = rmtjax.merge(rmtjax.factorize(params, plan))["kernel"]
    # Two ways to the same truncation, a float32 product apart.
    np.testing.assert_allclose(merged, rmtjax.truncate(params, plan)["kernel"], atol=1e-5)
    assert row_of(kernel, rule=Count(8), axes=axes, min_size=8, multiple=7).action == "factorize"


def test_a_law_that_does_not_fit_is_named_with_its_distance():
    rng = np.random.default_rng(0)
    heavy = rng.standard_t(1.5, size=(80, 100)).astype(np.float32)
    row = row_of(heavy)
    assert row.action == "keep"
    assert row.rank == 80
    assert row.reason == f"kept: law does not fit (distance {row.fit.distance:.3f})"
    assert row.fit.distance > 5 / 80
    assert row_of(heavy, rule=ranks.bema(tolerance=1.0)).action != "keep"


def test_a_kernel_of_noise_is_kept():
    noise = np.random.default_rng(0).standard_normal((60, 90)).astype(np.float32)
    assert row_of(noise).reason == "kept: no signal stands out of the noise"


@pytest.mark.parametrize("side", [0, 1])
def test_factors_that_have_no_spectrum_are_kept(side):
    factors = [jnp.ones((2, 60, 4)), jnp.ones((2, 4, 80))]
    for value, reason in ((np.nan, "not finite"), (np.inf, "not finite"), (0, "all zero")):
        bad = factors.copy()
        bad[side] = jnp.full_like(bad[side], value)
        assert row_of(Factors(*bad), rule=Count(2)).reason == f"kept: {reason}"
    empty = Factors(jnp.ones((60, 0)), jnp.ones((0, 80)))
    assert row_of(empty, rule=Count(2)).reason == "kept: all zero"


def test_a_plan_has_a_row_for_every_kernel_and_nothing_else():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            hidden = nn.BatchNorm(use_running_average=True)(nn.Embed(70, 64)(tokens))
            return nn.Dense(3)(nn.Conv(60, (3,), feature_group_count=1)(hidden))

    shapes = jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)
    plan = rmtjax.plan(params, rule=Count(3))
    assert {path: row.action for path, row in plan.items()} == {
        "Conv_0/kernel": "factorize",
        "Dense_0/kernel": "keep",
        "Embed_0/embedding": "factorize",
    }
    assert all(row.reason for row in plan.values())
    assert str(plan).splitlines() == [
        "Conv_0/kernel      factorized: rank 8 of 60, where the rule asks for 3",
        "Dense_0/kernel     kept: short side 3 under 50",
        "Embed_0/embedding  factorized: rank 8 of 64, where the rule asks for 3",
    ]
    # Of 3 x 64 x 60, 60 x 3 and 70 x 64 numbers; factors of rank 8.
    before, after = 11_520 + 180 + 4_480, 8 * (192 + 60) + 180 + 8 * (70 + 64)
    assert (plan.cost.parameters, plan.cost.parameters_after) == (before, after)
    assert repr(plan).splitlines()[0] == (
        f"Plan of 3 kernels: 2 factorized, 1 kept; {after:,} of {before:,} parameters stay"
    )
    assert plan.in_place().cost.parameters_after == before


def test_plans_are_equal_if_they_do_the_same():
    tree = {"kernel": GOOD}
    plan, again = (rmtjax.plan(tree, rule=Count(3)) for _ in range(2))
    assert plan == again
    assert plan != rmtjax.plan(tree, rule=Count(9))
    assert rmtjax.Report(plan) == rmtjax.Report(again)


def test_rounding_errors_do_not_stand_out():
    report = rmtjax.analyze({"kernel": np.outer(GOOD[:, 0], GOOD[0])})
    assert report["kernel"].reason == NO_NOISE
    assert report["kernel"].spikes == 0
    assert "No direction stands out of the noise." in report.summary


def test_a_tree_without_leaves_has_an_empty_plan():
    for params in ({}, {"Dense_0": {}}, {"kernel": None}):
        assert rmtjax.plan(params) == {}
        assert str(rmtjax.plan(params)) == ""
        assert repr(rmtjax.plan(params)) == "Plan of 0 kernels"
