"""Truncation and factors against the singular value decomposition of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax._axes import KernelAxes
from rmtjax.spectra import _svd
from rmtjax.spectra._factors import multiply, split, svd

STACK = KernelAxes((1,), (2,), (0,))

SHAPES = [(1, 1), (1, 6), (8, 8), (12, 5), (5, 12)]
# Roundoff of a factor, times the square root of some terms that are summed.
ROUNDING = {jnp.float32: 1e-5, jnp.bfloat16: 0.03, jnp.float16: 0.004}


def first_directions(stack, axes, rank):
    u, s, vt = _svd.directions(stack, rank, axes=axes, block=rank, iterate=False)
    return u, s, vt


def matrix_of(shape, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def numpy_truncation(matrix, rank):
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], s


def ranks_of(shape):
    return sorted({1, (min(shape) + 1) // 2, min(shape)})


CASES = [(shape, rank) for shape in SHAPES for rank in ranks_of(shape)]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_factors_are_the_nearest_matrix_of_their_rank(shape, rank, dtype):
    matrix = matrix_of(shape, dtype)
    expected, singular_values = numpy_truncation(matrix, rank)
    factors = rmtjax.factorize_matrix(matrix, rank)
    assert factors.left.shape == (shape[0], rank)
    assert factors.right.shape == (rank, shape[1])
    assert factors.left.dtype == factors.right.dtype == dtype
    product = multiply(factors)
    assert product.dtype == dtype
    size = singular_values[0]
    np.testing.assert_allclose(
        np.asarray(product, np.float64), expected, rtol=0, atol=ROUNDING[dtype] * size
    )
    # Eckart and Young: the error is exactly what was dropped.
    error = np.linalg.norm(np.asarray(product, np.float64) - np.asarray(matrix, np.float64))
    dropped = np.sqrt(np.sum(singular_values[rank:] ** 2))
    np.testing.assert_allclose(error, dropped, rtol=0, atol=3 * ROUNDING[dtype] * size)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("shape", "rank"), [*CASES, ((8, 8), 0), ((5, 12), 7)])
def test_truncation_is_the_nearest_matrix_of_its_rank(shape, rank, dtype):
    matrix = matrix_of(shape, dtype)
    expected, singular_values = numpy_truncation(matrix, rank)
    got = rmtjax.truncate_matrix(matrix, rank)
    assert got.shape == shape
    assert got.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, rtol=0, atol=ROUNDING[dtype] * singular_values[0]
    )


def test_error_of_a_truncation_is_what_was_dropped():
    with jax.enable_x64(True):
        matrix = jnp.asarray(np.random.default_rng(0).standard_normal((30, 50)))
        _, singular_values = numpy_truncation(matrix, 0)
        for rank in range(31):
            truncated = rmtjax.truncate_matrix(matrix, rank)
            assert truncated.dtype == jnp.float64
            error = np.linalg.norm(truncated - matrix)
            dropped = np.sqrt(np.sum(singular_values[rank:] ** 2))
            np.testing.assert_allclose(error, dropped, rtol=1e-10, atol=1e-12)  # LAPACK


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
def test_factors_are_balanced(shape):
    # L^T L = R R^T = diag(s): both train alike.
    left, right = rmtjax.factorize_matrix(matrix_of(shape), 4)
    _, singular_values = numpy_truncation(matrix_of(shape), 4)
    expected = np.diag(singular_values[:4])
    np.testing.assert_allclose(left.T @ left, expected, atol=1e-4)  # float32, sums of 12
    np.testing.assert_allclose(right @ right.T, expected, atol=1e-4)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_truncation_takes_a_traced_rank(transform):
    matrix, calls = matrix_of((6, 9)), []
    truncate = transform(lambda *args: calls.append(1) or rmtjax.truncate_matrix(*args))
    for rank in range(7):
        # Float32 LAPACK.
        expected, _ = numpy_truncation(matrix, rank)
        np.testing.assert_allclose(truncate(matrix, jnp.int32(rank)), expected, atol=1e-5)
    assert len(calls) == (1 if transform is jax.jit else 7)


def test_truncation_under_vmap():
    stack, ranks = matrix_of((3, 6, 9)), jnp.array([0, 2, 6])
    batched = jax.vmap(rmtjax.truncate_matrix)(stack, ranks)
    for i in range(3):
        expected, _ = numpy_truncation(stack[i], int(ranks[i]))
        np.testing.assert_allclose(batched[i], expected, atol=1e-5)  # float32 LAPACK


def test_factors_under_jit():
    matrix = matrix_of((6, 9))
    compiled = jax.jit(rmtjax.factorize_matrix, static_argnums=1)(matrix, 3)
    # The product: the signs of singular vectors are free.
    expected = multiply(rmtjax.factorize_matrix(matrix, 3))
    np.testing.assert_allclose(multiply(compiled), expected, atol=1e-5)  # float32 LAPACK


def test_full_rank_gives_the_matrix_back():
    matrix = matrix_of((7, 5))
    np.testing.assert_allclose(multiply(rmtjax.factorize_matrix(matrix, 5)), matrix, atol=1e-5)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_not_finite_gives_nan(value):
    matrix = matrix_of((4, 6)).at[1, 1].set(value)
    assert jnp.isnan(rmtjax.truncate_matrix(matrix, 2)).all()
    assert jnp.isnan(multiply(rmtjax.factorize_matrix(matrix, 2))).all()


@pytest.mark.parametrize("rank", [0, -1, 6, 100])
def test_rank_out_of_range_is_an_error(rank):
    with pytest.raises(ValueError, match=r"`rank` must be in \[1, 5\], got"):
        rmtjax.factorize_matrix(matrix_of((7, 5)), rank)


@pytest.mark.parametrize("rank", [2.0, np.float32(2), "2", None])
def test_rank_that_is_no_integer_is_an_error(rank):
    with pytest.raises(TypeError, match=r"rank|integer"):
        rmtjax.factorize_matrix(matrix_of((7, 5)), rank)


def test_traced_rank_is_an_error_for_factors():
    with pytest.raises(TypeError):
        jax.jit(rmtjax.factorize_matrix)(matrix_of((7, 5)), 2)


@pytest.mark.parametrize("function", [rmtjax.factorize_matrix, rmtjax.truncate_matrix])
def test_what_is_no_matrix_is_an_error(function):
    # The checks of shapes during tests may come first, with a TypeError.
    for shape in [(5,), (2, 3, 4), (3, 3, 8, 16)]:
        with pytest.raises((ValueError, TypeError), match="matrix"):
            function(jnp.ones(shape), 1)
    with pytest.raises(ValueError, match="needs a matrix with entries"):
        function(jnp.ones((0, 4)), 1)
    for dtype in (jnp.int32, jnp.complex64):
        with pytest.raises(TypeError, match="matrix"):
            function(jnp.ones((3, 4), dtype), 1)


# Factors of kernels with more axes.


def random_factors(left, right, dtype=jnp.float32):
    return rmtjax.Factors(matrix_of(left, dtype, 1), matrix_of(right, dtype, 2))


@pytest.mark.parametrize(
    ("left", "right", "subscripts"),
    [
        ((6, 2), (2, 5), "ir,ro->io"),
        ((3, 3, 4, 2), (2, 5), "hwir,ro->hwio"),  # a convolution
        ((6, 2), (2, 4, 5), "ir,rhd->ihd"),  # to the heads of an attention
        ((4, 5, 2), (2, 6), "hdr,ro->hdo"),  # and from them
        ((4, 5, 2), (2, 3, 6), "abr,rcd->abcd"),  # several of both, and no batch
        ((2, 5, 3), (3, 2, 6), "abr,rcd->abcd"),
        ((7, 6, 2), (7, 2, 5), "bir,bro->bio"),  # the layers of a scan
        ((7, 4, 5, 2), (7, 2, 6), "bhdr,bro->bhdo"),
        ((7, 6, 2), (7, 2, 4, 5), "bir,brhd->bihd"),
        ((7, 6, 1), (7, 1, 5), "bir,bro->bio"),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_multiply_is_the_contraction_of_the_rank(left, right, subscripts, dtype):
    factors = random_factors(left, right, dtype)
    expected = np.einsum(subscripts, *(np.asarray(factor, np.float64) for factor in factors))
    got = multiply(factors)
    assert got.dtype == dtype
    # One rounding to the dtype.
    rounding = 1e-5 if dtype == jnp.float32 else 0.02
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=rounding, atol=rounding)
    np.testing.assert_array_equal(jax.jit(multiply)(factors).shape, expected.shape)


def test_each_matrix_of_a_stack_has_its_own_factors():
    stack = matrix_of((3, 6, 9))
    factors = split(*first_directions(stack, STACK, 2))
    assert (factors.left.shape, factors.right.shape) == ((3, 6, 2), (3, 2, 9))
    product = multiply(factors)
    for i in range(3):
        expected, _ = numpy_truncation(stack[i], 2)
        np.testing.assert_allclose(product[i], expected, atol=1e-5)  # float32 LAPACK


def test_one_matrix_does_not_spoil_the_stack():
    stack = matrix_of((3, 4, 6)).at[1, 0, 0].set(jnp.nan)
    product = multiply(split(*first_directions(stack, STACK, 4)))
    assert jnp.isnan(product[1]).all()
    np.testing.assert_allclose(product[::2], stack[::2], atol=1e-5)  # float32 LAPACK


@pytest.mark.parametrize("shape", [(1, 90, 20), (1, 20, 90), (3, 60, 20), (1, 30, 20)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_first_directions_are_those_of_the_decomposition(shape, dtype):
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.normal(size=shape), dtype).at[..., 5].set(0).at[..., 7, :].set(0)
    for rank in (6, 20):
        found = first_directions(stack, STACK, rank)
        u, s, vt = svd(stack)
        wanted = u[..., :rank], s[..., :rank], vt[..., :rank, :]
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, wanted)
        assert all(np.isfinite(part).all() for part in found)
        # Vectors have a sign of their own; the products agree to the rounding of the largest.
        products = [multiply(split(*parts)) for parts in (found, wanted)]
        np.testing.assert_allclose(*products, rtol=0, atol=1e-5 * float(s.max()))
        np.testing.assert_allclose(found[1], wanted[1], rtol=0, atol=1e-5 * float(s.max()))


def test_a_rank_that_is_none_is_told():
    matrix = matrix_of((6, 4))
    with pytest.raises(ValueError, match="`rank` must be at least 0, got -1"):
        rmtjax.truncate_matrix(matrix, -1)
    with pytest.raises(TypeError):
        rmtjax.truncate_matrix(matrix, 2.5)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(rmtjax.truncate_matrix(matrix, 0), jnp.zeros((6, 4)))
    np.testing.assert_allclose(rmtjax.truncate_matrix(matrix, 9), matrix, atol=1e-5)


def test_derivatives_go_through_the_truncation_of_a_matrix():
    """Half the sum of the squares of the kept values has the truncated matrix as its gradient."""
    matrix = matrix_of((7, 5))
    squares = lambda a: (rmtjax.truncate_matrix(a, 2) ** 2).sum() / 2
    np.testing.assert_allclose(jax.grad(squares)(matrix), numpy_truncation(matrix, 2)[0], atol=1e-4)
