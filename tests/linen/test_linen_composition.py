"""Factorized trees of linen under transformations of JAX, Flax and optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers.composition_models import Net
from helpers.linen_checks import assert_close, check, draw, Fixed, make_thin, RANK
from helpers.virtual_devices import run_on_devices

import rmtjax
from rmtjax import linen

X = jnp.asarray(draw(4, 6, 6, 8))


NET = Net()
PRUNE = rmtjax.prune_spectrum(2, rule=Fixed(RANK), min_size=1)


def run(params, x=X):
    return linen.apply(NET, {"params": params}, x)


def loss(params, x=X):
    return jnp.mean(jnp.sin(run(params, x)))


@pytest.fixture(scope="module")
def trees():
    """Parameters factorized, and truncated by the same plan."""
    thin, dense, plan = make_thin(NET, X)
    assert {row.action for row in plan.values()} == {"factorize"}
    return thin["params"], dense["params"]


def test_vmap_over_inputs_and_over_trees(trees):
    thin, _ = trees
    each = jax.vmap(lambda x: run(thin, x[None])[0])(X)
    assert_close(each, run(thin))
    stack = [jax.tree.map(lambda leaf, scale=scale: scale * leaf, thin) for scale in (0.5, 1.0)]
    together = jax.vmap(run)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack))
    assert_close(together, jnp.stack([run(tree) for tree in stack]))


def test_checkpointing_keeps_no_hidden_values(trees):
    thin, _ = trees
    assert_close(jax.grad(jax.checkpoint(loss))(thin), jax.grad(loss)(thin))
    kept = []
    for function in (jax.checkpoint(loss), loss):
        _, pull = jax.vjp(function, thin)
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(pull)))
    given = sum(leaf.size for leaf in jax.tree.leaves((thin, X)))
    assert kept[0] <= given < kept[1]


def test_gradients_of_factors_are_those_of_kernels():
    check(NET, X)  # compiled, and by the chain rule


def test_a_scan_over_steps_carries_the_tree(trees):
    thin, _ = trees
    optimizer = optax.adam(1e-2)

    def step(carry, x):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, x), state, params)
        return (optax.apply_updates(params, updates), state), None

    batches = jnp.stack([X, X[::-1] + 1, -X])
    carry = thin, optimizer.init(thin)
    (params, _), _ = jax.lax.scan(step, carry, batches)
    for x in batches:
        carry, _ = step(carry, x)
    # Adam divides small gradients by their own size: rounding is enlarged, to 1e-3 of a step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, carry[0])


def test_train_state_prunes_and_goes_on_in_the_factors(trees):
    apply = functools.partial(linen.apply, NET)
    optimizer = optax.chain(optax.sgd(0.1), PRUNE)
    state = TrainState.create(apply_fn=apply, params=rmtjax.merge(trees[0]), tx=optimizer)
    start = jax.tree.map(lambda leaf: leaf + 0.1 * draw(*leaf.shape), state.params)
    state = state.replace(params=start)

    @jax.jit
    def step(state):
        loss = lambda params: jnp.mean(jnp.sin(state.apply_fn({"params": params}, X)))
        grads = jax.grad(loss)(state.params)
        return state.apply_gradients(grads=grads), grads

    rank = lambda state: np.linalg.matrix_rank(state.params["Dense_1"]["kernel"], rtol=1e-4)
    ranks = []
    for _ in range(2):
        state, _ = step(state)
        ranks.append(rank(state))
    assert ranks == [16, RANK]
    plan = rmtjax.plan(state.params, rule=Fixed(RANK), min_size=1, multiple=1)
    thin = rmtjax.factorize(state.params, plan)
    opt_state = rmtjax.transfer_opt_state(state.opt_state, state.params, thin)
    state = state.replace(params=thin, opt_state=opt_state)
    after, grads = step(state)
    assert int(after.step) == 3
    assert_close(after.params, jax.tree.map(lambda p, g: p - 0.1 * g, thin, grads))


def test_multi_steps_takes_the_mean_of_the_gradients_of_factors(trees):
    thin, dense = trees
    # The last layer stays dense, so that the chain has something left to prune.
    bumpy = dense["Dense_1"]["kernel"] + 0.1 * draw(20, 16)
    params = {**thin, "Dense_1": {**thin["Dense_1"], "kernel": bumpy}}
    prune = rmtjax.prune_spectrum(1, rule=Fixed(RANK), min_size=1)
    optimizer = optax.MultiSteps(optax.chain(optax.sgd(0.1), prune), 2)
    state, start, grads = optimizer.init(params), params, []
    for x in (X, 1 - X):
        grads.append(jax.grad(loss)(params, x))
        updates, state = optimizer.update(grads[-1], state, params)
        if len(grads) == 1:
            assert not any(leaf.any() for leaf in jax.tree.leaves(updates))
        params = optax.apply_updates(params, updates)
    wanted = jax.tree.map(lambda p, one, other: p - 0.05 * (one + other), start, *grads)
    u, s, vt = np.linalg.svd(wanted["Dense_1"]["kernel"])
    wanted["Dense_1"]["kernel"] = jnp.asarray((u[:, :RANK] * s[None, :RANK]) @ vt[:RANK])
    assert_close(params, wanted)


SHARDED = """
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, rmtjax
from jax.sharding import NamedSharding, PartitionSpec as P

module, x = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64)]), jnp.ones((8, 80)).at[0].set(2.)
params = module.init(jax.random.key(0), x)["params"]
thin = rmtjax.factorize(params, rmtjax.plan(params, rule=rmtjax.ranks.fixed(16)))
mesh = jax.make_mesh((2, 4), ("data", "model"))
specs = {1: P("model"), 2: P(None, "model")}  # the rank of the left factors, and what comes out
place = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, specs[leaf.ndim]))
placed, rows = jax.tree.map(place, thin), jax.device_put(x, NamedSharding(mesh, P("data")))
loss = lambda params, x: jnp.sin(rmtjax.linen.apply(module, {"params": params}, x)).sum()
step = jax.jit(lambda params, x: jax.tree.map(
    lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, x)))
wanted, found = step(thin, x), step(placed, rows)
run = jax.jit(lambda params, x: rmtjax.linen.apply(module, {"params": params}, x))
np.testing.assert_allclose(run(placed, rows), run(thin, x), atol=1e-5)
for before, after, one in zip(*map(jax.tree.leaves, (placed, found, wanted)), strict=True):
    assert len(after.sharding.device_set) == 8
    assert after.sharding.is_equivalent_to(before.sharding, before.ndim)
    np.testing.assert_allclose(after, one, atol=1e-5)
print(jax.tree.leaves(found)[1].sharding.shard_shape((80, 16)))
"""


def test_placed_on_a_mesh_of_devices_the_tree_stays_there():
    assert run_on_devices(8, SHARDED) == "(80, 4)"
