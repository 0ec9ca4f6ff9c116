"""Registered layers in nnx: thin without a change to their code."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.draws import normal
from helpers.nnx_checks import close

import rmtjax
from rmtjax import nnx as rmt_nnx
from rmtjax.nnx._variables import read, write

OPTIONS = {"rule": rmtjax.ranks.fixed(3), "multiple": 1, "min_size": 2}
X = normal(1, 64, 20)


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


AXES = rmtjax.KernelAxes((0,), (1,))
rmtjax.register_layer(Gated, {"up": AXES, "down": AXES})
rmtjax.register_layer(Weighed, {"weight": AXES})


def test_a_misspelt_name_raises_when_the_layer_is_met():
    class Misspelt(Weighed):
        def __init__(self):
            super().__init__()
            self.bias = None  # what is not there is not misspelt

    rmtjax.register_layer(Misspelt, dict.fromkeys(("weight", "bias"), AXES))
    assert rmt_nnx.kernel_axes(Misspelt()) == {"weight": AXES}
    rmtjax.register_layer(Misspelt, {"wieght": AXES})
    words = r"a kernel 'wieght' for `Misspelt`, whose parameters are 'bias', 'weight'\. Register"
    for use in (rmt_nnx.kernel_axes, rmt_nnx.plan):
        with pytest.raises(ValueError, match=words):
            use(nnx.Sequential(Misspelt()))


def both(model):
    """The model truncated, and made thin."""
    plan = rmt_nnx.plan(model, **OPTIONS)
    assert {row.action for row in plan.values()} == {"factorize"}
    return rmt_nnx.truncate(model, plan), rmt_nnx.factorize(model, plan)


@pytest.fixture(scope="module")
def models():
    return both(Net())


def test_a_registered_layer_is_found(models):
    axes = rmt_nnx.kernel_axes(models[0])
    assert axes == dict.fromkeys(("gated/up", "gated/down"), AXES)
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


class Drops(nnx.Module):
    """A layer that is handed random numbers, and a count to write to."""

    def __init__(self):
        self.w = nnx.Param(jax.random.normal(jax.random.key(0), (20, 24)))
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x, count, *, rngs):
        write(count, read(count) + 1)
        return self.drop(x @ self.w[...], rngs=rngs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_it_draws_from_and_writes_to_what_it_is_handed(compiled):
    run = lambda model, x, count, rngs: model(x, count, rngs=rngs)
    run = nnx.jit(run) if compiled else run
    found = []
    for model in both(Drops()):
        rngs, count = nnx.Rngs(0), nnx.BatchStat(jnp.zeros(()))
        outputs = [run(model, X, count, rngs) for _ in range(2)]
        assert (outputs[0] != outputs[1]).any()
        found.append((outputs, jax.tree.leaves(nnx.state((rngs, count), nnx.Not(nnx.RngKey)))))
    assert [int(leaf) for leaf in found[1][1]] == [int(leaf) for leaf in found[0][1]] == [2, 2]
    for one, other in zip(*(outputs for outputs, _ in found), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


class Read(nnx.Module):
    """A layer whose kernel is read by more than its public methods."""

    def __init__(self):
        self.w = nnx.Param(jax.random.normal(jax.random.key(0), (20, 24)))

    @nnx.jit
    def __call__(self, x):
        return x @ self.w[...]

    def scaled(self, x, scale):
        return x @ self.w[...] * scale

    doubled = functools.partialmethod(scaled, scale=2.0)
    act = staticmethod(jnp.tanh)

    @property
    def table(self):
        return self.w[...].T

    def _rows(self, x):
        return self.w[...] @ x.T


for layer in (Drops, Read):
    rmtjax.register_layer(layer, {"w": AXES})
READS = {
    "a compiled call": lambda layer: layer(X),
    "a part of a method": lambda layer: layer.doubled(X),
    "a static method": lambda layer: layer.act(X),
    "a property": lambda layer: layer.table,
    "a private method": lambda layer: layer._rows(X[:, :1].repeat(24, 1)),
    "a parent that ties": lambda layer: layer(X) @ layer.w[...].T,
    "its attributes": lambda layer: (layer(X) @ layer.w.T, X @ layer.w, layer.w.sum(0)),
    "its value": lambda layer: (
        layer.w.get_value() if hasattr(layer.w, "get_value") else layer.w.value
    ),
    "an index": lambda layer: layer.w[3, 1:],
    "an array": lambda layer: jnp.asarray(layer.w) * np.ones(layer.w.shape, layer.w.dtype),
}


@pytest.mark.parametrize("name", READS)
def test_its_kernel_is_read_from_anywhere(name):
    truncated, thin = both(Read())
    one, other = READS[name](thin), READS[name](truncated)
    close(one, other)
    close(nnx.jit(READS[name])(thin), other)


def test_its_compiled_call_runs_with_thin_products():
    _, thin = both(Read())
    graphdef, state = nnx.split(thin)
    program = str(jax.make_jaxpr(lambda state: nnx.merge(graphdef, state)(X))(state))
    assert "20,24" not in program
    assert "20,3" in program


def test_a_write_to_its_kernel_is_refused_with_the_way():
    _, thin = both(Read())
    writes = [lambda w: w.__setitem__(..., 0.0), lambda w: w.set_value(0.0)]
    writes.append(lambda w: setattr(w, "value", 0.0))
    before = thin(X)
    for one in writes:
        with pytest.raises(TypeError, match=r"`left` and `right`.*`rmtjax.nnx.replace`"):
            one(thin.w)
    np.testing.assert_array_equal(thin(X), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_it_is_copied_and_pickled(copied):
    _, thin = both(Read())
    other = copied(thin)
    assert type(other) is type(thin)
    assert nnx.graphdef(other) == nnx.graphdef(thin)
    np.testing.assert_array_equal(other(X), thin(X))
