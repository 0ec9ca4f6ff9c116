"""`prune_spectrum` never takes drifting noise for signal, and takes the noise of the first cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import ranks

SHAPE, LOOKS, LEVEL = (60, 90), 40, 0.01
prune_spectrum = functools.partial(rmtjax.prune_spectrum, 1, max_removed=1.0)
noise = lambda seed, shape=SHAPE: jax.random.normal(jax.random.key(seed), shape)


def grows(look, kernel, new):
    return kernel + 0.15 * new


def rotates(look, kernel, new):
    return jnp.cos(0.3) * kernel + jnp.sin(0.3) * new


def decays(look, kernel, new):
    return 0.9 * kernel + 0.1 * new


def grows_rows_first(look, kernel, new):
    started = jnp.arange(SHAPE[0]) < SHAPE[0] * (look + 1) / LOOKS
    return kernel + 0.15 * started[:, None] * new


def is_drawn_again_with_unequal_scales(look, kernel, new):
    scales = jnp.outer(jnp.linspace(0.5, 1.5, SHAPE[0]), jnp.linspace(1.2, 0.8, SHAPE[1]))
    return scales * new


DRIFTS = [grows, rotates, decays, grows_rows_first, is_drawn_again_with_unequal_scales]


@jax.jit
def is_cut(seeds, kind):
    """For each seed, whether a kernel of pure noise is cut while it drifts, one of five ways."""
    optimizer = prune_spectrum(rule=ranks.bema(level=LEVEL))

    def of_seed(seed):
        def step(carry, look):
            params, state = carry
            new = jax.random.normal(jax.random.fold_in(jax.random.key(seed), look), SHAPE)
            moved = jax.lax.switch(kind, DRIFTS, look, params["kernel"], new)
            update = {"kernel": moved - params["kernel"]}
            update, state = optimizer.update(update, state, params)
            return (jax.tree.map(jnp.add, params, update), state), None

        params = {"kernel": noise(seed)}
        (_, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(LOOKS))
        return state.ranks["kernel"] < min(SHAPE)

    return jax.lax.map(of_seed, seeds)


@pytest.mark.slow
@pytest.mark.parametrize("drift", DRIFTS)
def test_noise_that_drifts_is_cut_no_more_often_than_the_level_says(drift):
    kernels = 100
    cut = is_cut(jnp.arange(kernels), DRIFTS.index(drift))
    assert cut.mean() <= LEVEL + 3 * np.sqrt(LEVEL * (1 - LEVEL) / kernels)


def land_on(optimizer, kernels):
    """States after steps that would take a kernel to each of these, were it not cut."""
    params = {"kernel": jnp.zeros(kernels[0].shape)}
    state, states = optimizer.init(params), []
    for kernel in kernels:
        updates, state = optimizer.update({"kernel": kernel - params["kernel"]}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        states.append(state)
    return states


def spiked(seed, scale=1.0, strength=3.0):
    """Noise of a scale, with one direction spread over all entries."""
    left, right = (noise(seed + i, (size,)) for i, size in enumerate(SHAPE, 1))
    return scale * (noise(seed) + strength * jnp.outer(left, right) / 60**0.5)


@pytest.mark.slow
def test_the_noise_is_that_of_the_first_cut():
    kernels = [noise(0), 2 * noise(1), spiked(2, scale=3.0), 5 * noise(3)]
    states = land_on(prune_spectrum(), kernels)
    fits = [state.fits["kernel"] for state in states]
    assert [float(fit.threshold) > 0 for fit in fits] == [False, False, True, True]
    fresh = rmtjax.fit_bema(rmtjax.spectrum(kernels[2]))
    for carried in fits[2:]:
        np.testing.assert_allclose(carried.threshold, fresh.threshold, rtol=1e-4)
        np.testing.assert_allclose(carried.variance, 9, rtol=0.1)  # 60 x 90 draws of one level


WEAK = 1.1  # between the thresholds of the first look and the fortieth
LOCAL = {
    "spread": spiked(0),
    "mean": noise(0) + 1.0,
    "column": noise(0).at[:, 0].add(5.0),
    "row": noise(0).at[3].add(5.0),
    "block": noise(0).at[:8, :9].add(4.0),
    "entry": noise(0).at[2, 3].add(40.0),
}


@pytest.mark.parametrize("kernel", LOCAL.values(), ids=LOCAL)
@pytest.mark.parametrize("turned", [False, True])
def test_signal_is_found_at_the_first_look_wherever_it_lies(kernel, turned):
    (state,) = land_on(prune_spectrum(), [kernel.T if turned else kernel])
    assert int(state.ranks["kernel"]) == int(state.signal["kernel"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rule", [ranks.bema(), ranks.gavish_donoho()])
def test_noise_whose_rows_differ_in_scale_has_no_signal(rule):
    scales = jnp.linspace(0.75, 1.25, 240)[:, None]
    kernel = scales * noise(0, (240, 360))
    # The law alone finds some, and accepts the fit.
    assert int(ranks.bema()(rmtjax.spectrum(kernel))) > 0
    (state,) = land_on(prune_spectrum(rule=rule), [kernel])
    assert int(state.ranks["kernel"]) == 240


def test_the_level_is_spread_over_the_looks():
    """What stands out by little at the first look does not stand out at the fortieth."""
    weak = spiked(0, strength=WEAK)
    first = land_on(prune_spectrum(), [weak])[-1]
    last = land_on(prune_spectrum(), [noise(seed) for seed in range(1, 40)] + [weak])[-1]
    assert int(first.signal["kernel"]) == int(last.signal["kernel"]) == 1
    assert (int(first.ranks["kernel"]), int(last.ranks["kernel"])) == (1, 60)


def test_looks_are_counted_from_the_start():
    weak = spiked(0, strength=WEAK)
    late = prune_spectrum(start=40)
    state = land_on(late, [noise(seed) for seed in range(1, 40)] + [weak])[-1]
    assert int(state.ranks["kernel"]) == 1


@pytest.mark.slow
def test_the_level_is_that_of_the_whole_stack():
    weak = spiked(0, strength=WEAK)
    stack = jnp.stack([weak, *(noise(seed) for seed in range(1, 20))])
    axes = lambda path, leaf: rmtjax.KernelAxes((1,), (2,), (0,))
    (state,) = land_on(prune_spectrum(axes=axes), [stack])
    assert int(state.signal["kernel"]) == 1
    assert int(state.ranks["kernel"]) == 60


@pytest.mark.parametrize(("most", "rank"), [(0.4, 60), (0.6, 1)])
def test_a_cut_that_would_take_too_much_is_refused_and_told(most, rank):
    kernel = spiked(0, strength=7.0)
    squares = np.linalg.svd(kernel, compute_uv=False) ** 2
    share = 1 - squares[0] / squares.sum()
    (state,) = land_on(prune_spectrum(max_removed=most), [kernel])
    found = rmtjax.metrics(state)
    assert int(found["rank/kernel"]) == rank
    refused, made = (0.0, share) if rank == 1 else (share, 0.0)
    np.testing.assert_allclose(found["refused/kernel"], refused, rtol=1e-4)
    np.testing.assert_allclose(found["removed/kernel"], made, rtol=1e-4)
    # A kernel that is left alone carries no noise level, and is tried again.
    assert (found["threshold/kernel"] == 0) == (rank == 60)


def test_a_kernel_that_was_cut_is_guarded_too():
    kernels = [spiked(0, strength=7.0), spiked(0, strength=4.0)]
    states = land_on(prune_spectrum(max_removed=0.6), kernels)
    assert [int(state.ranks["kernel"]) for state in states] == [1, 1]
    assert float(states[1].refused["kernel"]) > 0.6 > float(states[1].removed["kernel"])
    np.testing.assert_array_equal(states[1].fits["kernel"], states[0].fits["kernel"])


@pytest.mark.parametrize("way", [lambda update: update, jax.jit], ids=["eager", "jit"])
def test_cuts_by_degrees_take_no_more_in_all_than_one_may(way):
    """A schedule of `keep` ends where the next rank would be too low; a plan stops there too."""
    kernel = spiked(0, strength=7.0)
    squares = np.linalg.svd(np.asarray(kernel, float), compute_uv=False) ** 2
    optimizer = prune_spectrum(keep=lambda step: 1 - 0.1 * (step + 1), max_removed=0.25)
    update, params = way(optimizer.update), {"kernel": kernel}
    state, zeros = optimizer.init(params), {"kernel": jnp.zeros(SHAPE)}
    for _ in range(8):
        updates, state = update(zeros, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    found = rmtjax.metrics(state)
    rank = int(found["rank/kernel"])
    ranks_asked = [1 + int((1 - 0.1 * (step + 1)) * 59 + 1e-4) for step in range(8)]
    shares = [1 - squares[:one].sum() / squares.sum() for one in ranks_asked]
    wanted = min(one for one, share in zip(ranks_asked, shares, strict=True) if share <= 0.25)
    assert rank == wanted > ranks_asked[-1]
    taken = 1 - squares[:rank].sum() / squares.sum()
    np.testing.assert_allclose(found["taken/kernel"], taken, rtol=1e-4)
    np.testing.assert_allclose(1 - jnp.sum(params["kernel"] ** 2) / squares.sum(), taken, rtol=1e-4)
    assert float(found["refused/kernel"]) > 0
    plan = rmtjax.plan(params, fits=rmtjax.noise_levels(state), multiple=1)
    assert plan["kernel"].rank == rank


def test_what_training_adds_after_a_cut_may_go_each_time():
    """It is not counted: a kernel keeps its rank however often it is cut."""
    kernel = spiked(0, strength=7.0)
    states = land_on(
        prune_spectrum(max_removed=0.6), [kernel] + [0.6 * kernel + 0.2 * noise(1)] * 4
    )
    assert [int(state.ranks["kernel"]) for state in states] == [1] * 5
    assert sum(float(state.removed["kernel"]) for state in states) > 1
    np.testing.assert_allclose(
        [float(state.taken["kernel"]) for state in states], states[0].removed["kernel"], rtol=1e-5
    )


def test_a_wrong_share_is_refused():
    with pytest.raises(ValueError, match=r"`max_removed` must be in \[0, 1\], got 1.5"):
        prune_spectrum(max_removed=1.5)


@pytest.mark.parametrize(
    "rule", [ranks.bema(), pytest.param(ranks.gavish_donoho(), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("strength", [pytest.param(30.0, marks=pytest.mark.slow), 60.0])
def test_many_directions_of_one_strength_are_signal(rule, strength):
    """They hold most of the squares, which must not be taken for the variance of the noise."""
    left, right = (jnp.linalg.qr(noise(seed, (80, 80)))[0][:, :20] for seed in (1, 2))
    kernel = noise(0, (80, 80)) + strength * left @ right.T
    (state,) = land_on(prune_spectrum(rule=rule), [kernel])
    assert int(state.ranks["kernel"]) == 20
