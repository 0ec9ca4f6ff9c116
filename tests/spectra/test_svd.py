"""Decompositions by squares, against NumPy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmtjax import prune_spectrum
from rmtjax.spectra._factors import compose
from rmtjax.spectra._svd import gram_svd, squares_suffice

BULK = jnp.full(1, jnp.nan)  # the bulk matters, too


def noisy(shape, values=(), seed=0):
    """Noise with the given singular values planted in it, in float64."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(side, max(len(values), 1))))[0] for side in shape)
    planted = (u[:, : len(values)] * values) @ v[:, : len(values)].T
    return planted + rng.normal(size=shape) / np.sqrt(max(shape))


def check(matrix, found, eps, rounding=20):
    """Values within rounding of the largest, orthonormal directions, and the matrix as product."""
    u, s, vt = (np.asarray(array, np.float64) for array in found)
    true = np.linalg.svd(matrix, compute_uv=False)
    bound = rounding * eps * true[0]
    assert (np.diff(s) <= 0).all()
    np.testing.assert_allclose(s, true, rtol=0, atol=bound)
    np.testing.assert_allclose((u * s) @ vt, matrix, rtol=0, atol=bound)
    strong = s > 1e3 * bound
    for vectors in (u[:, strong].T, vt[strong]):
        gram = vectors @ vectors.T
        np.testing.assert_allclose(gram, np.eye(len(gram)), rtol=0, atol=1e3 * rounding * eps)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("shape", [(60, 60), (60, 200), (200, 60), (1, 50)])
def test_as_numpy_in_float64(shape, jit):
    matrix = noisy(shape, [5.0, 3.0][: min(shape)]).astype(np.float32)
    find = jax.jit(gram_svd) if jit else gram_svd
    found = jax.tree.map(lambda a: a[0], find(jnp.asarray(matrix)[None], BULK))
    check(matrix.astype(np.float64), found, np.finfo(np.float32).eps)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_of_any_scale(scale):
    matrix = (scale * noisy((60, 80), [4.0])).astype(np.float32)
    found = jax.tree.map(lambda a: a[0], gram_svd(jnp.asarray(matrix)[None], BULK))
    check(matrix.astype(np.float64), found, np.finfo(np.float32).eps)


def test_in_float64():
    matrix = noisy((60, 80), [4.0])
    with jax.enable_x64(True):
        found = gram_svd(jnp.asarray(matrix)[None], BULK)
        check(matrix, jax.tree.map(lambda a: a[0], found), np.finfo(np.float64).eps)


def test_lifts_bfloat16():
    matrix = jnp.asarray(noisy((60, 80), [4.0]), jnp.bfloat16)
    found = jax.tree.map(lambda a: a[0], gram_svd(matrix[None], BULK))
    assert {a.dtype for a in found} == {jnp.dtype("float32")}
    check(np.asarray(matrix, np.float64), found, np.finfo(np.float32).eps)


@pytest.mark.parametrize("strength", [10.0, 1e2, 1e4, 1e6])
def test_a_bulk_that_is_fitted_is_never_blurred(strength):
    """By squares alone the strongest would drown it: 1e-7 of their square is more than its own."""
    matrix = noisy((200, 250), [strength]).astype(np.float32)
    _, s, _ = gram_svd(jnp.asarray(matrix)[None], BULK)
    true = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    # Of the quantiles of the bulk, which a fit compares; its least values are off by rounding.
    rounding = 20 * np.finfo(np.float32).eps * strength
    np.testing.assert_allclose(s[0, 1:150], true[1:150], rtol=1e-3, atol=rounding)


@pytest.mark.parametrize("strength", [10.0, 1e3, 1e5])
@pytest.mark.parametrize("least", [1.0, np.nan])
def test_signal_is_the_same_however_strong_the_strongest_is(strength, least):
    matrix = noisy((200, 250), [strength, strength / 2, 8.0]).astype(np.float32)
    found = gram_svd(jnp.asarray(matrix)[None], jnp.full(1, least))
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    rounding = 20 * np.finfo(np.float32).eps * strength
    np.testing.assert_allclose(found[1][0, :3], s[:3], rtol=0, atol=rounding)
    truncated = (u[:, :3] * s[:3]) @ vt[:3]
    np.testing.assert_allclose(compose(*found, 3)[0], truncated, rtol=0, atol=rounding)


