"""Singular vectors by LAPACK on the host, against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings, strategies as st

from rmtjax._axes import KernelAxes, MatrixView
from rmtjax.spectra import _lapack
from rmtjax.spectra._subspace_iteration import block_size

MATRIX, STACK = KernelAxes((0,), (1,)), KernelAxes((1,), (2,), (0,))
EPS = np.finfo(np.float32).eps
# (stack, rows, columns) of kernels whose singular vectors are compared.
SHAPES = [(1, 40, 40), (1, 40, 90), (1, 90, 40), (3, 30, 44), (2, 7, 1)]


def directions(kernel, axes, rank, block=None):
    return _lapack.directions(MatrixView("", kernel, axes), rank, block)


def without_last(kernel, axes, rank):
    return _lapack.without_last(MatrixView("", kernel, axes), rank)


def noise(shape, dtype: type = np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def truncated(matrix, rank):
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :], s


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_equal_the_singular_directions_in_float64(shape, dtype, share):
    stack, short = noise(shape, dtype), min(shape[1:])
    rank = max(1, int(share * short))
    u, s, vt = directions(stack, STACK, rank)
    wanted, values = truncated(stack, rank)
    # Rounding of float32 in the product, of the largest value.
    close = {"rtol": 0, "atol": 3e-6 * values.max()}
    np.testing.assert_allclose((u * s[..., None, :]) @ vt, wanted, **close)
    np.testing.assert_allclose(s, values[..., :rank], **close)
    for vectors in (u.mT, vt):
        identity = np.broadcast_to(np.eye(rank), (*shape[:1], rank, rank))
        # Those of the longer side are as orthogonal as s_r and s_1 let them be.
        least = (values[..., rank - 1] / values[..., 0]).min()
        np.testing.assert_allclose(vectors @ vectors.mT, identity, atol=1e-6 / least)


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_what_is_left_without_the_last_is_what_the_first_make(shape):
    stack = noise(shape)
    rank = min(shape[1:]) - 5
    wanted, values = truncated(stack, rank)
    lower = without_last(stack, STACK, rank)
    np.testing.assert_allclose(lower, wanted, atol=3e-6 * values.max())


@settings(max_examples=30, deadline=None)
@given(
    top=st.floats(1, 1e6),
    scale=st.sampled_from([1e-30, 1e-8, 1.0, 1e12]),
    shape=st.sampled_from([(50, 50), (50, 70), (160, 50)]),
    seed=st.integers(0, 99),
)
def test_directions_far_under_the_largest_are_told_apart(top, scale, shape, seed):
    """In float32 squares would not tell what lies under a ninetieth of the largest value."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(n, 50)))[0] for n in shape)
    values = np.r_[top, np.linspace(1, 0.6, 24), np.linspace(0.4, 0.1, 25)]
    matrix = (scale * (u * values) @ v.T).astype(np.float32)
    kept = [part[0] for part in directions(matrix, MATRIX, 25)]
    wanted, _ = truncated(matrix, 25)
    np.testing.assert_allclose((kept[0] * kept[1]) @ kept[2], wanted, atol=1e-6 * scale * top)
    # The 25th is the last of its group, and its value that of the matrix, off by its rounding.
    np.testing.assert_allclose(kept[1][-1], 0.6 * scale, atol=1e-6 * scale * max(top, 1))


def test_one_matrix_does_not_spoil_the_stack():
    stack = noise((3, 20, 30))
    stack[1, 4, 5] = np.inf
    u, s, vt = directions(stack, STACK, 4)
    np.testing.assert_array_equal(np.isnan(s).all(axis=1), [False, True, False])
    assert np.isfinite((u @ vt)[::2]).all()
    assert np.isnan(without_last(stack, STACK, 18)[1]).all()


def test_what_is_nothing_has_directions_of_nothing():
    thin = (noise((30, 4)) @ noise((4, 20))).astype(np.float32)
    u, s, vt = (part[0] for part in directions(thin, MATRIX, 9))
    np.testing.assert_allclose((u * s) @ vt, thin, atol=1e-5)
    assert (s[4:] < 1e-5 * s[0]).all()
    zero = np.zeros((8, 6), np.float32)
    assert not np.any(directions(zero, MATRIX, 3)[1])


def test_few_directions_are_iterated_and_what_does_not_converge_is_not(monkeypatch):
    squared = []  # those of which the Gram matrix was decomposed
    spy = lambda *args, decompose=scipy.linalg.eigh, **options: (
        squared.append(options["subset_by_index"]) or decompose(*args, **options)
    )
    monkeypatch.setattr(scipy.linalg, "eigh", spy)
    easy = noise((257, 300))
    easy[:, :3] += 4
    # Values that differ by less than their rounding: no direction is better than another.
    u, v = (np.linalg.qr(noise((300, 300), np.float64, seed))[0] for seed in (0, 1))
    hard = ((u * np.linspace(1, 1 - 1e-5, 300)) @ v.T).astype(np.float32)
    for matrix, decomposed in ((easy, []), (hard, [(299, 299)])):
        u, s, vt = (part[0] for part in directions(matrix, MATRIX, 1, block_size(1)))
        assert squared == decomposed
        np.testing.assert_allclose(matrix @ vt.T, u * s, atol=1e-4 * s[0])
        np.testing.assert_allclose(s, np.linalg.norm(matrix, 2), rtol=2e-5)
