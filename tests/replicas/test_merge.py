"""The merge of one kernel against float64, and what must hold for all replicas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers.replica_cases import agreed, EPS, noisy, relative
from hypothesis import given, settings, strategies as st

import rmtjax
from rmtjax.spectra import _fold, _select

MODES = pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
# Directions of noise with equal values turn. Over 112 cases (sides 20 to 400, 2 to 16 replicas,
# signal 0 to 300 times the edge) the host's result was apart by 1.2e-3 of the norm at most.
TURNS = 3e-3


def merge(changes, start=None, transform=lambda f: f, **options):
    start = np.zeros(changes.shape[1:], changes.dtype) if start is None else start
    call = transform(lambda *trees: rmtjax.merge_replicas(*trees, **options))
    merged = call({"kernel": start}, {"kernel": changes})
    return merged.params["kernel"], merged.kept["kernel"], merged.rank["kernel"]


@MODES
@pytest.mark.parametrize("count", [2, 3, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (48, 48), (200, 20), (30, 1), (1, 1)])
def test_a_merge_is_that_of_decompositions_in_float64(transform, count, shape):
    changes = noisy(count, shape, rank=1)
    found, kept, rank = merge(changes, transform=transform)
    wanted, effective = agreed(changes)
    assert relative(found, wanted) < TURNS
    share = np.sum(wanted**2) / np.sum(changes.mean(axis=0, dtype=np.float64) ** 2)
    np.testing.assert_allclose(kept, share, rtol=2 * TURNS)
    np.testing.assert_allclose(rank, effective, rtol=0.02)


@MODES
@pytest.mark.parametrize("signal", [0.0, 0.3, 10.0, 1000.0])
def test_strong_signal_does_not_drown_what_is_weak(transform, signal):
    changes = noisy(4, (120, 100), signal=signal)
    found, *_ = merge(changes, transform=transform)
    assert relative(found, agreed(changes)[0]) < TURNS


@MODES
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", TURNS), ("bfloat16", 2**-8), ("float16", TURNS)]
)
def test_arithmetic_is_in_float32_and_the_leaf_keeps_its_dtype(transform, dtype, tolerance):
    changes = jnp.asarray(noisy(3, (50, 40)), dtype)
    found, kept, _ = merge(changes, transform=transform)
    assert found.dtype == dtype
    assert kept.dtype == jnp.float32
    assert relative(found.astype("float32"), agreed(changes.astype("float32"))[0]) < tolerance


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_float64_is_merged_in_float64(transform):
    with jax.enable_x64(True):
        changes = noisy(3, (50, 40), dtype=np.float64)
        found, kept, _ = merge(changes, transform=transform)
        assert (found.dtype, kept.dtype) == (jnp.float64, jnp.float64)
        # Squares in float64 distinguish all values of this bulk: the rounding of sums is left.
        assert relative(found, agreed(changes)[0]) < 1e-9


@MODES
@pytest.mark.parametrize("rest", [0.0, 0.1, 1.0])
def test_a_share_of_what_is_not_agreed_on_is_kept(transform, rest):
    changes = noisy(4, (50, 40), signal=0.5)
    start = np.random.default_rng(1).standard_normal((50, 40)).astype(np.float32)
    call = transform(
        lambda start, replicas, rest: rmtjax.merge_replicas(start, replicas, rest=rest)
    )
    merged = call({"kernel": start}, {"kernel": start + changes}, rest)
    wanted = agreed(changes)[0]
    expected = start + wanted + rest * (changes.mean(axis=0) - wanted)
    assert relative(merged.params["kernel"], expected) < TURNS
    # The share that is reported is that of the agreement, whatever else is kept.
    plain = rmtjax.merge_replicas({"kernel": start}, {"kernel": start + changes})
    np.testing.assert_allclose(merged.kept["kernel"], plain.kept["kernel"], rtol=2 * TURNS)


@MODES
@given(seed=st.integers(0, 1000), count=st.integers(2, 16))
@settings(max_examples=10)
def test_equal_replicas_agree_on_all_of_their_change(transform, seed, count):
    change = noisy(1, (30, 20), seed=seed)
    found, kept, _ = merge(np.repeat(change, count, 0), transform=transform)
    # Mean and products are rounded. Nothing of it depends on directions.
    assert relative(found, change[0]) < 100 * EPS
    np.testing.assert_allclose(kept, 1, rtol=100 * EPS)


@MODES
@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
@pytest.mark.slow
def test_orthogonal_turns_and_the_order_of_replicas_change_nothing(transform, seed):
    rng = np.random.default_rng(seed)
    changes = noisy(4, (40, 30), seed=seed)
    found, kept, _ = merge(changes, transform=transform)
    left, right = (np.linalg.qr(rng.normal(size=(side,) * 2))[0] for side in (40, 30))
    turned = (left @ changes[rng.permutation(4)] @ right).astype(np.float32)
    other, share, _ = merge(turned, transform=transform)
    assert relative(other, left @ np.asarray(found) @ right) < 2 * TURNS
    np.testing.assert_allclose(share, kept, rtol=4 * TURNS)


def test_noise_alone_is_estimated_without_bias_and_made_smaller():
    # r of 200 matrices of 30 directions: of unit variance, since singular vectors have norm 1.
    rng, values, fold = np.random.default_rng(0), [], jax.jit(_fold.fold)
    for _ in range(200):
        changes = rng.standard_normal((2, 40, 30)).astype(np.float32)
        kept, _ = fold(changes[0], changes[1])
        other, _ = fold(changes[0], -changes[1])
        # The one has the positive r, the other the negative ones.
        u, _, vt = np.linalg.svd(changes[0])
        values.append(np.diagonal(u.T @ np.asarray(kept - other) @ vt.T))
    means = np.mean(values, axis=1)
    # The mean of 6,000 values of unit variance is within 4 / sqrt(6000) but once in 16,000.
    assert abs(np.mean(means)) < 4 / np.sqrt(6000)
    np.testing.assert_allclose(np.std(means), 1 / np.sqrt(30), rtol=0.25)
    # Given the directions they are independent and normal.
    assert scipy.stats.kstest(np.ravel(values), "norm").pvalue > 1e-3


@given(seed=st.integers(0, 1000), count=st.integers(2, 16), signal=st.floats(0, 5))
@settings(max_examples=30)
def test_the_norm_is_above_that_of_the_mean_by_noise_in_the_directions_at_most(seed, count, signal):
    changes = noisy(count, (30, 20), signal=signal, seed=seed)
    found, *_ = merge(changes)
    norms = np.linalg.norm(changes, axis=(1, 2))
    # r are 20 coordinates of a replica, in orthonormal directions.
    assert np.linalg.norm(found) <= norms.mean() * (1 + 100 * EPS)
    # What they have more than the mean is at most unit noise in 20 directions, in each fold: by
    # three of its deviations, and the mean over folds varies less.
    assert np.linalg.norm(found) <= np.linalg.norm(changes.mean(axis=0)) + np.sqrt(20) + 3


def test_rows_and_columns_that_did_not_move_in_some_replicas_have_no_part_in_their_folds():
    changes = noisy(3, (50, 40))
    changes[0, 30:] = changes[1, 20:] = 0
    changes[:2, :, :10] = 0
    found, *_ = merge(changes)
    assert relative(found, agreed(changes)[0]) < TURNS
    still = noisy(2, (50, 40)) * np.array([1, 0], np.float32)[:, None, None]
    found, kept, rank = merge(still)
    assert not np.any(found)
    assert (float(kept), float(rank)) == (0, 0)


@MODES
@pytest.mark.parametrize(("count", "shape"), [(2, (100, 100)), (4, (200, 50)), (16, (60, 60))])
def test_of_noise_alone_hardly_anything_is_kept(transform, count, shape):
    changes = noisy(count, shape, signal=0.0)
    _, kept, _ = merge(changes, transform=transform)
    # Half of p directions keep r^2, 1 on average, of each fold: (p / 2) / (m n / k), if the folds
    # were equal. Folds that differ keep less of their mean.
    assert kept < 1.3 * count / 2 / max(shape)


def test_signal_below_the_noise_is_found():
    changes = noisy(4, (200, 100), signal=2.0)
    noise = noisy(4, (200, 100), signal=0.0)
    common = (changes - noise).mean(axis=0)
    found, *_ = merge(changes)
    # Averaging leaves a quarter of the noise; the merge little of that.
    assert relative(found, common) < relative(changes.mean(axis=0), common) / 2


@MODES
def test_dead_rows_and_columns_and_low_ranks_stay_so(transform):
    changes = noisy(3, (50, 40))
    changes[:, 10:30] = 0
    changes[:, :, :5] = 0
    found, *_ = merge(changes, transform=transform)
    assert not np.any(found[10:30])
    np.testing.assert_allclose(found[:, :5], 0, atol=1e-4)
    assert relative(found, agreed(changes)[0]) < TURNS
    none, kept, rank = merge(np.zeros((3, 50, 40), np.float32), transform=transform)
    assert not np.any(none)
    assert (float(kept), float(rank)) == (0, 0)


@MODES
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_no_square_overflows_or_underflows(transform, scale):
    changes = noisy(3, (30, 20))
    found, kept, rank = merge(changes * np.float32(scale), transform=transform)
    wanted, share, effective = merge(changes)
    assert relative(np.asarray(found, np.float64) / scale, wanted) < TURNS
    np.testing.assert_allclose((kept, rank), (share, effective), rtol=0.02)


@MODES
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_in_one_replica_is_nan_and_no_other_matrix_changes(transform, value):
    axes = {"stack": rmtjax.KernelAxes((1,), (2,), (0,))}
    stack = noisy(3, (2, 30, 20))
    start = {"stack": np.zeros((2, 30, 20), np.float32), "kernel": np.zeros((30, 20), np.float32)}
    broken = {"stack": stack.copy(), "kernel": stack[:, 0]}
    broken["stack"][1, 1, 3, 4] = value
    call = transform(lambda *trees: rmtjax.merge_replicas(*trees, axes=axes))
    merged = call(start, broken)
    assert np.isnan(merged.params["stack"][1]).all()
    for found in (merged.params["stack"][0], merged.params["kernel"]):
        assert relative(found, agreed(stack[:, 0])[0]) < TURNS
    assert np.isnan((merged.kept["stack"], merged.rank["stack"])).all()
    assert np.isfinite((merged.kept["kernel"], merged.rank["kernel"])).all()


def test_large_kernels_are_merged_one_fold_after_another(monkeypatch):
    changes = noisy(3, (2, 50, 40))
    wanted = _fold.host_folds(changes)
    monkeypatch.setattr(_fold, "_LARGE", 40)
    monkeypatch.setattr(_fold, "one_blas_thread_each", None)
    found = _fold.host_folds(changes)
    assert relative(found[0], wanted[0]) < TURNS


def test_the_host_makes_the_folds_of_what_it_reads(monkeypatch):
    changes, seen = noisy(2, (20, 10)), []
    spy = lambda changes: (seen.append(changes.shape), host(changes))[1]
    host = _fold.host_folds
    monkeypatch.setattr(_fold, "host_folds", spy)
    merge(changes)
    assert seen == [(2, 1, 20, 10)]
    merge(changes, transform=jax.jit)
    assert len(seen) == 1
    assert _select.cross_validate(jnp.asarray(changes[:, None]))[0].shape == (1, 20, 10)
