"""The numbers of a spectrum against NumPy and SciPy in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

import rmtjax
from rmtjax import BulkFit, Spectrum
from rmtjax.laws import noise_threshold
from rmtjax.noise import metrics_of_each
from tests.helpers.law_cases import fredholm

SHAPE, MATRICES = (40, 60), 200
THRESHOLD, EDGE, RANK = 3.4, 3.2, 3


def matrices():
    """Noise, heavy tails, planted directions, and kernels without full rank: 50 of each."""
    rng = np.random.default_rng(0)
    count = MATRICES // 4
    noise = lambda: rng.standard_normal((count, *SHAPE))
    low = (
        rng.standard_normal((count, SHAPE[0], 20)) @ rng.standard_normal((count, 20, SHAPE[1])) / 5
    )
    scales = np.exp(rng.standard_normal((count, SHAPE[0], 1)))
    parts = (noise(), rng.standard_t(3, (count, *SHAPE)), scales * noise(), low)
    return np.concatenate(parts)


MATRIX = matrices()
VALUES = np.linalg.svd(MATRIX, compute_uv=False)


def reference_tail(eigenvalues):
    """Clauset's fit in plain words: each start is tried, and the nearest tail wins."""
    best = (np.inf, None)
    for k in range(len(eigenvalues), 1, -1):
        tail = np.sort(eigenvalues[:k])
        slope = k / np.sum(np.log(tail / tail[0]))
        law = 1 - (tail / tail[0]) ** -slope
        best = min(best, (np.max(np.abs(law - np.arange(k) / k)), k, slope))
    distance, k, slope = best
    return 1 + slope, k, distance


def vuong(first, second):
    """Returns Vuong's statistic and its p-value."""
    ratio = np.sum(first - second) / (np.std(first - second) * math.sqrt(len(first)))
    return ratio, special.erfc(abs(ratio) / math.sqrt(2))


def reference(matrix, values):
    """All numbers that need no optimiser, in float64."""
    n = SHAPE[1]
    values = values[values > n * np.finfo(float).eps * values[0]]
    eigenvalues = values**2 / n
    alpha, k, distance = reference_tail(eigenvalues)
    tail = eigenvalues[:k]
    shares = values / values.sum()
    half = len(values) - len(values) // 2
    hill = half / np.sum(np.log(eigenvalues[:half] / eigenvalues[half - 1]))
    power = stats.pareto.logpdf(tail, alpha - 1, scale=tail[-1])
    exponential = stats.expon.logpdf(tail, tail[-1], np.mean(tail) - tail[-1])
    above = eigenvalues[eigenvalues > THRESHOLD].sum()
    return {
        "spectral_norm": np.linalg.norm(matrix, 2),
        "frobenius_norm": np.linalg.norm(matrix),
        "stable_rank": np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2,
        "effective_rank": np.exp(stats.entropy(shares)),
        "numerical_rank": np.linalg.matrix_rank(matrix),
        "condition": values[0] / values[RANK - 1],
        "mp_softrank": EDGE / eigenvalues[0],
        "snr": above / eigenvalues[eigenvalues <= THRESHOLD].sum(),
        "alpha": alpha,
        "alpha_error": 1.2 * (alpha - 1) / math.sqrt(k),
        "alpha_tail": k,
        "alpha_start": tail[-1],
        "alpha_distance": distance,
        **dict(zip(("exponential_ratio", "exponential_p"), vuong(power, exponential), strict=True)),
        "hill": 1 + hill,
        "hill_error": hill / math.sqrt(half),
        "hill_tail": half,
        "alpha_weighted": alpha * np.log10(values[0] ** 2),
        "log_alpha_norm": np.log10(np.sum(values ** (2 * alpha))),
    }


FIT = BulkFit(1.0, EDGE, THRESHOLD, 0.0, RANK)


@functools.cache
def found(dtype):
    """Metrics of all matrices by one program."""
    with jax.enable_x64(dtype == "float64"):
        eigenvalues = jnp.asarray(VALUES**2 / SHAPE[1], dtype)
        fit = jax.tree.map(jnp.asarray, FIT)
        ratio = jnp.asarray(SHAPE[0] / SHAPE[1], dtype)
        one = lambda values: rmtjax.metrics_of(Spectrum(values, ratio), fit)
        return jax.device_get(jax.jit(jax.vmap(one))(eigenvalues))


