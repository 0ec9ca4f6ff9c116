"""The tables of the fits, and the rivals against theory, quadrature and published numbers."""

import json

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize

import rmtjax
from experiments import ensembles, fits, rivals

# The experiments are tested by their smallest runs; `test_mnist.py` is among the fast tests.
pytestmark = pytest.mark.slow

# As many draws of one size, so that the fit is compiled once for each level.
OPTIONS = (
    *("--bias.draws", "40", "--bias.shapes", "60", "120", "--bias.planted", "0", "0.1"),
    *("--calibration.draws", "40", "--calibration.shapes", "60", "120"),
    *("--calibration.levels", "0.1", "0.9", "--fit-test.draws", "40", "--fit-test.sizes", "60"),
)
RATIOS = (0.05, 0.5, 1.0)


def noise(shape, draws=1, seed=0):
    return ensembles.spectra(ensembles.gaussian, shape, draws, seed)


def planted(shape, count, strength, seed=0):
    """Equal spikes, in units of the detection limit; one matrix."""
    p, n = shape
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((side, count))).Q for side in shape)
    limit = n**0.5 * (p / n) ** 0.25
    matrix = rng.standard_normal(shape) + strength * limit * left @ right.T
    return np.linalg.svd(matrix, compute_uv=False) ** 2 / n


@pytest.mark.parametrize("ratio", RATIOS)
def test_quantiles_are_those_of_the_density(ratio):
    lower, upper = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    density = lambda x: np.sqrt((upper - x) * (x - lower)) / (2 * np.pi * ratio * x)
    for probability in (0.05, 0.25, 0.5, 0.9):
        x = rivals.quantiles(np.array(probability), ratio)
        # 1e-6: straight lines between 20,000 points, and quadrature up to a pole.
        mass = scipy.integrate.quad(density, lower, x, limit=500)[0]
        np.testing.assert_allclose(mass, probability, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "level", "correct", "authors"),
    [
        ((784, 1000), 0.1, 3.565794, 3.574622),
        ((784, 1000), 0.9, 3.487383, 3.432818),
        ((1000, 3000), 0.1, 2.492806, 2.493397),
        ((1024, 4096), 0.8, 2.230706, 2.231038),
        ((10, 1000), 0.1, 1.221012, 1.214733),
    ],
)
def test_thresholds_are_the_published_ones(shape, level, correct, authors):
    eigenvalues = np.ones(min(shape))
    for rival, expected in ((rivals.published_bema, correct), (rivals.authors_bema, authors)):
        estimate = rival(eigenvalues, shape, level=level)
        # 1e-5: six decimals, and a Tracy-Widom quantile to 1e-4 times less than 0.1.
        np.testing.assert_allclose(estimate.threshold / estimate.variance, expected, atol=1e-5)


def test_bema_agrees_with_numbers_known_from_other_runs():
    shape, draws = (50, 100), 2000
    values = noise(shape, draws)
    # Of 1,000 draws: the deviation of one is 0.0237, and 0.5 the worst of a rate.
    error = 4 * (1 / draws + 1 / 1000) ** 0.5
    for rival, variance, rates in (
        (rivals.published_bema, 0.9970, {0.1: 0.110, 0.5: 0.460, 0.9: 0.871}),
        (rivals.authors_bema, 1.0216, {0.1: 0.040, 0.5: 0.417, 0.9: 0.947}),
    ):
        estimate = rival(values, shape)
        np.testing.assert_allclose(estimate.variance.mean(), variance, atol=0.0237 * error)
        for level, expected in rates.items():
            spikes = rival(values, shape, level=level).spikes(values)
            np.testing.assert_allclose(np.mean(spikes > 0), expected, atol=0.5 * error)
    # Their 99 % quantile of the fit error, by six of its deviations either way.
    beyond = np.mean(rivals.authors_error(values, shape) > 0.0481)
    np.testing.assert_allclose(beyond, 0.01, atol=6 * 0.01**0.5 * error / 4)


def test_the_error_of_the_authors_falls_to_nothing_beyond_the_edge():
    """The published error 0.7 of a 10x1000 head: the first value out is the last of six."""
    shape = (10, 1000)
    ascending = rivals.quantiles((np.arange(10) + 0.5) / 10, rivals.aspect_ratio(shape))
    ascending[7:] = 1.5  # the edge is 1.21
    error = rivals.authors_error(ascending[::-1], shape, trim=0.2)
    np.testing.assert_allclose(error, 0.2 + 0.6 * 5 / 6, atol=1e-12)


def test_gavish_donoho_cuts_at_omega_medians():
    eigenvalues = np.linspace(5, 0.1, 100) ** 2
    for shape, omega in (((100, 1000), 1.608772), ((100, 200), 2.171185), ((100, 100), 2.858362)):
        cut = np.sqrt(rivals.gavish_donoho(eigenvalues, shape).threshold)
        # 1e-6: six decimals are given.
        np.testing.assert_allclose(cut / np.median(np.sqrt(eigenvalues)), omega, rtol=1e-6)


def free_energy(point, x, p, n):
    """Of one component at unit noise: its scales and widths, the priors eliminated."""
    left, right, scale = np.exp(point)
    widths = n * np.log1p(1 / left) + p * np.log1p(1 / right)
    return widths - 2 * scale * (n * x) ** 0.5 + scale**2 * (1 + left) * (1 + right)


