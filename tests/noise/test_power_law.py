"""Exponents of tails are those of `powerlaw` and WeightWatcher, and their errors calibrated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import BulkFit, Spectrum
from rmtjax.noise import metrics_of_each

FIT = BulkFit(*np.float32([1, 2, 3, 0]), np.int32(1))


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
    found = metrics_of_each(spectra, [FIT] * 3, [1] * 3)
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
    for name, metrics in zip(names, metrics_of_each(spectra, [FIT] * 5, [1] * 5), strict=True):
        found = metrics[9:18]
        expected = np.array(POWERLAW[name])
        expected[1] *= 1.2
        # Its likelihoods are those of an optimiser. Ours are of float32, and a p-value of 1e-14
        # is an exponential of its ratio.
        np.testing.assert_allclose(found, expected, rtol=2e-3, err_msg=name)
        np.testing.assert_allclose(found[:5], expected[:5], rtol=2e-5, err_msg=name)


DRAWS, SIZE = 4000, 128
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
        # 20,000 draws have 0.953 to 0.967 inside; of 4,000, a standard error is 0.0033.
        assert 0.953 - 3 * 0.0033 < inside < 0.967 + 3 * 0.0033
        assert 0.9 < scores.std() < 1.1
