"""The numbers of a spectrum against NumPy and SciPy in float64, `powerlaw` and WeightWatcher."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special, stats

import rmtjax
from rmtjax import BulkFit, Spectrum
from rmtjax.laws import noise_threshold
from rmtjax.noise import metrics_of_each

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


def test_the_log_normal_is_the_best_truncated_normal():
    """The best is found by search; where the spread is that of an exponential, there is none."""
    metrics, tested = found("float64"), 0
    for i in range(0, MATRICES, 10):
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
    assert tested > 10


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


def heavy():
    """Arrays whose numbers other packages have told; each has 128 eigenvalues at most."""
    rng = np.random.default_rng(0)
    return {
        "gauss": rng.standard_normal((100, 200)),
        "student": rng.standard_t(3, (120, 160)),
        "planted": rng.standard_normal((100, 300))
        + rng.standard_normal((100, 10))
        @ np.diag(np.arange(1, 11) / 6)
        @ rng.standard_normal((10, 300)),
    }


@functools.cache
def of_heavy():
    spectra = [
        jax.device_get(
            Spectrum(
                jnp.float32(np.linalg.svd(kernel, compute_uv=False) ** 2 / kernel.shape[1]),
                jnp.float32(kernel.shape[0] / kernel.shape[1]),
            )
        )
        for kernel in heavy().values()
    ]
    fit = BulkFit(*np.float32([1, 2, 3, 0]), np.int32(1))
    found = metrics_of_each(spectra, [fit] * 3, [1] * 3)
    return dict(zip(heavy(), found, strict=True))


# weightwatcher 0.7.7, `analyze(mp_fit=True)` of Torch layers whose weights are the transposed
# arrays in float32. Entropy and softrank have other definitions there: see docs/columns.md.
WEIGHTWATCHER = {
    "gauss": {
        "alpha": 12.102557639630431,
        "sigma": 3.700852546543477,
        "D": 0.14784109325545312,
        "num_pl_spikes": 9,
        "xmin": 443.9070488530573,
        "alpha_weighted": 33.22848034933642,
        "log_alpha_norm": 33.65430160455995,
        "norm": 19842.29886630845,
        "spectral_norm": 556.6408240863732,
        "stable_rank": 35.6465031088513,
        "matrix_rank": 100,
        "sv_max": 23.593236829362205,
    },
    "student": {
        "alpha": 5.282163937339101,
        "sigma": 1.105649974336288,
        "D": 0.10492307354644226,
        "num_pl_spikes": 15,
        "xmin": 1049.8726238843958,
        "alpha_weighted": 17.982184519050143,
        "log_alpha_norm": 18.16436064689791,
        "norm": 54931.43055910211,
        "spectral_norm": 2537.006321395274,
        "stable_rank": 21.652066885230127,
        "matrix_rank": 120,
        "sv_max": 50.368703789111684,
    },
    "planted": {
        "alpha": 1.6836498587824105,
        "sigma": 0.07127542486210812,
        "D": 0.14814245681633342,
        "num_pl_spikes": 92,
        "xmin": 99.0633146041238,
        "alpha_weighted": 8.305774257674253,
        "log_alpha_norm": 8.78115680482843,
        "norm": 359231.5544851457,
        "spectral_norm": 85742.41435825352,
        "stable_rank": 4.189659892059784,
        "matrix_rank": 100,
        "sv_max": 292.81805674898794,
    },
}


@pytest.mark.parametrize("name", WEIGHTWATCHER)
def test_weightwatcher_has_the_same_numbers(name):
    metrics, n = of_heavy()[name], heavy()[name].shape[1]
    ours = {
        "alpha": metrics.alpha,
        "sigma": metrics.alpha_error / 1.2,
        "D": metrics.alpha_distance,
        "num_pl_spikes": metrics.alpha_tail,
        "xmin": n * metrics.alpha_start,
        "alpha_weighted": metrics.alpha_weighted,
        "log_alpha_norm": metrics.log_alpha_norm,
        "norm": metrics.frobenius_norm**2,
        "spectral_norm": metrics.spectral_norm**2,
        "stable_rank": metrics.stable_rank,
        "matrix_rank": metrics.numerical_rank,
        "sv_max": metrics.spectral_norm,
    }
    # Theirs decomposes in float32, and ours reads float32.
    np.testing.assert_allclose(
        [*ours.values()], [WEIGHTWATCHER[name][key] for key in ours], rtol=1e-4
    )


# powerlaw 2.0.0, `Fit(eigenvalues, parameter_ranges={"alpha": [1, None]})`: its default admits no
# alpha above 3. Alpha, sigma, tail, start, D; ratio and p of log-normal and of exponential.
POWERLAW = {
    "pareto": (
        *(2.407804927840701, 0.10926685348355263, 166, 1.2002116513972756, 0.03335318976520993),
        *(-0.4557876746121524, 0.648542668104681, 2.0891138225056207, 0.036697478377799776),
    ),
    "gauss": (
        *(5.005376109002791, 0.8539490557130426, 22, 1.5984049166714627, 0.14680170173040047),
        *(-1.303841555458733, 0.19228761070532685, -2.4533626468289547, 0.01415275773717036),
    ),
    "lognormal": (
        *(3.9974106873624056, 0.7269788745500255, 17, 3.870276948110868, 0.11546403850416082),
        *(-0.3504836358805825, 0.7259757689894862, -0.13388054437150101, 0.8934970351130194),
    ),
    "student": (
        *(6.629722910879935, 1.9904076232422356, 8, 8.059586885836548, 0.10290941370088236),
        # Its log-normal has a ratio of -1.19 here, with a likelihood that no log-normal reaches.
        *(0, 1, 1.097852927577288, 0.27226871555522847),
    ),
    "planted": (
        *(1.6468270051291358, 0.06601650476745752, 96, 0.2840234240326622, 0.14988282400648578),
        *(-0.4807930870012833, 0.630663563964305, 7.554129957219818, 4.2166899238443465e-14),
    ),
}


def samples():
    """Descending positive numbers, for which `powerlaw` was run."""
    rng = np.random.default_rng(0)
    squares = lambda kernel: np.linalg.svd(kernel, compute_uv=False) ** 2 / kernel.shape[1]
    descending = lambda sample: np.sort(sample)[::-1]
    yield "pareto", descending(rng.pareto(1.5, 200) + 1)
    yield "gauss", squares(rng.standard_normal((100, 200)))
    yield "lognormal", descending(np.exp(rng.standard_normal(150)))
    yield "student", squares(rng.standard_t(3, (120, 160)))
    noise = rng.standard_normal((100, 300))
    left, right = rng.standard_normal((100, 10)), rng.standard_normal((10, 300))
    yield "planted", squares(noise + left @ np.diag(np.arange(1, 11) / 6) @ right)


def test_powerlaw_has_the_same_numbers():
    names, arrays = zip(*samples(), strict=True)
    spectra = [Spectrum(np.float32(array), np.float32(0.5)) for array in arrays]
    fit = BulkFit(*np.float32([1, 2, 3, 0]), np.int32(1))
    for name, metrics in zip(names, metrics_of_each(spectra, [fit] * 5, [1] * 5), strict=True):
        found = metrics[9:18]
        expected = np.array(POWERLAW[name])
        expected[1] *= 1.2
        # Its likelihoods are those of an optimiser. Ours are of float32, and a p-value of 1e-14
        # is an exponential of its ratio.
        np.testing.assert_allclose(found, expected, rtol=2e-3, err_msg=name)
        np.testing.assert_allclose(found[:5], expected[:5], rtol=2e-5, err_msg=name)


DRAWS, SIZE = 400, 128
of_draws = jax.jit(jax.vmap(lambda s, f: rmtjax.metrics_of(s, f), (0, None)))


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["all", "half"])
@pytest.mark.parametrize("alpha", [1.8, 3.0])
def test_errors_of_planted_pareto_tails_are_calibrated(alpha, share):
    rng = np.random.default_rng(int(10 * alpha))
    size = int(share * SIZE)
    tail = 1 + rng.pareto(alpha - 1, (DRAWS, size))
    body = np.sqrt(rng.random((DRAWS, SIZE - size)))  # a density that ends at the start, 1
    values = np.sort(np.concatenate([tail, body], axis=1))[:, ::-1]
    spectrum = Spectrum(jnp.float32(values), jnp.full(DRAWS, 0.5))
    metrics = of_draws(spectrum, jax.tree.map(jnp.asarray, FIT))
    for exponent, error in (
        (metrics.alpha, metrics.alpha_error),
        (metrics.hill, metrics.hill_error),
    ):
        scores = np.asarray((exponent - alpha) / error)
        inside = np.mean(np.abs(scores) <= 2)
        # Three standard errors of 400 draws are 3 %; a normal variable has 95.4 % inside.
        assert inside > 0.954 - 3 * math.sqrt(0.954 * 0.046 / DRAWS)
        assert 0.85 < scores.std() < 1.15


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