def test_a_stack_has_matrices_of_all_kinds():
    stack = np.stack([noisy((60, 80), [4.0]), np.zeros((60, 80)), noisy((60, 80), [1e6])])
    stack = np.concatenate([stack, np.full((1, 60, 80), np.nan), np.ones((1, 60, 80))])
    stack = stack.astype(np.float32)
    found = jax.jit(gram_svd)(jnp.asarray(stack), jnp.full(len(stack), jnp.nan))
    for index in (0, 1, 2, 4):
        own = jax.tree.map(lambda a, index=index: a[index], found)
        check(stack[index].astype(np.float64), own, np.finfo(np.float32).eps)
    assert np.isnan(found[1][3]).all()


@pytest.mark.parametrize("least", [1.0, np.nan])
def test_nothing_and_one_direction_give_back_the_matrix(least):
    for matrix in (np.zeros((60, 80)), np.ones((60, 80))):
        found = gram_svd(jnp.asarray(matrix, jnp.float32)[None], jnp.full(1, least))
        assert all(np.isfinite(array).all() for array in found)
        rounding = 20 * np.finfo(np.float32).eps * 70  # 69 is the largest value
        np.testing.assert_allclose(compose(*found, 60)[0], matrix, rtol=0, atol=rounding)


def test_each_bulk_of_a_stack_is_clear():
    stack = np.stack([noisy((200, 250)), noisy((200, 250), [300.0])]).astype(np.float32)
    _, s, _ = gram_svd(jnp.asarray(stack), jnp.full(2, jnp.nan))
    true = np.linalg.svd(stack.astype(np.float64), compute_uv=False)
    for own, values in zip(s, true, strict=True):
        np.testing.assert_allclose(own[1:150], values[1:150], rtol=2e-3)


def test_near_the_limit_squares_are_in_order_and_off_by_the_square_of_the_largest():
    matrix = noisy((400, 400), [50.0]).astype(np.float32)  # 62 times the median; 90 is the limit
    u, s, _ = gram_svd(jnp.asarray(matrix)[None], BULK)
    true = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    assert (np.diff(s[0]) <= 0).all()
    bound = 5 * np.finfo(np.float32).eps * true[0] ** 2
    np.testing.assert_allclose(s[0] ** 2, true**2, rtol=1e-5, atol=bound)
    np.testing.assert_allclose(u[0].T @ u[0], np.eye(400), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("strength", "rank", "least", "suffice"),
    [
        (4.0, None, np.nan, True),
        (4.0, 1, 2.0, True),  # its median is zero, and does not matter
        (4.0, 1, np.nan, False),
        (1e4, None, 1.0, False),
        (1e4, None, 1e3, True),
    ],
)
def test_only_what_squares_do_not_distinguish_is_decomposed(strength, rank, least, suffice):
    s = np.linalg.svd(noisy((60, 80), [strength]), compute_uv=False)[None]
    s[:, rank:] *= rank is None
    s = jnp.asarray(s, jnp.float32)
    assert squares_suffice(s, jnp.full(1, least)) == suffice


@pytest.mark.slow
def test_a_carried_threshold_far_under_the_largest_value_counts_as_numpy_does():
    """By squares alone most of what stands near the threshold would be lost in their rounding."""
    optimizer = prune_spectrum(1)
    weak = [3.0, 2.8, 2.6, 2.5]
    params = {"kernel": jnp.asarray(noisy((200, 300), weak), jnp.float32)}
    still = {"kernel": jnp.zeros((200, 300))}
    _, state = optimizer.update(still, optimizer.init(params), params)
    strong = noisy((200, 300), [2e4, *weak], seed=1).astype(np.float32)
    _, state = optimizer.update(still, state, {"kernel": jnp.asarray(strong)})
    values = np.linalg.svd(strong.astype(np.float64), compute_uv=False)
    threshold = np.sqrt(300 * float(state.fits["kernel"].threshold))
    assert abs(values / threshold - 1).min() > 0.005  # more than rounding
    assert int(state.ranks["kernel"]) == (values > threshold).sum() == 5
