"""Spectra against NumPy in float64, and stacks of matrices, decomposed one by one on CPU."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import Factors
from rmtjax.spectra import each
from rmtjax.spectra._factors import svd

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (40, 10), (10, 40), (30, 31)]
DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32]


def matrix_of(shape, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_squared_singular_values_over_the_longer_side(shape, dtype, transform):
    matrix = matrix_of(shape, dtype)
    expected = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2 / max(shape)
    eigenvalues, ratio = transform(rmtjax.spectrum)(matrix)
    assert eigenvalues.dtype == ratio.dtype == jnp.float32
    # A singular value is off by some units of roundoff of the largest one.
    np.testing.assert_allclose(eigenvalues, expected, rtol=1e-5, atol=1e-6 * expected[0])
    assert ratio == np.float32(min(shape) / max(shape))
    assert np.all(np.diff(eigenvalues) <= 0)


def test_float64_stays():
    with jax.enable_x64(True):
        matrix = jnp.asarray(np.random.default_rng(0).standard_normal((30, 50)))
        eigenvalues, ratio = rmtjax.spectrum(matrix)
        assert eigenvalues.dtype == ratio.dtype == jnp.float64
        expected = np.linalg.svd(matrix, compute_uv=False) ** 2 / 50
        np.testing.assert_allclose(eigenvalues, expected, rtol=1e-12)  # LAPACK in both
        assert ratio == 0.6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_transpose_has_the_same_spectrum(shape, dtype):
    matrix = matrix_of(shape, dtype)
    eigenvalues, ratio = rmtjax.spectrum(matrix)
    transposed = rmtjax.spectrum(matrix.T)
    assert transposed.ratio == ratio
    # Two runs of float32 LAPACK.
    np.testing.assert_allclose(
        transposed.eigenvalues, eigenvalues, rtol=1e-5, atol=1e-6 * eigenvalues[0]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mean_is_the_mean_square_of_the_entries(shape, dtype):
    matrix = matrix_of(shape, dtype)
    mean_square = np.mean(np.asarray(matrix, np.float64) ** 2)
    # Float32 sums.
    np.testing.assert_allclose(rmtjax.spectrum(matrix).eigenvalues.mean(), mean_square, rtol=1e-5)


def test_low_precision_does_not_overflow():
    # 300^2 * 100 is beyond the 65504 of float16.
    eigenvalues, _ = rmtjax.spectrum(jnp.full((100, 50), 300, jnp.float16))
    np.testing.assert_allclose(eigenvalues[0], 50 * 300.0**2, rtol=1e-5)  # float32


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_gives_nan(value, transform):
    eigenvalues, ratio = transform(rmtjax.spectrum)(matrix_of((6, 8)).at[2, 3].set(value))
    assert jnp.isnan(eigenvalues).all()
    assert ratio == 0.75


def test_vmap_does_not_let_one_matrix_spoil_another():
    stack = matrix_of((3, 6, 8)).at[1, 0, 0].set(jnp.nan)
    eigenvalues, ratio = jax.vmap(rmtjax.spectrum)(stack)
    assert ratio.shape == (3,)
    assert jnp.isnan(eigenvalues[1]).all()
    for i in (0, 2):
        # Batched and single LAPACK may round differently.
        single = rmtjax.spectrum(stack[i]).eigenvalues
        np.testing.assert_allclose(eigenvalues[i], single, rtol=1e-5)


def test_zeros_have_a_spectrum_of_zeros():
    np.testing.assert_array_equal(rmtjax.spectrum(jnp.zeros((4, 9))).eigenvalues, 0)


# The checks of shapes during tests may come first, with a TypeError that names the argument.
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (3, 3, 16, 32)])
def test_what_is_no_matrix_is_an_error(shape):
    with pytest.raises((ValueError, TypeError), match="matrix"):
        rmtjax.spectrum(jnp.ones(shape))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_is_an_error(shape):
    with pytest.raises(ValueError, match="needs a matrix with entries"):
        rmtjax.spectrum(jnp.ones(shape))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64])
def test_other_numbers_are_an_error(dtype):
    with pytest.raises(TypeError, match="matrix"):
        rmtjax.spectrum(jnp.ones((3, 4), dtype))


PRUNE = """
import jax, rmtjax
axes = lambda path, leaf: rmtjax.KernelAxes((1,), (2,), (0,))
draw = lambda seed: jax.random.normal(jax.random.key(seed), (2, 64, 64))
params = {f"layer_{seed}": {"kernel": draw(seed)} for seed in range(7)}
prune = rmtjax.prune_spectrum(1, rule=rmtjax.ranks.fixed(8), axes=axes)
state, step = prune.init(params), jax.jit(prune.update)
for _ in range(60):
    updates, state = step(params, state, params)
    jax.block_until_ready(updates)
print(*(int(rank) for rank in state.ranks.values()))
"""


@pytest.mark.slow
def test_several_stacks_in_a_program_do_not_wait_for_one_another():
    # Decomposed at once they hang within some ten steps, on two cores and jax 0.10.2.
    command = [sys.executable, "-c", PRUNE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.split() == ["8"] * 7


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_each_matrix_is_decomposed_as_alone(size, compiled):
    stack = jax.random.normal(jax.random.key(0), (size, 6, 4))
    run = jax.jit(svd) if compiled else svd
    for values, matrix in zip(run(stack)[1], stack, strict=True):
        wanted = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
        np.testing.assert_allclose(values, wanted, rtol=1e-5)  # float32


def test_each_takes_trees_and_has_a_gradient():
    stack = Factors(jnp.ones((3, 6, 2)), jnp.ones((3, 2, 4)))
    product = lambda stack: each(lambda one: one.left @ one.right, stack)
    np.testing.assert_array_equal(product(stack), np.full((3, 6, 4), 2.0))
    gradient = jax.grad(lambda stack: product(stack).sum())(stack)
    np.testing.assert_array_equal(gradient.left, np.full((3, 6, 2), 4.0))
