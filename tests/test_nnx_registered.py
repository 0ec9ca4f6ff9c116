"""Layers of one's own in nnx, told by one call: thin without a change to their code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rmtjax
from rmtjax import nnx as rmt_nnx

OPTIONS = {"rule": rmtjax.ranks.fixed(3), "multiple": 1, "min_size": 2}
X = jax.random.normal(jax.random.key(1), (64, 20))


class Gated(nnx.Module):
    """Two kernels, a bias, a statistic that a call changes, and a second method."""

    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal()
        self.up = nnx.Param(init(rngs.params(), (20, 24)))
        self.down = nnx.Param(init(rngs.params(), (16, 24)))
        self.shift = nnx.Param(jnp.ones(24))
        self.norm = nnx.BatchNorm(24, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, *, scale=1.0):
        return self.decode(self.encode(x) * scale)

    def encode(self, x):
        hidden = jnp.tanh(x @ self.up[...] + self.shift[...][None])
        return self.dropout(self.norm(hidden))

    def decode(self, hidden):
        return jnp.einsum("ba,oa->bo", hidden, self.down[...])


class Weighed(nnx.Module):
    """A layer that takes the norm of its kernel."""

    def __init__(self):
        self.weight = nnx.Param(jax.random.normal(jax.random.key(0), (20, 24)))

    def __call__(self, x):
        return x @ self.weight[...] / jnp.linalg.norm(self.weight[...])


class Net(nnx.Module):
    """The layer in a model of somebody else."""

    def __init__(self):
        self.gated = Gated(nnx.Rngs(0))

    def __call__(self, x):
        return self.gated(x, scale=0.5)


rmtjax.register_layer(
    Gated, {"up": rmtjax.KernelAxes((0,), (1,)), "down": rmtjax.KernelAxes((0,), (1,))}
)
rmtjax.register_layer(Weighed, {"weight": rmtjax.KernelAxes((0,), (1,))})


@pytest.fixture(scope="module")
def models():
    model = Net()
    plan = rmt_nnx.plan(model, **OPTIONS)
    assert [row.action for row in plan.values()] == ["factorize"] * 2
    return rmt_nnx.truncate(model, plan), rmt_nnx.factorize(model, plan)


def test_a_registered_layer_is_found(models):
    axes = rmt_nnx.kernel_axes(models[0])
    assert axes == dict.fromkeys(("gated/up", "gated/down"), rmtjax.KernelAxes((0,), (1,)))
    assert {row.path for row in rmt_nnx.analyze(models[1]).rows} == axes.keys()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_it_runs_thin_as_it_ran_truncated_and_changes_its_state(models, compiled):
    run = lambda model, x: (model(x), model.gated.encode(x))
    run = nnx.jit(run) if compiled else run
    truncated, thin = map(nnx.clone, models)
    for one, other in zip(run(thin, X), run(truncated, X), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
    count = lambda model: int(jax.tree.leaves(nnx.state(model, nnx.RngCount))[0])
    assert count(thin) == count(truncated) == count(models[0]) + 2  # draws of the dropout
    means = [model.gated.norm.mean[...] for model in (thin, truncated)]
    assert means[0].any()
    np.testing.assert_allclose(*means, rtol=0, atol=1e-5)


def test_its_gradients_obey_the_chain_rule(models):
    loss = lambda model: jnp.sum(jnp.sin(model(X)))
    dense, thin = (nnx.to_pure_dict(nnx.grad(loss)(nnx.clone(model)))["gated"] for model in models)
    scale = np.abs(dense["shift"]).max()
    np.testing.assert_allclose(thin["shift"], dense["shift"], rtol=0, atol=1e-5 * scale)
    for name in ("up", "down"):
        left, right = rmt_nnx.params(models[1])["gated"][name]
        expected = dense[name] @ right.T, left.T @ dense[name]
        for one, other in zip((thin[name]["left"], thin[name]["right"]), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_it_takes_fewer_operations_and_becomes_dense_again(models):
    flops = []
    for model in models:
        graphdef, state = nnx.split(model)
        run = lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state).gated.decode(x)
        costs = jax.jit(run).lower(state, jnp.ones((64, 24))).compile().cost_analysis()
        flops.append((costs[0] if isinstance(costs, list) else costs)["flops"])
    assert flops[1] < flops[0]
    merged = rmt_nnx.merge(models[1])
    assert type(merged.gated) is Gated
    assert nnx.graphdef(merged) == nnx.graphdef(models[0])
    # The product of the factors is what was truncated, up to the rounding of the products.
    np.testing.assert_allclose(merged.gated.up[...], models[0].gated.up[...], atol=1e-5)


def test_what_does_more_than_products_runs_right_with_a_warning():
    model = Weighed()
    thin = rmt_nnx.factorize(model, rmt_nnx.plan(model, **OPTIONS))
    with pytest.warns(UserWarning, match="`Weighed.__call__` runs with a kernel multiplied out"):
        outputs = thin(X)
    np.testing.assert_allclose(outputs, rmt_nnx.merge(thin)(X), rtol=0, atol=1e-5)
