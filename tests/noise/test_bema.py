"""The fit of the bulk against NumPy and SciPy in float64, and without the papers' bugs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.noise_cases import fit, noise_of
from scipy import optimize

import rmtjax
from rmtjax import Spectrum

# The quantile of the Tracy-Widom law at 1 - level, from the Painleve equation.
TRACY_WIDOM = {0.1: 0.450143, 0.5: -1.268575, 0.8: -2.283163, 0.9: -2.782428}


def law_cdf(x, ratio):
    """The closed form in x, not that of the library, which works in an angle."""
    lower, upper = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    if not lower < x < upper:
        return float(x >= upper)
    root = math.sqrt((upper - x) / (x - lower))
    total = math.pi * ratio + math.sqrt((upper - x) * (x - lower))
    total -= (1 + ratio) * math.atan((root**2 - 1) / (2 * root))
    if ratio < 1:
        inner = (lower * root**2 - upper) / (2 * (1 - ratio) * root)
        total += (1 - ratio) * math.atan(inner)
    return total / (2 * math.pi * ratio)


@functools.cache
def law_quantiles(size, ratio):
    """Where p F(x) + 1/4 - theta / (2 pi) is a midpoint."""
    lower, upper = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2

    def count(x):
        # The share of the arcsine law below x.
        share = math.asin(math.sqrt((x - lower) / (upper - lower))) / math.pi
        return size * law_cdf(x, ratio) + 0.25 - share

    solve = lambda middle: optimize.brentq(lambda x: count(x) - middle, lower, upper, xtol=1e-14)
    return np.array([solve(i + 0.5) for i in range(size)])


def noise_law(ascending, n, spikes, trim, level):
    """Scale, aspect ratio and threshold of the noise, some values being spikes."""
    p = len(ascending)
    m, columns = p - spikes, n - spikes
    ratio = m / columns
    window = np.arange(math.floor(trim * m), math.floor((1 - trim) * m))
    quantiles = law_quantiles(m, ratio)[window] * columns / n
    scale = quantiles @ ascending[window] / (quantiles @ quantiles)
    # Ma's half takes the place of the rows and columns in Johnstone's formula.
    threshold = noise_quantile(m - 0.5, columns - 0.5, level) * (columns - 0.5) / columns
    return scale, ratio, scale * columns / n * threshold


def noise_quantile(p, n, level):
    """Johnstone's: the formula that the papers print."""
    spread = n ** (-2 / 3) * (p / n) ** (-1 / 6) * (1 + math.sqrt(p / n)) ** (4 / 3)
    return (1 + math.sqrt(p / n)) ** 2 + TRACY_WIDOM[level] * spread


