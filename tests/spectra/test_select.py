"""One contract whatever computes spectra and vectors: the host, or compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import Factors, ranks, shrinkage
from rmtjax._axes import KernelAxes, MatrixView
from rmtjax.spectra import _select, _svd, product, singular_vectors, spectra, truncate_by

MATRIX, STACK = KernelAxes((0,), (1,)), KernelAxes((1,), (2,), (0,))
EPS = np.finfo(np.float32).eps


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def noise(shape, dtype: type = np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def truncated(matrix, rank):
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :], s


def test_the_host_takes_kernels_that_it_reads_without_moving_them():
    kernel = np.ones((4, 4), np.float32)
    on_host = lambda leaf: _select._on_host(MatrixView("", leaf, MATRIX))
    assert on_host(kernel)
    assert on_host(jnp.asarray(kernel))
    assert on_host(jax.ShapeDtypeStruct((4, 4), np.float16))
    assert not on_host(kernel.astype(np.float64))
    assert not on_host(Factors(jnp.asarray(kernel), jnp.asarray(kernel)))
    assert not jax.jit(lambda kernel: jnp.asarray(on_host(kernel)))(kernel)


def test_spectra_are_those_of_the_compiled_programs(rng):
    """On a GPU all kernels are measured in these."""
    stack = jnp.asarray(rng.standard_normal((3, 80, 100)), jnp.bfloat16)
    kernels = {"a": rng.standard_normal((100, 240)).astype(np.float32), "b": stack}
    kernels |= {"c": kernels["a"].T[:90], "d": kernels["a"] + 1}
    axes = {"b": KernelAxes((1,), (2,), (0,))}
    views = {name: MatrixView(name, a, axes.get(name, MATRIX)) for name, a in kernels.items()}
    compiled = _svd.compiled_spectra(views)
    for path, values in spectra(views).items():
        expected, exponents = compiled[path]
        assert not values.exponent.any()
        assert not exponents.any()
        np.testing.assert_allclose(
            values.spectrum.eigenvalues, expected.eigenvalues, rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(values.spectrum.ratio, expected.ratio, rtol=EPS)


LARGE = pytest.param((1000, 1040), 1, marks=pytest.mark.slow)  # which is iterated


@pytest.mark.parametrize(("shape", "rank"), [LARGE, ((257, 300), 250)])
@pytest.mark.parametrize("change", [rmtjax.truncate, rmtjax.factorize])
def test_a_tree_may_be_a_constant_of_a_program(change, shape, rank):
    kernel = noise(shape)
    kernel[:, :3] += 4
    for params in ({"kernel": kernel}, {"kernel": jnp.asarray(kernel)}):
        plan = rmtjax.plan(params, rule=ranks.fixed(rank), min_size=20)
        wanted = rmtjax.merge(change(params, plan))["kernel"]
        inside = lambda x, params=params, plan=plan: (
            x @ rmtjax.merge(change(params, plan))["kernel"]
        )
        np.testing.assert_allclose(jax.jit(inside)(np.eye(len(kernel))), wanted, atol=1e-4)
        shape = jax.eval_shape(inside, np.eye(len(kernel)))
        assert shape.shape == kernel.shape


def test_results_stay_where_the_kernel_is_bound_to():
    (device, *_) = jax.devices()
    kernel = noise((60, 80))
    for placed in (jnp.asarray(kernel), jax.device_put(kernel, device)):
        plan = rmtjax.plan({"kernel": placed}, rule=ranks.fixed(8))
        for change in (rmtjax.truncate, rmtjax.factorize):
            found = jax.tree.leaves(change({"kernel": placed}, plan))
            assert {leaf.committed for leaf in found} == {placed.committed}


@pytest.mark.parametrize("shrink", [None, shrinkage.frobenius])
@pytest.mark.parametrize("rank", [8, 45])
@pytest.mark.parametrize("kind", ["dense", "stack", "conv", "bfloat16"])
def test_a_tree_is_cut_as_by_the_compiled_programs(kind, rank, shrink):
    """Under `jit` the host cannot: as on a GPU."""
    shape, axes = {
        "dense": ((60, 80), MATRIX),
        "bfloat16": ((60, 80), MATRIX),
        "stack": ((3, 70, 60), STACK),
        "conv": ((3, 3, 8, 60), KernelAxes((0, 1, 2), (3,))),
    }[kind]
    kernel = jnp.asarray(noise(shape), jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
    params = {"kernel": kernel}
    plan = rmtjax.plan(
        params, axes={"kernel": axes}, rule=ranks.fixed(rank), shrink=shrink, min_size=20
    )
    for change in (rmtjax.truncate, rmtjax.factorize):
        cut = lambda tree, change=change: rmtjax.merge(change(tree, plan))["kernel"]
        by_host, compiled = cut(params), jax.jit(cut)(params)
        eps = 2**-8 if kind == "bfloat16" else 2e-6
        assert by_host.dtype == compiled.dtype
        wide = lambda array: np.asarray(array, np.float32)
        close = {"rtol": 0, "atol": 8 * eps * float(jnp.abs(kernel).max())}
        np.testing.assert_allclose(wide(by_host), wide(compiled), **close)


def test_a_kernel_of_float64_is_cut_in_float32():
    """As JAX computes without its 64 bits: without a word of warning."""
    kernel = noise((60, 80), np.float64)
    plan = rmtjax.plan({"kernel": kernel}, rule=ranks.fixed(8))
    for change in (rmtjax.truncate, rmtjax.factorize):
        found = rmtjax.merge(change({"kernel": kernel}, plan))["kernel"]
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, truncated(kernel, 8)[0], atol=1e-4)


@pytest.mark.parametrize("kind", ["numpy", "jax", "float64", "factors"])
def test_values_and_vectors_of_any_leaf_have_one_contract(kind):
    axes = KernelAxes((0, 2), (3,), (1,))  # a stack, with its axis between those of the inputs
    kernel = noise((3, 2, 4, 20), np.float64)
    stack = kernel.transpose(1, 0, 2, 3).reshape(2, 12, 20)
    if kind == "factors":
        axes = KernelAxes((1, 2), (3,), (0,))
        left, right = noise((2, 3, 4, 5)), noise((2, 5, 20))
        leaf = Factors(jnp.asarray(left), jnp.asarray(right))
        stack = left.reshape(2, 12, 5) @ right
    else:
        leaf = kernel if kind == "float64" else kernel.astype(np.float32)
        leaf = jnp.asarray(leaf) if kind == "jax" else leaf
    view = MatrixView("kernel", leaf, axes)
    ((path, (u, s, vt)),) = singular_vectors({"kernel": view}, {"kernel": 5})
    assert (path, u.shape, s.shape, vt.shape) == ("kernel", (2, 3, 4, 5), (2, 5), (2, 5, 20))
    wanted, values = truncated(stack, 5)
    np.testing.assert_allclose(s, values[:, :5], rtol=1e-5)
    factors = Factors(u * s[:, None, None], vt)
    # Rounding of float32 in the product, of the largest value.
    close = {"rtol": 0, "atol": 3e-6 * values.max()}
    dense = MatrixView("kernel", jnp.zeros(view.shape), axes)
    np.testing.assert_allclose(
        MatrixView("", product(factors, dense), axes).matrices(), wanted, **close
    )
    spectrum, num_exact, live, exponent = spectra({"kernel": view})["kernel"]
    assert live.tolist() == [[view.rows, view.columns]] * 2
    assert exponent.tolist() == [0, 0]
    assert isinstance(spectrum.eigenvalues, np.ndarray)
    assert num_exact.tolist() == [12, 12]
    expected = values**2 / 20
    np.testing.assert_allclose(spectrum.eigenvalues, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(spectrum.ratio, [0.6, 0.6], rtol=EPS)


def above(least):
    """A rule: the number of values above a threshold, and whether it saw all values."""
    return lambda s, complete: (jnp.sum(s > least), jnp.asarray(complete))


@pytest.mark.parametrize("size", [1, 3])
def test_a_stack_is_truncated_to_the_rank_of_its_values(size):
    stack = noise((size, 40, 60))
    stack[:, :, 0] += 8
    rank_of = lambda s, complete: (jnp.max(jnp.sum(s > 14, axis=-1)), complete)
    lower, s, complete = truncate_by(jnp.asarray(stack), rank_of, jnp.full(size, 14.0), True)
    wanted, values = truncated(stack, 1)
    assert complete
    np.testing.assert_allclose(s, values, rtol=0, atol=1e-5 * values.max())
    np.testing.assert_allclose(lower, wanted, rtol=0, atol=1e-5 * values.max())


@pytest.mark.parametrize(
    ("search", "complete"), [(True, False), pytest.param(False, True, marks=pytest.mark.slow)]
)
def test_directions_above_a_floor_are_searched_where_it_pays(search, complete):
    matrix = noise((1000, 1010))  # its noise ends at 64
    for i, shift in enumerate((12, 10, 8)):
        matrix[300 * i : 300 * (i + 1), i] += shift  # of size 17.3 times as much
    find = jax.jit(lambda a, floor, search: truncate_by(a[None], above(90), floor[None], search))
    lower, s, saw_all = find(jnp.asarray(matrix), jnp.float32(90), jnp.asarray(search))
    wanted, values = truncated(matrix, 3)
    assert saw_all == complete
    np.testing.assert_allclose(s[0, :3], values[:3], rtol=1e-5)
    np.testing.assert_allclose(lower[0], wanted, rtol=0, atol=1e-5 * values[0])


@pytest.mark.slow  # compiles both ways for a matrix of 1,000 columns
def test_a_search_that_is_not_enough_is_followed_by_a_decomposition():
    matrix = noise((1000, 1010))
    find = jax.jit(lambda a, floor: truncate_by(a[None], above(50), floor[None], jnp.array(True)))
    lower, s, saw_all = find(jnp.asarray(matrix), jnp.float32(90))
    wanted, values = truncated(matrix, int((np.asarray(s[0]) > 50).sum()))
    assert saw_all
    np.testing.assert_allclose(lower[0], wanted, rtol=0, atol=2e-5 * values[0])
