"""Rows and columns of zeros are no noise, and a fit does not depend on the scale of a kernel."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import rmtjax
from rmtjax import KernelAxes, ranks

RULES = {"bema": ranks.bema(), "gavish_donoho": ranks.gavish_donoho()}
EACH = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
RNG = np.random.default_rng(5)
LIVE = (RNG.normal(size=(100, 160)) + 0.4).astype(np.float32)  # noise, and one direction


def spread(live, shape, seed=0):
    """A kernel of zeros with the entries of another one in some of its rows and columns."""
    rng = np.random.default_rng(seed)
    rows, columns = (
        np.sort(rng.permutation(size)[:some]) for size, some in zip(shape, live.shape, strict=True)
    )
    kernel = np.zeros(shape, live.dtype)
    kernel[np.ix_(rows, columns)] = live
    return kernel


def row_of(kernel, **options):
    (row,) = rmtjax.plan({"kernel": kernel}, **options).values()
    return row


def assert_same_fit(row, live):
    """The fit of a kernel with zeros is that of its other rows and columns, on its own scale."""
    scale = max(live.shape) / max(row.shape)
    np.testing.assert_allclose(row.fit.variance, live.fit.variance, rtol=1e-5)
    np.testing.assert_allclose(row.fit.edge, live.fit.edge * scale, rtol=1e-5)
    np.testing.assert_allclose(row.fit.threshold, live.fit.threshold * scale, rtol=1e-5)
    np.testing.assert_allclose(row.fit.distance, live.fit.distance, atol=1e-5)
    assert (row.fit.num_spikes, row.rank) == (live.fit.num_spikes, live.rank)


@EACH
@pytest.mark.parametrize("shape", [(200, 160), (100, 320), (150, 300), (300, 160), (101, 161)])
def test_the_fit_is_that_of_the_rows_and_columns_that_are_not_zero(rule, shape):
    row, live = row_of(spread(LIVE, shape), rule=rule), row_of(LIVE, rule=rule)
    assert live.fit.num_spikes == 1
    assert_same_fit(row, live)
    dead = {"rows": shape[0] - 100, "columns": shape[1] - 160}
    words = " and ".join(f"{count} {name}" for name, count in dead.items() if count)
    assert row.reason.endswith(f"({words} are zero)")
    # The levels of a plan serve another one.
    fits = {"kernel": row.fit}
    assert row_of(spread(LIVE, shape), rule=rule, fits=fits).rank == row.rank


@EACH
@pytest.mark.parametrize("shape", [(200, 400), (400, 200), (300, 300)])
def test_pure_noise_with_half_of_its_rows_zero_has_no_signal(rule, shape):
    noise = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    for index in (np.s_[::2], np.s_[:, ::2], np.s_[shape[0] // 2 :]):
        kernel = noise.copy()
        kernel[index] = 0
        assert row_of(kernel, rule=rule).reason.startswith("kept: no signal stands out")


@EACH
def test_each_matrix_of_a_stack_has_its_zeros(rule):
    members = [LIVE, spread(LIVE[:80], LIVE.shape), spread(LIVE[:, :120], LIVE.shape)]
    axes = {"kernel": KernelAxes((1,), (2,), (0,))}
    row = row_of(np.stack(members), rule=rule, axes=axes)
    alone = [
        row_of(LIVE, rule=rule),
        row_of(LIVE[:80], rule=rule),
        row_of(LIVE[:, :120], rule=rule),
    ]
    np.testing.assert_allclose(row.fit.variance, [one.fit.variance for one in alone], rtol=1e-5)
    np.testing.assert_array_equal(row.fit.num_spikes, [one.fit.num_spikes for one in alone])
    assert "20 rows and 40 columns are zero" in row.reason


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray, lambda a: jnp.asarray(a, jnp.bfloat16)])
def test_zeros_are_seen_wherever_a_kernel_is(place):
    assert "(60 rows are zero)" in row_of(place(spread(LIVE, (160, 160)))).reason


def test_what_is_left_may_be_too_little_for_a_law():
    few = row_of(spread(LIVE[:40], (100, 160)))
    assert few.reason.startswith("kept: short side 40 under 50 without rows and columns of zeros")
    assert row_of(np.zeros((100, 160), np.float32)).reason == "kept: all zero"


@EACH
def test_shrinkage_takes_the_sides_that_are_left(rule):
    shrink, kernel = rmtjax.shrinkage.frobenius, spread(LIVE, (150, 300))
    plan = rmtjax.plan({"kernel": kernel}, rule=rule, shrink=shrink, multiple=1)
    alone = rmtjax.plan({"kernel": LIVE}, rule=rule, shrink=shrink, multiple=1)
    cut = rmtjax.truncate({"kernel": kernel}, plan)["kernel"]
    expected = spread(np.asarray(rmtjax.truncate({"kernel": LIVE}, alone)["kernel"]), (150, 300))
    np.testing.assert_allclose(cut, expected, atol=1e-5)


SCALES = (1e-38, 1e-30, 1e-20, 1e-15, 1.0, 1e15, 1e20, 1e30, 1e37)
WIDE = (RNG.normal(size=(70, 90)) + 0.6).astype(np.float32)


@EACH
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_fit_does_not_depend_on_the_scale(rule, scale, dtype):
    kernel = (WIDE.astype(np.float64) * scale).astype(dtype)
    row, usual = row_of(kernel, rule=rule), row_of(WIDE.astype(dtype), rule=rule)
    assert row.reason == usual.reason == "factorized: 1 of 70 are signal, rank 8"
    # At 1e-38 entries are rounded to 1e-45; those of bfloat16 to a two-hundredth.
    rtol = 1e-3 if dtype == np.float32 else 2e-2
    for field in ("variance", "edge", "threshold"):
        found, wanted = (float(getattr(one.fit, field)) for one in (row, usual))
        np.testing.assert_allclose(found, wanted * scale**2, rtol=rtol)
    values = np.linalg.svd(kernel.astype(np.float64), compute_uv=False) ** 2 / 90
    np.testing.assert_allclose(row.spectrum.eigenvalues, values, rtol=1e-4)
    fits = {"kernel": row.fit}
    assert row_of(kernel, rule=rule, fits=fits).rank == row.rank


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1e3, 1e4])
def test_half_precision_is_fitted_at_its_scales(scale):
    row = row_of((WIDE * np.float32(scale)).astype(np.float16))
    assert row.fit is not None
    if scale > 1e-7:  # there the smallest steps of float16 are as large as the entries
        assert row.reason == "factorized: 1 of 70 are signal, rank 8"


@pytest.mark.parametrize("scale", [1e-140, 1e-60, 1.0, 1e60, 1e140])
def test_doubles_are_fitted_at_their_scales(scale):
    with jax.enable_x64(True):
        row = row_of(WIDE.astype(np.float64) * scale)
    assert row.reason == "factorized: 1 of 70 are signal, rank 8"
    np.testing.assert_allclose(
        row.fit.variance, float(row_of(WIDE).fit.variance) * scale**2, rtol=1e-4
    )


@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_doubles_without_squares_have_a_true_reason(scale):
    with jax.enable_x64(True):
        row = row_of(WIDE.astype(np.float64) * scale)
    assert row.reason == "kept: squares of its entries leave the range of float64"


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_cuts_do_not_depend_on_the_scale(scale):
    tree, usual = {"kernel": (WIDE * np.float32(scale))}, {"kernel": WIDE}
    plan = rmtjax.plan(tree, multiple=1)
    for cut in (rmtjax.truncate, lambda *args: rmtjax.merge(rmtjax.factorize(*args))):
        found = np.asarray(cut(tree, plan)["kernel"], np.float64) / scale
        wanted = cut(usual, rmtjax.plan(usual, multiple=1))["kernel"]
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@settings(max_examples=15)
@given(st.integers(-120, 120), st.integers(0, 40), st.integers(0, 40))
def test_powers_of_two_and_zeros_change_nothing_else(power, rows, columns):
    kernel = spread(WIDE, (70 + rows, 90 + columns))
    row = row_of(np.ldexp(kernel, power))
    np.testing.assert_allclose(
        row.fit.variance, float(row_of(WIDE).fit.variance) * 4.0**power, rtol=1e-4
    )
    assert row.fit.num_spikes == 1


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_a_kernel_is_shrunk_at_any_scale(scale):
    kernel = np.random.default_rng(0).normal(size=(60, 90)).astype(np.float32) + 1
    cut = []
    for factor in (1.0, scale):
        params = {"kernel": kernel * np.float32(factor)}
        plan = rmtjax.plan(params, shrink=rmtjax.shrinkage.frobenius, multiple=1)
        cut.append(np.asarray(rmtjax.truncate(params, plan)["kernel"], np.float64) / factor)
    np.testing.assert_allclose(cut[1], cut[0], atol=1e-4)
