"""`prune_spectrum`: the noise level that is carried on, and kernels that are left alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.transform_checks import (
    assert_same_bits,
    ATOL,
    perturbation,
    planted,
    prune_once,
    SHAPE,
    truncated,
)
from hypothesis import given, settings, strategies as st

import rmtjax
from rmtjax import KernelAxes, prune_spectrum, ranks


def lawless():
    """Singular values that fall off geometrically: no Marchenko-Pastur law fits them."""
    rng = np.random.default_rng(9)
    left, right = (np.linalg.qr(rng.normal(size=(n, 64)))[0] for n in SHAPE)
    return jnp.asarray(left * np.geomspace(10, 0.01, 64) @ right.T, jnp.float32)


def test_the_first_accepted_noise_level_is_carried():
    params = {"kernel": planted()}
    optimizer = prune_spectrum(2)
    update, state = optimizer.update, optimizer.init(params)
    seen = []
    for step in range(6):
        updates = perturbation(params, 0.02, seed=step)
        if step == 1:
            first = rmtjax.fit_bema(rmtjax.spectrum(params["kernel"] + updates["kernel"]))
        updates, state = update(updates, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(state.fits["kernel"])
    assert [*map(float, seen[0])] == [0, 0, 0, 1, 0]  # not known
    # Compiled together with the rest, sums are taken in another order.
    np.testing.assert_allclose(seen[1], first, rtol=1e-5)
    for later in seen[2:]:
        assert_same_bits(later, seen[1])


def test_a_truncated_spectrum_is_not_refitted_as_the_published_code_does():
    """N9 of the reference notes: zeros of a truncation, fed to BEMA, make spikes of all."""
    params = {"kernel": planted()}
    optimizer = prune_spectrum(1)
    update, state = optimizer.update, optimizer.init(params)
    refit = jax.jit(lambda kernel: rmtjax.fit_bema(rmtjax.spectrum(kernel)).num_spikes)
    rng, naive = np.random.default_rng(5), params["kernel"]
    carried, refitted = [], []
    for _ in range(8):
        # As the gradient of a small batch: of low rank, far below the noise in size.
        updates = 0.003 * jnp.float32(rng.normal(size=(64, 4)) @ rng.normal(size=(4, 96)))
        naive = naive + updates
        refitted.append(int(refit(naive)))
        naive = jnp.asarray(truncated(naive, refitted[-1]), jnp.float32)
        updates, state = update({"kernel": updates}, state, params)
        params = optax.apply_updates(params, updates)
        carried.append(int(state.ranks["kernel"]))
    assert carried == [3] * 8
    assert refitted[0] == 3
    assert min(refitted[1:]) >= 10  # near trim * p, whatever the data


def test_a_refused_kernel_is_left_alone_and_tried_again():
    params = {"kernel": lawless(), "other": {"kernel": planted(4)}}
    optimizer = prune_spectrum(1)
    update = optimizer.update
    wiggle = perturbation(params)
    updates, refused = update(wiggle, optimizer.init(params), params)
    assert_same_bits(updates["kernel"], wiggle["kernel"])
    assert refused.fits["kernel"].threshold == 0
    assert {path: int(rank) for path, rank in refused.ranks.items()} == {
        "kernel": 64,
        "other/kernel": 3,
    }
    wiggle["kernel"] = planted() - params["kernel"]
    updates, state = update(wiggle, refused, params)
    landed = optax.apply_updates(params, updates)["kernel"]
    np.testing.assert_allclose(landed, truncated(planted(), 3), atol=ATOL)
    assert int(state.ranks["kernel"]) == 3
    assert_same_bits(state.fits["other/kernel"], refused.fits["other/kernel"])


def test_a_stack_with_a_refused_matrix_is_left_alone():
    params = {"kernel": jnp.stack([planted(), lawless()])}
    axes = lambda path, leaf: KernelAxes((1,), (2,), (0,))
    updates = perturbation(params)
    landed, state = prune_once(params, updates, axes=axes)
    assert_same_bits(landed, optax.apply_updates(params, updates))
    assert int(state.ranks["kernel"]) == 64
    assert not state.fits["kernel"].threshold.any()  # until it is cut, nothing is carried


@pytest.mark.parametrize("rule", [ranks.bema(), ranks.gavish_donoho(), ranks.fixed(3)], ids=str)
def test_a_kernel_that_is_no_longer_finite_is_left_alone(rule):
    params = {"a": {"kernel": planted(0)}, "b": {"kernel": planted(1)}}
    optimizer = prune_spectrum(1, rule=rule)
    update = optimizer.update
    zeros = optax.tree.zeros_like(params)
    updates, state = update(zeros, optimizer.init(params), params)
    params = optax.apply_updates(params, updates)
    wiggle = perturbation(params)
    expected = truncated(params["b"]["kernel"] + wiggle["b"]["kernel"], 3)
    for bad in (np.nan, np.inf):
        broken = {**wiggle, "a": {"kernel": wiggle["a"]["kernel"].at[5, 7].set(bad)}}
        updates, later = update(broken, state, params)
        assert_same_bits(updates["a"], broken["a"])
        assert_same_bits(later.fits, state.fits)
        landed = optax.apply_updates(params, updates)["b"]["kernel"]
        np.testing.assert_allclose(landed, expected, atol=ATOL)
    _, healed = update(wiggle, later, params)
    assert int(healed.ranks["a/kernel"]) == 3


@pytest.mark.parametrize(
    "rule", [ranks.bema(), ranks.gavish_donoho(), ranks.fixed(3), ranks.energy(0.9)], ids=str
)
def test_a_kernel_of_zeros_stays_zero(rule):
    params, state = prune_once({"kernel": jnp.zeros(SHAPE)}, rule=rule)
    assert not params["kernel"].any()
    assert state.fits["kernel"].threshold == 0  # no noise to carry


@functools.partial(jax.jit, static_argnames="axes")
def prune_by(keep, params, axes=None):
    """With `keep` traced, so that one program serves all of its values."""
    optimizer = prune_spectrum(1, keep=keep, axes=axes)
    updates = optax.tree.zeros_like(params)
    updates, state = optimizer.update(updates, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state


def stacked_c(path, leaf):
    """The axes of kernels of which `c` alone is a stack."""
    return KernelAxes((1,), (2,), (0,)) if path == "c/kernel" else KernelAxes((0,), (1,))


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.0, 0.25])
def test_ranks_are_those_of_a_plan_with_the_carried_noise(keep):
    params = {
        "a": {"kernel": planted(0)},
        "b": {"kernel": lawless()},
        "c": {"kernel": jnp.stack([planted(1), planted(2, num_spikes=6)])},
        "d": {"kernel": planted(3).astype(jnp.bfloat16)},
    }
    pruned, state = prune_by(keep, params, stacked_c)
    fits, expected = rmtjax.noise_levels(state), jax.tree.map(int, state.ranks)
    assert len(set(expected.values())) == 3  # 3 spikes, 6 spikes and a refusal
    for tree in (params, pruned):
        plan = rmtjax.plan(tree, fits=fits, multiple=1, keep=keep, axes=stacked_c)
        assert {path: row.rank for path, row in plan.items()} == expected


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**16),
    shape=st.sampled_from([(90, 56), (50, 200)]),
    num_spikes=st.integers(0, 8),
    keep=st.floats(0, 1, width=32),
)
@settings(max_examples=20)
def test_the_state_has_the_numerical_rank(seed, shape, num_spikes, keep):
    params = {"kernel": planted(seed, shape, num_spikes)}
    pruned, state = prune_by(keep, params)
    # Rounding leaves singular values of 1e-6; those of the noise are above 0.05.
    assert np.linalg.matrix_rank(pruned["kernel"], tol=1e-4) == int(state.ranks["kernel"])
    assert int(state.ranks["kernel"]) >= max(num_spikes, 1)
