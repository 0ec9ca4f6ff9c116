"""The Tracy-Widom law against Fredholm determinants computed here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import interpolate

from rmtjax import tracy_widom
from tests.helpers.law_cases import fredholm

# Mean and variance, Bornemann, Markov Process. Relat. Fields 16 (2010) 803-866, table 6.
MOMENTS = {1: (-1.2065335745820, 1.607781034581), 2: (-1.7710868074, 0.8131947928)}


@functools.cache
def reference(beta):
    x = np.linspace(-10, 14, 481)
    return x, np.array([fredholm(value, beta) for value in x])


@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"]
)
@pytest.mark.parametrize("beta", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_cdf_is_the_fredholm_determinant(beta, transform):
    x, expected = reference(beta)
    cdf = transform(functools.partial(tracy_widom.cdf, beta=beta))
    # 1e-4 is promised; the table reaches 2e-5.
    np.testing.assert_allclose(cdf(jnp.asarray(x)), expected, atol=2e-5)


@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"]
)
@pytest.mark.parametrize("beta", [1, 2])
@pytest.mark.slow
def test_ppf_inverts_the_fredholm_determinant(beta, transform):
    x, probabilities = reference(beta)
    # Where float32 can tell the probabilities apart.
    middle = (probabilities > 1e-4) & (probabilities < 0.999)
    ppf = transform(functools.partial(tracy_widom.ppf, beta=beta))
    got = ppf(jnp.asarray(probabilities[middle]))
    np.testing.assert_allclose(got, x[middle], atol=1e-4)  # as promised


@pytest.mark.parametrize(
    ("probability", "quantile"),
    [
        (0.01, -3.895433),
        (0.05, -3.180380),
        (0.1, -2.782428),
        (0.2, -2.283163),
        (0.5, -1.268575),
        (0.8, -0.165313),
        (0.9, 0.450143),
        (0.95, 0.979316),
        (0.99, 2.023449),
    ],
)
def test_golden_quantiles(probability, quantile):
    # From the Painleve equation; 1e-4 is promised.
    np.testing.assert_allclose(tracy_widom.ppf(probability), quantile, atol=1e-4)
    np.testing.assert_allclose(tracy_widom.cdf(quantile), probability, atol=1e-4)


@pytest.mark.parametrize("beta", [1, 2])
def test_round_trip(beta):
    q = jnp.linspace(1e-3, 1 - 1e-3, 999)
    again = tracy_widom.cdf(tracy_widom.ppf(q, beta=beta), beta=beta)
    # Twice the error that is promised.
    np.testing.assert_allclose(again, q, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [1, 2])
def test_rises_on_the_table_and_beyond(beta):
    # Through the table, which starts at -8 or -6.5 and ends at 10 or 6, and its tails.
    cdf = np.asarray(tracy_widom.cdf(jnp.linspace(-30, 30, 60_001), beta=beta))
    assert np.all(np.diff(cdf) >= 0)
    assert cdf[0] == 0
    assert cdf[-1] == 1
    assert np.all(np.diff(cdf[(cdf > 1e-6) & (cdf < 0.99)]) > 0)
    with jax.enable_x64(True):
        # To 1e-100: far into the lower tail, which ends at 1e-12 or 1e-10.
        q = np.concatenate([np.logspace(-100, -1, 2000), np.linspace(0.1, 1 - 1e-15, 20_000)[1:]])
        assert np.all(np.diff(tracy_widom.ppf(q, beta=beta)) > 0)
        x = np.linspace(-12, 6, 20_001)
        assert np.all(np.diff(tracy_widom.cdf(x, beta=beta)) > 0)


@pytest.mark.parametrize("beta", [1, 2])
def test_mean_and_variance(beta):
    with jax.enable_x64(True):
        edges = np.linspace(-14, 14, 28_001)
        mass = np.diff(tracy_widom.cdf(edges, beta=beta))
    x = (edges[1:] + edges[:-1]) / 2
    mean = np.sum(mass * x)
    variance = np.sum(mass * (x - mean) ** 2)
    # The error of the table, 2e-5, over a law some units wide.
    np.testing.assert_allclose((mean, variance), MOMENTS[beta], atol=1e-4)


def test_reference_is_the_law_itself():
    # Guards the guard: the moments of the determinants, without our code.
    for beta, expected in MOMENTS.items():
        x, probabilities = reference(beta)
        density = interpolate.CubicSpline(x, probabilities).derivative()
        fine = np.linspace(-10, 14, 24_001)
        mass = density(fine) * 1e-3
        mean = np.sum(mass * fine)
        got = mean, np.sum(mass * (fine - mean) ** 2)
        np.testing.assert_allclose(got, expected, atol=1e-6)  # the spline


@pytest.mark.parametrize("beta", [1, 2])
def test_ends_and_what_is_no_probability(beta):
    x = jnp.array([-jnp.inf, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(tracy_widom.cdf(x, beta=beta), [0, 1, jnp.nan])
    q = jnp.array([0.0, 1.0, -0.1, 1.1, jnp.nan])
    expected = [-jnp.inf, jnp.inf, jnp.nan, jnp.nan, jnp.nan]
    np.testing.assert_array_equal(tracy_widom.ppf(q, beta=beta), expected)


@pytest.mark.parametrize("beta", [1, 2])
def test_density_is_the_slope(beta):
    x, probabilities = reference(beta)
    density = interpolate.CubicSpline(x, probabilities).derivative()(x)
    slope = jax.vmap(jax.grad(functools.partial(tracy_widom.cdf, beta=beta)))(jnp.asarray(x))
    # Steps of one half: the slope is worse than the value by some tens.
    np.testing.assert_allclose(slope, density, atol=1e-3)


@pytest.mark.parametrize("function", [tracy_widom.cdf, tracy_widom.ppf])
def test_shapes_and_dtypes(function):
    assert function(jnp.full((2, 3), 0.5)).shape == (2, 3)
    low = function(jnp.bfloat16(0.5))
    assert low.dtype == jnp.float32
    assert low == function(0.5)
    assert function(1).dtype == jnp.float32
    with jax.enable_x64(True):
        assert function(np.float64(0.5)).dtype == jnp.float64


@pytest.mark.parametrize("function", [tracy_widom.cdf, tracy_widom.ppf])
@pytest.mark.parametrize("beta", [0, 3, 4])
def test_other_ensembles_are_errors(function, beta):
    with pytest.raises(ValueError, match="`beta` must be 1"):
        function(0.5, beta=beta)
