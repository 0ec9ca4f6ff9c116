"""Estimated spectra of large matrices against their decompositions, and what is done without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import fit_bema, ranks, Spectrum
from rmtjax._axes import KernelAxes, MatrixView
from rmtjax.planning import _measure
from rmtjax.spectra import _lanczos

MATRIX = KernelAxes((0,), (1,))


def planted(shape, strengths, seed=0):
    """Noise of variance 1, and directions that will show at these multiples of its edge."""
    rng = np.random.default_rng(seed)
    ratio = min(shape) / max(shape)
    excess = np.asarray(strengths) * (1 + ratio**0.5) ** 2 - 1 - ratio
    strength = np.sqrt((excess + np.sqrt(excess**2 - 4 * ratio)) / 2)  # l^2 + ratio / l^2
    left, right = (np.linalg.qr(rng.standard_normal((n, len(strengths))))[0] for n in shape)
    signal = (left * strength * max(shape) ** 0.5) @ right.T
    return (rng.standard_normal(shape) + signal).astype(np.float32)


def exact(matrix):
    long = matrix if len(matrix) >= len(matrix.T) else matrix.T
    values = np.linalg.eigvalsh((long.T @ long).astype(np.float64))[::-1] / len(long)
    return Spectrum(jnp.asarray(values, jnp.float32), jnp.float32(long.shape[1] / len(long)))


@pytest.mark.parametrize("shape", [(3000, 3000), (3000, 4200), (4100, 3100)])
def test_agrees_with_the_decomposition(shape):
    matrix = planted(shape, np.geomspace(1.05, 30, 25))
    estimate, spectrum = _lanczos.estimated_spectrum(jnp.asarray(matrix)), exact(matrix)
    got, expected = fit_bema(estimate.spectrum), fit_bema(spectrum)
    # The quantiles of the bulk come from 2^17 random numbers, and are off by 0.3 % or so.
    np.testing.assert_allclose(got[:3], expected[:3], rtol=1e-2)
    assert got.num_spikes == expected.num_spikes == 25 <= estimate.num_found
    found = int(estimate.num_found)
    values = estimate.spectrum.eigenvalues
    assert (np.diff(values) <= 0).all()
    # Spikes to rounding; what was found of the bulk, to a residual of 0.3 %.
    np.testing.assert_allclose(values[:25], spectrum.eigenvalues[:25], rtol=1e-4)
    np.testing.assert_allclose(values[:found], spectrum.eigenvalues[:found], rtol=3e-3)
    np.testing.assert_allclose(values.sum(), spectrum.eigenvalues.sum(), rtol=1e-5)
    assert got.distance < 0.015  # that is the tolerance of the rule


@pytest.fixture
def fewer(monkeypatch):
    """A sixteenth of the random numbers, in which a smaller matrix may be large."""
    monkeypatch.setattr(_lanczos, "_DRAWN", 2**13)


def test_a_plan_is_that_of_the_decomposition(fewer):
    params = {"kernel": planted((1200, 1200), np.geomspace(1.3, 30, 8))}
    (thin,), (whole,) = (rmtjax.plan(params, exact_below=n).values() for n in (1200, 1201))
    assert thin.reason == whole.reason + " (spectrum estimated)"
    assert (thin.rank, thin.action) == (whole.rank, whole.action) == (8, "factorize")
    np.testing.assert_allclose(thin.fit.threshold, whole.fit.threshold, rtol=1e-2)


@pytest.mark.parametrize("values", [1.0, [1.0, 1.5]])
def test_a_law_that_does_not_fit_is_seen(values, fewer):
    """One or two singular values, each many times, at which the iteration comes to its end."""
    orthogonal = np.linalg.qr(np.random.default_rng(0).standard_normal((1200, 1200)))[0]
    matrix = (orthogonal * np.resize(values, 1200)).astype(np.float32)
    (row,) = rmtjax.plan({"kernel": matrix}, exact_below=1200).values()
    assert row.action == "keep"
    assert row.reason.startswith("kept: law does not fit (distance 0.")
    assert row.reason.endswith("(spectrum estimated)")
    np.testing.assert_allclose(
        row.spectrum.eigenvalues.mean(), np.mean(np.square(values)) / 1200, rtol=1e-5
    )


@pytest.mark.parametrize("rule", [ranks.fixed(400), ranks.energy(0.99), ranks.bema()])
def test_what_an_estimate_does_not_decide_is_computed(rule, fewer):
    """More directions than it has found by themselves."""
    matrix = planted((1200, 1200), np.geomspace(1.2, 30, 250))
    views = {"kernel": MatrixView("kernel", matrix, MATRIX)}
    measured = _measure.measure(views, rule, {}, exact_below=1200)["kernel"]
    assert not measured.estimated
    np.testing.assert_allclose(
        measured.spectra.eigenvalues[0], exact(matrix)[0], rtol=1e-3, atol=1e-5
    )


def test_a_rule_without_a_law_asks_for_what_was_not_found(fewer):
    """Far from the law, which this rule does not mind: its rank is beyond what was found."""
    orthogonal = np.linalg.qr(np.random.default_rng(0).standard_normal((1200, 1200)))[0]
    matrix = (orthogonal * np.resize([1.0, 1.5], 1200)).astype(np.float32)
    views = {"kernel": MatrixView("kernel", matrix, MATRIX)}
    measured = _measure.measure(views, ranks.fixed(600), {}, exact_below=1200)["kernel"]
    assert measured.fits.distance[0] > 0.05
    assert not measured.estimated


def test_stacks_and_what_is_not_finite(fewer):
    stack = np.stack([planted((1200, 1200), [3.0, 2.0]), np.zeros((1200, 1200), np.float32)])
    stack[1, 0, 0] = np.inf
    axes = KernelAxes((1,), (2,), (0,))
    views = {"kernel": MatrixView("kernel", jnp.asarray(stack), axes)}
    found = jax.jit(lambda stack: jax.lax.map(_lanczos.estimated_spectrum, stack))(stack)
    np.testing.assert_array_equal(np.isnan(found.spectrum.eigenvalues).all(axis=1), [False, True])
    assert found.num_found[0] >= 2
    measured = _measure.measure(views, ranks.bema(), {}, exact_below=1200)["kernel"]
    assert measured.signal[0] == 2
    assert not measured.accepted[1]


def test_a_noise_level_that_is_given_is_used(fewer):
    matrix = planted((1200, 1200), [3.0, 2.0, 1.5])
    fit = fit_bema(exact(matrix))
    given = {"kernel": jax.tree.map(jnp.asarray, fit._replace(threshold=2.5 * fit.threshold))}
    (row,) = rmtjax.plan({"kernel": matrix}, fits=given, multiple=1, exact_below=1200).values()
    assert row.rank == 1


def test_what_has_few_directions(fewer):
    """The iteration comes to an end before its steps do."""
    rng = np.random.default_rng(0)
    thin = rng.standard_normal((1200, 5)) @ rng.standard_normal((5, 1300))
    estimate = _lanczos.estimated_spectrum(jnp.asarray(thin, jnp.float32))
    expected = np.linalg.svd(thin, compute_uv=False)[:5] ** 2 / 1300
    np.testing.assert_allclose(estimate.spectrum.eigenvalues[:5], expected, rtol=1e-4)
    assert np.abs(estimate.spectrum.eigenvalues[5:]).max() < 1e-4 * expected[0]


def test_small_matrices_are_decomposed():
    assert not _lanczos.lanczos_pays(2000)
    assert _lanczos.lanczos_pays(4096)
    matrix = planted((300, 300), [2.0])
    assert "estimated" not in str(rmtjax.plan({"kernel": matrix}, exact_below=1))
    with pytest.raises(ValueError, match="`exact_below` must be an integer of at least 1, got 0"):
        rmtjax.plan({"kernel": matrix}, exact_below=0)
