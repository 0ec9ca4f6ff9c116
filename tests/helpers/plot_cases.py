"""Spectra to draw, and what a figure says of itself."""

import functools

import jax.numpy as jnp
import numpy as np

import rmtjax


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line(ax, label):
    """The points of the line of that label."""
    (found,) = (one for one in ax.lines if one.get_label() == label)
    return found.get_xydata().T


def bars(ax):
    counts, edges, _ = ax.patches[0].get_data()
    return np.sum(counts * np.diff(edges))


@functools.cache
def made_up(size, spikes, ratio=0.5):
    """The quantiles of the law, with some far out: a spectrum that is the same everywhere."""
    positions = (np.arange(size - spikes)[::-1] + 0.5) / (size - spikes)
    bulk = rmtjax.marchenko_pastur.ppf(jnp.float32(positions), ratio)
    spectrum = rmtjax.Spectrum(
        jnp.concatenate([jnp.linspace(16, 4, spikes), bulk]), jnp.asarray(ratio)
    )
    return spectrum, rmtjax.fit_bema(spectrum)
