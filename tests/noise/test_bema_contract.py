"""The fit of the bulk at every scale, under transformations, and of what is hardly a matrix."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.noise_cases import fit, noise_of
from hypothesis import given, settings, strategies as st

import rmtjax
from rmtjax import Spectrum

COMPILED_FIT = jax.jit(rmtjax.fit_bema)


@functools.cache
def spectrum_with_a_loud_row(shape):
    return rmtjax.spectrum(noise_of(shape).at[0].add(2.0))


@pytest.mark.parametrize("shape", [(60, 80), (10, 300)])
@settings(max_examples=50)
@given(exponent=st.floats(-6, 6))
def test_follows_the_scale_of_the_matrix(shape, exponent):
    eigenvalues, ratio = spectrum_with_a_loud_row(shape)
    scale = np.float32(10**exponent)
    before = COMPILED_FIT(Spectrum(eigenvalues, ratio))
    after = COMPILED_FIT(Spectrum(scale * eigenvalues, ratio))
    # Float32, one rounding more.
    np.testing.assert_allclose(after[:3], scale * np.array(before[:3]), rtol=1e-5)
    np.testing.assert_allclose(after.distance, before.distance, atol=1e-5)
    assert after.num_spikes == before.num_spikes > 0


def test_eager_jit_and_vmap_agree():
    stack = noise_of((4, 40, 60)) + jnp.arange(4.0)[:, None, None]
    spectra = jax.vmap(rmtjax.spectrum)(stack)
    batched = jax.vmap(rmtjax.fit_bema)(spectra)
    for i in range(4):
        single = jax.tree.map(lambda leaf, i=i: leaf[i], spectra)
        for other in (rmtjax.fit_bema(single), COMPILED_FIT(single)):
            for ours, theirs in zip(batched, other, strict=True):
                np.testing.assert_allclose(ours[i], theirs, rtol=1e-5)  # order of summation
    assert batched.num_spikes[0] == 0
    assert min(batched.num_spikes[1:]) >= 1


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 30), (5, 9), (50, 60)])
def test_zeros_have_a_fit(shape):
    got = fit(jnp.zeros(shape))
    assert got.variance == got.edge == got.threshold == got.num_spikes == 0
    assert got.distance == 1  # there is no law to compare with


@pytest.mark.parametrize("shape", [(6, 9), (50, 60), (200, 20)])
def test_one_direction_without_noise_has_a_fit(shape):
    got = fit(jnp.outer(jnp.linspace(1, 2, shape[0]), jnp.linspace(-1, 1, shape[1])))
    assert got.distance > 0.3  # the law does not fit roundoff
    assert got.num_spikes >= 1
    # 1e-10: the squared roundoff of the singular values.
    assert 0 <= got.variance < 1e-10


@pytest.mark.parametrize("trim", [0.0, 0.25, 0.49])
@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (2, 2), (3, 5)])
def test_tiny_matrices_have_a_fit(shape, trim):
    got = fit(noise_of(shape), trim=trim)
    assert np.isfinite(got).all()
    assert got.variance > 0
    assert 0.5 / min(shape) <= got.distance <= 1


@pytest.mark.parametrize("shape", [(1, 1), (6, 9), (50, 60)])
def test_what_is_not_finite_gives_nan_and_no_spike(shape):
    got = fit(noise_of(shape).at[0, 0].set(jnp.nan))
    assert np.isnan(got[:4]).all()
    assert got.num_spikes == 0


@pytest.mark.parametrize("trim", [-0.1, 0.5, 1.0, math.nan])
def test_trim_out_of_range_is_an_error(trim):
    with pytest.raises(ValueError, match=r"`trim` must be in \[0, 0.5\)"):
        fit(noise_of((4, 5)), trim=trim)


@pytest.mark.parametrize("level", [-0.1, 0.0, 1.0, 1.5, math.nan])
def test_level_out_of_range_is_an_error(level):
    with pytest.raises(ValueError, match=r"`level` must be in \(0, 1\)"):
        fit(noise_of((4, 5)), level=level)


def test_several_spectra_are_an_error():
    with pytest.raises(ValueError, match="`spectrum` must belong to one matrix"):
        rmtjax.fit_bema(Spectrum(jnp.ones((2, 5)), jnp.float32(0.5)))


def test_a_small_level_is_a_high_threshold():
    spectrum = rmtjax.spectrum(noise_of((60, 80)))
    levels = [0.01, 0.1, 0.5, 0.9, 0.99]
    # In one program, of which the most is compiled once.
    each = lambda spectrum: [rmtjax.fit_bema(spectrum, level=a).threshold for a in levels]
    assert np.all(np.diff(jax.jit(each)(spectrum)) < 0)
