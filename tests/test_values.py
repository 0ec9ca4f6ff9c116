"""Spectra that the host finds, against float64 singular values and the compiled programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import _measure, _values, ranks
from rmtjax._typing import KernelAxes

MATRIX = KernelAxes((0,), (1,))
EPS = np.finfo(np.float32).eps


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def exact(matrix):
    """Eigenvalues by the singular values in float64."""
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False) ** 2 / max(matrix.shape)


def found(matrix):
    return _values.host_spectra(matrix, MATRIX).eigenvalues[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    "shape", [(120, 120), (120, 200), (600, 60), (60, 600), (9000, 50), (7, 1)]
)
def test_equals_the_singular_values_in_float64(rng, shape, dtype):
    matrix = rng.standard_normal(shape).astype(dtype)
    spectra = _values.host_spectra(matrix, MATRIX)
    assert spectra.eigenvalues.dtype == np.float32
    np.testing.assert_allclose(spectra.ratio, [min(shape) / max(shape)], rtol=EPS)
    expected = exact(matrix)
    # Small values of a square matrix are exact to the last bit of the largest, and far better.
    np.testing.assert_allclose(found(matrix), expected, rtol=1e-5, atol=EPS**2 * expected[0])


@pytest.mark.parametrize("shape", [(200, 200), (800, 200)])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_what_a_fit_uses_is_not_squared_away(rng, shape, condition):
    """Noise under directions that are larger by orders of magnitude, as in trained kernels."""
    noise = rng.standard_normal(shape)
    signal = np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1]))
    matrix = (noise + condition / 30 * signal).astype(np.float32)
    expected = exact(matrix)
    # What remains is the rounding of float64, of the largest eigenvalue.
    np.testing.assert_allclose(found(matrix), expected, rtol=3e-4, atol=expected[0] / 2**53)


@pytest.mark.parametrize("columns", [100, 300])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_follows_the_scale(rng, scale, columns):
    matrix = rng.standard_normal((300, columns)).astype(np.float32)
    scaled = found((scale * matrix).astype(np.float32))
    bulk = slice(columns - 5)
    np.testing.assert_allclose(scaled[bulk], scale**2 * found(matrix)[bulk], rtol=1e-4)


def test_squares_may_leave_the_range_of_float32(rng):
    """The eigenvalues are the squares over n: they need not, and then there is no warning."""
    matrix = np.zeros((400, 50), np.float32)
    matrix[np.arange(50), np.arange(50)] = 1.9e19 * np.linspace(1, 2, 50)
    assert np.isfinite(found(matrix)[-1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_a_spectrum_of_nan(rng, bad):
    kernel = rng.standard_normal((3, 60, 80)).astype(np.float32)
    kernel[1, 5, 7] = bad
    spectra = _values.host_spectra(kernel, KernelAxes((1,), (2,), (0,)))
    np.testing.assert_array_equal(np.isnan(spectra.eigenvalues).all(axis=1), [False, True, False])


def test_a_thin_product_has_directions_of_nothing(rng):
    thin = rng.standard_normal((300, 20)) @ rng.standard_normal((20, 400))
    values = found(thin.astype(np.float32))
    assert (values[20:] < (300 * EPS) ** 2 * values[0]).all()
    np.testing.assert_array_equal(found(np.zeros((60, 50), np.float32)), np.zeros(50))


def test_the_host_takes_what_lies_there():
    kernel = np.ones((4, 4), np.float32)
    assert _values.on_host(kernel)
    assert _values.on_host(jnp.asarray(kernel))
    assert _values.on_host(jax.ShapeDtypeStruct((4, 4), np.float16))
    assert not _values.on_host(kernel.astype(np.float64))
    assert not _values.on_host(rmtjax.Factors(kernel, kernel))
    assert not jax.jit(lambda kernel: jnp.asarray(_values.on_host(kernel)))(kernel)


@pytest.mark.parametrize("rule", [ranks.bema(), ranks.gavish_donoho(), ranks.energy(0.9)])
def test_a_plan_is_that_of_the_compiled_programs(rng, rule, monkeypatch):
    """On a GPU all kernels are measured in these."""
    planted = rng.standard_normal((100, 240)).astype(np.float32)
    planted[:, :4] += 3
    stack = jnp.asarray(rng.standard_normal((3, 80, 100)), jnp.bfloat16)
    params = {"a": planted, "b": {"c": stack, "d": np.asarray(planted.T[:90])}}
    axes = {"a": MATRIX, "b/c": KernelAxes((1,), (2,), (0,)), "b/d": MATRIX}
    here = rmtjax.plan(params, axes=axes, rule=rule)
    again = rmtjax.plan(params, axes=axes, rule=rule, fits={"a": here["a"].fit})
    monkeypatch.setattr(_measure, "on_host", lambda kernel: False)
    there = rmtjax.plan(params, axes=axes, rule=rule)
    assert str(here) == str(there) == str(again)
    for row, other in zip(here.values(), there.values(), strict=True):
        np.testing.assert_allclose(row.spectrum.eigenvalues, other.spectrum.eigenvalues, 1e-4, 1e-6)
        for number, like in zip(row.fit, other.fit, strict=True):
            np.testing.assert_allclose(number, like, rtol=1e-4, atol=1e-6)
