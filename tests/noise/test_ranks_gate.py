"""The gate of rank rules: what noise passes, and what is no noise."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.noise_cases import each_rule, noise_of, RULES, spectrum_of

import rmtjax
from rmtjax import ranks, Spectrum

SIZES = [(10, 10), (10, 200), (50, 50), (50, 100), (100, 50), (64, 128)]


# One program for all shapes with the same shorter side.
fits_of = jax.jit(jax.vmap(rmtjax.fit_bema))


@functools.cache
def noise_and_fits(shape, draws=400):
    """Spectra of pure noise and their fits, which each gate below judges."""

    @jax.jit
    @jax.vmap
    def draw(key):
        return rmtjax.spectrum(jax.random.normal(key, shape))

    spectra = draw(jax.random.split(jax.random.key(sum(shape)), draws))
    return spectra, fits_of(spectra)


def share_refused(rule, shape):
    spectra, fits = noise_and_fits(shape)
    each = Spectrum(eigenvalues=0, ratio=0)
    return 1 - np.mean(jax.vmap(rule.accepts, in_axes=(each, 0))(spectra, fits))


@pytest.mark.parametrize("significance", [0.01, 0.05, 0.1, 0.3])
@pytest.mark.parametrize(
    "shape", [pytest.param(SIZES[2], marks=pytest.mark.slow), *SIZES[3:]], ids=str
)
def test_bema_refuses_noise_of_any_size_as_often_as_it_says(shape, significance):
    rate = share_refused(ranks.bema(significance=significance, tolerance=0.0), shape)
    # Three standard errors, and a tenth of the rate: one line of constants for all sizes.
    error = math.sqrt(significance * (1 - significance) / 400)
    assert abs(rate - significance) < 3 * error + 0.1 * significance


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), *SIZES], ids=str)
def test_bema_accepts_noise_of_any_size(shape):
    assert share_refused(ranks.bema(), shape) <= 0.01


RNG = np.random.default_rng(0)
NO_NOISE = {
    "rows of other scales": np.exp(RNG.standard_normal((200, 1))) * RNG.standard_normal((200, 400)),
    "half the rows louder": np.repeat([1, 4], 100)[:, None] * RNG.standard_normal((200, 400)),
    "heavy tails": RNG.standard_t(1.5, (200, 400)),
    "half of the directions": RNG.standard_normal((200, 80)) @ RNG.standard_normal((80, 400)),
    "correlated columns": np.cumsum(RNG.standard_normal((200, 400)), axis=1),
    "one direction": np.ones((200, 400)),
    "zeros": np.zeros((200, 400)),
}


@pytest.mark.parametrize("kind", NO_NOISE)
def test_bema_refuses_what_is_no_noise(kind):
    rule, spectrum = ranks.bema(), rmtjax.spectrum(jnp.asarray(NO_NOISE[kind], jnp.float32))
    fit = rule.fit(spectrum)
    assert not rule.accepts(spectrum, fit)
    # With the gate open all is accepted but the rounding of exact zeros, and what is no
    # minority of spikes: scales that vary by orders of magnitude look like that.
    noisy = kind not in ("one direction", "zeros", "half of the directions")
    accepted = ranks.bema(tolerance=1.0).accepts(spectrum, fit)
    assert bool(accepted) is (noisy and int(fit.num_spikes) < 100)


@pytest.mark.parametrize("entries", ["uniform", "signs"])
def test_bema_accepts_noise_of_other_laws(entries):
    key, shape = jax.random.key(0), (150, 200)
    draw = jax.random.uniform if entries == "uniform" else jax.random.rademacher
    matrix = draw(key, shape).astype(jnp.float32)
    rule, spectrum = ranks.bema(), rmtjax.spectrum(matrix - matrix.mean())
    assert rule.accepts(spectrum, rule.fit(spectrum))


def test_the_limit_is_that_of_noise_and_the_tolerance():
    spectrum = rmtjax.spectrum(noise_of((200, 300)))
    fit = rmtjax.fit_bema(spectrum)
    accepts = lambda rule, distance: bool(
        rule.accepts(spectrum, fit._replace(distance=jnp.float32(distance)))
    )
    # 0.4 log(200) + 1.32, the 99 % quantile of p times the distance.
    limit = (0.4 * math.log(200) + 1.32) / 200
    for tolerance in (0.0, 0.015, 0.3):
        rule = ranks.bema(tolerance=tolerance)
        assert accepts(rule, limit + tolerance - 1e-4)
        assert not accepts(rule, limit + tolerance + 1e-4)


@each_rule
@pytest.mark.parametrize("size", [1, 5, 60])
def test_nothing_is_believed_of_nan(rule, size):
    spectrum = spectrum_of(jnp.full(size, jnp.nan))
    assert not rule.accepts(spectrum, rule.fit(spectrum))
    if not isinstance(rule, ranks.fixed | ranks.size):
        assert rule(spectrum) == 0


def test_bema_refuses_nan_with_an_open_gate():
    rule, spectrum = ranks.bema(tolerance=1.0), spectrum_of(jnp.full(3, jnp.nan))
    assert not rule.accepts(spectrum, rule.fit(spectrum))


@pytest.mark.parametrize("rule", RULES[1:], ids=repr)
def test_rules_without_a_gate_accept_what_is_finite(rule):
    spectrum = rmtjax.spectrum(jnp.asarray(NO_NOISE["heavy tails"], jnp.float32))
    assert rule.accepts(spectrum, rule.fit(spectrum))


def test_gavish_donoho_refuses_a_spectrum_without_noise():
    rule, spectrum = ranks.gavish_donoho(), spectrum_of([3, 0, 0, 0])
    assert not rule.accepts(spectrum, rule.fit(spectrum))


def test_the_median_of_a_spectrum_cut_below_it_is_unknown():
    spectrum = rmtjax.spectrum(noise_of((61, 80)))
    rule = ranks.gavish_donoho()
    np.testing.assert_allclose(rule.fit(spectrum, 32).variance, rule.fit(spectrum).variance)
    cut = rule.fit(spectrum, 30)
    assert np.isnan(cut.variance)
    assert not rule.accepts(spectrum, cut)