@pytest.mark.parametrize("shape", [(50, 100), (20, 20), (30, 300)])
@pytest.mark.parametrize("factor", [1.02, 1.5, 3.0])
def test_evbmf_gain_is_the_minimum_of_the_free_energy(shape, factor):
    p, n = shape
    x = factor * rivals.evbmf_cut(p / n)
    found = scipy.optimize.minimize(
        free_energy,
        (-1, -1, np.log(n * x) / 2),
        (x, p, n),
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-9, "maxiter": 10_000},
    )
    assert found.success
    # The search stops within 1e-9 of n times it.
    np.testing.assert_allclose(rivals.evbmf_gain(np.array(x), p / n), found.fun / n, atol=1e-8)


@pytest.mark.parametrize("ratio", RATIOS)
def test_evbmf_gains_nothing_at_its_cut(ratio):
    cut = rivals.evbmf_cut(ratio)
    near = rivals.evbmf_gain(cut * np.array([1 - 1e-6, 1 + 1e-6]), ratio)
    assert near[0] == 0
    assert -1e-5 < near[1] < 0
    # The approximation of the 2013 paper, exact for squares.
    rough = 2.5129 * ratio**0.5
    np.testing.assert_allclose(cut, (1 + rough) * (1 + ratio / rough), rtol=0.02)


@pytest.mark.parametrize("variance", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(200, 200), (100, 400)])
def test_variances_of_noise_scale_with_it(shape, variance):
    values = variance * noise(shape, 8)
    for rival in (rivals.published_bema, rivals.authors_bema, rivals.gavish_donoho, rivals.evbmf):
        estimate = rival(values, shape)
        assert estimate.variance.shape == estimate.spikes(values).shape == (8,)
        # A median varies most: by 0.01 to 0.02 here, and 8 draws by a third of it.
        np.testing.assert_allclose(estimate.variance.mean(), variance, rtol=0.03)


@pytest.mark.parametrize("shape", [(512, 1024), (1024, 1024)])
def test_planted_ranks_are_found_as_in_one_run_before(shape):
    """By strength: just above the detection limit, above most cuts, and many."""
    expected = {
        rivals.published_bema: ((0, 0), (6, 14), (16, 16), (63, 64)),
        rivals.authors_bema: ((0, 0), (6, 14), (16, 16), (63, 64)),
        rivals.gavish_donoho: ((0, 0), (0, 0), (14, 16), (63, 64)),
        rivals.evbmf: ((0, 0), (0, 0), (15, 16), (63, 64)),
    }
    for case, (count, strength) in enumerate(((0, 0.0), (16, 1.3), (16, 2.0), (64, 3.0))):
        values = planted(shape, count, strength)
        for rival, bounds in expected.items():
            low, high = bounds[case]
            assert low <= rival(values, shape).spikes(values) <= high, rival.__name__


def test_equal_seeds_give_equal_spectra_in_any_orientation():
    first = noise((300, 200), 40, seed=3)
    assert first.shape == (40, 200)
    assert (np.diff(first) <= 0).all()
    assert len(np.unique(first[:, 0])) == 40
    np.testing.assert_array_equal(first, noise((200, 300), 40, seed=3))
    assert (first != noise((200, 300), 40, seed=4)).any()


@pytest.mark.parametrize("kind", ensembles.ENTRIES)
def test_entries_have_unit_variance(kind):
    values = ensembles.spectra(ensembles.ENTRIES[kind], (100, 200), 20, 0)
    # 400,000 squares of deviation 1.4, or 2.8 for t(5): by four errors.
    np.testing.assert_allclose(values.mean(), 1, atol=4 * 2.8 / 400_000**0.5)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("fits") / "results" / "fits.json"
    assert fits.main([*OPTIONS, "--out", str(path)]) == 0
    return json.loads(path.read_text())


def test_results_hold_command_configuration_environment_and_rows(found):
    assert found["command"].startswith("python experiments/fits.py --bias.draws 40")
    assert found["config"]["calibration"]["shapes"] == [[60, 120]]
    assert found["environment"]["versions"]["rmtjax"] == rmtjax.__version__
    assert found["seconds"].keys() == found["rows"].keys() == fits.TABLES.keys()


def test_rows_tell_of_the_noise(found):
    bias = found["rows"]["bias"]
    assert len(bias) == 2 * 5
    for row in bias:
        # The deviation of a draw is 0.02, and 0.03 for the median; authors' positions add 0.02.
        assert row["planted"] > 0 or abs(row["mean"] - 1) < 0.04
        # A spike at 1.5 times the limit of so small a matrix may be missed.
        assert row["planted"] - 3 < row["spikes"] < row["planted"] + 1
    calibration = {
        (row["entries"], row["rule"]): row["share"] for row in found["rows"]["calibration"]
    }
    assert len(calibration) == 3 * 6
    assert calibration["Gaussian", "rmtjax 0.1"] < calibration["Gaussian", "rmtjax 0.9"]
    refused = {(row["kernel"], row["test"]): row["share"] for row in found["rows"]["fit_test"]}
    assert len(refused) == 2 * len(ensembles.KERNELS)
    assert refused["noise", "rmtjax 60"] < 0.5 < refused["log-normal rows, 1", "rmtjax 60"]


def test_one_table_has_a_line_for_each_index(capsys):
    assert fits.main([*OPTIONS, "--table", "bias"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "bias"
    assert [line.split()[:2] for line in lines[2:4]] == [["60x120", "0"], ["60x120", "6"]]


def test_no_draws_are_refused():
    with pytest.raises(ValueError, match=r"`fit_test.draws` must be at least 1, got 0"):
        fits.Config(fit_test=fits.FitTest(draws=0))
