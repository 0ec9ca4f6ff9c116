"""Where the spikes of a kernel come from, and how often shuffled noise has one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.draws import normal

import rmtjax

SHAPE = (60, 90)
NOISE = normal(0, *SHAPE)
KEY = jax.random.key(1)


def planted():
    """The noise with one source of a spike each."""
    left, right = jax.random.normal(KEY, (60, 1)), jax.random.normal(KEY, (1, 90))
    return {
        "entry": NOISE.at[7, 9].set(30.0),
        "row": NOISE.at[7].multiply(2.5),
        "column": NOISE.at[:, 9].multiply(3.0),
        "low rank": NOISE + left @ right / 3,
    }


@pytest.mark.parametrize("power", [-90, 90])
def test_spikes_do_not_depend_on_the_scale(power):
    kernel = planted()["row"]
    traps, scaled = (
        rmtjax.find_traps(kernel * 2.0**exponent, KEY, draws=1) for exponent in (0, power)
    )
    moved = [spike._replace(eigenvalue=spike.eigenvalue * 4.0**power) for spike in traps.spikes]
    assert list(scaled.spikes) == moved
    assert [entry[:2] for entry in scaled.largest] == [entry[:2] for entry in traps.largest]


@pytest.mark.parametrize("kind", ["entry", "row", "column", "low rank"])
def test_sources_are_told_apart(kind):
    traps = rmtjax.find_traps(planted()[kind], KEY, draws=3)
    (spike,) = traps.spikes
    assert spike.kind == kind
    # Only an entry is a direction in whatever place. A row is spread over all of them.
    assert [len(spikes) for spikes in traps.shuffled] == [int(kind == "entry")] * 3
    assert spike.row == 7 or kind in ("column", "low rank")
    assert spike.column == 9 or kind in ("row", "low rank")
    for spikes in traps.shuffled:
        assert all(spike.kind == "entry" for spike in spikes)
    u, s, vt = np.linalg.svd(np.asarray(planted()[kind], np.float64))
    expected = s[0] ** 2 / 90, np.sum(u[:, 0] ** 4), np.sum(vt[0] ** 4)
    found = spike.eigenvalue, spike.left_participation, spike.right_participation
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # float32 and its fourth powers


def test_bfloat16_is_lifted():
    kernel = planted()["entry"].astype(jnp.bfloat16)
    (spike,) = rmtjax.find_traps(kernel, KEY, draws=1).spikes
    assert (spike.kind, spike.row, spike.column) == ("entry", 7, 9)


def test_the_largest_entries_have_their_places():
    kernel = 3 + np.asarray(planted()["entry"])
    largest = rmtjax.find_traps(kernel, KEY, draws=1).largest
    assert len(largest) == 5
    assert largest[0][:2] == (7, 9)
    assert largest[0].deviations == pytest.approx((33 - kernel.mean()) / kernel.std(), rel=1e-5)


def test_a_mean_is_no_trap_and_keys_are_seeds():
    traps = rmtjax.find_traps(NOISE + 3, KEY, draws=3)
    assert traps.shuffled == ((), (), ())
    assert traps.spikes[0].kind == "low rank"
    loud = planted()["entry"]
    assert rmtjax.find_traps(loud, KEY, draws=3) == rmtjax.find_traps(loud, KEY, draws=3)
    other = rmtjax.find_traps(loud, jax.random.key(2), draws=3)
    assert rmtjax.find_traps(loud, KEY, draws=3).shuffled != other.shuffled


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_what_has_no_noise_has_no_spikes(value):
    traps = rmtjax.find_traps(jnp.full(SHAPE, value), KEY, draws=3)
    assert traps.spikes == ()
    assert traps.shuffled == ((), (), ())


def test_wrong_arguments_are_named():
    with pytest.raises((TypeError, ValueError), match="matrix"):
        rmtjax.find_traps(jnp.ones(3), KEY)
    with pytest.raises(ValueError, match="`draws` must be at least 1, got 0"):
        rmtjax.find_traps(NOISE, KEY, draws=0)
    with pytest.raises(ValueError, match="`level` must be in"):
        rmtjax.find_traps(NOISE, KEY, level=2.0)


LEVELS = pytest.mark.parametrize("level", [0.01, 0.1])


@pytest.mark.slow
@LEVELS
@pytest.mark.parametrize("shape", [(50, 100), (64, 64), (120, 40), (60, 200)], ids=str)
def test_shuffled_noise_has_a_spike_as_often_as_the_level_says(shape, level):
    """By the column, which needs no vectors: 500 orders of each of eight kernels."""
    noise = np.random.default_rng(sum(shape)).standard_normal((8, *shape), np.float32)
    rule = rmtjax.ranks.bema(level=level)
    params = {f"Dense_{k}": {"kernel": kernel} for k, kernel in enumerate(noise)}
    report = rmtjax.analyze(params, rule=rule, min_size=40, randomized=500)
    rate = np.mean([found["shuffled_rate"] for found in report.metrics.values()])
    # Three standard errors, and a part for the law at these sizes: 0.0125 and 0.1006 are the worst
    # of 8,000 draws of each shape by NumPy.
    assert abs(rate - level) <= 3 * math.sqrt(level * (1 - level) / 4000) + 0.0025


@pytest.mark.slow
@LEVELS
def test_draws_of_traps_have_a_spike_as_often_as_the_level_says(level):
    noise = np.random.default_rng(0).standard_normal((40, 60), np.float32)
    shuffled = rmtjax.find_traps(noise, KEY, draws=500, level=level).shuffled
    rate = np.mean([len(spikes) > 0 for spikes in shuffled])
    assert abs(rate - level) <= 3 * math.sqrt(level * (1 - level) / 500)


@pytest.mark.slow
def test_low_rank_is_hardly_ever_taken_for_a_row_or_a_column():
    rng, kinds = np.random.default_rng(0), []
    for _ in range(300):
        signal = rng.standard_normal((60, 1)) @ rng.standard_normal((1, 90)) / 3
        traps = rmtjax.find_traps(rng.standard_normal(SHAPE) + signal, KEY, draws=1, level=0.1)
        kinds.append(traps.spikes[0].kind)
    # Two vectors are tested at a level of 0.1 each, with a bound: 19 %, and three standard errors.
    assert np.mean([kind != "low rank" for kind in kinds]) < 0.19 + 0.07
