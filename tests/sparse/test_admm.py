"""ADMM against its formulas in float64, on problems whose answer is known."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.virtual_devices import EXPLICIT, run_on_devices

import rmtjax
from rmtjax import admm, projections

TERNARY = functools.partial(projections.project_bits, bits=2)
RNG = np.random.default_rng(0)
WANTED = {name: jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32) for name in "ab"}
START = {name: {"kernel": 0.5 * leaf + 0.1, "bias": jnp.ones(4)} for name, leaf in WANTED.items()}
STATIC = ("projection", "where", "axes")


def gradients_of(params):
    """Of half the squared distance from what is wanted."""
    gradient = lambda name: {
        "kernel": params[name]["kernel"] - WANTED[name],
        "bias": params[name]["bias"],
    }
    return {name: gradient(name) for name in params}


def run(optimizer, num_steps, wrap=lambda step: step):
    """Parameters and states after each step; the state before the first comes first."""

    @wrap
    def step(params, state):
        updates, state = optimizer.update(gradients_of(params), state, params)
        return optax.apply_updates(params, updates), state

    history = [(START, optimizer.init(START))]
    for _ in range(num_steps):
        history.append(step(*history[-1]))
    return history


def reference(kernel, wanted, project, rho, every, start, rate, num_steps):
    """The loop of the method in float64: kernel, target and multipliers after each step."""
    w, target, multiplier = np.asarray(kernel, np.float64), None, 0.0
    for step in range(1, num_steps + 1):
        if step >= start and (step - start) % every == 0:
            old, target = target, project(w + multiplier / rho(step - 1))
            if old is not None:
                multiplier = multiplier + rho(step - 1) * (w - target)
        gradient = w - np.asarray(wanted, np.float64)
        if target is not None:
            gradient = gradient + multiplier + rho(step - 1) * (w - target)
        w = w - rate * gradient
    return w, target, multiplier


def rank_one(matrix):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :1] * s[:1] @ vt[:1]


@pytest.mark.parametrize(
    ("wrap", "start", "rho"),
    [(lambda f: f, 1, 0.7), (jax.jit, 4, lambda step: 0.5 + 0.02 * step)],
    ids=["eager", "jit, schedule"],
)
def test_the_loop_is_that_of_the_method(wrap, start, rho):
    project = functools.partial(projections.project_rank, rule=rmtjax.ranks.fixed(1))
    optimizer = optax.chain(admm(project, rho=rho, every=3, start=start), optax.sgd(0.2))
    params, (state, *_) = run(optimizer, 20, wrap)[20]
    schedule = rho if callable(rho) else lambda step: rho
    for name in "ab":
        w, target, multiplier = reference(
            START[name]["kernel"], WANTED[name], rank_one, schedule, 3, start, 0.2, 20
        )
        # Twenty steps of float32, in which errors do not grow.
        np.testing.assert_allclose(params[name]["kernel"], w, atol=2e-5)
        np.testing.assert_allclose(state.targets[f"{name}/kernel"], target, atol=2e-5)
        np.testing.assert_allclose(state.multipliers[f"{name}/kernel"], multiplier, atol=2e-5)
        np.testing.assert_allclose(params[name]["bias"], 0.8**20, rtol=1e-5)


def test_with_a_convex_set_it_ends_at_the_nearest_point_of_it():
    half = jnp.asarray(0.25)
    box = lambda matrix: jnp.clip(matrix, -half, half)
    optimizer = optax.chain(admm(box, rho=1.0, every=10), optax.sgd(0.2))
    params, (state, *_) = run(optimizer, 300, jax.jit)[300]
    for name in "ab":
        # The distance of a convex problem shrinks by a constant factor: 1e-4 is far above its end.
        np.testing.assert_allclose(
            params[name]["kernel"], np.clip(WANTED[name], -0.25, 0.25), atol=1e-4
        )
        assert state.primal[f"{name}/kernel"] < 1e-4
        assert state.dual[f"{name}/kernel"] < 1e-4


def test_few_bits_are_nearly_reached_and_cost_less_than_rounding_after_training():
    # The loss has correlated inputs, so that the nearest point of the grid is not the best one.
    rng = np.random.default_rng(1)
    inputs = jnp.asarray(rng.normal(size=(64, 12)) @ rng.normal(size=(12, 12)), jnp.float32)
    wanted = jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)
    loss = lambda params: jnp.mean((inputs @ (params["kernel"] - wanted)) ** 2)
    # The largest curvature of the loss, and that of the constraint.
    rate = 1 / (float(jnp.linalg.eigvalsh(inputs.T @ inputs / 256)[-1]) + 4.0)
    optimizer = optax.chain(admm(TERNARY, rho=4.0, every=20), optax.sgd(rate))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        start = params, optimizer.init(params)
        return jax.lax.scan(step, start, length=4000)[0]

    params, state = train({"kernel": wanted})
    hard = projections.project(params, TERNARY)
    assert state[0].primal["kernel"] < 0.2
    assert loss(hard) < 0.8 * loss(projections.project({"kernel": wanted}, TERNARY))


def test_metrics_tell_both_residuals_and_a_wrong_place_shows_in_them():
    right = optax.chain(admm(TERNARY, rho=4.0, every=5), optax.sgd(0.1))
    wrong = optax.chain(optax.sgd(0.1), admm(TERNARY, rho=0.1, every=5))
    grown = {}
    for name, optimizer in (("right", right), ("wrong", wrong)):
        history = run(optimizer, 41)
        found = [rmtjax.metrics(state)["primal/a/kernel"] for _, state in (history[6], history[41])]
        grown[name] = found[1] > found[0]
    assert grown == {"right": False, "wrong": True}
    assert rmtjax.metrics(history[1][1]).keys() == {
        f"{kind}/{name}/kernel" for kind in ("primal", "dual") for name in "ab"
    }
    assert all(number == 1 for number in rmtjax.metrics(right.init(START)).values())


def test_projections_by_path_leave_other_kernels_alone():
    optimizer = optax.chain(admm({"a/kernel": TERNARY}, every=1), optax.sgd(0.1))
    params, (state, *_) = run(optimizer, 3)[3]
    assert state.targets.keys() == {"a/kernel"}
    plain, _ = run(optax.sgd(0.1), 3)[3]
    np.testing.assert_array_equal(params["b"]["kernel"], plain["b"]["kernel"])


def test_injected_numbers_change_nothing_and_can_be_changed():
    injected = optax.inject_hyperparams(admm, STATIC)(TERNARY, rho=0.5, every=2)
    plain = admm(TERNARY, rho=0.5, every=2)
    one, other = (run(optax.chain(opt, optax.sgd(0.1)), 4)[4] for opt in (injected, plain))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), one[0], other[0])


def test_low_precision_keeps_its_dtypes():
    params = optax.tree.cast(START, "bfloat16")
    optimizer = admm(TERNARY, rho=0.5, every=1)
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(params, state, params)
    assert updates["a"]["kernel"].dtype == jnp.bfloat16
    assert after.targets["a/kernel"].dtype == jnp.float32
    describe = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert describe(after) == describe(state)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rho": 0.0}, ValueError, "`rho` must be above 0 and finite, got 0.0"),
        ({"every": 0}, ValueError, "`every` must be an integer of at least 1, got 0"),
        ({"start": 0}, ValueError, "`start` must be an integer of at least 1, got 0"),
        ({"projection": 3}, TypeError, "`projection` must be a function"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        inspect.unwrap(admm)(**{"projection": TERNARY, **arguments}).init(START)


def test_params_are_needed():
    with pytest.raises(ValueError, match="`params` must be given"):
        admm(TERNARY).update(START, admm(TERNARY).init(START))


ON_A_MESH = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np, rmtjax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((2,), ("half",), axis_types=(AxisType[sys.argv[1]],))
kernel = 1 + jax.random.normal(jax.random.key(0), (60, 90))
u, s, vt = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
place = NamedSharding(mesh, PartitionSpec("half"))
params = {"kernel": jax.device_put(kernel, place)}
rank_2 = functools.partial(rmtjax.projections.project_rank, rule=rmtjax.ranks.fixed(2))
optimizer = rmtjax.admm(rank_2, every=1)
zeros = jax.tree.map(jnp.zeros_like, params)
for update in (optimizer.update, jax.jit(optimizer.update)):
    updates, state = update(zeros, optimizer.init(params), params)
    for found in (state.targets["kernel"], rmtjax.projections.project(params, rank_2)["kernel"]):
        np.testing.assert_allclose(found, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-4)
    assert updates["kernel"].sharding.is_equivalent_to(place, 2)
print("alike")
"""


@pytest.mark.slow  # starts a process
@pytest.mark.parametrize("kind", ["Auto", pytest.param("Explicit", marks=EXPLICIT)])
def test_divided_over_a_mesh(kind):
    assert run_on_devices(2, ON_A_MESH, kind) == "alike"
