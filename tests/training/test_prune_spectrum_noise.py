"""`prune_spectrum`: which noise level is in force, and when a kernel is ready to be pruned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmtjax
from rmtjax import prune_spectrum, ranks

SHAPE = (120, 160)


def planted(num_spikes, seed=0, noise=0.1):
    """Noise with a few directions far above the threshold, all of one strength."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, num_spikes)))[0] for n in SHAPE)
    strength = 3 * noise * (SHAPE[0] * SHAPE[1]) ** 0.25
    return jnp.float32(noise * rng.normal(size=SHAPE) + strength * left @ right.T)


def land_on(optimizer, kernels, wrap=lambda f: f):
    """States after steps that would take a kernel to each of these, were it not pruned."""
    update, params = wrap(optimizer.update), {"kernel": jnp.zeros(SHAPE)}
    state, states, landed = optimizer.init(params), [], []
    for kernel in kernels:
        updates, state = update({"kernel": kernel - params["kernel"]}, state, params)
        states.append(state)
        landed.append(optax.apply_updates(params, updates)["kernel"])
    return states, landed


def train(optimizer, kernel, steps, drift):
    """States while a kernel is pruned and `drift(step, kernel)` moves it between prunings."""
    update, params = optimizer.update, {"kernel": kernel}
    state, states = optimizer.init(params), []
    for step in range(steps):
        updates, state = update({"kernel": drift(step, params["kernel"])}, state, params)
        params = optax.apply_updates(params, updates)
        states.append(state)
    return states, params["kernel"]


def wiggle(step, kernel):
    """As the gradient of a small batch: of low rank, and far below the noise in size."""
    rng = np.random.default_rng(step)
    return jnp.float32(0.001 * rng.normal(size=(120, 4)) @ rng.normal(size=(4, 160)))


