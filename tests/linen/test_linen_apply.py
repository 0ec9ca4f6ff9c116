"""Factorized trees under unmodified modules: they compute what the truncated tree does."""

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.linen_checks import (
    assert_close,
    Block,
    check,
    COARSE,
    DENSE,
    draw,
    EACH,
    INPUTS,
    make_thin,
    make_variables,
    RNGS,
    tokens,
    TRAIN,
)
from helpers.slow import slow_except

from rmtjax import Factors, linen


class Net(nn.Module):
    """All at once, with state and randomness."""

    @nn.compact
    def __call__(self, images, train):
        hidden = nn.Conv(24, (3, 3))(images)
        hidden = nn.relu(nn.BatchNorm(use_running_average=not train)(hidden))
        hidden = nn.Dropout(0.5, deterministic=not train)(hidden.reshape(len(hidden), -1))
        self.sow("intermediates", "hidden", hidden)
        return nn.Dense(20)(hidden)


class Tied(nn.Module):
    """Reads the table of its embedding, as some language models do."""

    def setup(self):
        self.embed = nn.Embed(40, 24)

    def __call__(self, ids):
        return self.embed(ids) @ self.embed.embedding.T


ATTENTION = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=32)
CASES = {
    "Dense": (nn.Dense(24), draw(5, 30)),
    "Dense, no bias": (nn.Dense(24, use_bias=False), draw(5, 30)),
    "Dense, many axes": (nn.Dense(24), draw(2, 3, 4, 30)),
    "Dense, no axes": (nn.Dense(24), draw(30)),
    "Conv, 1-d": (nn.Conv(24, (3,)), draw(2, 9, 8)),
    "Conv, 1-d causal": (nn.Conv(24, 3, padding="CAUSAL"), draw(2, 9, 8)),
    "Conv, strides": (nn.Conv(24, (3, 3), strides=2), draw(2, 7, 6, 8)),
    "Conv, dilation": (nn.Conv(24, (3, 2), kernel_dilation=2, padding="VALID"), draw(2, 7, 6, 8)),
    "Conv, input dilation": (nn.Conv(24, (3,), input_dilation=2, padding=1), draw(2, 5, 8)),
    "Conv, circular": (nn.Conv(24, (3, 3), padding="CIRCULAR"), draw(2, 7, 6, 8)),
    "Conv, pads": (nn.Conv(24, (3, 3), padding=[(2, 0), (0, 1)]), draw(2, 7, 6, 8)),
    "Conv, no batch, no bias": (nn.Conv(24, (3, 3), use_bias=False), draw(7, 6, 8)),
    "ConvTranspose": (nn.ConvTranspose(24, (3, 3), strides=(2, 2)), draw(2, 4, 5, 8)),
    "ConvTranspose, circular": (
        nn.ConvTranspose(24, (3,), strides=(2,), padding="CIRCULAR"),
        draw(2, 6, 8),
    ),
    "DenseGeneral, outputs": (nn.DenseGeneral((4, 6)), draw(5, 30)),
    "DenseGeneral, inputs": (nn.DenseGeneral(24, axis=(-2, -1)), draw(5, 6, 5)),
    "DenseGeneral, both": (nn.DenseGeneral((4, 6), axis=(1, -1)), draw(2, 6, 3, 5)),
    "DenseGeneral, batch": (nn.DenseGeneral((4, 6), batch_dims=(0,)), draw(3, 5, 30)),
    "attention to self": (ATTENTION, draw(2, 5, 24)),
    "attention": (ATTENTION, draw(2, 5, 24), draw(2, 7, 20)),
    "Embed": (nn.Embed(40, 24), tokens(2, 5)),
    "Embed, tied": (Tied(), tokens(2, 5)),
    "Sequential": (nn.Sequential([nn.Dense(24), nn.relu, nn.Dense(20)]), draw(5, 30)),
    "scan": (nn.scan(Block, **EACH, length=4)(), draw(5, 24), None),
    "scan of remat": (nn.scan(nn.remat(Block), **EACH, length=4)(), draw(5, 24), None),
    "vmap": (nn.vmap(nn.Dense, **EACH)(24), draw(3, 5, 30)),
    "RNN": (nn.RNN(nn.SimpleCell(24)), draw(2, 5, 30)),
}


# One case of each kind of layer and of lifting.
FAST = (
    "Dense, many axes",
    "Conv, strides",
    "ConvTranspose",
    "DenseGeneral, both",
    "attention",
    "Embed, tied",
    "scan of remat",
    "vmap",
)


@pytest.mark.parametrize("name", slow_except(FAST, CASES))
def test_outputs_and_gradients_are_those_of_the_truncated_tree(name):
    module, *args = CASES[name]
    check(module, *args)


def test_embed_attends_with_its_factors():
    check(nn.Embed(40, 24), draw(5, 24), method="attend")


def test_state_and_randomness_are_those_of_the_truncated_tree():
    check(Net(), draw(4, 5, 4, 8), **TRAIN)


LAYERS = {
    "Dense": (nn.Dense, (24,), draw(5, 30)),
    "DenseGeneral": (nn.DenseGeneral, ((4, 6),), draw(5, 30)),
    "Conv": (nn.Conv, (24, (3,)), draw(2, 9, 8)),
    "ConvTranspose": (nn.ConvTranspose, (24, (3,)), draw(2, 9, 8)),
    "Embed": (nn.Embed, (40, 24), tokens(2, 5)),
}


