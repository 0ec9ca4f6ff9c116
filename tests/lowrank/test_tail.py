"""The tail sum, its derivative and its proximal step, against NumPy in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rmtjax import KernelAxes
from rmtjax.lowrank import prox_tail, tail_sum

each_way = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
CASES = [((9, 6), "float32"), ((6, 9), "float32"), ((6, 6), "float32"), ((9, 6), "bfloat16")]


def draw(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


def svd(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)


def with_values(values, shape, seed=0):
    """A matrix with these singular values."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, len(values))))[0] for n in shape)
    return left * np.asarray(values, np.float64) @ right.T


@each_way
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_the_sum_and_its_derivative(wrap, shape, dtype):
    kernel = draw(*shape, dtype=dtype)
    value, gradient = wrap(jax.value_and_grad(tail_sum))(kernel, 3)
    u, s, vt = svd(kernel)
    np.testing.assert_allclose(value, s[3:].sum(), rtol=1e-5)  # a sum of a few float32
    assert value.dtype == jnp.float32
    assert gradient.dtype == kernel.dtype
    # A gap g mixes vectors by eps / g. bfloat16 rounds the result by 2^-9.
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64),
        u[:, 3:] @ vt[3:],
        atol=2**-8 if dtype != "float32" else 1e-5,
    )


@pytest.mark.parametrize("rank", [0, 2, 6, 9])
def test_the_derivative_is_the_slope_along_a_line(rank):
    with jax.enable_x64(True):
        kernel, move = draw(9, 6, dtype="float64"), draw(6, 9, dtype="float64").T
        gradient = jax.grad(tail_sum)(kernel, rank)
        line = lambda t: svd(np.asarray(kernel) + t * np.asarray(move))[1][rank:].sum()
        slope = (line(1e-6) - line(-1e-6)) / 2e-6
        # Central differences are off by h^2 and by eps / h.
        np.testing.assert_allclose(jnp.sum(gradient * move), slope, atol=1e-7)


@each_way
def test_ties_have_a_finite_derivative(wrap):
    matrix = with_values([4, 2, 2, 2, 1], (7, 5))
    gradient = wrap(jax.grad(tail_sum))(jnp.asarray(matrix, jnp.float32), 1)
    u, _, vt = svd(matrix)
    # The tie is within the tail, where the derivative is that of any choice of vectors.
    np.testing.assert_allclose(gradient, u[:, 1:] @ vt[1:], atol=1e-5)
    across = wrap(jax.grad(tail_sum))(jnp.asarray(matrix, jnp.float32), 2)
    values = svd(across)[1]
    np.testing.assert_allclose(values, [1, 1, 1, 0, 0], atol=1e-5)


@each_way
def test_zeros_have_the_smallest_subgradient(wrap):
    gradient = wrap(jax.grad(tail_sum))
    assert not gradient(jnp.zeros((6, 4)), 0).any()
    matrix = with_values([3, 1, 0, 0], (6, 4))
    u, _, vt = svd(matrix)
    np.testing.assert_allclose(
        gradient(jnp.asarray(matrix, jnp.float32), 1), u[:, 1:2] @ vt[1:2], atol=1e-5
    )


def test_rank_may_be_traced_and_the_sum_mapped():
    stack = draw(4, 9, 6)
    ranks = jnp.arange(4)
    sums = jax.jit(jax.vmap(tail_sum))(stack, ranks)
    expected = [svd(matrix)[1][rank:].sum() for rank, matrix in enumerate(stack)]
    np.testing.assert_allclose(sums, expected, rtol=1e-5)


CONV = KernelAxes((0, 1, 2), (3,))
STACK = KernelAxes((1,), (2,), (0,))


@pytest.mark.parametrize("axes", [CONV, STACK, KernelAxes((2,), (0,), (1,))], ids=str)
def test_axes_say_what_the_matrices_are(axes):
    kernel = draw(2, 3, 4, 5) if axes == CONV else draw(4, 9, 6)
    shape = [np.prod([kernel.shape[a] for a in group], dtype=int) for group in axes]
    stack = np.transpose(np.asarray(kernel, np.float64), axes.order)
    stack = stack.reshape(shape[2], shape[0], shape[1])
    u, s, vt = np.linalg.svd(stack, full_matrices=False)
    np.testing.assert_allclose(tail_sum(kernel, 2, axes), s[:, 2:].sum(), rtol=1e-5)
    s[:, 2:] = np.maximum(s[:, 2:] - 0.5, 0)
    moved = prox_tail(kernel, 2, 0.5, axes)
    assert moved.shape == kernel.shape
    seen = np.transpose(np.asarray(moved), axes.order).reshape(stack.shape)
    np.testing.assert_allclose(seen, u * s[:, None] @ vt, atol=1e-5)


