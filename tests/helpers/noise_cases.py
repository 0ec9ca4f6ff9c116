"""Matrices of noise, their fits and spectra, and the rank rules that the noise tests share."""

import jax
import jax.numpy as jnp
import pytest

import rmtjax
from rmtjax import ranks, Spectrum

RULES = [ranks.bema(), ranks.gavish_donoho(), ranks.energy(0.9), ranks.fixed(3), ranks.size(0.3)]
each_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


def noise_of(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def fit(matrix, **options):
    return rmtjax.fit_bema(rmtjax.spectrum(matrix), **options)


def spectrum_of(eigenvalues, ratio=0.5):
    return Spectrum(jnp.asarray(eigenvalues, jnp.float32), jnp.float32(ratio))
