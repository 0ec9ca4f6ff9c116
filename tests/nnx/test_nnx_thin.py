"""Layers of `flax.nnx`: their axes, what a thin one costs, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.nnx_checks import by_path, close, rank_plan
from helpers.nnx_models import draw, Experts, LAYERS, linear, models, RANK, rngs

import rmtjax
from rmtjax import nnx as rmt_nnx
from rmtjax.nnx._variables import write


@pytest.mark.parametrize("name", ["Linear", "LinearGeneral, batch", "Einsum", "Conv", "GRUCell"])
def test_a_thin_layer_takes_fewer_operations(name):
    flops = []
    for model in models(name, "fused")[2:]:
        run = lambda tree, x, model=model: rmt_nnx.replace(model, tree)(x)
        lowered = jax.jit(run).lower(rmt_nnx.params(model), LAYERS[name][1])
        costs = lowered.compile().cost_analysis()
        flops.append((costs[0] if isinstance(costs, list) else costs)["flops"])
    assert flops[1] < flops[0]


def test_the_rest_of_a_layer_stays():
    calls = []

    def dot_general(*args, **kwargs):
        calls.append(args[1].shape)
        return jax.lax.dot_general(*args, **kwargs)

    options = {"dtype": jnp.bfloat16, "precision": "highest", "dot_general": dot_general}
    model = linear(**options)
    thin = rmt_nnx.factorize(model, rank_plan(model, RANK))
    assert isinstance(thin, nnx.Linear)
    assert (thin.in_features, thin.out_features, thin.use_bias) == (20, 16, True)
    assert thin(draw(5, 20)).dtype == jnp.bfloat16
    assert calls == [(20, RANK), (RANK, 16)]
    for factor in (thin.left_factor, thin.right_factor):
        assert type(factor) is nnx.Linear
        assert all(getattr(factor, name) is value for name, value in options.items())
    assert (thin.left_factor.bias, thin.right_factor.bias) == (None, thin.bias)
    np.testing.assert_array_equal(thin.bias[...], model.bias[...])


def test_who_reads_the_kernel_of_a_thin_layer_gets_the_product():
    for name, kernel in (("Linear", "kernel"), ("Embed", "table"), ("OptimizedLSTMCell", "cell")):
        _, _, truncated, thin = models(name, "each" if kernel == "cell" else "fused")
        if kernel == "cell":
            one, other = truncated.cell.dense_i.kernel, thin.cell.dense_i.kernel
        elif kernel == "table":
            one, other = truncated.table.embedding, thin.table.embedding
        else:
            one, other = truncated.kernel, thin.kernel
        close(other[...], one[...])


@pytest.mark.parametrize("name", ["Linear", "Embed", "OptimizedLSTMCell"])
def test_a_write_to_the_kernel_of_a_thin_layer_is_refused_with_the_way(name):
    thin = models(name, "fused")[3]
    layer = {"Embed": lambda: thin.table, "OptimizedLSTMCell": lambda: thin.cell.dense_i}
    layer = layer.get(name, lambda: thin)()
    kernel = layer.embedding if name == "Embed" else layer.kernel
    before = kernel[...]
    writes = [
        lambda: kernel.__setitem__(..., jnp.zeros_like(before)),
        lambda: write(kernel, jnp.zeros_like(before)),
    ]
    for one in writes:
        with pytest.raises(TypeError, match=r"`left_factor` and `right_factor`.*nnx.replace"):
            one()
    np.testing.assert_array_equal(kernel[...], before)


def test_an_adapter_goes_over_a_factor():
    *_, truncated, thin = models("Linear", "fused")
    thin = nnx.clone(thin)
    thin.left_factor = nnx.LoRA(20, 2, RANK, base_module=thin.left_factor, rngs=rngs())
    close(thin(draw(5, 20)), truncated(draw(5, 20)))  # it starts at 0
    paths = by_path(rmt_nnx.params(thin)).keys()
    assert {"left_factor/lora_a", "left_factor/base_module/kernel"} < paths
    close(rmt_nnx.replace(thin, rmt_nnx.params(thin))(draw(5, 20)), thin(draw(5, 20)))


class Scaled(nnx.Linear):
    """A subclass, which does something else with its kernel."""

    def __call__(self, x):
        return super().__call__(x * self.kernel[0, 0])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nnx.Conv(4, 8, 3, feature_group_count=2, rngs=rngs()), {"kernel": None}),
        (lambda: nnx.Conv(4, 8, 3, mask=jnp.ones((3, 4, 8)), rngs=rngs()), {"kernel": None}),
        (lambda: nnx.ConvTranspose(4, 8, 3, transpose_kernel=True, rngs=rngs()), {"kernel": None}),
        (lambda: nnx.Einsum("na,bc->nc", (4, 8), rngs=rngs()), {"kernel": None}),
        (
            lambda: nnx.Einsum("na,hab->nhb", (4, 8, 5), rngs=rngs()),
            {"kernel": rmtjax.KernelAxes((1,), (0, 2))},
        ),
        (lambda: Scaled(4, 8, rngs=rngs()), {}),
    ],
    ids=["grouped", "masked", "transposed", "einsum that sums", "einsum", "subclass"],
)
def test_axes_are_those_of_the_layer(make, expected):
    assert rmt_nnx.kernel_axes(make()) == expected


def test_axes_of_stacks_and_gates():
    assert rmt_nnx.kernel_axes(nnx.eval_shape(Experts)) == {
        "experts/kernel": rmtjax.KernelAxes((1, 2), (3,), (0,))
    }
    cell = nnx.GRUCell(10, 12, rngs=rngs())
    one = rmtjax.KernelAxes((1,), (2,), (0,))
    assert rmt_nnx.kernel_axes(cell, gates="each") == {
        "dense_h/kernel": one,
        "dense_i/kernel": one,
    }
    assert rmt_nnx.params(cell, gates="each")["dense_i"]["kernel"].shape == (3, 10, 12)
