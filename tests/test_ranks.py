"""Rank rules against their definitions, and the gate against what is no noise."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import rmtjax
from rmtjax import ranks, Spectrum

RULES = [ranks.bema(), ranks.gavish_donoho(), ranks.energy(0.9), ranks.fixed(3)]
each_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


def noise_of(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def spectrum_of(eigenvalues, ratio=0.5):
    return Spectrum(jnp.asarray(eigenvalues, jnp.float32), jnp.float32(ratio))


@functools.cache
def spiked(shape=(60, 90), count=2):
    """Noise with `count` directions far above it."""
    rng = np.random.default_rng(0)
    (left, _), (right, _) = (np.linalg.qr(rng.standard_normal((side, count))) for side in shape)
    strength = 10 * (shape[0] * shape[1]) ** 0.25
    matrix = rng.standard_normal(shape) + strength * left @ right.T
    return rmtjax.spectrum(jnp.asarray(matrix, jnp.float32))


# The count.


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


@pytest.mark.parametrize("rule", [ranks.energy(0.5), ranks.fixed(2)], ids=repr)
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


# The gate.


SIZES = [(10, 10), (10, 200), (50, 50), (50, 100), (100, 50), (64, 128)]


@functools.cache
def noise_and_fits(shape, draws=400):
    """Spectra of pure noise and their fits, which each gate below judges."""

    @jax.jit
    @jax.vmap
    def fit(key):
        spectrum = rmtjax.spectrum(jax.random.normal(key, shape))
        return spectrum, rmtjax.fit_bema(spectrum)

    return fit(jax.random.split(jax.random.key(sum(shape)), draws))


def share_refused(rule, shape):
    spectra, fits = noise_and_fits(shape)
    each = Spectrum(eigenvalues=0, ratio=0)
    return 1 - np.mean(jax.vmap(rule.accepts, in_axes=(each, 0))(spectra, fits))


@pytest.mark.parametrize("significance", [0.01, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("shape", SIZES[2:], ids=str)
def test_bema_refuses_noise_of_any_size_as_often_as_it_says(shape, significance):
    rate = share_refused(ranks.bema(significance=significance, tolerance=0.0), shape)
    # Three standard errors, and a tenth of the rate: one line of constants for all sizes.
    error = math.sqrt(significance * (1 - significance) / 400)
    assert abs(rate - significance) < 3 * error + 0.1 * significance


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), *SIZES], ids=str)
def test_bema_accepts_noise_of_any_size(shape):
    assert share_refused(ranks.bema(), shape) <= 0.01


RNG = np.random.default_rng(0)
NO_NOISE = {
    "rows of other scales": np.exp(RNG.standard_normal((200, 1))) * RNG.standard_normal((200, 400)),
    "half the rows louder": np.repeat([1, 4], 100)[:, None] * RNG.standard_normal((200, 400)),
    "heavy tails": RNG.standard_t(1.5, (200, 400)),
    "half of the directions": RNG.standard_normal((200, 80)) @ RNG.standard_normal((80, 400)),
    "correlated columns": np.cumsum(RNG.standard_normal((200, 400)), axis=1),
    "one direction": np.ones((200, 400)),
    "zeros": np.zeros((200, 400)),
}


@pytest.mark.parametrize("kind", NO_NOISE)
def test_bema_refuses_what_is_no_noise(kind):
    rule, spectrum = ranks.bema(), rmtjax.spectrum(jnp.asarray(NO_NOISE[kind], jnp.float32))
    fit = rule.fit(spectrum)
    assert not rule.accepts(spectrum, fit)
    # With the gate open all is accepted but the rounding of exact zeros, and what is no
    # minority of spikes: scales that vary by orders of magnitude look like that.
    noisy = kind not in ("one direction", "zeros", "half of the directions")
    accepted = ranks.bema(tolerance=1.0).accepts(spectrum, fit)
    assert bool(accepted) is (noisy and int(fit.num_spikes) < 100)


@pytest.mark.parametrize("entries", ["uniform", "signs"])
def test_bema_accepts_noise_of_other_laws(entries):
    key, shape = jax.random.key(0), (150, 200)
    draw = jax.random.uniform if entries == "uniform" else jax.random.rademacher
    matrix = draw(key, shape).astype(jnp.float32)
    rule, spectrum = ranks.bema(), rmtjax.spectrum(matrix - matrix.mean())
    assert rule.accepts(spectrum, rule.fit(spectrum))


def test_the_limit_is_that_of_noise_and_the_tolerance():
    spectrum = rmtjax.spectrum(noise_of((200, 300)))
    fit = rmtjax.fit_bema(spectrum)
    accepts = lambda rule, distance: bool(
        rule.accepts(spectrum, fit._replace(distance=jnp.float32(distance)))
    )
    # 0.4 log(200) + 1.32, the 99 % quantile of p times the distance.
    limit = (0.4 * math.log(200) + 1.32) / 200
    for tolerance in (0.0, 0.015, 0.3):
        rule = ranks.bema(tolerance=tolerance)
        assert accepts(rule, limit + tolerance - 1e-4)
        assert not accepts(rule, limit + tolerance + 1e-4)


@each_rule
@pytest.mark.parametrize("size", [1, 5, 60])
def test_nothing_is_believed_of_nan(rule, size):
    spectrum = spectrum_of(jnp.full(size, jnp.nan))
    assert not rule.accepts(spectrum, rule.fit(spectrum))
    if not isinstance(rule, ranks.fixed):
        assert rule(spectrum) == 0


def test_bema_refuses_nan_with_an_open_gate():
    rule, spectrum = ranks.bema(tolerance=1.0), spectrum_of(jnp.full(3, jnp.nan))
    assert not rule.accepts(spectrum, rule.fit(spectrum))


@pytest.mark.parametrize("rule", RULES[1:], ids=repr)
def test_rules_without_a_gate_accept_what_is_finite(rule):
    spectrum = rmtjax.spectrum(jnp.asarray(NO_NOISE["heavy tails"], jnp.float32))
    assert rule.accepts(spectrum, rule.fit(spectrum))


def test_gavish_donoho_refuses_a_spectrum_without_noise():
    rule, spectrum = ranks.gavish_donoho(), spectrum_of([3, 0, 0, 0])
    assert not rule.accepts(spectrum, rule.fit(spectrum))


# Truncated spectra.


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rank_that_is_full_changes_nothing(rule):
    spectrum = spiked()
    size = spectrum.eigenvalues.shape[0]
    for whole, ranked in zip(rule.fit(spectrum), rule.fit(spectrum, size), strict=True):
        np.testing.assert_allclose(whole, ranked, rtol=1e-6)


def test_the_median_of_a_spectrum_cut_below_it_is_unknown():
    spectrum = rmtjax.spectrum(noise_of((61, 80)))
    rule = ranks.gavish_donoho()
    np.testing.assert_allclose(rule.fit(spectrum, 32).variance, rule.fit(spectrum).variance)
    cut = rule.fit(spectrum, 30)
    assert np.isnan(cut.variance)
    assert not rule.accepts(spectrum, cut)


# Rules as values.


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
    expected = "bema(trim=0.25, level=0.1, significance=0.01, tolerance=0.015)"
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


# The rank that is kept.


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
    assert ranks.kept_rank(num_signal, size, keep, min_rank) == expected
    traced = jax.jit(ranks.kept_rank, static_argnums=1)
    assert traced(num_signal, size, keep, min_rank) == expected


@given(data=st.data(), size=st.integers(1, 4096), percent=st.integers(0, 100))
def test_kept_rank_is_the_formula_of_the_papers(data, size, percent):
    num_signal = data.draw(st.integers(0, size))
    rank = int(ranks.kept_rank(num_signal, size, percent / 100))
    exact = num_signal + math.floor(Fraction(percent, 100) * (size - num_signal))
    assert rank == max(exact, 1)
    assert num_signal <= rank <= size


@given(data=st.data(), size=st.integers(1, 4096), keeps=st.lists(st.floats(0, 1), min_size=2))
def test_kept_rank_rises_with_keep(data, size, keeps):
    num_signal = data.draw(st.integers(0, size))
    kept = [int(ranks.kept_rank(num_signal, size, keep)) for keep in [0.0, *sorted(keeps), 1.0]]
    assert kept == sorted(kept)
    assert kept[0] == max(num_signal, 1)
    assert kept[-1] == size
