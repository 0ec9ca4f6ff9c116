"""Merges of every tree that optax takes, of kernels with axes, and of factors."""

from collections import namedtuple
from dataclasses import dataclass

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.replica_cases import agreed, noisy, relative

import rmtjax
from rmtjax import Factors, KernelAxes, merge_replicas

TURNS = 3e-3  # as in `test_merge`
COUNT, SHAPE = 3, (30, 20)
CHANGES = noisy(COUNT, SHAPE)
KERNEL = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
KERNELS, WANTED = KERNEL + CHANGES, KERNEL + agreed(CHANGES)[0]
BIAS = np.ones(20, np.float32)
BIASES = BIAS + np.arange(COUNT, dtype=np.float32)[:, None]


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: jax.Array
    bias: jax.Array


Pair = namedtuple("Pair", ["weight", "bias"])
State = lambda kernel, bias: nnx.State(
    {"a": {"kernel": nnx.Param(kernel), "bias": nnx.Param(bias)}}
)
# A tree of a kernel and a bias, and the path of the kernel.
TREES = {
    "array": (lambda kernel, bias: kernel, ""),
    "dict": (lambda kernel, bias: {"a": {"kernel": kernel, "bias": bias}}, "a/kernel"),
    "list": (lambda kernel, bias: [bias, [kernel]], "1/0"),
    "tuple": (lambda kernel, bias: (kernel, bias), "0"),
    "NamedTuple": (Pair, "weight"),
    "None": (lambda kernel, bias: {"gone": None, "w": kernel}, "w"),
    "FrozenDict": (
        lambda kernel, bias: flax.core.freeze({"kernel": kernel, "bias": bias}),
        "kernel",
    ),
    "dataclass": (lambda kernel, bias: {"layer": Layer(kernel, bias)}, "layer/kernel"),
    "State": (State, "a/kernel"),
    "same names": (lambda kernel, bias: {"a": {"b": bias}, "a/b": bias, "w": kernel}, "w"),
}
EACH = pytest.mark.parametrize(("make", "path"), TREES.values(), ids=TREES)


@EACH
@pytest.mark.parametrize("form", ["axis", "list", "tuple"])
def test_any_tree_is_merged_from_an_axis_or_from_a_list(make, path, form):
    start = make(jnp.asarray(KERNEL), jnp.asarray(BIAS))
    trees = [make(*map(jnp.asarray, pair)) for pair in zip(KERNELS, BIASES, strict=True)]
    replicas = (
        make(KERNELS, BIASES) if form == "axis" else {"list": list, "tuple": tuple}[form](trees)
    )
    merged = merge_replicas(start, replicas, where=lambda name, leaf: name == path)
    assert list(merged.kept) == list(merged.rank) == [path]
    assert jax.tree.structure(merged.params) == jax.tree.structure(start)
    for leaf in jax.tree.leaves(merged.params):
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == jnp.float32
        if leaf.shape == SHAPE:
            assert relative(leaf, WANTED) < TURNS
        else:
            np.testing.assert_allclose(leaf, BIAS + 1)  # the mean of 0, 1 and 2


def test_what_is_no_kernel_is_averaged_or_that_of_the_first():
    key = jax.random.key
    start = {"scale": 1.0, "half": jnp.zeros(4, jnp.bfloat16), "z": jnp.zeros(2, jnp.complex64)}
    start |= {"count": 3, "on": jnp.zeros(2, bool), "key": key(0), "kernel": jnp.ones(3, jnp.int32)}
    replicas = [
        {"scale": 1.0 + i, "half": start["half"] + i, "z": start["z"] + i * 1j}
        | {"count": 5 + i, "on": jnp.arange(2) == i, "key": key(i), "kernel": start["kernel"] + i}
        for i in range(4)
    ]
    merged = merge_replicas(start, replicas).params
    assert float(merged["scale"]) == 2.5
    assert (merged["half"] == 1.5).all()
    assert merged["half"].dtype == jnp.bfloat16
    np.testing.assert_allclose(merged["z"], 1.5j)
    for name in ("count", "on", "key", "kernel"):
        first = replicas[0][name]
        assert (merged[name] == first).all() if hasattr(first, "shape") else merged[name] == first


def test_empty_trees_and_empty_kernels_pass():
    assert merge_replicas({}, {}) == ({}, {}, {})
    assert merge_replicas(None, [None, None]).params is None
    start = {"kernel": jnp.zeros((0, 4))}
    assert merge_replicas(start, [start, start]).params["kernel"].shape == (0, 4)


KINDS = {
    "conv": ("Conv_0/kernel", (3, 3, 4, 20), KernelAxes((0, 1, 2), (3,)), (36, 20)),
    "query": ("query/kernel", (30, 4, 5), KernelAxes((0,), (1, 2)), (30, 20)),
    "embedding": ("Embed_0/embedding", (80, 16), None, (80, 16)),
    "stack": ("x/kernel", (2, 30, 20), KernelAxes((1,), (2,), (0,)), (30, 20)),
    "stacks": ("x/kernel", (30, 2, 20, 3), KernelAxes((0,), (2,), (3, 1)), (30, 20)),
}


