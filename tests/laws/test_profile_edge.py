"""The edge of noise whose rows and columns differ in scale: against optimization, and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import rmtjax
from rmtjax.laws import profile_edge

RNG = np.random.default_rng(0)
UNEQUAL = RNG.lognormal(0, 1, 128), RNG.lognormal(0, 1, 300)
FEW = np.r_[9.0, np.ones(59)], np.r_[np.ones(80), np.zeros(10)]
EDGE = jax.jit(profile_edge)


def by_optimization(rows, columns):
    """Returns the least x in float64: a root by bisection for each d of a bounded search."""
    size = max(len(rows), len(columns))

    def x_at(d):
        h = np.sum(rows / (1 - rows * d)) / size
        gap = lambda log: np.sum(columns / (np.exp(log) + (columns.max() - columns) * h)) / size - d
        pole = h * columns.max()
        ends = np.log(columns.max() / size / d) - 1e-9, np.log(columns.sum() / size / d) + 1e-9
        return pole + np.exp(optimize.brentq(gap, *ends, xtol=1e-14))

    most = 1 / rows.max()
    found = optimize.minimize_scalar(
        x_at, bounds=(1e-9 * most, (1 - 1e-9) * most), method="bounded", options={"xatol": 1e-9}
    )
    return found.fun


@pytest.mark.parametrize("shape", [(60, 90), (4000, 10), (3, 4000), (50, 50)])
def test_equal_scales_have_the_edge_of_marchenko_and_pastur(shape):
    expected = 6 * rmtjax.marchenko_pastur.support(min(shape) / max(shape), 1.0)[1]
    found = EDGE(*(jnp.full(side, scale) for side, scale in zip(shape, (2.0, 3.0), strict=True)))
    np.testing.assert_allclose(found, expected, rtol=2e-6)  # some units of rounding in the sums


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("profile", [UNEQUAL, FEW], ids=["unequal", "few"])
def test_the_edge_is_the_least_value_of_its_equations(profile, turned):
    rows, columns = profile[::-1] if turned else profile
    found = EDGE(jnp.asarray(rows, jnp.float32), jnp.asarray(columns, jnp.float32))
    # The search stops within 1e-8; float32 rounds at 1e-7, and sums 300 terms.
    np.testing.assert_allclose(found, by_optimization(rows, columns), rtol=3e-6)
    # Both sides have one spectrum.
    other = EDGE(jnp.asarray(columns, jnp.float32), jnp.asarray(rows, jnp.float32))
    np.testing.assert_allclose(other, found, rtol=3e-6)


def test_draws_lie_at_the_edge():
    rows, columns = np.linspace(0.2, 2, 300), np.r_[np.ones(200), np.full(200, 0.3)]
    scales = np.sqrt(rows[:, None] * columns)
    draws = [np.linalg.norm(scales * RNG.standard_normal(scales.shape), 2) for _ in range(5)]
    found = EDGE(jnp.asarray(rows, jnp.float32), jnp.asarray(columns, jnp.float32))
    # At this size the largest eigenvalue lies some 3 % below the edge and varies by 3 %. Equal
    # scales on one side or on both would have an edge that is 12 to 26 % lower.
    assert 0.93 * found < np.mean(np.square(draws)) / 400 < found


def test_zeros_alone_have_no_edge():
    assert np.isnan(EDGE(jnp.zeros(5), jnp.ones(7)))
