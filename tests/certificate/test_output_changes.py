"""The change of the outputs of layers on data: an equality, whatever has changed them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.draws import normal

import rmtjax
from rmtjax.certificate import output_changes


class Net(nn.Module):
    """A table, a convolution and a dense layer, each with its inputs for the test to see."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(50, 12, name="table")(ids)
        self.sow("inputs", "to_conv", x)
        x = nn.relu(nn.Conv(16, (3,), name="conv")(x))
        self.sow("inputs", "to_dense", x)
        return nn.DenseGeneral((4, 5), name="dense")(x)


IDS = np.random.default_rng(0).integers(0, 50, (20, 9))
MODULE = Net()
SHAPES = jax.eval_shape(MODULE.init, jax.random.key(0), IDS)["params"]
PARAMS = jax.tree.map(lambda a: normal(1, *a.shape) / 4, SHAPES)


@pytest.fixture(scope="module")
def moments():
    return rmtjax.linen.moments(MODULE, {"params": PARAMS}, [IDS[:11], IDS[11:]])


def outputs_of(params):
    """The outputs of each layer alone, on the inputs before the change."""
    _, sown = MODULE.apply({"params": PARAMS}, IDS, mutable="inputs")
    inputs = {name.removeprefix("to_"): one[0] for name, one in sown["inputs"].items()}
    layers = {
        "conv": nn.Conv(16, (3,)),
        "dense": nn.DenseGeneral((4, 5)),
        "table": nn.Embed(50, 12),
    }
    inputs["table"] = IDS
    run = lambda name: layers[name].apply({"params": params[name]}, inputs[name])
    leaf = {"table": "embedding"}
    return {
        f"{name}/{leaf.get(name, 'kernel')}": np.asarray(run(name), np.float64).reshape(180, -1)
        for name in layers
    }


CHANGES = {
    "noise": lambda m: jax.tree.map(lambda a: a + 0.01 * jnp.cos(7 * a), PARAMS),
    "bfloat16": lambda m: jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(a.dtype), PARAMS),
    "budget": lambda m: cut(m, rmtjax.truncate),
    "factors": lambda m: cut(m, rmtjax.factorize),
    "centred": lambda m: cut(m.with_options(centred=True), rmtjax.factorize),
}


def cut(moments, function):
    axes = rmtjax.linen.kernel_axes(MODULE, {"params": PARAMS}, IDS)
    options = {"axes": axes, "min_size": 1, "multiple": 1, "budget": 0.6}
    plan = rmtjax.plan(PARAMS, moments=moments, **options)
    assert len(plan.changes) == 3
    return function(PARAMS, plan, moments=moments)


@pytest.mark.parametrize("name", CHANGES)
def test_the_change_of_the_outputs_is_the_one_measured(name, moments):
    after = CHANGES[name](moments)
    axes = rmtjax.linen.kernel_axes(MODULE, {"params": PARAMS}, IDS)
    found = output_changes(PARAMS, after, moments, axes=axes)
    before, changed = outputs_of(PARAMS), outputs_of(rmtjax.merge(after))
    assert found.keys() == before.keys()
    for path, one in found.items():
        moved = np.sum((before[path] - changed[path]) ** 2) / 180
        # Outputs of float32, of which a hundredth has changed, or less by a hundred times.
        rtol = 1e-3 if name == "bfloat16" else 1e-4
        np.testing.assert_allclose(one.change, moved, rtol=rtol, err_msg=path)


def test_the_plan_and_the_certificate_say_the_same(moments):
    axes = rmtjax.linen.kernel_axes(MODULE, {"params": PARAMS}, IDS)
    for one in (moments, moments.with_options(centred=True)):
        options = {"axes": axes, "min_size": 1, "multiple": 1, "budget": 0.6}
        plan = rmtjax.plan(PARAMS, moments=one, **options)
        after = rmtjax.truncate(PARAMS, plan, moments=one)
        found = output_changes(PARAMS, after, moments, axes=axes)
        for path, row in plan.items():
            np.testing.assert_allclose(row.loss.outputs[row.rank], found[path].change, rtol=1e-3)
            if one is moments:
                np.testing.assert_allclose(row.loss.outputs[0], found[path].energy, rtol=1e-4)


def test_the_mean_costs_nothing_once_it_is_corrected():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(300, 60)) + 5, jnp.float32)
    module = nn.Dense(60)
    params = module.init(jax.random.key(0), x)["params"]
    moments = rmtjax.linen.moments(module, {"params": params}, [x])
    changes = {}
    for centred in (False, True):
        one = moments.with_options(centred=centred, shrinkage=0.0)
        plan = rmtjax.plan(params, moments=one, rule=rmtjax.ranks.fixed(16))
        after = rmtjax.factorize(params, plan, moments=one)
        changes[centred] = output_changes(params, after, moments)["kernel"].change
    assert changes[True] < changes[False]


def test_trees_that_do_not_fit_are_refused(moments):
    with pytest.raises(ValueError, match="`after` must have 'table/embedding' of shape"):
        output_changes(PARAMS, {**PARAMS, "table": {"embedding": jnp.ones((2, 3))}}, moments)
    other = {"table": {"embedding": jnp.ones((7, 12))}}
    with pytest.raises(ValueError, match="`moments` is of another model: it has 50 inputs for"):
        output_changes(other, other, moments)
