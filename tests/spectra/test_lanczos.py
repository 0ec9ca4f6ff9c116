"""Estimated spectra of large matrices against their decompositions, and plans made from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import fit_bema, KernelAxes, ranks, Spectrum
from rmtjax._axes import MatrixView
from rmtjax.spectra import estimated_spectra, largest_eigenvalue
from rmtjax.spectra._lanczos import estimated_spectrum, lanczos_pays

# Nearly the smallest short side for which an estimate pays.
LARGE = 2752
# With fewer random numbers smaller matrices can be estimated too, and take less time to decompose.
estimate_small = jax.jit(functools.partial(estimated_spectrum, drawn=2**13))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def planted(shape, strengths, seed=0):
    """Noise of variance 1, and directions whose eigenvalues are these multiples of its edge."""
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


def check_estimate(estimate, matrix, num_spikes):
    values, num_exact, spectrum = estimate[0].eigenvalues, int(estimate[1]), exact(matrix)
    got, expected = fit_bema(estimate[0]), fit_bema(spectrum)
    # With 2^17 random numbers the quantiles of the bulk are off by 0.3 % or so.
    np.testing.assert_allclose(got[:3], expected[:3], rtol=1e-2)
    assert got.num_spikes == expected.num_spikes == num_spikes <= num_exact
    assert (np.diff(values) <= 0).all()
    # Spikes to rounding; exact values of the bulk, to a residual of 0.3 %.
    spikes = slice(num_spikes)
    np.testing.assert_allclose(values[spikes], spectrum.eigenvalues[spikes], rtol=1e-4)
    np.testing.assert_allclose(values[:num_exact], spectrum.eigenvalues[:num_exact], rtol=3e-3)
    np.testing.assert_allclose(values.sum(), spectrum.eigenvalues.sum(), rtol=1e-5)
    assert got.distance < 0.015  # that is the tolerance of the rule


@pytest.mark.slow  # decomposes matrices of 3,000 columns
@pytest.mark.parametrize("shape", [(3000, 3000), (3000, 4200), (4100, 3100)])
def test_agrees_with_the_decomposition(shape):
    matrix = planted(shape, np.geomspace(1.05, 30, 25))
    views = {"kernel": MatrixView("kernel", matrix, KernelAxes((0,), (1,)))}
    estimates = estimated_spectra(views, exact_below=3000)
    check_estimate(jax.tree.map(lambda a: a[0], estimates["kernel"]), matrix, 25)
    assert not estimated_spectra(views, exact_below=max(shape) + 1)


@pytest.mark.parametrize("shape", [(1200, 1200), (1200, 1700), (1700, 1200)])
def test_agrees_with_the_decomposition_of_a_smaller_matrix(shape):
    matrix = planted(shape, np.geomspace(1.3, 30, 8))
    check_estimate(jax.device_get(estimate_small(matrix)), matrix, 8)


@pytest.mark.slow  # decomposes a matrix of 2,752 columns
def test_a_plan_is_that_of_the_decomposition():
    params = {"kernel": planted((LARGE, LARGE), np.geomspace(1.3, 30, 8))}
    (thin,), (dense,) = (rmtjax.plan(params, exact_below=n).values() for n in (LARGE, LARGE + 1))
    assert thin.reason == dense.reason + " (spectrum estimated)"
    assert (thin.rank, thin.action) == (dense.rank, dense.action) == (8, "factorize")
    np.testing.assert_allclose(thin.fit.threshold, dense.fit.threshold, rtol=1e-2)


@pytest.mark.parametrize("values", [pytest.param(1.0, marks=pytest.mark.slow), [1.0, 1.5]])
def test_a_law_that_does_not_fit_is_seen(values):
    """One or two singular values, each many times: few steps of the iteration exhaust them."""
    matrix = np.diag(np.resize(values, LARGE)).astype(np.float32)
    (row,) = rmtjax.plan({"kernel": matrix}, exact_below=LARGE).values()
    assert row.action == "keep"
    assert row.reason.startswith("kept: law does not fit (distance 0.")
    assert row.reason.endswith("(spectrum estimated)")
    mean = np.mean(np.square(values)) / LARGE
    np.testing.assert_allclose(row.spectrum.eigenvalues.mean(), mean, rtol=1e-5)


@functools.cache
def many_spikes():
    """More directions than an estimate has exactly, and their values."""
    matrix = planted((LARGE, LARGE), np.geomspace(1.2, 30, 400))
    return matrix, exact(matrix)[0]


@pytest.mark.slow  # decomposes a matrix of 2,752 columns
@pytest.mark.parametrize("rule", [ranks.fixed(400), ranks.energy(0.99), ranks.bema()])
def test_what_an_estimate_does_not_decide_is_computed(rule):
    matrix, eigenvalues = many_spikes()
    (row,) = rmtjax.plan({"kernel": matrix}, rule=rule, exact_below=LARGE).values()
    assert "estimated" not in row.reason
    np.testing.assert_allclose(row.spectrum.eigenvalues, eigenvalues, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_rule_without_a_law_asks_for_more_directions_than_are_exact():
    """Far from the law, which this rule does not mind: its rank is beyond the exact directions."""
    matrix = np.diag(np.resize([1.0, 1.5], LARGE)).astype(np.float32)
    (row,) = rmtjax.plan({"kernel": matrix}, rule=ranks.fixed(600), exact_below=LARGE).values()
    assert row.fit.distance > 0.05
    assert "estimated" not in row.reason


@pytest.mark.slow
def test_stacks_and_what_is_not_finite(tmp_path):
    stack = np.stack([planted((LARGE, LARGE), [3.0, 2.0]), np.zeros((LARGE, LARGE), np.float32)])
    stack[1, 0, 0] = np.inf
    views = {"kernel": MatrixView("kernel", jnp.asarray(stack), KernelAxes((1,), (2,), (0,)))}
    spectrum, num_exact, *_ = estimated_spectra(views, exact_below=LARGE)["kernel"]
    np.testing.assert_array_equal(np.isnan(spectrum.eigenvalues).all(axis=1), [False, True])
    assert num_exact[0] >= 2
    assert fit_bema(Spectrum(spectrum.eigenvalues[0], spectrum.ratio[0])).num_spikes == 2
    # A plan does not believe the estimate of a matrix that is not finite.
    (row,) = rmtjax.plan({"kernel": stack[1]}, exact_below=LARGE).values()
    assert row.reason.startswith("kept: not finite")
    # Nor of one that is still in a file.
    rmtjax.checkpoint.save(tmp_path / "large.safetensors", {"kernel": stack[1]})
    report = rmtjax.checkpoint.analyze_file(tmp_path / "large.safetensors", exact_below=LARGE)
    assert report.rows[0].reason == row.reason


def test_a_noise_level_that_is_given_is_used():
    matrix = planted((LARGE, LARGE), [3.0, 2.0, 1.5])
    # Unit noise in a square matrix ends at 4, and 2.5 times as much leaves the first direction.
    given = rmtjax.BulkFit(*map(jnp.float32, (1.0, 4.0, 10.0, 0.0)), num_spikes=jnp.int32(3))
    options = {"fits": {"kernel": given}, "multiple": 1, "exact_below": LARGE}
    (row,) = rmtjax.plan({"kernel": matrix}, **options).values()
    assert row.rank == 1


def test_what_has_few_directions():
    """The iteration comes to an end before its steps do."""
    rng = np.random.default_rng(0)
    thin = rng.standard_normal((1200, 5)) @ rng.standard_normal((5, 1300))
    spectrum, _ = estimate_small(jnp.asarray(thin, jnp.float32))
    expected = np.linalg.svd(thin, compute_uv=False)[:5] ** 2 / 1300
    np.testing.assert_allclose(spectrum.eigenvalues[:5], expected, rtol=1e-4)
    assert np.abs(spectrum.eigenvalues[5:]).max() < 1e-4 * expected[0]


def test_small_matrices_are_decomposed():
    assert not lanczos_pays(2000)
    assert lanczos_pays(LARGE)
    assert lanczos_pays(4096)
    matrix = planted((300, 300), [2.0])
    assert "estimated" not in str(rmtjax.plan({"kernel": matrix}, exact_below=1))
    with pytest.raises(ValueError, match="`exact_below` must be an integer of at least 1, got 0"):
        rmtjax.plan({"kernel": matrix}, exact_below=0)


@pytest.mark.parametrize("shape", [(60, 90), (400, 130), (300, 300), (7, 1)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_largest_eigenvalue_of_noise_is_right_to_five_digits(rng, shape, scale):
    matrix = (scale * rng.standard_normal(shape)).astype(np.float32)
    exact = np.linalg.norm(np.float64(matrix), 2) ** 2 / max(shape)
    for turned in (matrix, matrix.T):
        np.testing.assert_allclose(jax.jit(largest_eigenvalue)(turned), exact, rtol=1e-5)


def test_the_largest_eigenvalue_of_what_has_none():
    assert largest_eigenvalue(jnp.zeros((60, 90))) == 0
    assert np.isnan(largest_eigenvalue(jnp.full((60, 90), jnp.nan)))
    product = jnp.outer(jnp.arange(60.0), jnp.arange(90.0))  # the iteration ends after a step
    exact = float(jnp.sum(product**2)) / 90
    np.testing.assert_allclose(largest_eigenvalue(product), exact, rtol=1e-5)


def test_largest_eigenvalues_under_vmap(rng):
    """A transform may be mapped over an ensemble: no call of LAPACK may wait for another."""
    stack = jnp.asarray(rng.standard_normal((5, 60, 90)), jnp.float32)
    together = jax.jit(jax.vmap(largest_eigenvalue))(stack)
    np.testing.assert_allclose(together, [largest_eigenvalue(one) for one in stack], rtol=1e-5)
