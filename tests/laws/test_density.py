"""The numbers behind a picture of a spectrum."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax.laws import law_curve, roots


def test_roots_of_what_rounding_left_below_zero_are_zero():
    assert roots(jnp.array([4.0, 1.0, -1e-9])).tolist() == [2.0, 1.0, 0.0]


def curve(ratio, size, spikes, edge, points=60):
    numbers = jnp.float32(ratio), jnp.int32(size), jnp.int32(spikes), jnp.float32(edge)
    grid, density = jax.jit(partial(law_curve, points=points))(*numbers)
    return np.asarray(grid, np.float64), np.asarray(density, np.float64)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("points", [60, 400])
def test_the_curve_is_the_law_of_marchenko_and_pastur(ratio, points):
    """Its formula in NumPy, for a variance of 2 and no spikes; f(s) = 2 s f(s^2)."""
    lower, upper = (2 * (1 + sign * ratio**0.5) ** 2 for sign in (-1, 1))
    grid, density = curve(ratio, 100, 0, upper, points)
    assert grid[[0, -1]] == pytest.approx(np.sqrt([lower, upper]), rel=1e-5, abs=1e-5)
    x = grid[1:-1] ** 2
    expected = np.sqrt((upper - x) * (x - lower)) / (2 * np.pi * ratio * 2 * x) * 2 * grid[1:-1]
    # The roots near the ends lose half of the digits of float32.
    assert density[1:-1] == pytest.approx(expected, abs=2e-3)
    # The trapezoidal rule, at points that crowd at the ends, errs by 1/points^2 or so.
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=20 / points**2)


def test_spikes_leave_a_lower_law_to_the_others():
    """A drawn matrix whose 40 spikes have taken a tenth of its ranks."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 40)))[0] for n in (400, 500))
    matrix = rng.normal(size=(400, 500)) + 60 * left @ right.T
    fit = rmtjax.fit_bema(rmtjax.spectrum(jnp.float32(matrix)))
    bulk = np.linalg.svd(matrix, compute_uv=False)[40:] / np.sqrt(500)
    grid, density = curve(0.8, 400, int(fit.num_spikes), fit.edge, 400)
    mass = np.concatenate([[0], np.cumsum(np.diff(grid) * (density[1:] + density[:-1]) / 2)])
    assert mass[-1] == pytest.approx(0.9, abs=1e-3)
    # A spacing is 0.4 % of the width of the bulk.
    for q in (0.1, 0.5, 0.9):
        assert np.interp(0.9 * q, mass, grid) == pytest.approx(np.quantile(bulk, q), abs=0.02)
