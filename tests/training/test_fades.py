"""`prune_spectrum` with `fade`: what is beyond the rank gets smaller, if the loss allows it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.guarded_steps import (
    CHEAP_B,
    EQUAL,
    gain,
    loss_with,
    PARAMS,
    passes_of,
    PATHS,
    SIZE,
    squares,
)
from helpers.transform_checks import assert_same_bits, ATOL, planted, prune_once

import rmtjax
from rmtjax import prune_spectrum, ranks
from rmtjax._axes import MatrixView
from rmtjax.training import _fades, _guard
from rmtjax.training._cuts import Stacks
from rmtjax.training._prune_state import unpruned

RULE = ranks.fixed(40)
STATIC = ("rule", "min_size", "where", "axes", "max_rise")
WHOLE: Any = {"max_removed": 1.0}  # what is asked for without a loss is done


def faded(kernel, fade, rank=40):
    """The reference, in float64."""
    u, s, vt = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    return u * np.where(np.arange(s.shape[-1]) < rank, s, fade * s)[..., None, :] @ vt


def beyond(path):
    """The squares beyond the rank, and their share: above the one at which the rest goes."""
    tail = squares(path)[40:].sum()
    assert tail / squares(path).sum() > _fades._WEAK
    return tail, tail / squares(path).sum()


# One program for most tests: the weights of the loss are traced.
@jax.jit
def update(updates, state, params, weights):
    optimizer = prune_spectrum(1, rule=RULE, fade=0.6)
    return optimizer.update(updates, state, params, value_fn=loss_with(weights))


def squares_of(group):
    """The squares of a kernel beyond the rank."""
    return np.square(np.linalg.svd(group["kernel"], compute_uv=False)[40:]).sum().item()


def step(weights, fall, params=PARAMS, **known_before):
    """What a pruning step lands on, and its state, after periods in which the loss fell."""
    zeros, state = jax.tree.map(jnp.zeros_like, params), prune_spectrum(1, fade=0.6).init(params)
    # Gradients that weigh all directions alike: a cut is then that of the squares.
    known = jax.tree.map(lambda side: side + jnp.eye(side.shape[-1])[None], state.curvatures)
    state = state._replace(fall=jnp.float32(fall), curvatures=known, **known_before)
    updates, state = update(zeros, state, params, weights)
    return optax.apply_updates(params, updates), state


def plan_of(params, state, **options):
    return rmtjax.plan(params, rule=RULE, fits=rmtjax.noise_levels(state), multiple=1, **options)


@pytest.mark.parametrize("fade", [0.0, 0.6])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_beyond_the_rank_fades_and_the_state_does_not_claim_a_rank(fade, dtype):
    kernel = planted().astype(dtype)
    params, state = prune_once({"kernel": kernel}, rule=RULE, fade=fade, **WHOLE)
    expected = faded(kernel.astype(jnp.float32), fade)
    # What lands is rounded, to 2^-8 of the largest entry, about 2, in bfloat16.
    atol = ATOL if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(params["kernel"].astype(jnp.float32), expected, atol=atol)
    assert params["kernel"].dtype == dtype
    found, s = rmtjax.metrics(state), np.linalg.svd(np.float64(kernel), compute_uv=False)
    share = np.square(s[40:]).sum() / np.square(s).sum()
    assert found["rank/kernel"] == SIZE
    np.testing.assert_allclose(found["removed/kernel"], (1 - fade**2) * share, rtol=1e-4)
    # A difference of two shares in float32.
    np.testing.assert_allclose(found["refused/kernel"], fade**2 * share, rtol=1e-3, atol=1e-6)
    assert plan_of(params, state)["kernel"].rank == 40


@pytest.mark.slow
def test_a_stack_fades_by_one_rank():
    stack = jnp.stack([planted(0), planted(1, num_spikes=6)])
    axes = {"kernel": rmtjax.KernelAxes((1,), (2,), (0,))}
    params, state = prune_once({"kernel": stack}, axes=axes, fade=0.5, **WHOLE)
    expected = [faded(kernel, 0.5, rank=6) for kernel in stack]
    np.testing.assert_allclose(params["kernel"], expected, atol=ATOL)
    # Of a rule with a noise level the first fade takes it, and a plan counts by it.
    plan = rmtjax.plan(params, axes=axes, fits=rmtjax.noise_levels(state), multiple=1)
    assert plan["kernel"].rank == 6


@pytest.mark.parametrize(
    ("weights", "share", "names"), [(EQUAL, 1.1, "ab"), (CHEAP_B, 1.9, "b"), (EQUAL, 0.9, "")]
)
def test_kernels_fade_whose_cuts_cost_less_than_their_share_of_the_gain(weights, share, names):
    cost = {path: weights[path[0]] * beyond(path)[0] for path in PATHS}
    # Both have as many entries: each may cost half. All together would be allowed in the second.
    fall = share * sum(cost.values()) / _fades._PERIODS
    assert fall < _guard.RIPE * gain(weights)
    params, state = step(weights, fall)
    found, plan = rmtjax.metrics(state), plan_of(params, state)
    np.testing.assert_allclose(state.fall, fall, rtol=1e-6)
    for path in PATHS:
        goes, landed, whole = path[0] in names, *(t[path[0]]["kernel"] for t in (params, PARAMS))
        np.testing.assert_allclose(landed, faded(whole, 0.6) if goes else whole, atol=2 * ATOL)
        np.testing.assert_allclose(found[f"cost/{path}"], cost[path], rtol=1e-3)
        left = beyond(path)[1] * (0.36 if goes else 1)
        np.testing.assert_allclose(found[f"refused/{path}"], left, rtol=1e-3)
        reason = plan[path].reason
        assert (reason.startswith("kept: pruning left it alone while training")) is not goes, reason
    if not names:
        assert_same_bits(params, PARAMS)


def test_a_kernel_that_was_too_dear_does_not_fade_when_the_loss_allows_it_later():
    cost, before = beyond("a/kernel")[0], prune_spectrum(1, fade=0.6).init(PARAMS).reasons
    _, state = step(CHEAP_B, cost / _fades._PERIODS)
    assert {path: int(reason) for path, reason in state.reasons.items()} == dict(
        zip(PATHS, (6, 0), strict=True)
    )
    for reasons, fades in ((state.reasons, False), (before, True)):
        landed, _ = step(CHEAP_B, 2.2 * cost / _fades._PERIODS, reasons=reasons)
        assert (squares_of(landed["a"]) < 0.9 * squares_of(PARAMS["a"])) is fades


def test_what_is_weak_goes_at_once():
    weak = {name: faded(PARAMS[name]["kernel"], 0.3).astype(np.float32) for name in "ab"}
    params = {name: {"kernel": jnp.asarray(kernel)} for name, kernel in weak.items()}
    cost = sum(beyond(path)[0] for path in PATHS)
    landed, state = step(EQUAL, cost, params | {"bias": PARAMS["bias"]})
    for name in "ab":
        s = np.linalg.svd(landed[name]["kernel"], compute_uv=False)
        assert s[40:].max() < 1e-5 * s[0]  # some eps of float32
    assert set(map(float, state.refused.values())) == {0}


def test_a_network_that_learns_fast_does_not_fade():
    # Half of it, with a period of none.
    params, state = step(EQUAL, 2.1 * _guard.RIPE * gain(EQUAL))
    assert_same_bits(params, PARAMS)
    assert set(map(float, state.floors.values())) == {-1}
    assert set(map(int, state.reasons.values())) == {5}


@pytest.mark.parametrize("shape", [(2, 8, 6), (2, 6, 8)], ids=["tall", "wide"])
def test_a_cut_removes_what_the_gradients_feel_least(shape):
    rng = np.random.default_rng(0)
    kernel, gradients = rng.normal(size=shape), rng.normal(size=(30, *shape))
    gradients *= np.linspace(0.1, 3, shape[1])[:, None]
    axes = rmtjax.KernelAxes((1,), (2,), (0,))
    view = MatrixView("", jnp.asarray(kernel, jnp.float32), axes)
    move, known = (jnp.zeros(shape), unpruned(view)), _fades.no_curvature(view)
    stacks = Stacks([view], [move], [move])
    for gradient in gradients:
        (known,) = _fades.gathered(stacks, [known], [jnp.asarray(gradient, jnp.float32)])
    (end,) = stacks.kernels(_fades.ends_of(stacks, [known], [jnp.int32(3)]))
    for i in range(2):
        rows, columns = (np.zeros((side, side)) for side in shape[1:])
        for gradient in gradients:
            new = gradient[i] @ gradient[i].T, gradient[i].T @ gradient[i]
            scale = max(np.square(g).sum() for g in gradient)  # of the stack
            rows, columns = (
                0.9 * old + n / scale for old, n in zip((rows, columns), new, strict=True)
            )
        left, right = (_root(side) for side in (rows, columns))
        best = np.linalg.inv(left) @ faded(left @ kernel[i] @ right, 0, 3) @ np.linalg.inv(right)
        np.testing.assert_allclose(end[i], best, atol=1e-4)  # roots in float32


def _root(side):
    values, vectors = np.linalg.eigh(side)
    return vectors * (values / values.mean() + _fades._DAMPING) ** 0.5 @ vectors.T


def test_a_step_takes_at_most_fifteen_passes_and_is_compiled_once():
    counts, programs = passes_of(prune_spectrum(1, start=2, rule=RULE, fade=0.6))
    # Before the first pruning step, once a period. One has a gradient, and counts as three.
    assert counts[0] == 4
    # Then two with a gradient.
    assert 3 < counts[1] + 4 <= 15
    assert programs == 1


def test_a_schedule_of_the_fade_is_injected_and_scanned():
    factory = optax.inject_hyperparams(prune_spectrum, static_args=STATIC)
    optimizer = factory(1, rule=RULE, fade=optax.linear_schedule(0.8, 0.4, 2), **WHOLE)
    params = {"kernel": planted()}

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(optax.tree.zeros_like(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (landed, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=3)
    expected = faded(params["kernel"], 0.8 * 0.6 * 0.4)
    np.testing.assert_allclose(landed["kernel"], expected, atol=ATOL)


def test_a_fade_that_is_undone_is_forgotten():
    zeros = {"kernel": jnp.zeros_like(planted())}
    optimizer = prune_spectrum(1, rule=RULE, fade=0.6, **WHOLE)
    step = jax.jit(optimizer.update)
    updates, state = step(zeros, optimizer.init({"kernel": planted()}), {"kernel": planted()})
    landed = optax.apply_updates({"kernel": planted()}, updates)
    assert rmtjax.metrics(step(zeros, state, landed)[1])["landed/kernel"]
    assert not rmtjax.metrics(step(zeros, state, {"kernel": planted()})[1])["landed/kernel"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fade": 1.0}, r"`fade` must be in \[0, 1\), got 1.0"),
        ({"fade": -0.1}, r"`fade` must be in \[0, 1\), got -0.1"),
        ({"fade": 0.5, "noise": "refit"}, '`noise` must be "first" with `fade`'),
    ],
)
def test_a_fade_out_of_range_or_with_a_fit_of_what_fades_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        prune_spectrum(1, **options)
