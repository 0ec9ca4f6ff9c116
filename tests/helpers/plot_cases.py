"""Spectra to draw, the labels and lines of a figure, and its image.

An image that is missing in `tests/plots/images` is written there, and its test fails: look at it.
"""

import functools
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images
from matplotlib.testing.decorators import remove_ticks_and_titles

import rmtjax

IMAGES = Path(__file__).parents[1] / "plots" / "images"


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
    return spectrum, rmtjax.fit_bema(spectrum, level=0.1)


def check_image(name, draw, tmp_path):
    """Compares a figure, without the texts that each version of matplotlib draws its way."""
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = Figure(figsize=(4, 3), dpi=60)
        ax = figure.add_axes((0.05, 0.05, 0.75, 0.9))
        draw(ax)
        remove_ticks_and_titles(figure)
        ax.set(xlabel="", ylabel="")
        ax.get_legend().remove()
        expected, actual = IMAGES / f"{name}.png", tmp_path / f"{name}.png"
        if not expected.exists():
            figure.savefig(expected)
            pytest.fail(f"{expected} was missing: look at it.")
        figure.savefig(actual)
    # The root of the mean square over the pixels, of 255: an edge drawn a little softer passes, a
    # threshold moved by a bar does not.
    assert compare_images(str(expected), str(actual), tol=2, in_decorator=True) is None