@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [(jnp.bfloat16, jnp.float32), (None, jnp.bfloat16), (jnp.float32, jnp.bfloat16)],
    ids=["compute", "params", "params only"],
)
@pytest.mark.parametrize(("layer", "fields", "inputs"), LAYERS.values(), ids=LAYERS.keys())
def test_dtypes_of_the_layer_hold(layer, fields, inputs, dtype, param_dtype):
    module = layer(*fields, dtype=dtype, param_dtype=param_dtype)
    thin, dense, plan = make_thin(module, inputs)
    assert [row.action for row in plan.values()] == ["factorize"]
    outputs = linen.apply(module, thin, inputs)
    assert_close(outputs, module.apply(dense, inputs), COARSE)


@pytest.mark.parametrize("name", ["Dense", "Conv", "ConvTranspose", "DenseGeneral", "attend"])
def test_thin_layers_are_cheaper(name):
    layer, fields, inputs = LAYERS.get(name, (nn.Embed, (40, 24), draw(5, 24)))
    module, kwargs = layer(*fields), {"method": name} if name == "attend" else {}
    thin, dense, _ = make_thin(module, inputs, **kwargs)
    run = lambda variables: linen.apply(module, variables, inputs, **kwargs)
    flops = lambda variables: jax.jit(run).lower(variables).cost_analysis()["flops"]
    assert flops(thin) < flops(dense) / 2


def test_apply_and_the_context_agree_eager_and_compiled_and_under_vmap():
    thin, dense, _ = make_thin(DENSE, INPUTS)
    outputs = linen.apply(DENSE, thin, INPUTS)
    with linen.factorized():
        np.testing.assert_array_equal(DENSE.apply(thin, INPUTS), outputs)
        assert_close(jax.jit(DENSE.apply)(thin, INPUTS), outputs)
        assert_close(jax.vmap(DENSE.apply, in_axes=(None, 0))(thin, INPUTS), outputs)
        stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), thin, thin)
        several = jax.vmap(DENSE.apply, in_axes=(0, None))(stacked, INPUTS)
        assert_close(several, jnp.stack([outputs, outputs]))
    assert_close(outputs, DENSE.apply(dense, INPUTS))


def test_the_inputs_may_be_named():
    thin, dense, _ = make_thin(DENSE, INPUTS)
    outputs = linen.apply(DENSE, thin, inputs=INPUTS)
    assert_close(outputs, DENSE.apply(dense, INPUTS))


def test_a_dense_tree_runs_as_without():
    images = draw(4, 5, 4, 8)
    module, variables = Net(), make_variables(Net(), images, **TRAIN)
    expected = module.apply(variables, images, **TRAIN)
    outputs = linen.apply(module, variables, images, **TRAIN)
    jax.tree.map(np.testing.assert_array_equal, outputs, expected)
    with linen.factorized():
        started = module.init(RNGS, images, train=True)
    jax.tree.map(np.testing.assert_array_equal, started, module.init(RNGS, images, train=True))


def test_some_kernels_may_stay_dense():
    module = nn.Sequential([nn.Dense(24), nn.relu, nn.Dense(20)])
    thin, dense, _ = make_thin(module, INPUTS)
    mixed = {"params": {**dense["params"], "layers_0": thin["params"]["layers_0"]}}
    assert_close(linen.apply(module, mixed, INPUTS), module.apply(dense, INPUTS))


def test_a_frozen_tree_runs_too():
    thin, dense, _ = make_thin(DENSE, INPUTS)
    outputs = linen.apply(DENSE, flax.core.freeze(thin), INPUTS)
    assert_close(outputs, DENSE.apply(dense, INPUTS))


@pytest.mark.parametrize("freeze", [lambda tree: tree, flax.core.freeze])
def test_a_tree_in_the_place_of_all_variables_is_refused(freeze):
    module = nn.Sequential([nn.Dense(24), nn.tanh, nn.Dense(20)])
    thin, _, _ = make_thin(module, INPUTS)
    words = r"`variables` must be \{\"params\": tree\}, .* 'layers_0', 'layers_2'\. Give"
    with pytest.raises(ValueError, match=words):
        linen.apply(module, freeze(thin["params"]), INPUTS)


def test_nothing_is_left_behind_by_the_context_not_even_after_an_error():
    thin, _, _ = make_thin(DENSE, INPUTS)
    with pytest.raises(ZeroDivisionError), linen.factorized():
        raise ZeroDivisionError
    with pytest.raises(TypeError):
        linen.apply(DENSE, thin, INPUTS.astype(str))
    with pytest.raises(Exception, match="kernel"):
        DENSE.apply(thin, INPUTS)
    with linen.factorized():
        with linen.factorized():
            DENSE.apply(thin, INPUTS)
        DENSE.apply(thin, INPUTS)


def test_training_goes_on_in_the_factors():
    module, targets = nn.Sequential([nn.Dense(24), nn.relu, nn.Dense(20)]), draw(5, 20)
    thin, _, _ = make_thin(module, INPUTS)
    optimizer = optax.sgd(0.01)

    def loss(variables):
        return jnp.mean((linen.apply(module, variables, INPUTS) - targets) ** 2)

    @jax.jit
    def step(variables, state):
        value, gradient = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(variables, updates), state, value

    state, values = optimizer.init(thin), []
    variables = thin
    for _ in range(5):
        variables, state, value = step(variables, state)
        values.append(float(value))
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]
    assert isinstance(variables["params"]["layers_0"]["kernel"], Factors)
