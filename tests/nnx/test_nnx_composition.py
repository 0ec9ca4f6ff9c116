"""Thin models of nnx under transformations of JAX, Flax and optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers.composition_models import NnxNet
from helpers.linen_checks import assert_close, draw, Fixed, RANK
from helpers.virtual_devices import run_on_devices

from rmtjax import nnx as rmt_nnx

X = jnp.asarray(draw(3, 5, 32))


def factorize(model):
    plan = rmt_nnx.plan(model, rule=Fixed(RANK), min_size=1, multiple=1)
    assert {row.action for row in plan.values()} == {"factorize"}
    return rmt_nnx.factorize(model, plan)


@pytest.fixture(scope="module")
def thin():
    return factorize(NnxNet())


def loss(model, x=X):
    return jnp.mean(jnp.sin(model(x)))


def update(optimizer, model, grads):
    """A step, as newer Flax has it, or older Flax, where the optimizer holds the model."""
    optimizer.update(*((grads,) if hasattr(optimizer, "model") else (model, grads)))


@nnx.jit
def step(model, optimizer, x):
    grads = nnx.grad(loss)(model, x)
    update(optimizer, model, grads)


def arrays(model, *kinds):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, *kinds))]


@pytest.mark.slow
def test_gradients_of_factors_are_those_of_kernels(thin):
    # The gradient of a kernel G gives those of its factors, G R^T and L^T G.
    grads = nnx.jit(nnx.grad(loss))(thin)
    (kernel,) = jax.tree.leaves(nnx.grad(loss)(rmt_nnx.merge(thin))["linear"]["kernel"])
    left, right = rmt_nnx.params(thin)["linear"]["kernel"]
    found = [grads["linear"][name]["kernel"] for name in ("left_factor", "right_factor")]
    assert_close(jax.tree.leaves(found), [kernel @ right.T, left.T @ kernel])


def test_vmap_over_inputs_and_over_models(thin):
    each = nnx.vmap(lambda model, x: model(x[None])[0], in_axes=(None, 0))(thin, X)
    assert_close(each, thin(X))
    graph, state = nnx.split(thin)
    stack = [jax.tree.map(lambda leaf, scale=scale: scale * leaf, state) for scale in (0.5, 1.0)]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stack)
    together = jax.vmap(lambda state: nnx.merge(graph, state)(X))(states)
    assert_close(together, jnp.stack([nnx.merge(graph, state)(X) for state in stack]))


def test_checkpointing_keeps_no_hidden_values(thin):
    graph, state = nnx.split(thin)
    loss_of = lambda state: loss(nnx.merge(graph, state))
    kept = []
    for function in (jax.checkpoint(loss_of), loss_of):
        _, pull = jax.vjp(function, state)
        kept.append(sum(leaf.size for leaf in jax.tree.leaves(pull)))
    assert kept[0] <= sum(leaf.size for leaf in jax.tree.leaves((state, X))) < kept[1]
    assert_close(jax.grad(jax.checkpoint(loss_of))(state), jax.grad(loss_of)(state))


def test_a_scan_over_steps_carries_the_model(thin):
    model = nnx.clone(thin)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))
    batches = jnp.stack([X, X[::-1] + 1, -X])

    def body(state, x):
        model, optimizer = nnx.merge(graph, state)
        step(model, optimizer, x)
        return nnx.state((model, optimizer)), None

    state, _ = jax.lax.scan(body, state, batches)
    scanned, _ = nnx.merge(graph, state)
    for x in batches:
        step(model, optimizer, x)
    assert_close(arrays(scanned), arrays(model))
    assert any((one != other).any() for one, other in zip(arrays(model), arrays(thin), strict=True))


def test_train_state_holds_the_parameters_as_a_tree(thin):
    params = rmt_nnx.params(thin)
    apply = lambda params, x: rmt_nnx.replace(thin, params)(x)
    state = TrainState.create(apply_fn=apply, params=params, tx=optax.sgd(0.1))
    loss_of = lambda params: jnp.mean(jnp.sin(state.apply_fn(params, X)))
    after = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss_of)(state.params)))(
        state
    )
    model = nnx.clone(thin)
    step(model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param), X)
    assert_close(after.params, rmt_nnx.params(model))


def test_multi_steps_takes_the_mean_of_the_gradients_of_factors(thin):
    model = nnx.clone(thin)
    transform = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    one, other = (nnx.grad(loss)(thin, x) for x in (X, 1 - X))
    wanted = jax.tree.map(lambda p, a, b: p - 0.05 * (a + b), nnx.state(thin), one, other)
    step(model, optimizer, X)
    assert_close(arrays(model), arrays(thin), 0)  # waits
    step(model, optimizer, 1 - X)
    assert_close(nnx.state(model), wanted)


def test_an_adapter_over_a_factor_is_all_that_trains(thin):
    model = nnx.clone(thin)
    layer = model.linear
    layer.left_factor = nnx.LoRA(32, 2, RANK, base_module=layer.left_factor, rngs=nnx.Rngs(1))
    assert_close(model(X), thin(X), 0)  # it starts at 0
    frozen, adapter = arrays(thin), arrays(model, nnx.LoRAParam)
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.LoRAParam)
    for _ in range(2):  # the gradient of one half is 0 as long as the other is
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        update(optimizer, model, grads)
    assert_close(arrays(model, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))), frozen, 0)
    a, b = arrays(model, nnx.LoRAParam)
    assert (a != adapter[0]).any()
    assert (b != adapter[1]).any()
    hidden, factors = jnp.tanh(thin.attention(X)), thin.linear
    left, right = factors.left_factor.kernel[...], factors.right_factor
    assert_close(model(X), right(hidden @ (left + a @ b)))


def test_an_adapter_beside_a_thin_layer_is_all_that_trains():
    model = factorize(nnx.LoRALinear(32, 24, lora_rank=2, rngs=nnx.Rngs(0)))
    wanted, kinds = model(X), (nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), nnx.LoRAParam)
    frozen = arrays(model, kinds[0])
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.LoRAParam)
    for _ in range(2):
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        update(optimizer, model, grads)
    assert_close(arrays(model, kinds[0]), frozen, 0)
    a, b = arrays(model, kinds[1])
    assert b.any()
    assert_close(model(X), wanted + X @ (a @ b))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax, rmtjax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

x = jnp.ones((8, 80)).at[0].set(2.)
model = nnx.Sequential(nnx.Linear(80, 64, rngs=nnx.Rngs(0)), nnx.relu)
thin = rmtjax.nnx.factorize(model, rmtjax.nnx.plan(model, rule=rmtjax.ranks.fixed(16)))
mesh = jax.make_mesh((2, 4), ("data", "model"))
specs = {1: P("model"), 2: P(None, "model")}
place = lambda leaf: jax.device_put(leaf, NamedSharding(mesh, specs[leaf.ndim]))
placed, rows = nnx.clone(thin), jax.device_put(x, NamedSharding(mesh, P("data")))
nnx.update(placed, jax.tree.map(place, nnx.state(placed)))

@nnx.jit
def step(model, optimizer, x):
    grads = nnx.grad(lambda model: jnp.sin(model(x)).sum())(model)
    optimizer.update(*((grads,) if hasattr(optimizer, "model") else (model, grads)))

run = nnx.jit(lambda model, x: model(x))
np.testing.assert_allclose(run(placed, rows), run(thin, x), atol=1e-5)
before = jax.tree.leaves(nnx.state(placed))
for one, inputs in ((thin, x), (placed, rows)):
    step(one, nnx.Optimizer(one, optax.sgd(0.1), wrt=nnx.Param), inputs)
states = before, *(jax.tree.leaves(nnx.state(one)) for one in (placed, thin))
for first, found, wanted in zip(*states, strict=True):
    assert found.sharding.is_equivalent_to(first.sharding, first.ndim)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
print(rmtjax.nnx.params(placed)["layers"][0]["kernel"].left.sharding.shard_shape((80, 16)))
"""


@pytest.mark.slow
def test_placed_on_a_mesh_of_devices_the_model_stays_there():
    assert run_on_devices(8, SHARDED) == "(80, 4)"
