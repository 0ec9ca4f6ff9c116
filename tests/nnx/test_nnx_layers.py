"""Each layer of `flax.nnx`, thin: its outputs, its gradients and its parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.nnx_checks import by_path, close, rank_plan

import rmtjax
from rmtjax import nnx as rmt_nnx

RANK = 3


def rngs():
    return nnx.Rngs(0)


def draw(*shape):
    return jax.random.normal(jax.random.key(1), shape)


def linear(rows=20, columns=16, **options):
    return nnx.Linear(rows, columns, rngs=rngs(), **options)


class Attend(nnx.Module):
    """An embedding with its weights tied to the output."""

    def __init__(self):
        self.table = nnx.Embed(30, 16, rngs=rngs())

    def __call__(self, x):
        return self.table(jnp.arange(4)) @ x, self.table.attend(x.T)


class Steps(nnx.Module):
    """Two steps of a recurrent cell."""

    def __init__(self, cell):
        self.cell = cell

    def __call__(self, x):
        carry = jax.tree.map(jnp.zeros_like, self.cell.initialize_carry(x.shape, rngs()))
        for _ in range(2):
            carry, x_next = self.cell(carry, x)
        return carry, x_next


class Remat(nnx.Module):
    """A layer that is computed twice."""

    def __init__(self):
        self.inner = linear()

    @nnx.remat
    def __call__(self, x):
        return jnp.tanh(self.inner(x))


class Stack(nnx.Module):
    """Layers of one shape, run one after another by `nnx.scan`."""

    def __init__(self):
        make = nnx.vmap(lambda rngs: nnx.Linear(12, 12, rngs=rngs))
        self.layers = nnx.split_rngs(splits=4)(make)(rngs())

    def __call__(self, x):
        run = nnx.scan(
            lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return run(x, self.layers)


class Experts(nnx.Module):
    """Convolutions of one shape, each for its own inputs, as `nnx.vmap` makes them."""

    def __init__(self):
        make = nnx.vmap(lambda rngs: nnx.Conv(4, 12, 3, rngs=rngs))
        self.experts = nnx.split_rngs(splits=3)(make)(rngs())

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=0, out_axes=0)(self.experts, x)


LORA = {"lora_rank": 2, "b_initializer": nnx.initializers.normal()}
LAYERS = {
    "Linear": (linear, draw(5, 20)),
    "Linear, no bias": (lambda: linear(use_bias=False), draw(5, 20)),
    "LinearGeneral": (
        lambda: nnx.LinearGeneral((4, 5), (3, 6), axis=(1, -1), rngs=rngs()),
        draw(3, 4, 2, 5),
    ),
    "LinearGeneral, batch": (
        lambda: nnx.LinearGeneral(10, 12, batch_axis={0: 3}, rngs=rngs()),
        draw(3, 2, 10),
    ),
    "Einsum": (
        lambda: nnx.Einsum("nta,ahb->nthb", (20, 4, 5), (4, 5), rngs=rngs()),
        draw(3, 2, 20),
    ),
    "Einsum, batch": (
        lambda: nnx.Einsum("...ea,eab->...eb", (3, 10, 12), (3, 12), rngs=rngs()),
        draw(2, 3, 10),
    ),
    "Conv": (
        lambda: nnx.Conv(4, 16, (3, 3), 2, padding=1, kernel_dilation=(2, 1), rngs=rngs()),
        draw(2, 9, 8, 4),
    ),
    "Conv 1x1": (lambda: nnx.Conv(20, 16, (1, 1), rngs=rngs()), draw(2, 3, 3, 20)),
    "Conv, circular": (
        lambda: nnx.Conv(4, 16, 4, padding="CIRCULAR", rngs=rngs()),
        draw(2, 3, 9, 4),
    ),
    "ConvTranspose": (
        lambda: nnx.ConvTranspose(4, 16, (3, 3), 2, padding="VALID", rngs=rngs()),
        draw(2, 4, 3, 4),
    ),
    "ConvTranspose, circular": (
        lambda: nnx.ConvTranspose(4, 16, 5, 3, padding="CIRCULAR", rngs=rngs()),
        draw(2, 6, 4),
    ),
    "Embed": (Attend, draw(16, 2)),
    "MultiHeadAttention": (
        lambda: nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs()),
        draw(2, 5, 16),
    ),
    "LoRALinear": (lambda: nnx.LoRALinear(20, 16, **LORA, rngs=rngs()), draw(5, 20)),
    "LoRA": (
        lambda: nnx.LoRA(20, 2, 16, base_module=linear(), rngs=rngs()),
        draw(5, 20),
    ),
    "LSTMCell": (lambda: Steps(nnx.LSTMCell(10, 12, rngs=rngs())), draw(2, 10)),
    "OptimizedLSTMCell": (lambda: Steps(nnx.OptimizedLSTMCell(10, 12, rngs=rngs())), draw(2, 10)),
    "GRUCell": (lambda: Steps(nnx.GRUCell(10, 12, rngs=rngs())), draw(2, 10)),
    "SimpleCell": (lambda: Steps(nnx.SimpleCell(10, 12, rngs=rngs())), draw(2, 10)),
    "RNN": (lambda: nnx.RNN(nnx.GRUCell(10, 12, rngs=rngs())), draw(2, 3, 10)),
    "remat": (Remat, draw(5, 20)),
    "scan": (Stack, draw(5, 12)),
    "vmap": (Experts, draw(3, 2, 6, 4)),
}
EACH = ("OptimizedLSTMCell", "GRUCell", "RNN")
CASES = [(name, "fused") for name in LAYERS] + [(name, "each") for name in EACH]
each_case = pytest.mark.parametrize(("name", "gates"), CASES, ids=lambda part: part)


@functools.cache
def models(name, gates):
    """A layer with biases that are not 0, its plan, and the layer truncated and made thin."""
    model = LAYERS[name][0]()
    biased = lambda path, leaf: leaf + 0.3 if "bias" in str(path) else leaf
    tree = jax.tree_util.tree_map_with_path(biased, rmt_nnx.params(model))
    model = rmt_nnx.replace(model, tree)
    plan = rank_plan(model, RANK, gates=gates)
    return model, plan, rmt_nnx.truncate(model, plan), rmt_nnx.factorize(model, plan)


def loss(tree, x, model):
    outputs = rmt_nnx.replace(model, tree)(x)
    return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs)), outputs


def stacked(kernel, axes):
    """A kernel as a stack of matrices, by hand."""
    order = (*axes.batch, *axes.inputs, *axes.outputs)
    rows = [np.prod([kernel.shape[axis] for axis in group], dtype=int) for group in axes]
    matrices = np.transpose(np.asarray(kernel, np.float64), order)
    return matrices.reshape(rows[2], rows[0], rows[1])


@each_case
def test_a_thin_layer_has_the_outputs_and_gradients_of_the_truncated_one(name, gates):
    _, plan, truncated, thin = models(name, gates)
    x = LAYERS[name][1]
    both = truncated, thin
    trees = [rmt_nnx.params(model, gates=gates) for model in both]
    run = [jax.grad(functools.partial(loss, model=model), (0, 1), has_aux=True) for model in both]
    dense, thin = jax.jit(
        lambda trees, x: [f(tree, x) for f, tree in zip(run, trees, strict=True)]
    )(trees, x)
    close(thin[1], dense[1])  # the outputs
    close(thin[0][1], dense[0][1])  # the gradients of the inputs
    of_dense, of_thin, factors = by_path(dense[0][0]), by_path(thin[0][0]), by_path(trees[1])
    assert of_dense.keys() == of_thin.keys()
    for path in of_dense:
        if path not in plan:
            close(of_thin[path], of_dense[path])
            continue
        # The chain rule of the product: dL/dleft = G right^T, dL/dright = left^T G.
        gradient = stacked(of_dense[path], plan[path].axes)
        batch, rows, columns = gradient.shape
        left = np.asarray(factors[path].left, np.float64).reshape(batch, rows, RANK)
        right = np.asarray(factors[path].right, np.float64).reshape(batch, RANK, columns)
        close(of_thin[path].left.reshape(left.shape), gradient @ right.transpose(0, 2, 1))
        close(of_thin[path].right.reshape(right.shape), left.transpose(0, 2, 1) @ gradient)


@each_case
def test_at_full_rank_a_thin_layer_is_the_layer(name, gates):
    model, plan, *_ = models(name, gates)
    full = {
        path: dataclasses.replace(row, rank=min(stacked(np.empty(row.shape), row.axes).shape[1:]))
        for path, row in plan.items()
    }
    thin = rmt_nnx.factorize(model, rmtjax.Plan(full))
    x = LAYERS[name][1]
    close(thin(x), model(x))  # eager
    merged = rmt_nnx.merge(thin)
    assert nnx.graphdef(merged) == nnx.graphdef(model)
    close(rmt_nnx.params(merged), rmt_nnx.params(model))


@each_case
def test_a_thin_layer_has_fewer_parameters(name, gates):
    model, plan, truncated, thin = models(name, gates)
    count = lambda model: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    saved = 0
    for row in plan.values():
        batch, rows, columns = stacked(np.empty(row.shape), row.axes).shape
        saved += batch * (rows * columns - RANK * (rows + columns))
    assert count(model) - count(thin) == saved > 0
    assert count(truncated) == count(model)
