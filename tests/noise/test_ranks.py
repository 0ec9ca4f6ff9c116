"""Rank rules against their definitions and as values, and the rank that is kept."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.noise_cases import each_rule, noise_of, RULES, spectrum_of
from hypothesis import given, strategies as st

import rmtjax
from rmtjax import ranks, Spectrum
from rmtjax.noise import kept_rank


@functools.cache
def spiked(shape=(60, 90), count=2):
    """Noise with `count` directions far above it."""
    rng = np.random.default_rng(0)
    (left, _), (right, _) = (np.linalg.qr(rng.standard_normal((side, count))) for side in shape)
    strength = 10 * (shape[0] * shape[1]) ** 0.25
    matrix = rng.standard_normal(shape) + strength * left @ right.T
    return rmtjax.spectrum(jnp.asarray(matrix, jnp.float32))


@pytest.mark.parametrize(("trim", "level"), [(0.25, 0.1), (0.1, 0.99)])
def test_bema_counts_the_spikes_of_its_fit(trim, level):
    rule, spectrum = ranks.bema(trim=trim, level=level), spiked()
    expected = rmtjax.fit_bema(spectrum, trim=trim, level=level)
    fit = rule.fit(spectrum)
    assert all(ours == theirs for ours, theirs in zip(fit, expected, strict=True))
    assert rule(spectrum) == expected.num_spikes >= 2


@pytest.mark.parametrize(
    ("ratio", "cut", "omega"),
    [
        (0.1, 1.581648, 1.608772),
        (1 / 3, 1.838544, 1.951397),
        (0.5, 1.978599, 2.171185),
        (0.784, 2.178123, 2.547800),
        (1.0, 2.309401, 2.858362),
    ],
)
def test_gavish_donoho_is_that_of_the_paper(ratio, cut, omega):
    # Of odd length, so that the median of the squares is the square of the median.
    eigenvalues = np.linspace(5, 0.1, 101) ** 2
    spectrum, rule = spectrum_of(eigenvalues, ratio), ranks.gavish_donoho()
    fit = rule.fit(spectrum)
    # Six decimals are given; float32.
    np.testing.assert_allclose(np.sqrt(fit.threshold / fit.variance), cut, rtol=2e-6)
    np.testing.assert_allclose(np.sqrt(fit.threshold / np.median(eigenvalues)), omega, rtol=2e-6)
    singular_values = np.sqrt(eigenvalues)
    expected = np.sum(singular_values > omega * np.median(singular_values))
    assert rule(spectrum) == fit.num_spikes == expected


@pytest.mark.parametrize("shape", [(80, 80), (40, 400), (100, 50)])
def test_gavish_donoho_finds_the_noise_level_and_the_signal(shape):
    fit = ranks.gavish_donoho().fit(spiked(shape))
    # The median of one draw, moved a little by two spikes.
    np.testing.assert_allclose(fit.variance, 1, rtol=0.1)
    assert fit.num_spikes == 2


@given(
    eigenvalues=st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=30),
    share=st.floats(0.01, 1.0),
)
def test_energy_is_the_fewest_that_hold_the_share(eigenvalues, share):
    eigenvalues = np.float32(sorted(eigenvalues, reverse=True))
    rank = int(ranks.energy(share)(spectrum_of(eigenvalues)))
    total = eigenvalues.sum(dtype=np.float64)
    if total < 1e-30:  # nothing to hold; float32 on CPU has no smaller numbers
        assert rank <= len(eigenvalues)
        return
    held = np.concatenate([[0.0], np.cumsum(eigenvalues, dtype=np.float64)]) / total
    # 1e-5: float32 sums of up to 30 terms.
    assert held[rank] >= share - 1e-5
    assert held[rank - 1] < share + 1e-5


@pytest.mark.parametrize(
    ("share", "rank"), [(0.01, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (1.0, 4)]
)
def test_energy_by_hand(share, rank):
    assert ranks.energy(share)(spectrum_of([4, 2, 1, 1, 0, 0])) == rank


def test_energy_of_nothing_is_no_direction():
    assert ranks.energy(1.0)(spectrum_of([0, 0, 0])) == 0


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (4, 4), (5, 5), (6, 5), (100, 5)])
def test_fixed_is_the_rank_or_all(rank, expected):
    assert ranks.fixed(rank)(spectrum_of([5, 4, 3, 2, 1])) == expected


@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    share=st.fractions(Fraction(1, 100), Fraction(99, 100), max_denominator=100),
    multiple=st.integers(1, 16),
)
def test_size_is_the_largest_rank_whose_factors_hold_the_share(shape, share, multiple):
    short, long = sorted(shape)
    spectrum = spectrum_of(np.ones(short), np.float32(short) / np.float32(long))
    rank = int(ranks.size(float(share), multiple)(spectrum))
    # A thousandth of a rank is forgiven, as float32 needs it.
    exact = math.floor(share * short * long / (short + long) + Fraction(1, 1000))
    assert rank == max(exact // multiple * multiple, min(exact, multiple), 1)


@pytest.mark.parametrize(
    ("shape", "share", "rank"),
    [((128, 128), 0.5, 32), ((128, 128), 0.4, 24), ((576, 64), 0.4, 16), ((64, 50), 0.2, 5)],
)
def test_size_by_hand(shape, share, rank):
    spectrum = rmtjax.spectrum(noise_of(shape))
    assert ranks.size(share)(spectrum) == rank
    assert jax.jit(ranks.size(share))(spectrum) == rank


@pytest.mark.parametrize("rule", [ranks.energy(0.5), ranks.fixed(2), ranks.size(0.5)], ids=repr)
def test_rules_that_ask_nothing_of_the_noise_report_it(rule):
    spectrum = spiked()
    expected = rmtjax.fit_bema(spectrum)
    assert all(a == b for a, b in zip(rule.fit(spectrum), expected, strict=True))


@pytest.mark.parametrize("rule", [ranks.bema(), ranks.gavish_donoho()], ids=repr)
def test_a_fit_that_is_given_is_used(rule):
    spectrum = spiked()
    fit = rule.fit(spectrum)
    assert rule(spectrum, fit) == 2
    one = (spectrum.eigenvalues[0] + spectrum.eigenvalues[1]) / 2
    assert rule(spectrum, fit._replace(threshold=one)) == 1
    # The reason for the argument: what is left of a truncated matrix has no noise to fit.
    truncated = Spectrum(spectrum.eigenvalues.at[2:].set(0.0), spectrum.ratio)
    assert rule(truncated, fit) == 2


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rank_that_is_full_changes_nothing(rule):
    spectrum = spiked()
    size = spectrum.eigenvalues.shape[0]
    for whole, ranked in zip(rule.fit(spectrum), rule.fit(spectrum, size), strict=True):
        np.testing.assert_allclose(whole, ranked, rtol=1e-6)


@pytest.mark.parametrize(
    ("num_signal", "size", "keep", "min_rank", "expected"),
    [
        (0, 784, 0.45, 1, 352),  # the papers' code has 353: one value always counts, bug B5
        (56, 784, 0.0, 1, 56),
        (0, 10, 0.0, 1, 1),
        (0, 100, 0.53, 1, 53),  # 52.999996 in float32
        (0, 200, 0.59, 1, 118),
        (2, 10, 0.5, 1, 6),
        (2, 10, 0.49, 1, 5),
        (10, 10, 0.5, 1, 10),
        (3, 10, 0.0, 5, 5),
        (3, 10, 0.0, 50, 10),
        (0, 10, 0.0, 0, 0),
    ],
)
def test_kept_rank_by_hand(num_signal, size, keep, min_rank, expected):
    assert kept_rank(num_signal, size, keep, min_rank) == expected
    traced = jax.jit(kept_rank, static_argnums=1)
    assert traced(num_signal, size, keep, min_rank) == expected


@given(data=st.data(), size=st.integers(1, 4096), percent=st.integers(0, 100))
def test_kept_rank_is_the_formula_of_the_papers(data, size, percent):
    num_signal = data.draw(st.integers(0, size))
    rank = int(kept_rank(num_signal, size, percent / 100))
    exact = num_signal + math.floor(Fraction(percent, 100) * (size - num_signal))
    assert rank == max(exact, 1)
    assert num_signal <= rank <= size


@given(data=st.data(), size=st.integers(1, 4096), keeps=st.lists(st.floats(0, 1), min_size=2))
def test_kept_rank_rises_with_keep(data, size, keeps):
    num_signal = data.draw(st.integers(0, size))
    kept = [int(kept_rank(num_signal, size, keep)) for keep in [0.0, *sorted(keeps), 1.0]]
    assert kept == sorted(kept)
    assert kept[0] == max(num_signal, 1)
    assert kept[-1] == size


@each_rule
def test_rules_work_under_jit_and_vmap(rule):
    spectra = jax.vmap(lambda seed: noise_of((40, 60), 0) * seed)(jnp.arange(1.0, 4.0))
    spectra = jax.vmap(rmtjax.spectrum)(spectra.at[2, 0].add(8.0))

    def apply(spectrum):
        fit = rule.fit(spectrum)
        return rule(spectrum), rule(spectrum, fit), rule.accepts(spectrum, fit)

    batched = jax.vmap(apply)(spectra)
    for i in range(3):
        single = jax.tree.map(lambda leaf, i=i: leaf[i], spectra)
        eager, compiled = apply(single), jax.jit(apply)(single)
        for many, one, other in zip(batched, eager, compiled, strict=True):
            assert many[i] == one == other
        assert eager[0].dtype == jnp.int32
        assert eager[2].dtype == jnp.bool_


@each_rule
def test_rules_are_values(rule):
    copy = eval(repr(rule), vars(ranks))
    assert copy == rule
    assert hash(copy) == hash(rule)
    assert isinstance(rule, ranks.RankRule)
    assert sum(other == rule for other in RULES) == 1
    # As a static argument of `jit`: equal rules share the compiled function.
    traces = []
    count = jax.jit(lambda rule, spectrum: traces.append(1) or rule(spectrum), static_argnums=0)
    count(rule, spiked())
    count(copy, spiked())
    assert len(traces) == 1


def test_rules_print_and_compare_their_parameters():
    expected = "bema(trim=0.25, level=0.01, significance=0.01, tolerance=0.015)"
    assert repr(ranks.bema()) == expected
    assert ranks.bema(level=0.2) != ranks.bema()
    assert ranks.energy(0.5) != ranks.energy(0.6)
    assert ranks.fixed(2) != ranks.fixed(3)


@each_rule
def test_rules_are_frozen(rule):
    with pytest.raises(AttributeError):
        rule.trim = 0.1


@pytest.mark.parametrize(
    ("build", "name"),
    [
        *[(functools.partial(ranks.bema, trim=x), "trim") for x in (-0.1, 0.5, math.nan)],
        *[(functools.partial(ranks.bema, level=x), "level") for x in (0.0, 1.0, -1.0, math.nan)],
        *[(functools.partial(ranks.bema, tolerance=x), "tolerance") for x in (-0.1, 1.1, math.nan)],
        *[
            (functools.partial(ranks.bema, significance=x), "significance")
            for x in (0.0, 0.6, math.nan)
        ],
        *[(functools.partial(ranks.energy, x), "share") for x in (0.0, 1.1, -0.5, math.nan)],
        *[(functools.partial(ranks.fixed, x), "rank") for x in (0, -1, True)],
        *[(functools.partial(ranks.size, x), "share") for x in (0.0, 1.0, -0.5, math.nan)],
        *[(functools.partial(ranks.size, 0.5, x), "multiple") for x in (0, -1, True)],
    ],
)
def test_wrong_parameters_are_errors_that_name_them(build, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        build()


@pytest.mark.parametrize("rank", [2.0, "3", None])
def test_rank_that_is_no_integer_is_an_error(rank):
    # The checks of types during tests come first, with a TypeError.
    with pytest.raises((ValueError, TypeError), match="rank"):
        ranks.fixed(rank)
