"""The Marchenko-Pastur law against quadrature of the textbook density in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.law_cases import cdf, inside, pdf, ppf, RATIOS, textbook_support
from hypothesis import given, strategies as st
from scipy import integrate

from rmtjax import marchenko_pastur as mp

TRANSFORMS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: jax.vmap(f, (0, None)),
}
ratios = st.floats(1e-4, 1.0)
variances = st.floats(1e-3, 1e3)
probabilities = st.floats(0, 1, width=32)


def textbook_pdf(x, ratio):
    lower, upper = textbook_support(ratio)
    return math.sqrt((upper - x) * (x - lower)) / (2 * math.pi * ratio * x)


def textbook_cdf(x, ratio):
    # x = lower + width sin(t)^2 takes the square roots from the ends. Near a ratio of 1 the
    # pole at 0 is left, just outside the support: the points show quad where it is.
    lower, upper = textbook_support(ratio)
    width = upper - lower

    def integrand(t):
        x = lower + width * math.sin(t) ** 2
        return (width * math.sin(2 * t)) ** 2 / (4 * math.pi * ratio * x)

    end = math.asin(math.sqrt((x - lower) / width))
    points = [end * 10.0**-k for k in range(1, 7)]
    value, _ = integrate.quad(integrand, 0, end, points=points, epsabs=1e-13, limit=400)
    return value


@pytest.mark.parametrize("ratio", RATIOS)
def test_float64_is_the_textbook(ratio):
    x = np.array(inside(ratio))
    probability = np.array([textbook_cdf(value, ratio) for value in x])
    density = np.array([textbook_pdf(value, ratio) for value in x])
    with jax.enable_x64(True):
        variance = 2.5
        # 1e-11: quadrature, and the rounding of x near the edges of a narrow support.
        close = lambda got, expected: np.testing.assert_allclose(got, expected, rtol=1e-11)
        close(mp.support(ratio, variance), variance * np.array(textbook_support(ratio)))
        close(mp.pdf(variance * x, ratio, variance), density / variance)
        close(mp.cdf(variance * x, ratio, variance), probability)
        close(mp.ppf(probability, ratio, variance), variance * x)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_float32_is_the_textbook(ratio, transform):
    ratio = float(np.float32(ratio))  # the same law on both sides
    lower, upper = textbook_support(ratio)
    x = np.float32(inside(ratio))
    probability = np.array([textbook_cdf(float(value), ratio) for value in x])
    density = np.array([textbook_pdf(float(value), ratio) for value in x])
    apply = lambda f, values: transform(f)(jnp.asarray(values), ratio)
    # 2e-6: a support of width 0.04 around 1 resolves 1.5e-6 of itself.
    np.testing.assert_allclose(apply(mp.cdf, x), probability, atol=2e-6)
    # 1e-5 of the width: the same, and the slope of the quantiles near the ends.
    quantiles = apply(mp.ppf, np.float32(probability))
    np.testing.assert_allclose(quantiles, x, rtol=0, atol=1e-5 * (upper - lower))
    # 1e-3: the distance from an edge of that support has three digits.
    np.testing.assert_allclose(apply(mp.pdf, x), density, rtol=1e-3)


@pytest.mark.parametrize(
    ("ratio", "x", "density", "probability"),
    [
        (0.5, 1.0, 0.421084, 0.576004),
        (1.0, 0.5, 0.421084, 0.440596),
        (1.0, 1.0, 0.275664, 0.608998),
        (1.0, 2.0, 0.159155, 0.818310),
        (1.0, 3.0, 0.091888, 0.942331),
        (0.784, 1.0, 0.322344, 0.595917),
        (1 / 3, 1.0, 0.527857, 0.561783),
        (1 / 3, 2.0, 0.225079, 0.929725),
    ],
)
def test_golden_densities_and_probabilities(ratio, x, density, probability):
    # Six decimals are given.
    np.testing.assert_allclose(mp.pdf(x, ratio), density, atol=1e-6)
    np.testing.assert_allclose(mp.cdf(x, ratio), probability, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "quartiles"),
    [
        (1.0, (0.156253, 0.652776, 1.611400)),
        (0.784, (0.248744, 0.730860, 1.569483)),
        (1 / 3, (0.509716, 0.887681, 1.413088)),
        (0.1, (0.735321, 0.966565, 1.241528)),
    ],
)
def test_golden_quartiles(ratio, quartiles):
    # Six decimals are given, and float32 has seven digits.
    got = mp.ppf(jnp.array([0.25, 0.5, 0.75]), ratio)
    np.testing.assert_allclose(got, quartiles, atol=2e-6)


def test_support_is_that_of_the_paper():
    np.testing.assert_allclose(mp.support(0.25, 2.0), (0.5, 4.5), rtol=1e-6)
    # Exact: the lower edge of a square matrix is 0, and would else be a pole nearby.
    assert [float(edge) for edge in mp.support(1.0)] == [0.0, 4.0]


def moments(ratio, variance):
    # Bai and Silverstein, Spectral Analysis (2010), Lemma 3.1.
    unit = np.array([1, 1, 1 + ratio, 1 + 3 * ratio + ratio**2])
    return unit * variance ** np.arange(4)


NODES, WEIGHTS = np.polynomial.legendre.leggauss(512)
MIDPOINTS = (np.arange(20_000) + 0.5) / 20_000


# From 1e-2: on a narrower support float32 does not resolve the ends, where nodes crowd.
@given(ratio=st.floats(1e-2, 1.0), variance=variances)
def test_density_has_the_moments_of_the_law(ratio, variance):
    # With x = centre - radius * cos(angle) the square-root edges become smooth.
    angle, radius = np.pi / 2 * (NODES + 1), 2 * variance * np.sqrt(ratio)
    x = variance * (1 + ratio) - radius * np.cos(angle)
    density = np.asarray(pdf(jnp.asarray(x), ratio, variance))
    mass = np.pi / 2 * WEIGHTS * radius * np.sin(angle) * density
    got = [np.sum(mass * x**order) for order in range(4)]
    # 1e-4: the pole next to the support of a ratio near 1, and float32.
    np.testing.assert_allclose(got, moments(ratio, variance), rtol=1e-4)


@given(ratio=ratios, variance=variances)
def test_quantiles_have_the_moments_of_the_law(ratio, variance):
    x = np.asarray(ppf(jnp.asarray(MIDPOINTS), ratio, variance), np.float64)
    got = [np.mean(x**order) for order in range(4)]
    # 1e-5: the midpoint rule at the square-root ends, and float32.
    np.testing.assert_allclose(got, moments(ratio, variance), rtol=1e-5)


@given(q=probabilities, ratio=ratios, variance=variances)
def test_ppf_is_the_inverse_of_cdf(q, ratio, variance):
    x = ppf(q, ratio, variance)
    lower, upper = mp.support(ratio, variance)
    # An ulp: the edges and the quantiles are not rounded in the same order.
    assert lower * (1 - 3e-7) <= x <= upper * (1 + 3e-7)
    # 1e-5: the rounding of x, of which the narrowest support has 6e5 steps.
    np.testing.assert_allclose(cdf(x, ratio, variance), q, atol=1e-5)


@given(fraction=st.floats(-0.5, 1.5), ratio=ratios, variance=variances)
def test_variance_is_a_scale(fraction, ratio, variance):
    lower, upper = textbook_support(ratio)
    x = lower + fraction * (upper - lower)
    # 1e-5 as above: x is rounded on two scales.
    np.testing.assert_allclose(cdf(variance * x, ratio, variance), cdf(x, ratio, 1.0), atol=1e-5)
    # Exact for a power of two: nothing is rounded.
    assert 8 * pdf(8 * np.float32(x), ratio, 8.0) == pdf(np.float32(x), ratio, 1.0)


@pytest.mark.parametrize("ratio", RATIOS)
def test_cdf_and_ppf_rise(ratio):
    lower, upper = textbook_support(ratio)
    x = jnp.asarray(np.linspace(lower, upper, 300))
    probabilities = np.asarray(mp.cdf(x, ratio))
    assert np.all(np.diff(probabilities[1:-1]) > 0)
    assert np.all(np.diff(mp.ppf(jnp.linspace(0, 1, 1000), ratio)) > 0)


@pytest.mark.parametrize("variance", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("ratio", RATIOS)
def test_outside_the_support_nothing_is_left(ratio, variance):
    lower, upper = mp.support(ratio, variance)
    # Bug B3 of the papers' code: 0 above the bulk.
    above = jnp.stack([upper * 1.0001, 2 * upper, jnp.inf])
    below = jnp.stack([lower * 0.9999, -upper, -jnp.inf])
    np.testing.assert_array_equal(mp.cdf(above, ratio, variance), 1)
    np.testing.assert_array_equal(mp.cdf(below, ratio, variance), 0)
    np.testing.assert_array_equal(mp.pdf(above, ratio, variance), 0)
    np.testing.assert_array_equal(mp.pdf(below, ratio, variance), 0)
    ends = mp.ppf(jnp.array([0.0, 1.0]), ratio, variance)
    np.testing.assert_allclose(ends, [lower, upper], rtol=1e-6)
