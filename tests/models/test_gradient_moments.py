"""The moments of gradients with respect to the outputs of kernels: what a cut is weighed by."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.linen_checks import draw

import rmtjax

SIZE = 12
X = draw(3000, SIZE)
KEY = jax.random.key(3)


class Step(nn.Module):
    """A layer of a stack."""

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(SIZE)(x)), None


class Unrolled(nn.Module):
    """Four layers, one after another."""

    @nn.compact
    def __call__(self, x, _):
        for place in range(4):
            x, _ = Step(name=f"{place}")(x, None)
        return x, None


def second(moment):
    return np.asarray(moment.second) / np.asarray(moment.rows)[:, None, None]


def test_gradients_are_those_of_the_chain_rule():
    module = nn.Sequential([nn.Dense(SIZE), nn.tanh, nn.Dense(5)])
    variables = module.init(KEY, X)
    moments = rmtjax.linen.moments(module, variables, [X[:1000], X[1000:]], key=KEY)
    first, last = (variables["params"][f"layers_{i}"] for i in (0, 2))
    slopes = 1 - np.tanh(X @ np.asarray(first["kernel"]) + np.asarray(first["bias"])) ** 2
    rows = slopes[:, :, None] * np.asarray(last["kernel"])  # the Jacobian of each row
    expected = np.einsum("nij,nkj->ik", rows, rows) / len(X)
    found = second(moments.gradients["layers_0/kernel"])[0]
    # The mean over 3,000 rows of squares of normal draws: 2.6 % of it for the diagonal.
    np.testing.assert_allclose(found, expected, atol=0.1 * np.abs(expected).max())
    identity = second(moments.gradients["layers_2/kernel"])[0]
    np.testing.assert_allclose(identity, np.eye(5), atol=0.1)
    assert moments.gradients["layers_0/kernel"].rows == len(X)


def test_a_scan_has_the_gradients_of_each_layer():
    lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    stack = nn.scan(Step, **lift, length=4)()
    variables = stack.init(KEY, X[:50], None)
    parts = {f"{i}": jax.tree.map(lambda a, i=i: a[i], variables["params"]) for i in range(4)}
    batches = [(X[:50], None), (X[50:100], None)]
    found = rmtjax.linen.moments(stack, variables, batches, key=KEY)
    one_by_one = rmtjax.linen.moments(Unrolled(), {"params": parts}, batches, key=KEY)
    together = second(found.gradients["Dense_0/kernel"])
    assert together.shape == (4, SIZE, SIZE)
    for i in range(4):
        alone = second(one_by_one.gradients[f"{i}/Dense_0/kernel"])[0]
        np.testing.assert_allclose(together[i], alone, atol=1e-5 * np.abs(alone).max())  # float32


class Wide(nn.Module):
    """Products of other kinds: attention, a convolution, an embedding, an einsum."""

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(20, SIZE, name="table")
        x = nn.Conv(SIZE, (3,), name="conv")(table(ids))
        x = nn.MultiHeadDotProductAttention(3, name="attention")(x)
        return nn.Einsum((3, 4, 20), "btij,ijk->btk", name="last")(
            nn.DenseGeneral((3, 4), name="dense")(x)
        )


@pytest.mark.slow
def test_each_product_has_gradients_of_its_outputs():
    module, ids = Wide(), np.random.default_rng(0).integers(0, 20, (5, 7))
    variables = module.init(KEY, ids)
    moments = rmtjax.linen.moments(module, variables, [ids], key=KEY)
    assert moments.gradients.keys() == moments.keys()
    for path, moment in moments.gradients.items():
        size = 20 if path.startswith("last") else SIZE
        assert moment.second.shape == (1, size, size), path
        assert np.linalg.eigvalsh(moment.second[0]).min() > -1e-4 * np.trace(moment.second[0])
        assert moment.total.any()
    # The gradient of a bias is the sum over the rows, whatever layer it is in.
    again = rmtjax.linen.moments(module, variables, [ids], key=KEY)
    cotangent = jax.random.normal(jax.random.split(jax.random.fold_in(KEY, 0), 1)[0], (5, 7, 20))
    loss = lambda params: jnp.sum(cotangent * module.apply({"params": params}, ids))
    biases = jax.grad(loss)(variables["params"])
    for path in ("conv", "dense", "attention/query", "attention/out", "last"):
        bias = biases
        for name in path.split("/"):
            bias = bias[name]
        seen = again.gradients[f"{path}/kernel"].total[0]
        scale = 1e-4 * np.sqrt(np.trace(again.gradients[f"{path}/kernel"].second[0]))
        np.testing.assert_allclose(seen, np.ravel(bias["bias"]), rtol=1e-4, atol=scale)


def test_models_of_nnx_and_outputs_without_gradients():
    model = nnx.Sequential(nnx.Linear(SIZE, SIZE, rngs=nnx.Rngs(0)), nnx.tanh)
    call = lambda model, x: {"logits": model(x), "count": jnp.arange(3), "name": "a"}
    moments = rmtjax.nnx.moments(model, [X[:40]], call=call, key=KEY)
    (moment,) = moments.gradients.values()
    kernel, bias = (np.asarray(model.layers[0].kernel[...]), np.asarray(model.layers[0].bias[...]))
    slopes = 1 - np.tanh(X[:40] @ kernel + bias) ** 2
    assert second(moment).shape == (1, SIZE, SIZE)
    np.testing.assert_allclose(np.trace(second(moment)[0]), np.mean(np.sum(slopes**2, 1)), rtol=0.2)


def test_a_loss_is_an_output_too():
    module = nn.Dense(SIZE)
    variables = module.init(KEY, X)
    loss = lambda module, x: jnp.mean(module(x) ** 2)
    (moment,) = rmtjax.linen.moments(
        module, variables, [X], key=KEY, method=loss
    ).gradients.values()
    outputs = np.asarray(module.apply(variables, X), np.float64)
    draw = float(jax.random.normal(jax.random.split(jax.random.fold_in(KEY, 0), 1)[0], ()))
    gradients = draw * 2 * outputs / outputs.size
    expected = gradients.T @ gradients
    np.testing.assert_allclose(moment.second[0], expected, atol=1e-4 * np.abs(expected).max())


def test_moments_add_up_with_gradients_only():
    module = nn.Dense(3)
    variables = module.init(KEY, X[:4])
    plain = rmtjax.linen.moments(module, variables, [X[:4]])
    weighed = rmtjax.linen.moments(module, variables, [X[:4]], key=KEY)
    assert (weighed + weighed).gradients["kernel"].rows == 8
    with pytest.raises(ValueError, match="both have gradients, or both none"):
        plain + weighed


class Stopped(nn.Module):
    """Adds a layer and a stack, whose second member and whose last layer get no gradients."""

    @nn.compact
    def __call__(self, x):
        stack = self.param("kernel", nn.initializers.normal(), (2, SIZE, SIZE))
        first, second = jnp.einsum("kni,kio->kno", jnp.stack([x, x]), stack)
        stopped = second + nn.Dense(SIZE, name="stopped")(x)
        return nn.Dense(SIZE, name="dense")(x) + first + jax.lax.stop_gradient(stopped)


def test_kernels_whose_outputs_change_nothing_are_cut_as_without_gradients():
    variables = Stopped().init(KEY, X[:50])
    axes = {"kernel": rmtjax.KernelAxes((1,), (2,), (0,))}
    moments = rmtjax.linen.moments(Stopped(), variables, [X[:50]], axes=axes, key=KEY)
    plain = rmtjax.linen.moments(Stopped(), variables, [X[:50]], axes=axes)
    cut = []
    for known in (moments, plain):
        rule = {"rule": rmtjax.ranks.fixed(4), "multiple": 1, "min_size": 2}
        plan = rmtjax.plan(variables["params"], axes=axes, moments=known, **rule)
        cut.append(rmtjax.truncate(variables["params"], plan, moments=known))
    assert moments.weighs("dense/kernel")
    assert not moments.weighs("stopped/kernel")
    apart = lambda pick: np.abs(pick(cut[0]) - pick(cut[1])).max()
    assert apart(lambda tree: tree["stopped"]["kernel"]) == 0
    assert apart(lambda tree: tree["dense"]["kernel"]) > 1e-3
    # Weights that are all alike, by a decomposition of another matrix in float64.
    assert apart(lambda tree: tree["kernel"][1]) < 1e-5
    assert apart(lambda tree: tree["kernel"][0]) > 1e-3


@pytest.mark.parametrize("key", [None, KEY], ids=["inputs", "gradients"])
def test_all_batches_of_one_shape_share_a_program(key, caplog):
    module = nn.Dense(SIZE)
    variables = module.init(jax.random.key(0), X)
    with jax.log_compiles(True):
        rmtjax.linen.moments(module, variables, [X[:100]] * 3, key=key)
    messages = [record.getMessage() for record in caplog.records]
    assert sum("Compiling" in message and "_add" in message for message in messages) == 1