def reference_fit(matrix, trim, level):
    """Variance, edge, threshold, distance and count, in float64, in plain words."""
    matrix = np.asarray(matrix, np.float64)
    p, n = sorted(matrix.shape)
    ascending = np.linalg.svd(matrix, compute_uv=False)[::-1] ** 2 / n
    spikes = -1
    found = 0
    while found > spikes:
        spikes = found
        scale, ratio, threshold = noise_law(ascending, n, spikes, trim, level)
        found = max(spikes, min(np.sum(ascending > threshold), p // 2))
    m, unit = p - spikes, (n - spikes) / n

    def too_much(variance):
        """A spike stands at l^2 + 1 + ratio + ratio / l^2; the last term is the bulk's loss."""
        values = np.maximum(ascending[m:] / (variance * unit), (1 + math.sqrt(ratio)) ** 2)
        roots = (np.roots([1, 1 + ratio - y, ratio]) for y in values)
        loss = sum(ratio / max(root.real) for root in roots)
        return variance * (1 - loss / m) - scale

    variance = optimize.brentq(too_much, scale, 3 * scale, rtol=1e-12) if spikes else scale
    law = np.array([law_cdf(x / (scale * unit), ratio) for x in ascending[:m]])
    ranks = np.arange(m)
    distance = np.max(np.maximum(np.abs(law - ranks / m), np.abs(law - (ranks + 1) / m)))
    edge = scale * unit * (1 + math.sqrt(ratio)) ** 2
    return variance, edge, threshold, distance, np.sum(ascending > threshold)


SETTINGS = [(0.25, 0.1), (0.2, 0.9), (0.0, 0.5), (0.4, 0.8)]  # trim and level


LONG = [pytest.param(shape, marks=pytest.mark.slow) for shape in [(10, 100), (64, 64), (8, 900)]]


@jax.jit
def fits_of(spectrum):
    """At all settings in one program, of which the most is compiled once."""
    return [rmtjax.fit_bema(spectrum, trim=trim, level=level) for trim, level in SETTINGS]


@pytest.mark.parametrize("spiked", [False, True], ids=["noise", "spiked"])
@pytest.mark.parametrize(("trim", "level"), SETTINGS)
@pytest.mark.parametrize("shape", [LONG[0], (100, 50), LONG[1], (120, 121), LONG[2]])
def test_is_the_fit_of_the_reference(shape, trim, level, spiked):
    matrix = 0.3 * noise_of(shape) + spiked * 0.5
    expected = reference_fit(matrix, trim, level)
    found = fits_of(rmtjax.spectrum(matrix))[SETTINGS.index((trim, level))]
    variance, edge, threshold, distance, num_spikes = found
    # 1e-4: the Tracy-Widom quantile is good to 1e-4; the rest is float32.
    np.testing.assert_allclose((variance, edge, threshold), expected[:3], rtol=2e-4)
    np.testing.assert_allclose(distance, expected[3], atol=1e-5)
    assert num_spikes == expected[4]
    assert not spiked or num_spikes > 0


def test_float64_is_exact():
    with jax.enable_x64(True):
        matrix = jnp.asarray(np.random.default_rng(0).standard_normal((80, 130)))
        got, expected = fit(matrix, level=0.1), reference_fit(matrix, 0.25, 0.1)
        assert {leaf.dtype for leaf in got[:4]} == {jnp.dtype("float64")}
        for i in (0, 1, 3):
            np.testing.assert_allclose(got[i], expected[i], rtol=1e-9)  # quadrature-free


@pytest.mark.parametrize(
    ("p", "n", "level", "correct", "authors"),
    [
        (784, 1000, 0.1, 3.565794, 3.574622),
        (784, 1000, 0.9, 3.487383, 3.432818),
        pytest.param(1000, 3000, 0.1, 2.492806, 2.493397, marks=pytest.mark.slow),
        pytest.param(3000, 3000, 0.1, 4.005453, 4.011542, marks=pytest.mark.slow),
        pytest.param(3000, 3000, 0.9, 3.966293, 3.928659, marks=pytest.mark.slow),
        (1024, 1024, 0.8, 3.943370, 3.880141),
        (1024, 4096, 0.8, 2.230706, 2.231038),
        (10, 1000, 0.1, 1.221012, 1.214733),
    ],
)
def test_golden_thresholds_without_bug_b1(p, n, level, correct, authors):
    """Bug B1 of the papers' code: the power 4, divided by 3, for the power 4 / 3."""
    np.testing.assert_allclose(noise_quantile(p, n, level), correct, atol=1e-6)
    # A half row less, and then the same formula.
    correct = noise_quantile(p - 0.5, n - 0.5, level) * (n - 0.5) / n
    got = rmtjax.fit_bema(Spectrum(jnp.ones(p), jnp.float32(p / n)), level=level)
    # Of equal values none is a spike. 1e-5: float32, and the Tracy-Widom quantile times 0.1.
    np.testing.assert_allclose(got.threshold / got.variance, correct, atol=1e-5)
    assert abs(correct - authors) > 2e-4


def test_distance_above_the_edge_without_bug_b3():
    """Bug B3 of the papers' code: a distribution function of 0 above the bulk."""
    ratio = 0.1
    ascending = law_quantiles(10, ratio)
    # Above the edge and below the threshold: noise, which the law puts at 1.
    ascending[-1] = 1.01 * (1 + math.sqrt(ratio)) ** 2
    got = rmtjax.fit_bema(Spectrum(jnp.float32(ascending[::-1]), jnp.float32(ratio)), level=0.01)
    assert got.edge < ascending[-1] < got.threshold
    assert got.distance < 0.11  # a step of ten values; with the bug 0.95


def test_noise_has_no_spike_without_bug_b5():
    """Bug B5 of the papers' code: one value of pure noise always counts as signal."""
    eigenvalues = jnp.float32(law_quantiles(784, 0.784)[::-1])
    assert rmtjax.fit_bema(Spectrum(eigenvalues, jnp.float32(0.784))).num_spikes == 0


def test_variance_is_that_of_an_entry_without_bug_b6():
    """Bug B6 of the papers' code: divided by the inputs, whichever side is longer."""
    matrix = 0.5 * noise_of((300, 100))
    got, transposed = fit(matrix), fit(matrix.T)
    # 0.25; one draw is off by 1 %, the bug by 200 %.
    np.testing.assert_allclose(got.variance, 0.25, rtol=0.04)
    for ours, theirs in zip(got, transposed, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)  # two runs of float32 LAPACK


def test_one_entry_is_matched_with_the_median():
    # The median of the law of ratio 1 is 0.653; with the term of order 1 / p it is 0.286,
    # nearer to 0.455, that of the square of one normal variable.
    got = fit(jnp.full((1, 1), 3.0)).variance
    np.testing.assert_allclose(got, 9 / law_quantiles(1, 1.0)[0], rtol=1e-4)
    np.testing.assert_allclose(9 / got, 0.286, atol=1e-3)
