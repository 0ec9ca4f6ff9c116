"""The fit of a bulk that has lost ranks: to spikes, which it must see through, or to a cut."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import Spectrum

DRAWS = 60
# Each of these draws and decomposes 60 matrices or more, for two seconds.
slow = pytest.mark.slow


@functools.cache
def planted_spectra(shape, share, draws=DRAWS, weakest=1.5, seed=0):
    """Unit noise with a share of the ranks planted, 1.5 to 4 times the detection limit."""
    rng = np.random.default_rng(seed)
    p, n = sorted(shape)
    planted = round(share * p)
    left, _ = np.linalg.qr(rng.standard_normal((draws, p, planted)))
    right, _ = np.linalg.qr(rng.standard_normal((draws, n, planted)))
    strengths = rng.uniform(weakest, 4, (draws, 1, planted)) * (n * p) ** 0.25
    matrices = rng.standard_normal((draws, p, n)) + left * strengths @ right.swapaxes(1, 2)
    values = np.linalg.svd(matrices, compute_uv=False) ** 2 / n
    return Spectrum(jnp.float32(values), jnp.full(draws, p / n, jnp.float32)), planted


@functools.cache
def fitted(shape, share, **options):
    spectra, planted = planted_spectra(shape, share)
    return jax.jit(jax.vmap(functools.partial(rmtjax.fit_bema, **options)))(spectra), planted


def published_variance(eigenvalues, ratio):
    """BEMA as published, but for midpoints: all ranks are matched, spikes among them."""
    p = eigenvalues.shape[-1]
    window = np.arange(p // 4, 3 * p // 4)
    q = np.asarray(rmtjax.marchenko_pastur.ppf((window + 0.5) / p, jnp.float32(ratio)))
    return eigenvalues[..., ::-1][..., window] @ q / (q @ q)


@pytest.mark.parametrize("share", [0.03, 0.06, 0.1])
@pytest.mark.parametrize(
    "shape",
    [pytest.param((128, 512), marks=slow), pytest.param((256, 256), marks=slow), (200, 300)],
    ids=str,
)
def test_variance_is_true_to_one_percent_with_a_tenth_of_the_ranks_planted(shape, share):
    fit, planted = fitted(shape, share)
    # One draw is off by 0.5 %, their mean by a tenth of that.
    assert abs(fit.variance.mean() - 1) < 0.01
    spectra, _ = planted_spectra(shape, share)
    published = published_variance(np.asarray(spectra.eigenvalues), float(spectra.ratio[0]))
    assert published.mean() > 1 + 0.4 * share  # it grows by about the share itself
    found = np.asarray(fit.num_spikes) - planted
    assert np.mean(np.abs(found)) < 0.5
    assert fit.distance.max() * min(shape) < 5


LEVELS = (0.01, 0.1, 0.5, 0.9)


@jax.jit
@jax.vmap
def counts_of(spectrum):
    """At each level: one program for all aspect ratios."""
    return [rmtjax.fit_bema(spectrum, level=level).num_spikes for level in LEVELS]


@functools.cache
def alarms(shape, share, draws, weakest, seed):
    spectra, planted = planted_spectra(shape, share, draws, weakest, seed)
    return dict(zip(LEVELS, counts_of(spectra), strict=True)), planted


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(100, 100), pytest.param((80, 160), marks=slow)], ids=str)
def test_false_alarms_come_at_the_level_with_spikes_too(shape, level):
    draws = 400
    counted, planted = alarms(shape, 0.05, draws, 2.0, 1)
    counts = counted[level]
    assert counts.min() >= planted
    # Three standard errors, and what 100 ranks with 5 spikes are off.
    error = math.sqrt(level * (1 - level) / draws)
    assert abs(np.mean(counts > planted) - level) < 3 * error + 0.03


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=slow) for shape in [(50, 50), (50, 100), (50, 400)]]
)
def test_the_level_holds_down_to_fifty_ranks(shape, level):
    draws = 1500
    counts = alarms(shape, 0.0, draws, 1.5, 2)[0][level]
    error = math.sqrt(level * (1 - level) / draws)
    # 0.117 at (50, 50) and level 0.1 in 6,000 draws is the worst.
    assert abs(np.mean(counts > 0) - level) < 3 * error + 0.02


@pytest.mark.parametrize("rank", [-3, 101, 2.5])
def test_a_rank_out_of_range_is_an_error(rank):
    spectrum = rmtjax.spectrum(jnp.ones((100, 130)))
    with pytest.raises((ValueError, TypeError), match=r"rank|integer"):
        rmtjax.fit_bema(spectrum, rank=rank)


def test_spikes_of_any_strength_leave_the_variance():
    spectra, _ = planted_spectra((128, 512), 0.06)
    fit = lambda eigenvalues: rmtjax.fit_bema(Spectrum(eigenvalues, spectra.ratio[0]))
    eigenvalues = spectra.eigenvalues[0]
    far = jnp.where(eigenvalues > fit(eigenvalues).threshold, 1e6, eigenvalues)
    # What a spike takes from the bulk goes to 0 with its strength: here it was some percent.
    small, large = fit(far).variance, fit(eigenvalues).variance
    assert 0.97 * large < small < large


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("kept", [0.9, 0.7, 0.45])
def test_a_truncated_bulk_has_the_noise_of_the_whole(kept, share):
    """The rank-aware fit: old positions, and only the ranks that the cut has left."""
    shape = (200, 300)
    spectra, _ = planted_spectra(shape, share)
    whole, _ = fitted(shape, share)
    rank = round(kept * 200)
    cut = spectra._replace(eigenvalues=spectra.eigenvalues.at[:, rank:].set(0.0))
    aware = jax.vmap(functools.partial(rmtjax.fit_bema, rank=rank))(cut)
    # Fewer ranks tell less: 1 % for a single draw.
    np.testing.assert_allclose(aware.variance, whole.variance, rtol=0.02)
    assert np.mean(aware.num_spikes == whole.num_spikes) > 0.8
    assert aware.distance.max() * 200 < 5
    naive = jax.vmap(rmtjax.fit_bema)(cut)
    assert kept > 0.5 or (naive.variance < 0.7 * aware.variance).all()


@pytest.mark.parametrize("rank", [0, 1, 59, 60, 61, 199])
def test_too_few_ranks_left_are_no_fit(rank):
    spectra, _ = planted_spectra((200, 300), 0.0)
    cut = Spectrum(spectra.eigenvalues[0].at[rank:].set(0.0), spectra.ratio[0])
    fit = jax.jit(rmtjax.fit_bema)(cut, rank=rank)
    # The window ends at rank 150 of 200, ascending: of the largest 59 ranks 9 are in it.
    assert np.isfinite(fit.variance) == (rank >= 60)
    assert fit.num_spikes == (0 if rank < 60 else rmtjax.fit_bema(cut, rank=rank).num_spikes)


def test_pure_noise_has_the_published_fit():
    """Without a spike, eigenvalue matching is as published, but for terms of order 1 / p."""
    spectra, _ = planted_spectra((200, 300), 0.0)
    fit = jax.vmap(functools.partial(rmtjax.fit_bema, level=0.001))(spectra)
    assert not fit.num_spikes.any()
    expected = published_variance(np.asarray(spectra.eigenvalues), 200 / 300)
    np.testing.assert_allclose(fit.variance / expected, 1 + 0.2 / 200, atol=0.1 / 200)
    ends = rmtjax.marchenko_pastur.support(200 / 300, fit.variance)
    np.testing.assert_allclose(fit.edge, ends[1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("shape", [(60, 60), (60, 75), (60, 80), (60, 120), (60, 240)], ids=str)
def test_the_fit_has_a_derivative(shape, share):
    """Against differences, in float64; the count of spikes is held."""
    spectrum = jax.tree.map(lambda leaf: leaf[0], planted_spectra(shape, share)[0])

    def variance(eigenvalues):
        ratio = jnp.asarray(60 / shape[1], eigenvalues.dtype)
        return rmtjax.fit_bema(Spectrum(eigenvalues, ratio), level=0.01).variance

    single = np.asarray(jax.grad(variance)(spectrum.eigenvalues))
    with jax.enable_x64(True):
        eigenvalues = jnp.asarray(np.asarray(spectrum.eigenvalues), "float64")
        direction = jnp.asarray(np.random.default_rng(0).standard_normal(60))
        ahead, behind = (variance(eigenvalues + t * direction) for t in (1e-5, -1e-5))
        double = np.asarray(jax.grad(variance)(eigenvalues))
        np.testing.assert_allclose(double @ direction, (ahead - behind) / 2e-5, rtol=1e-4)
    np.testing.assert_allclose(single, double, atol=1e-5)  # float32; entries are near 0.02


@pytest.mark.parametrize("size", [100, 384])
def test_any_number_of_spikes_of_a_square_matrix_leaves_a_fit(size):
    """Compiled, (p - K) / (n - K) may round to above 1, where there is no law."""
    midpoints = (np.arange(size, dtype=np.float32)[::-1] + 0.5) / size
    noise = rmtjax.marchenko_pastur.ppf(midpoints, 1.0)
    for spikes in range(size // 4):
        lifted = jnp.where(jnp.arange(size) < spikes, 100.0, noise)
        fit = rmtjax.fit_bema(Spectrum(lifted, jnp.float32(1.0)))
        assert np.isfinite(fit.variance)
        assert fit.num_spikes >= spikes


@pytest.mark.parametrize("kind", ["heavy", "decay", "ones", "product"])
def test_a_spectrum_without_a_law_ends_with_a_fit(kind):
    """The count may creep: it is bounded, and what comes out is finite."""
    rng = np.random.default_rng(0)
    values = {
        "heavy": np.sort(rng.pareto(0.3, 300))[::-1],
        "decay": np.geomspace(1e3, 1e-3, 300),
        "ones": np.ones(300),
        "product": np.r_[np.geomspace(10, 1, 100), np.zeros(200)],
    }[kind]
    fit = jax.jit(rmtjax.fit_bema)(Spectrum(jnp.float32(values), jnp.float32(0.5)))
    assert np.isfinite(fit[:4]).all()
    assert fit.distance > 0.05


def test_the_threshold_has_a_derivative_by_the_level():
    s = np.linalg.svd(np.random.default_rng(0).standard_normal((60, 90)), compute_uv=False)
    spectrum = Spectrum(jnp.asarray(s**2 / 90, jnp.float32), jnp.float32(60 / 90))
    threshold = lambda level: rmtjax.fit_bema(spectrum, level=level).threshold
    step = 0.01  # the values are right to eps / step, and the third derivative is small here
    expected = (threshold(0.1 + step) - threshold(0.1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(threshold)(0.1), expected, rtol=0.01)
