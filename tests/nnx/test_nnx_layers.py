"""Each layer of `flax.nnx`, thin: its outputs, its gradients and its parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.nnx_checks import by_path, close
from helpers.nnx_models import CASES, LAYERS, models, RANK
from helpers.slow import slow_except

import rmtjax
from rmtjax import nnx as rmt_nnx

# One case of each form of a thin layer, and of `nnx.vmap`.
FAST = (
    ("Linear", "fused"),
    ("Conv", "fused"),
    ("Einsum, batch", "fused"),
    ("Embed", "fused"),
    ("LoRALinear", "fused"),
    ("OptimizedLSTMCell", "each"),
    ("vmap", "fused"),
)
each_case = pytest.mark.parametrize("case", slow_except(FAST, CASES), scope="module")


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
def test_a_thin_layer_has_the_outputs_and_gradients_of_the_truncated_one(case):
    name, gates = case
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
def test_at_full_rank_a_thin_layer_is_the_layer(case):
    name, gates = case
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
def test_a_thin_layer_has_fewer_parameters(case):
    name, gates = case
    model, plan, truncated, thin = models(name, gates)
    count = lambda model: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    saved = 0
    for row in plan.values():
        batch, rows, columns = stacked(np.empty(row.shape), row.axes).shape
        saved += batch * (rows * columns - RANK * (rows + columns))
    assert count(model) - count(thin) == saved > 0
    assert count(truncated) == count(model)
