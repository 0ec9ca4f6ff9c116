"""The Marchenko-Pastur law against quadrature of the textbook density in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.test_util import check_grads
from scipy import integrate

from rmtjax import marchenko_pastur as mp

# Down to a very long matrix, both sides of the switch to the series at 0.01, up to a square.
RATIOS = [1e-4, 1e-3, 0.0099, 0.0101, 0.1, 1 / 3, 0.5, 0.784, 0.99, 0.9999, 1.0]
FRACTIONS = [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]  # of the support
TRANSFORMS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: jax.vmap(f, (0, None)),
}

ratios = st.floats(1e-4, 1.0)
variances = st.floats(1e-3, 1e3)
probabilities = st.floats(0, 1, width=32)


def textbook_support(ratio):
    return (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2


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


def inside(ratio):
    lower, upper = textbook_support(ratio)
    return [lower + fraction * (upper - lower) for fraction in FRACTIONS]


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


def gradients(f):
    return jax.jit(jax.vmap(jax.grad(f, (0, 1, 2)), (0, None, None)))


pdf, cdf, ppf = jax.jit(mp.pdf), jax.jit(mp.cdf), jax.jit(mp.ppf)
GRADIENTS = {f: gradients(f) for f in (mp.pdf, mp.cdf, mp.ppf)}
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


@pytest.mark.parametrize("ratio", RATIOS)
def test_gradients_are_finite_everywhere(ratio):
    lower, upper = mp.support(ratio, 2.0)
    special = [lower, upper, -upper, 0 * upper, 2 * upper]
    x = jnp.stack([*special, *jnp.linspace(lower, upper, 101)])
    q = jnp.concatenate([jnp.array([0.0, 1.0, 1e-30, 1e-7, 1 - 1e-7]), jnp.linspace(0, 1, 101)])
    for function, values in [(mp.pdf, x), (mp.cdf, x), (mp.ppf, q)]:
        assert np.isfinite(GRADIENTS[function](values, ratio, 2.0)).all(), function.__name__
    for edge in (lambda *law: mp.support(*law)[0], lambda *law: mp.support(*law)[1]):
        assert np.isfinite(jax.grad(edge, (0, 1))(ratio, 2.0)).all()


@pytest.mark.parametrize("ratio", RATIOS)
def test_gradient_of_cdf_is_pdf(ratio):
    with jax.enable_x64(True):
        x = jnp.asarray(inside(ratio))
        slope, *_ = GRADIENTS[mp.cdf](x, ratio, 1.0)
        # 1e-9: the difference of two close numbers at the ends of a narrow support.
        np.testing.assert_allclose(slope, mp.pdf(x, ratio), rtol=1e-9)
        slope, *_ = GRADIENTS[mp.ppf](mp.cdf(x, ratio), ratio, 1.0)
        np.testing.assert_allclose(slope, 1 / mp.pdf(x, ratio), rtol=1e-9)


@pytest.mark.parametrize("ratio", [0.005, 0.1, 0.5, 0.95])
@pytest.mark.parametrize(("function", "x"), [(mp.pdf, 1.1), (mp.cdf, 1.1), (mp.ppf, 0.3)])
def test_gradients_are_finite_differences(function, x, ratio):
    with jax.enable_x64(True):
        # 1e-6: central differences with a step that is small for a support of width 0.3.
        law = x, ratio, 1.2
        check_grads(function, law, 1, ("fwd", "rev"), rtol=1e-6, atol=1e-6, eps=1e-6)


@pytest.mark.parametrize("ratio", [1e-6, *RATIOS])
def test_gradients_of_quantiles_keep_float32(ratio):
    ratio, q = float(np.float32(ratio)), np.float32([0.05, 0.3, 0.6, 0.95])
    got = GRADIENTS[mp.ppf](q, ratio, 1.0)
    with jax.enable_x64(True):
        expected = GRADIENTS[mp.ppf](np.float64(q), ratio, 1.0)
    # The worst is 6e-6; the closed form alone, without its series, loses 5e-4.
    np.testing.assert_allclose(got, expected, rtol=2e-5)


@pytest.mark.parametrize("function", [mp.pdf, mp.cdf, mp.ppf])
def test_low_precision_is_lifted(function):
    low = jnp.linspace(0.05, 0.95, 7, dtype=jnp.bfloat16)
    high = function(low.astype(jnp.float32), 0.7)
    got = function(low, jnp.bfloat16(0.7))
    assert got.dtype == jnp.float32
    # The lifted ratio is 0.69921875.
    np.testing.assert_array_equal(got, function(low.astype(jnp.float32), 0.69921875))
    np.testing.assert_array_equal(function(low, 0.7), high)
    assert function(1, 0.5).dtype == jnp.float32
    with jax.enable_x64(True):
        assert function(np.float64(0.5), 0.5).dtype == jnp.float64


@pytest.mark.parametrize("function", [mp.pdf, mp.cdf, mp.ppf])
def test_arguments_broadcast(function):
    x, ratio, variance = jnp.linspace(0.1, 0.9, 4), jnp.array([[0.2], [1.0]]), jnp.array([1, 2, 3])
    got = function(x[:, None, None, None], ratio, variance)
    assert got.shape == (4, 1, 2, 3)
    for i, j, k in np.ndindex(4, 2, 3):
        single = function(x[i], ratio[j, 0], variance[k])
        # Vectorised and single code may round differently.
        np.testing.assert_allclose(got[i, 0, j, k], single, rtol=1e-5)


@pytest.mark.parametrize("function", [mp.pdf, mp.cdf, mp.ppf])
@pytest.mark.parametrize("x", [-1.0, 0.0, 0.5, 1.0, 9.0])
def test_parameters_out_of_range_in_arrays_give_nan(function, x):
    for ratio in [jnp.nan, 0.0, -0.5, 1.001, jnp.inf]:
        assert jnp.isnan(function(x, jnp.float32(ratio), 1.0))
    for variance in [jnp.nan, 0.0, -1.0, jnp.inf]:
        assert jnp.isnan(function(x, 0.5, jnp.float32(variance)))
    assert jnp.isnan(function(jnp.nan, 0.5))


def test_probabilities_out_of_range_give_nan():
    assert jnp.isnan(mp.ppf(jnp.array([-0.1, 1.1, jnp.inf, -jnp.inf]), 0.5)).all()


@pytest.mark.parametrize("number", [float, np.float32, np.float64])
@pytest.mark.parametrize("function", [mp.pdf, mp.cdf, mp.ppf, lambda _, *law: mp.support(*law)])
def test_numbers_out_of_range_are_errors(function, number):
    for ratio in [0, -1, 1.5, math.nan, math.inf]:
        with pytest.raises(ValueError, match=r"`ratio` must be in \(0, 1\]"):
            function(0.5, number(ratio), 1.0)
    for variance in [0, -1, math.nan, math.inf]:
        with pytest.raises(ValueError, match="`variance` must be positive and finite"):
            function(0.5, 0.5, number(variance))


@settings(max_examples=30)
@given(q=st.floats(0.01, 0.99), ratio=st.floats(0.01, 1.0))
def test_eager_and_compiled_agree(q, ratio):
    x = mp.ppf(q, ratio)
    # 1e-5: fused operations may round differently; next to an edge of a narrow support.
    np.testing.assert_allclose(ppf(q, ratio), x, rtol=1e-5)
    np.testing.assert_allclose(cdf(x, ratio), mp.cdf(x, ratio), atol=1e-5)
    np.testing.assert_allclose(pdf(x, ratio), mp.pdf(x, ratio), rtol=1e-4)