@pytest.mark.parametrize("noise", ["first", pytest.param("refit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("keep", [pytest.param(0.0, marks=pytest.mark.slow), 0.5, 0.8])
def test_a_truncated_spectrum_does_not_inflate_the_count(noise, keep):
    """The published code fits it as if it were whole (N9): the count jumps manyfold."""
    rule = ranks.bema(level=0.001)
    optimizer = prune_spectrum(1, keep=keep, noise=noise, rule=rule, max_removed=1.0)
    states, kernel = train(optimizer, planted(5), 8, wiggle)
    assert [int(state.signal["kernel"]) for state in states] == [5] * 8
    variances = [float(state.fits["kernel"].variance) for state in states]
    np.testing.assert_allclose(variances, 0.01, rtol=0.05)  # of 120 ranks, 2 % for one draw
    if keep == 0.5:
        naive = rmtjax.fit_bema(rmtjax.spectrum(kernel), level=0.001)
        assert naive.num_spikes > 25
        assert naive.variance < 0.008


@pytest.mark.slow
def test_a_refit_follows_the_scale_and_the_first_fit_does_not():
    shrink = lambda step, kernel: -0.1 * kernel  # as strong weight decay would
    variances = {}
    for noise in ("first", "refit"):
        optimizer = prune_spectrum(1, keep=0.8, noise=noise)
        states, _ = train(optimizer, planted(5), 6, shrink)
        variances[noise] = [float(state.fits["kernel"].variance) for state in states]
    assert len(set(variances["first"])) == 1
    # Each step takes a tenth of every entry.
    expected = variances["first"][0] * 0.81 ** np.arange(6)
    np.testing.assert_allclose(variances["refit"], expected, rtol=0.03)


@pytest.mark.slow
def test_a_refit_carries_what_it_cannot_fit():
    """With nothing kept below the threshold no rank is left in the window of the fit."""
    states = {
        noise: train(prune_spectrum(1, noise=noise), planted(5), 4, wiggle)[0]
        for noise in ("first", "refit")
    }
    for first, refit in zip(*states.values(), strict=True):
        for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(refit), strict=True):
            # To rounding: what is fitted once more is decomposed in another way.
            # The share that was removed is what is left of 1, in float32.
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settled", "counts", "first", "wrap"),
    [
        (None, [2, 4, 5, 5], 0, lambda f: f),
        (0.0, [2, 4, 5, 5, 5], 3, lambda f: f),
        (0.25, [2, 4, 5, 5], 2, lambda f: f),  # 4 to 5 is a fifth
        (0.25, [2, 4, 5, 5], 2, jax.jit),
        (0.1, [2, 4, 2, 4, 8], None, lambda f: f),
    ],
)
def test_a_kernel_is_pruned_when_its_count_has_settled(settled, counts, first, wrap):
    optimizer = prune_spectrum(1, settled=settled, max_removed=1.0, rule=ranks.bema(level=0.001))
    states, landed = land_on(optimizer, [planted(count) for count in counts], wrap)
    assert [int(state.signal["kernel"]) for state in states] == counts
    pruned = [int(state.ranks["kernel"]) < 120 for state in states]
    assert pruned == [first is not None and step >= first for step in range(len(counts))]
    for step, kernel in enumerate(landed):
        rank = counts[step] if pruned[step] else 120
        assert np.linalg.matrix_rank(kernel, tol=1e-3) == rank  # noise is above 0.01


@pytest.mark.slow
def test_a_settled_kernel_is_judged_by_the_noise_of_its_own_time():
    optimizer = prune_spectrum(1, settled=0.0, max_removed=1.0)
    states, _ = land_on(optimizer, [planted(2, noise=0.2), planted(4), planted(4)])
    assert states[0].fits["kernel"].threshold == 0
    assert states[1].fits["kernel"].threshold == 0
    np.testing.assert_allclose(states[2].fits["kernel"].variance, 0.01, rtol=0.05)


@pytest.mark.slow
def test_every_kernel_settles_in_its_own_time():
    optimizer = prune_spectrum(1, settled=0.0, max_removed=1.0, rule=ranks.bema(level=0.001))
    early, late = [3, 3, 3, 3], [1, 2, 4, 4]
    params = {"a": {"kernel": jnp.zeros(SHAPE)}, "b": {"kernel": jnp.zeros(SHAPE)}}
    state, seen = optimizer.init(params), []
    update = optimizer.update
    for one, other in zip(early, late, strict=True):
        updates = {"a": {"kernel": planted(one)}, "b": {"kernel": planted(other)}}
        _, state = update(updates, state, params)
        seen.append(tuple(int(state.ranks[path]) for path in ("a/kernel", "b/kernel")))
    assert seen == [(120, 120), (3, 120), (3, 120), (3, 4)]


@pytest.mark.slow
def test_what_a_kernel_was_cut_to_is_known_after_it_was_passed_over():
    """Or the next refit would take a truncated spectrum for a whole one."""
    optimizer = prune_spectrum(1, keep=0.5, noise="refit", rule=ranks.bema(level=0.001))
    rank = 5 + 57  # floor(0.5 * 115)

    def drift(step, kernel):
        return wiggle(step, kernel) if step != 2 else jnp.full(SHAPE, jnp.nan)

    params = {"kernel": planted(5)}
    update, state = optimizer.update, optimizer.init(params)
    for step in range(4):
        updates, state = update({"kernel": drift(step, None)}, state, params)
        assert int(state.ranks["kernel"]) == rank
        if step != 2:
            params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(state.fits["kernel"].variance, 0.01, rtol=0.05)


@pytest.mark.slow
def test_settled_may_be_injected():
    make = optax.inject_hyperparams(
        prune_spectrum, static_args=("noise", "min_size", "rule", "where", "axes")
    )
    optimizer = make(1, settled=0.25, rule=ranks.bema(level=0.001), max_removed=1.0)
    _, landed = land_on(optimizer, [planted(2), planted(4), planted(5)])
    assert [np.linalg.matrix_rank(kernel, tol=1e-3) for kernel in landed] == [120, 120, 5]


@pytest.mark.parametrize("noise", ["last", "", None])
def test_a_wrong_noise_is_an_error(noise):
    # The checks of types during tests come first, with a TypeError.
    with pytest.raises((ValueError, TypeError), match="noise"):
        prune_spectrum(1, noise=noise)


@pytest.mark.parametrize("settled", [-0.1, 1.0, 2.0, float("nan")])
def test_a_wrong_share_of_change_is_an_error(settled):
    with pytest.raises(ValueError, match=r"`settled` must be in \[0, 1\)"):
        prune_spectrum(1, settled=settled, max_removed=1.0)