@each_way
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_the_step_is_soft_thresholding_beyond_the_rank(wrap, shape, dtype):
    kernel = draw(*shape, dtype=dtype)
    u, s, vt = svd(kernel)
    s[2:] = np.maximum(s[2:] - 0.7, 0)
    moved = wrap(prox_tail)(kernel, 2, 0.7)
    assert moved.dtype == kernel.dtype
    # Values up to 6 in float32; bfloat16 rounds entries up to 3 by 2^-8 of them.
    atol = 1e-5 if dtype == "float32" else 0.01
    np.testing.assert_allclose(np.asarray(moved, np.float64), u * s @ vt, atol=atol)


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), rank=st.integers(0, 5), strength=st.floats(0.0, 3.0))
def test_no_other_matrix_is_better(seed, rank, strength):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(7, 5))

    def objective(matrix):
        return 0.5 * np.sum((matrix - kernel) ** 2) + strength * svd(matrix)[1][rank:].sum()

    with jax.enable_x64(True):
        best = np.asarray(prox_tail(jnp.asarray(kernel), rank, strength))
    lowest = objective(best)
    # The sum is not convex: small moves and large ones.
    for scale in (1e-3, 1e-1, 1.0):
        for _ in range(10):
            assert objective(best + scale * rng.normal(size=kernel.shape)) >= lowest - 1e-9
    assert objective(kernel) >= lowest - 1e-9


def test_a_step_of_no_length_and_a_kernel_of_zeros_stay():
    kernel = draw(9, 6)
    np.testing.assert_array_equal(prox_tail(kernel, 2, 0.0), kernel)
    assert not prox_tail(jnp.zeros((9, 6)), 2, 0.5).any()


def test_what_is_not_finite_gives_nan():
    kernel = draw(4, 9, 6).at[1, 0, 0].set(jnp.inf)
    assert np.isnan(tail_sum(kernel[1], 2))
    moved = prox_tail(kernel, 2, 0.5, STACK)
    assert np.isnan(moved[1]).all()
    assert np.isfinite(moved[jnp.asarray([0, 2, 3])]).all()


UNCHECKED = [inspect.unwrap(function) for function in (tail_sum, prox_tail)]


@pytest.mark.parametrize("function", UNCHECKED, ids=lambda f: f.__name__)
def test_wrong_arguments_are_named(function):
    more = (0.5,) if function.__name__ == "prox_tail" else ()
    with pytest.raises(ValueError, match=r"needs `axes` for a kernel of shape \(4, 9, 6\)"):
        function(draw(4, 9, 6), 2, *more)
    with pytest.raises(ValueError, match=r"^`rank` must be at least 0, got -1"):
        function(draw(9, 6), -1, *more)
    with pytest.raises(TypeError, match=r"^`kernel` must be floating, got dtype int32"):
        function(jnp.ones((9, 6), jnp.int32), 1, *more)


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_a_wrong_strength_is_named(strength):
    with pytest.raises(
        ValueError, match=f"^`strength` must be at least 0 and finite, got {strength}"
    ):
        prox_tail(draw(9, 6), 2, strength)


@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
def test_the_step_is_right_for_a_matrix_that_lacks_rank(shape):
    # Rows and columns that are there twice: a Gram matrix does not tell the values near zero.
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    half = kernel if shape[0] == 90 else kernel.T
    half[:45] = half[45:]
    u, s, vt = np.linalg.svd(kernel.astype(np.float64), full_matrices=False)
    wanted = (u * np.where(np.arange(60) < 2, s, np.maximum(s - 0.5, 0))) @ vt
    found = np.asarray(prox_tail(jnp.asarray(kernel), 2, 0.5), np.float64)
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(kernel)
