"""Transforms fit as `plan` does: without rows and columns of zeros, and at any scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmtjax
from rmtjax import ranks

SHAPE = (120, 160)
RNG = np.random.default_rng(5)
NOISE = RNG.normal(size=(80, 100)).astype(np.float32)
LIVE = NOISE + RNG.normal(size=(80, 1)).astype(np.float32)  # noise, and one direction
ROWS, COLUMNS = (
    np.sort(RNG.permutation(size)[:some]) for size, some in zip(SHAPE, LIVE.shape, strict=True)
)
RULES = {"bema": ranks.bema(), "gavish_donoho": ranks.gavish_donoho()}
EACH = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
prune = functools.partial(rmtjax.prune_spectrum, 1, max_rise=None, max_removed=1.0)
shrink = functools.partial(rmtjax.lowrank.shrink_tail, 1, strength=0.0)


def spread(live):
    """A kernel of zeros with the entries of a smaller one in some of its rows and columns."""
    kernel = np.zeros(SHAPE, np.float32)
    kernel[np.ix_(ROWS, COLUMNS)] = live
    return kernel


def after_a_step(transform, kernel):
    """What the kernel lands on, and the state."""
    params = {"kernel": jnp.asarray(kernel)}
    updates, state = transform.update(optax.tree.zeros_like(params), transform.init(params), params)
    return optax.apply_updates(params, updates)["kernel"], state


def assert_same_level(state, row, rtol=1e-4):
    fit = rmtjax.noise_levels(state)["kernel"]
    for field in ("variance", "edge", "threshold"):
        # The step sums in another order.
        np.testing.assert_allclose(getattr(fit, field), getattr(row.fit, field), rtol=rtol)
    np.testing.assert_allclose(fit.distance, row.fit.distance, atol=1e-3)
    assert fit.num_spikes == row.fit.num_spikes == 1


@EACH
@pytest.mark.parametrize(
    "make",
    [prune, pytest.param(shrink, marks=pytest.mark.slow)],
    ids=["prune_spectrum", "shrink_tail"],
)
def test_the_fit_is_that_of_the_rows_and_columns_that_are_not_zero(make, rule):
    kernel = spread(LIVE)
    row = rmtjax.plan({"kernel": kernel}, rule=rule, multiple=1)["kernel"]
    landed, state = after_a_step(make(rule=rule), kernel)
    assert_same_level(state, row)
    if make is prune:
        assert int(state.ranks["kernel"]) == row.rank == 1
        s = np.linalg.svd(landed, compute_uv=False)
        assert s[1] < 1e-5 * s[0]
        np.testing.assert_array_equal(np.asarray(landed)[~np.isin(np.arange(120), ROWS)], 0)


@EACH
def test_noise_of_which_half_is_zero_is_not_cut(rule):
    for index in (np.s_[::2], np.s_[:, ::2]):
        kernel = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
        kernel[index] = 0
        landed, state = after_a_step(prune(rule=rule), kernel)
        assert int(rmtjax.metrics(state)["signal/kernel"]) == 0
        np.testing.assert_array_equal(landed, kernel)


def test_what_is_left_may_be_too_little_for_a_law():
    kernel = spread(LIVE)
    kernel[ROWS[40:]] = 0
    landed, _ = after_a_step(prune(), kernel)
    np.testing.assert_array_equal(landed, kernel)
    _, state = after_a_step(shrink(), kernel)
    assert int(state.ranks["kernel"]) == 120  # nothing was shrunk
    assert "short side 40 under 50" in rmtjax.plan({"kernel": kernel})["kernel"].reason


WIDE = (RNG.normal(size=(70, 90)) + 0.6).astype(np.float32)
# Each dtype is another program.
SCALES = [
    (1e-30, "float32"),
    (1e20, "float32"),
    (1e37, "float32"),
    *(
        pytest.param(scale, dtype, marks=pytest.mark.slow)
        for scale, dtype in (
            (1e-15, "bfloat16"),
            (1e37, "bfloat16"),
            (1e-3, "float16"),
            (1e4, "float16"),
        )
    ),
]


@pytest.mark.parametrize(("scale", "dtype"), SCALES)
def test_a_chain_cuts_at_any_scale(scale, dtype):
    kernel = jnp.asarray(WIDE.astype(np.float64) * scale, dtype)
    row = rmtjax.plan({"kernel": kernel}, multiple=1)["kernel"]
    assert row.rank == 1
    for make in (prune, shrink):
        landed, state = after_a_step(make(), kernel)
        assert_same_level(state, row, rtol=1e-3)
        numbers = rmtjax.metrics(state)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state, numbers)))
        if make is prune:
            s = np.linalg.svd(np.asarray(landed, np.float64), compute_uv=False)
            assert s[1] < {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}[dtype] * s[0]
            # A second step takes the level of the first, and a plan takes it too.
            params, update = {"kernel": landed}, prune().update
            _, state = update(optax.tree.zeros_like(params), state, params)
            assert int(numbers["rank/kernel"]) == int(state.ranks["kernel"]) == 1
            assert bool(rmtjax.metrics(state)["landed/kernel"])
            plan = rmtjax.plan(params, fits=rmtjax.noise_levels(state), multiple=1)
            assert plan["kernel"].rank == 1


@pytest.mark.parametrize("scale", [1e-30, 1e37])
def test_halves_agree_at_any_scale(scale):
    """The same of `agree`, whose change is that of the usual scale."""
    start = np.zeros((70, 90), np.float32)
    kept = []
    for times in (np.float32(1), np.float32(scale)):
        transform, params = rmtjax.agree(2, start=2), {"kernel": jnp.asarray(start)}
        state = transform.init(params)
        for seed in (1, 2):
            noise = np.random.default_rng(seed).normal(size=WIDE.shape).astype(np.float32)
            updates, state = transform.update(
                {"kernel": jnp.asarray((WIDE + noise) * times)}, state, params
            )
            params = optax.apply_updates(params, updates)
        kept.append(np.asarray(params["kernel"], np.float64) / times)
        assert all(np.isfinite(number) for number in rmtjax.metrics(state).values())
    np.testing.assert_allclose(kept[1], kept[0], atol=1e-4)