@functools.cache
def references():
    return [reference(*pair) for pair in zip(MATRIX, VALUES, strict=True)]


# The others have tests of their own.
NAMES = [
    name
    for name in rmtjax.SpectralMetrics._fields
    if name not in ("lognormal_ratio", "lognormal_p", "snr_noise")
]


@pytest.mark.parametrize("name", NAMES)
def test_is_the_number_of_the_reference(name):
    expected = np.array([row[name] for row in references()])
    # float64 throughout; the reference sums in another order, and p-values are exponentials.
    np.testing.assert_allclose(getattr(found("float64"), name), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_the_log_normal_is_the_best_truncated_normal(step):
    """The best is found by search; where the spread is that of an exponential, there is none."""
    metrics, tested = found("float64"), 0
    for i in range(0, MATRICES, step):
        k = metrics.alpha_tail[i]
        excess = np.log(VALUES[i, :k] ** 2 / VALUES[i, k - 1] ** 2)
        ratio, p = metrics.lognormal_ratio[i], metrics.lognormal_p[i]
        if np.mean(excess**2) >= 2 * np.mean(excess) ** 2:
            assert (ratio, p) == (0, 1)
            continue
        expected = vuong(stats.expon.logpdf(excess, 0, excess.mean()), best_normal(excess))
        # A search ends where the likelihood no longer changes: at half of its digits.
        np.testing.assert_allclose((ratio, p), expected, rtol=2e-3)
        tested += 1
    assert tested > MATRICES / step / 2


def best_normal(excess):
    """Log-likelihoods of the best normal that is cut at 0."""
    likelihoods = lambda p: (
        stats.norm.logpdf(excess, p[0], np.exp(p[1])) - stats.norm.logsf(0, p[0], np.exp(p[1]))
    )
    start = (excess.mean(), np.log(excess.std()))
    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 10_000, "maxfev": 10_000}
    loss = lambda p: -likelihoods(p).sum()
    best = optimize.minimize(loss, start, method="Nelder-Mead", options=options)
    return likelihoods(best.x)


