"""`prune_spectrum` of large kernels, whose signal alone is found: as with all directions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.transform_checks import ATOL, planted, truncated

from rmtjax import prune_spectrum, ranks
from rmtjax.noise import kept_rank
from rmtjax.spectra import _gram, _subspace_iteration

SHAPE = (320, 300)


@pytest.fixture(autouse=True)
def small_kernels_too(monkeypatch):
    """Kernels of 300 are iterated as those of 1,000 are, whose references take seconds."""
    monkeypatch.setattr(_subspace_iteration, "_MIN_SIDE", 256)
    jax.clear_caches()  # the programs of other tests have the true limit in them
    yield
    jax.clear_caches()


def regrown(num_spikes=3, growth=0.01, **options):
    """Parameters a while after their first pruning, and the state of that."""
    params = {"kernel": planted(shape=SHAPE, num_spikes=num_spikes)}
    optimizer = prune_spectrum(1, **options)
    still = optax.tree.zeros_like(params)
    updates, state = jax.jit(optimizer.update)(still, optimizer.init(params), params)
    rng = np.random.default_rng(2)
    noise = jnp.asarray(growth * rng.normal(size=SHAPE), jnp.float32)
    return optimizer, optax.apply_updates(params, {"kernel": updates["kernel"] + noise}), state


def step(optimizer, params, state):
    updates, state = jax.jit(optimizer.update)(optax.tree.zeros_like(params), state, params)
    return optax.apply_updates(params, updates)["kernel"], state


def break_all_directions(monkeypatch):
    """What looks at all directions of a kernel has NaN from now on."""
    broken = lambda matrix: jax.tree.map(lambda a: a * jnp.nan, by_squares(matrix))
    by_squares = _gram._by_squares
    monkeypatch.setattr(_gram, "_by_squares", broken)


@pytest.mark.parametrize("rule", [ranks.bema(), ranks.gavish_donoho()], ids=repr)
def test_the_signal_alone_is_enough(rule, monkeypatch):
    optimizer, params, state = regrown(rule=rule)
    lost = np.linalg.svd(np.asarray(params["kernel"], np.float64), compute_uv=False) ** 2
    break_all_directions(monkeypatch)
    pruned, state = step(optimizer, params, state)
    np.testing.assert_allclose(pruned, truncated(params["kernel"]), atol=ATOL)
    assert int(state.ranks["kernel"]) == int(state.signal["kernel"]) == 3
    removed = float(state.removed["kernel"])
    np.testing.assert_allclose(removed, lost[3:].sum() / lost.sum(), rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"keep": 0.5}, {"min_rank": 7}, {"noise": "refit"}, {"rule": ranks.fixed(3)}],
    ids=repr,
)
def test_where_more_is_needed_all_directions_are_found(options):
    optimizer, params, state = regrown(**options)
    pruned, state = step(optimizer, params, state)
    rank, signal = int(state.ranks["kernel"]), int(state.signal["kernel"])
    kept = {name: options[name] for name in options if name in ("keep", "min_rank")}
    assert rank == int(kept_rank(signal, 300, **kept)) >= 3
    np.testing.assert_allclose(pruned, truncated(params["kernel"], rank), atol=ATOL)


@pytest.mark.parametrize("num_spikes", [23, 24, 40])
def test_more_signal_than_the_block_has_is_found_all_the_same(num_spikes):
    optimizer, params, state = regrown(num_spikes)
    pruned, state = step(optimizer, params, state)
    assert int(state.ranks["kernel"]) == num_spikes
    np.testing.assert_allclose(pruned, truncated(params["kernel"], num_spikes), atol=3 * ATOL)


def test_a_kernel_whose_signal_is_gone_is_left_alone():
    optimizer, _, state = regrown()
    noise = {"kernel": 1e-3 * jax.random.normal(jax.random.key(0), SHAPE)}
    kernel, found = step(optimizer, noise, state)
    assert (np.asarray(kernel) == np.asarray(noise["kernel"])).all()
    assert int(found.signal["kernel"]) == 0
    assert int(found.ranks["kernel"]) == 3


def test_what_is_not_finite_is_left_alone():
    optimizer, params, state = regrown()
    params["kernel"] = params["kernel"].at[3, 4].set(jnp.inf)
    kernel, found = step(optimizer, params, state)
    assert (np.asarray(kernel) == np.asarray(params["kernel"])).all()
    assert int(found.ranks["kernel"]) == 3


def test_derivatives_are_those_of_a_truncation():
    """But for a part that is smaller by (bulk / signal)^2, here (0.35 / 7)^2 at most."""
    optimizer, params, state = regrown()

    def landed(update):
        updates, _ = optimizer.update({"kernel": update}, state, params)
        return params["kernel"] + updates["kernel"]

    rng = np.random.default_rng(3)
    direction, cotangent = rng.normal(size=(2, *SHAPE))
    _, pull = jax.vjp(landed, jnp.zeros(SHAPE))
    found = np.sum(np.asarray(pull(jnp.asarray(cotangent, jnp.float32))[0], float) * direction)
    kernel = np.asarray(params["kernel"], np.float64)
    ahead, behind = (truncated(kernel + step * direction) for step in (1e-5, -1e-5))
    np.testing.assert_allclose(found, np.sum(cotangent * (ahead - behind)) / 2e-5, rtol=2e-3)


def test_a_rule_of_ones_own_sees_the_whole_spectrum():
    class Half(ranks.bema):
        def __call__(self, spectrum, fit=None):
            return jnp.asarray(spectrum.eigenvalues.shape[-1] // 2, jnp.int32)

    optimizer, params, state = regrown(rule=Half())
    assert int(step(optimizer, params, state)[1].ranks["kernel"]) == 150


def test_nothing_is_removed_where_all_is_kept():
    optimizer, params, state = regrown(keep=1.0)
    kernel, state = step(optimizer, params, state)
    assert (np.asarray(kernel) == np.asarray(params["kernel"])).all()
    assert float(state.removed["kernel"]) == 0