@pytest.mark.parametrize(("path", "shape", "axes", "sides"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_axes_make_matrices_of_kernels(path, shape, axes, sides, transform):
    named = axes or rmtjax.planning.guess_axes(path, np.zeros(shape))
    stack = int(np.prod([shape[axis] for axis in named.batch]))
    matrices = noisy(COUNT, (stack, *sides))
    inverse = np.argsort(named.order)
    ordered = [shape[axis] for axis in named.order]
    to_kernel = lambda stack: stack.reshape(ordered).transpose(inverse)
    layer, name = path.split("/")
    start = {layer: {name: np.ones(shape, np.float32)}}
    replicas = {layer: {name: 1 + np.stack([to_kernel(one) for one in matrices])}}
    call = transform(lambda *trees: merge_replicas(*trees, axes=axes and {path: axes}))
    merged = call(start, replicas)
    wanted = np.stack([agreed(matrices[:, index])[0] for index in range(stack)])
    assert relative(merged.params[layer][name], 1 + to_kernel(wanted)) < TURNS
    assert merged.kept[path].shape == merged.rank[path].shape == ()


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("rank", [4, 12])
def test_the_product_of_factors_is_merged_and_keeps_its_rank(transform, batch, rank):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    start = Factors(draw(*batch, 40, rank), draw(*batch, rank, 30))
    common = Factors(draw(*batch, 40, rank), draw(*batch, rank, 30))
    replicas = Factors(
        *(a + 0.3 * b + 0.1 * draw(COUNT, *a.shape) for a, b in zip(start, common, strict=True))
    )
    merged = transform(merge_replicas)({"kernel": start}, {"kernel": replicas})
    found = merged.params["kernel"]
    assert [factor.shape for factor in found] == [factor.shape for factor in start]
    product = lambda factors: np.matmul(*(np.asarray(factor, np.float64) for factor in factors))
    changes = product(replicas) - product(start)
    stack = changes.reshape(COUNT, -1, 40, 30)
    agreement = np.stack([agreed(stack[:, index])[0] for index in range(stack.shape[1])])
    wanted = product(start).reshape(-1, 40, 30) + agreement
    u, s, vt = np.linalg.svd(wanted)
    cut = (u[:, :, :rank] * s[:, None, :rank]) @ vt[:, :rank]
    assert relative(product(found).reshape(cut.shape), cut) < TURNS
    share = np.sum(agreement**2) / np.sum(stack.mean(axis=0) ** 2)
    np.testing.assert_allclose(merged.kept["kernel"], share, rtol=2 * TURNS)
    # The directions are those of the start, as far as a rotation brings them there.
    overlap = lambda a, b: np.sum(np.asarray(a) * b) / np.linalg.norm(a) / np.linalg.norm(b)
    assert overlap(found.left, start.left) + overlap(found.right, start.right) > 1.5


def test_factors_of_equal_replicas_give_their_product_back():
    rng = np.random.default_rng(0)
    draw = lambda: Factors(*map(jnp.asarray, (rng.normal(size=(40, 5)), rng.normal(size=(5, 30)))))
    start, after = draw(), draw()
    merged = merge_replicas({"kernel": start}, [{"kernel": after}] * 2)
    np.testing.assert_allclose(merged.kept["kernel"], 1, rtol=1e-4)
    # The product of 5 directions in float32, through two bases.
    assert relative(np.matmul(*merged.params["kernel"]), np.matmul(*after)) < 1e-4
    still = merge_replicas({"kernel": start}, [{"kernel": start}] * 2)
    for new, old in zip(still.params["kernel"], start, strict=True):
        assert new.dtype == old.dtype
    assert float(still.kept["kernel"]) == 0


def test_factors_with_nan_are_nan_and_of_a_rank_above_the_sides_are_padded():
    start = Factors(jnp.ones((6, 8)), jnp.ones((8, 4)))
    replicas = Factors(*(jnp.stack([a + 1, a + 2]) for a in start))
    found = merge_replicas({"kernel": start}, {"kernel": replicas}).params["kernel"]
    assert [factor.shape for factor in found] == [(6, 8), (8, 4)]
    assert np.isfinite(found.left).all()
    broken = replicas._replace(left=replicas.left.at[0, 0, 0].set(jnp.nan))
    merged = merge_replicas({"kernel": start}, {"kernel": broken})
    assert np.isnan(np.matmul(*merged.params["kernel"])).all()
    assert np.isnan(merged.kept["kernel"])


def test_where_leaves_a_kernel_to_be_averaged():
    start = {"a": {"kernel": KERNEL}, "b": {"kernel": KERNEL}}
    merged = merge_replicas(
        start, {"a": {"kernel": KERNELS}, "b": {"kernel": KERNELS}}, where="a/*"
    )
    assert list(merged.kept) == ["a/kernel"]
    np.testing.assert_allclose(
        merged.params["b"]["kernel"], KERNELS.mean(axis=0), rtol=1e-4, atol=1e-6
    )
