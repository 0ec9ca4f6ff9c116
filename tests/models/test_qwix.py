"""Factorized models under qwix: int8 weights and products, and adapters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from helpers.composition_models import Net, NnxNet
from helpers.linen_checks import assert_close, draw, Fixed, make_thin, RANK
from helpers.slow import slow_except

from rmtjax import Factors, linen, nnx as rmt_nnx

# Qwix calls Flax by its old names.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

X = jnp.asarray(draw(4, 6, 6, 8))
SEQUENCE = jnp.asarray(draw(3, 5, 32))


NET = Net()


def is_factors(leaf):
    return isinstance(leaf, Factors)


def run(params):
    return linen.apply(NET, {"params": params}, X)


def loss(params):
    return jnp.mean(jnp.sin(run(params)))


@pytest.fixture(scope="module")
def trees():
    """Parameters factorized, and truncated by the same plan."""
    thin, dense, _ = make_thin(NET, X)
    return thin["params"], dense["params"]


@pytest.fixture(scope="module")
def thin():
    model = NnxNet()
    return rmt_nnx.factorize(model, rmt_nnx.plan(model, rule=Fixed(RANK), min_size=1, multiple=1))


INT8 = [qwix.QuantizationRule(weight_qtype="int8", act_qtype="int8")]


def quantize(thin, quantized, inputs=X):
    """Factors in the boxes of qwix, and the other kernels by qwix itself."""
    like = jax.eval_shape(lambda: quantized.init(jax.random.key(0), inputs))["params"]

    def box(factor, wanted, axes):
        return wanted.replace(array=qwix.quantize(factor, "int8", channelwise_axes=axes))

    def visit(leaf, wanted):
        if not is_factors(leaf):
            if not hasattr(wanted, "how"):  # a bias
                return leaf
            return qwix.quantize_params({"kernel": leaf}, {"kernel": wanted})["kernel"]
        left, right = leaf  # a scale for each output of the one, and of the other
        channels = (left.ndim - 1,), tuple(range(1, right.ndim))
        return Factors(*map(box, leaf, (wanted, wanted), channels))

    boxes = lambda leaf: is_factors(leaf) or hasattr(leaf, "how")
    return jax.tree.map(visit, thin, like, is_leaf=boxes)


@pytest.mark.parametrize("how", slow_except(("jit",), ("eager", "jit")))
def test_int8_of_a_factorized_tree(trees, how):
    thin, dense = trees
    thin = {**thin, "Dense_1": dense["Dense_1"]}
    quantized = qwix.quantize_model(NET, qwix.PtqProvider(INT8))
    params = quantize(thin, quantized)
    apply = lambda params: linen.apply(quantized, {"params": params}, X)
    outputs = (jax.jit(apply) if how == "jit" else apply)(params)
    wanted = run(thin)
    # An entry is off by 1 / 254 of the largest of its channel at most, twice in five products.
    assert 0 < jnp.linalg.norm(outputs - wanted) < 0.03 * jnp.linalg.norm(wanted)
    products = [
        [variable.aval for variable in equation.invars]
        for equation in jax.make_jaxpr(apply)(params).eqns
        if equation.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    assert {aval.dtype for avals in products for aval in avals} == {jnp.dtype("int8")}
    kernels = [avals[1].shape for avals in products]
    assert kernels == [(3, 3, 8, RANK), (RANK, 24), (24, RANK), (RANK, 20), (20, 16)]


@pytest.mark.slow
def test_training_that_rounds_to_int8(trees):
    thin, _ = trees
    aware = qwix.quantize_model(NET, qwix.QtProvider(INT8))
    quantized = qwix.quantize_model(NET, qwix.PtqProvider(INT8))
    outputs = linen.apply(aware, {"params": thin}, X)
    wanted = linen.apply(quantized, {"params": quantize(thin, quantized)}, X)
    assert_close(outputs, wanted)  # of the same int8 values
    loss_of = lambda params: jnp.mean(jnp.sin(linen.apply(aware, {"params": params}, X)))
    near = lambda one, other: jnp.linalg.norm(one - other) < 0.2 * jnp.linalg.norm(other)
    assert all(jax.tree.leaves(jax.tree.map(near, jax.grad(loss_of)(thin), jax.grad(loss)(thin))))


def test_qwix_says_that_factors_are_not_quantized(trees):
    thin, _ = trees
    quantized = qwix.quantize_model(NET, qwix.PtqProvider(INT8))
    with pytest.raises(ValueError, match="unquantized param"):
        linen.apply(quantized, {"params": thin}, X)
    with pytest.raises(TypeError, match="Factors"):
        qwix.quantize_params(thin, quantized.init(jax.random.key(0), X)["params"])


def test_a_model_that_is_one_layer_is_put_into_another_first():
    inputs = jnp.asarray(draw(4, 30))
    alone, inside = nn.Dense(24), nn.Sequential([nn.Dense(24)])
    thin, _, _ = make_thin(alone, inputs)
    quantized = qwix.quantize_model(alone, qwix.PtqProvider(INT8))
    boxes = quantize(thin["params"], quantized, inputs)
    with (
        pytest.warns(UserWarning, match="multiplied out"),
        pytest.raises(TypeError, match=r"arrays .* got WithAux .*`nn\.Sequential\(\[layer\]\)`"),
    ):
        linen.apply(quantized, {"params": boxes}, inputs)
    quantized = qwix.quantize_model(inside, qwix.PtqProvider(INT8))
    outputs = linen.apply(quantized, {"params": {"layers_0": boxes}}, inputs)
    wanted = linen.apply(alone, thin, inputs)
    # An entry is off by 1 / 254 of the largest of its channel at most, twice in two products.
    assert 0 < jnp.linalg.norm(outputs - wanted) < 0.03 * jnp.linalg.norm(wanted)


@pytest.mark.slow
def test_int8_of_a_thin_model(thin):
    rules = [qwix.QuantizationRule(weight_qtype="int8")]
    quantized = qwix.quantize_model(thin, qwix.PtqProvider(rules), SEQUENCE)
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(quantized))
    held = {
        name: [leaf for key, leaf in leaves if name in str(key)] for name in ("qvalue", "scale")
    }
    assert all(leaf.dtype == np.int8 for leaf in held["qvalue"])
    rounded = iter([q * scale for q, scale in zip(*held.values(), strict=True)])
    scales = iter(held["scale"])

    def visit(half):
        value, scale = next(rounded), next(scales)
        assert (jnp.abs(value - half) <= 0.501 * scale).all()  # the nearest, up to float32
        return value

    both = lambda leaf: Factors(*map(visit, leaf)) if is_factors(leaf) else leaf
    params = jax.tree.map(both, rmt_nnx.params(thin), is_leaf=is_factors)
    assert (next(rounded, None), next(scales, None)) == (None, None)
    wanted = rmt_nnx.replace(thin, params)(SEQUENCE)
    for run in (quantized, nnx.jit(lambda x: quantized(x))):
        assert_close(run(SEQUENCE), wanted)
    # Ten products in a row of entries that are off by 1 / 255 of the largest in their sum.
    assert 0 < jnp.linalg.norm(wanted - thin(SEQUENCE)) < 0.03 * jnp.linalg.norm(wanted)


@pytest.mark.slow
def test_an_adapter_of_qwix_goes_over_each_factor(thin):
    provider = qwix.LoraProvider(rank=2, alpha=4.0, module_path="linear/.*_factor")
    model = qwix.apply_lora_to_model(thin, provider, SEQUENCE, rngs=nnx.Rngs(1))
    assert_close(model(SEQUENCE), thin(SEQUENCE), 0)  # it starts at 0
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))]
    assert shapes == [(32, 2), (2, RANK), (RANK, 2), (2, 24)]
