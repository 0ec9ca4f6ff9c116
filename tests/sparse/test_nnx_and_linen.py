"""Transforms of the room in the optimizers of linen and nnx, as users have them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers.slow import slow_except

import rmtjax

BITS = functools.partial(rmtjax.projections.project_bits, bits=2, scale_axis=1)
OPTIMIZERS = {
    "drop and grow": rmtjax.drop_and_grow(optax.adam(0.01), every=2, density=0.25),
    "reallocation": optax.chain(
        optax.adam(0.01), rmtjax.prune_entries(0.5, start=2, restore=0.1, select=2)
    ),
    "pattern": optax.chain(optax.adam(0.01), rmtjax.prune_entries(pattern=(2, 4))),
    "admm": optax.chain(rmtjax.admm(BITS, every=2), optax.adam(0.01)),
    "average": optax.chain(optax.adam(0.01), rmtjax.average_params(1)),
}
EACH = pytest.mark.parametrize("name", slow_except(("drop and grow",), tuple(OPTIMIZERS)))
X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
ZEROS = {"drop and grow": 0.75, "reallocation": 0.5, "pattern": 0.5, "admm": 0, "average": 0}


def check_zeros(name, kernels):
    zeros = sum(float((kernel == 0).sum()) for kernel in kernels) / 96
    # Entries that have just grown are still zero.
    assert zeros == pytest.approx(ZEROS[name], abs=0.1)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.two(nnx.relu(self.one(x)))


@EACH
def test_an_optimizer_of_nnx(name):
    model = Model(nnx.Rngs(0))
    wrapped = nnx.Optimizer(model, OPTIMIZERS[name], wrt=nnx.Param)

    @nnx.jit
    def step(model, wrapped):
        gradients = nnx.grad(lambda model: jnp.mean(jnp.sin(model(X))))(model)
        wrapped.update(model, gradients)

    for _ in range(5):
        step(model, wrapped)
    check_zeros(name, [model.one.kernel[...], model.two.kernel[...]])
    if name == "average":
        params = nnx.state(model, nnx.Param)
        mean = rmtjax.averaged(wrapped.opt_state, params)
        jax.tree.map(np.testing.assert_array_equal, mean, params)
    else:
        paths = {name.partition("/")[2] for name in rmtjax.metrics(wrapped.opt_state)}
        assert paths == {"one/kernel", "two/kernel"}


@EACH
def test_a_train_state_of_linen(name):
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)])
    params = model.init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=OPTIMIZERS[name])

    @jax.jit
    def step(state):
        loss = lambda params: jnp.mean(jnp.sin(model.apply({"params": params}, X)))
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(5):
        state = step(state)
    check_zeros(name, [layer["kernel"] for layer in state.params.values()])
