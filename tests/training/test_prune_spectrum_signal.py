"""`prune_spectrum` of large kernels, whose signal alone is searched: as with all directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.transform_checks import ATOL, planted, truncated

from rmtjax import prune_spectrum, ranks

# From a short side of 1,000 on a search may be cheaper; of this shape it finds up to 96 directions.
SHAPE, SIZE, BLOCK = (1000, 1008), 1000, 96


# Without `jit`, one program of the transform serves all tests with one rule.
@functools.cache
def regrown(num_spikes=3, **options):
    """Parameters a while after their first pruning, and the state of that."""
    params = {"kernel": planted(shape=SHAPE, num_spikes=num_spikes)}
    optimizer = prune_spectrum(2, max_removed=1.0, **options)
    still, state = optax.tree.zeros_like(params), optimizer.init(params)
    for _ in range(3):  # the last one sees that the cut has landed
        updates, state = optimizer.update(still, state, params)
        params = optax.apply_updates(params, updates)
    noise = jnp.asarray(0.01 * np.random.default_rng(2).normal(size=SHAPE), jnp.float32)
    return optimizer, params["kernel"] + noise, state


def step(optimizer, kernel, state):
    params = {"kernel": kernel}
    updates, state = optimizer.update(optax.tree.zeros_like(params), state, params)
    return kernel + updates["kernel"], state


@pytest.mark.parametrize(
    "rule", [pytest.param(ranks.bema(), marks=pytest.mark.slow), ranks.gavish_donoho()], ids=repr
)
def test_the_signal_alone_is_enough(rule, monkeypatch):
    optimizer, kernel, state = regrown(rule=rule)
    lost = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False) ** 2
    # Where all directions are found, their spectrum is fitted. Without `jit` only the branch that
    # is taken calls `fit`.
    monkeypatch.setattr(type(rule), "fit", lambda *_: pytest.fail("all directions were found"))
    with jax.disable_jit():
        pruned, state = step(optimizer, kernel, state)
    np.testing.assert_allclose(pruned, truncated(kernel), atol=ATOL)
    assert int(state.ranks["kernel"]) == int(state.signal["kernel"]) == 3
    removed = float(state.removed["kernel"])
    np.testing.assert_allclose(removed, lost[3:].sum() / lost.sum(), rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"keep": 0.5}, marks=pytest.mark.slow),
        pytest.param({"min_rank": 7}, marks=pytest.mark.slow),
        pytest.param({"noise": "refit"}, marks=pytest.mark.slow),
        {"rule": ranks.fixed(3)},
    ],
    ids=repr,
)
def test_where_more_is_needed_all_directions_are_found(options):
    optimizer, kernel, state = regrown(**options)
    pruned, state = step(optimizer, kernel, state)
    rank, signal = int(state.ranks["kernel"]), int(state.signal["kernel"])
    expected = max(signal + int(options.get("keep", 0) * (SIZE - signal)), 3)
    assert rank == max(expected, options.get("min_rank", 1))
    np.testing.assert_allclose(pruned, truncated(kernel, rank), atol=ATOL)


@pytest.mark.parametrize(
    "num_spikes", [*(pytest.param(n, marks=pytest.mark.slow) for n in (BLOCK - 1, 150)), BLOCK]
)
@pytest.mark.slow
def test_more_signal_than_the_block_has_is_found_all_the_same(num_spikes):
    optimizer, kernel, state = regrown(num_spikes)
    pruned, state = step(optimizer, kernel, state)
    assert int(state.ranks["kernel"]) == num_spikes
    np.testing.assert_allclose(pruned, truncated(kernel, num_spikes), atol=3 * ATOL)


def test_a_kernel_whose_signal_is_gone_is_left_alone():
    optimizer, _, state = regrown()
    noise = 1e-3 * jax.random.normal(jax.random.key(0), SHAPE)
    kernel, later = step(optimizer, noise, state)
    assert (np.asarray(kernel) == np.asarray(noise)).all()
    assert int(later.signal["kernel"]) == 0
    assert int(later.ranks["kernel"]) == 3


def test_what_is_not_finite_is_left_alone():
    optimizer, kernel, state = regrown()
    broken = kernel.at[3, 4].set(jnp.inf)
    landed, later = step(optimizer, broken, state)
    assert (np.asarray(landed) == np.asarray(broken)).all()
    assert int(later.ranks["kernel"]) == 3


@pytest.mark.slow
def test_derivatives_are_those_of_a_truncation():
    """But for a part that is smaller by (bulk / signal)^2, here (0.63 / 13)^2 at most."""
    optimizer, kernel, state = regrown()

    def landed(update):
        updates, _ = optimizer.update({"kernel": update}, state, {"kernel": kernel})
        return kernel + updates["kernel"]

    direction, cotangent = np.random.default_rng(3).normal(size=(2, *SHAPE))
    _, pull = jax.vjp(landed, jnp.zeros(SHAPE))
    slope = np.sum(np.asarray(pull(jnp.asarray(cotangent, jnp.float32))[0], float) * direction)
    wide = np.asarray(kernel, np.float64)
    ahead, behind = (truncated(wide + step * direction) for step in (1e-5, -1e-5))
    np.testing.assert_allclose(slope, np.sum(cotangent * (ahead - behind)) / 2e-5, rtol=2e-3)


@pytest.mark.slow
def test_a_rule_of_ones_own_sees_the_whole_spectrum():
    class Half(ranks.bema):
        def __call__(self, spectrum, fit=None):
            return jnp.asarray(spectrum.eigenvalues.shape[-1] // 2, jnp.int32)

    optimizer, kernel, state = regrown(rule=Half())
    assert int(step(optimizer, kernel, state)[1].ranks["kernel"]) == SIZE // 2


def test_nothing_is_removed_where_all_is_kept():
    optimizer, kernel, state = regrown(keep=1.0)
    landed, state = step(optimizer, kernel, state)
    assert (np.asarray(landed) == np.asarray(kernel)).all()
    assert float(state.removed["kernel"]) == 0