def test_float32_is_as_good_as_its_digits():
    wide, narrow = found("float64"), found("float32")
    full = slice(0, 3 * MATRICES // 4)  # the last quarter has eigenvalues of rounding errors
    for name in ("stable_rank", "effective_rank", "snr", "hill", "frobenius_norm"):
        numbers = (getattr(metrics, name)[full] for metrics in (narrow, wide))
        np.testing.assert_allclose(*numbers, rtol=2e-5)  # sums of 40 terms, and of logarithms
    # Two starts of a tail may be equally near to rounding.
    same = narrow.alpha_tail[full] == wide.alpha_tail[full]
    assert same.mean() > 0.97
    np.testing.assert_allclose(narrow.alpha[full][same], wide.alpha[full][same], rtol=2e-5)


def reference_noise(shape, spikes, threshold, edge):
    """Energy above over below: the law by quadrature, the largest eigenvalue by Tracy-Widom's."""
    p, n = shape[0] - spikes, shape[1] - spikes
    root = math.sqrt(p / n)
    lower, upper = (1 - root) ** 2, (1 + root) ** 2
    cut = threshold / edge * upper
    # The density times its variable.
    density = lambda x: math.sqrt((upper - x) * (x - lower)) / (2 * math.pi * root**2)
    bulk = integrate.quad(density, max(cut, lower), upper)[0] if cut < upper else 0.0
    rows, columns = math.sqrt(p - 0.5), math.sqrt(n - 0.5)
    scale = (rows + columns) * (1 / rows + 1 / columns) ** (1 / 3)
    alarm = 1 - fredholm((cut * n - (rows + columns) ** 2) / scale, 1)
    share = max(bulk, alarm * cut / p)
    return share / (1 - share)


@pytest.mark.parametrize("spikes", [0, 3])
@pytest.mark.parametrize("shape", [(40, 60), (64, 128), (100, 100)], ids=str)
def test_noise_has_the_signal_to_noise_of_its_laws(shape, spikes):
    p, n = shape
    edge = (1 + math.sqrt(p / n)) ** 2
    for threshold in (0.5 * edge, 0.9 * edge, edge, 1.05 * edge, 1.2 * edge):
        fit = BulkFit(*np.float32([1, edge, threshold, 0]), np.int32(spikes))
        spectrum = Spectrum(np.linspace(9, 0.1, p, dtype=np.float32), np.float32(p / n))
        (metrics,) = metrics_of_each([spectrum], [fit], [1])
        expected = reference_noise(shape, spikes, threshold, edge)
        # The table of Tracy-Widom's law is exact to 2e-5, which one of p eigenvalues has.
        np.testing.assert_allclose(metrics.snr_noise, expected, rtol=2e-4, atol=2e-5 * 4 / p)


@pytest.fixture(scope="module")
def noise():
    """Spectra of 1,000 matrices of noise of 64 x 128."""
    matrices = np.random.default_rng(1).standard_normal((1000, 64, 128))
    return np.linalg.eigvalsh(matrices @ matrices.mT / 128)


@pytest.mark.parametrize("level", [0.01, 0.5, 0.9])
def test_noise_has_the_signal_to_noise_that_is_told(noise, level):
    """Beyond the edge only the largest of 64 eigenvalues is above, within it some of them."""
    threshold = float(noise_threshold(jnp.float32(0.5), 64, level))
    fit = BulkFit(*np.float32([1.0, (1 + math.sqrt(0.5)) ** 2, threshold, 0.0]), np.int32(0))
    one = Spectrum(np.float32(noise[0, ::-1]), np.float32(0.5))
    (metrics,) = metrics_of_each([one], [fit], [1])
    above = np.where(noise > threshold, noise, 0).sum(axis=1)
    expected = np.mean(above) / np.mean(noise.sum(axis=1) - above)
    error = np.std(above) / math.sqrt(len(above)) / 64
    # The law of infinite matrices: within a quarter where several are above.
    assert abs(metrics.snr_noise - expected) < 3 * error + 0.25 * expected


def test_padding_changes_nothing():
    kernel = jax.random.normal(jax.random.key(0), (50, 90)).at[0].multiply(9)
    spectrum = rmtjax.spectrum(kernel)
    fit = rmtjax.fit_bema(spectrum)
    alone = rmtjax.metrics_of(spectrum)
    (padded,) = metrics_of_each(
        [jax.device_get(spectrum)], [jax.device_get(fit)], [int(fit.num_spikes)]
    )
    np.testing.assert_allclose(padded, alone, rtol=1e-4)  # sums in another order
    assert fit.num_spikes == 1
    assert padded.condition == 1


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan])
def test_what_is_hardly_a_spectrum_has_no_numbers(value):
    spectrum = Spectrum(jnp.full(50, value), jnp.float32(0.5))
    metrics = rmtjax.metrics_of(spectrum, jax.tree.map(jnp.asarray, FIT), rank=0)
    assert np.isnan(
        [metrics.alpha, metrics.hill, metrics.lognormal_p, metrics.condition, metrics.alpha_start]
    ).all()
    assert metrics.alpha_tail == metrics.hill_tail == 0
    assert metrics.numerical_rank == (50 if value == 1 else 0)
    expected = {0.0: np.nan, 1.0: 50.0, np.nan: np.nan}[value]
    np.testing.assert_allclose(metrics.stable_rank, expected)


def test_wrong_arguments_are_named():
    spectrum = Spectrum(jnp.ones(50), jnp.float32(0.5))
    with pytest.raises(TypeError, match="spectrum"):
        rmtjax.metrics_of(np.ones(3))
    with pytest.raises(TypeError, match="fit"):
        rmtjax.metrics_of(spectrum, (1, 2))
    with pytest.raises(ValueError, match=r"`share` must be in \(0, 1\], got 0"):
        rmtjax.metrics_of(spectrum, share=0.0)
    with pytest.raises(ValueError, match=r"`spectrum` must belong to one matrix"):
        rmtjax.metrics_of(Spectrum(jnp.ones((2, 5)), jnp.ones(2)))
