"""Kernels by the names that libraries give them, and the proofs that they are no stacks."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import rmtjax
from rmtjax import KernelAxes
from rmtjax.planning import find_kernels, guess_axes, is_kernel, Neighbours

NOISE = np.random.default_rng(0).normal(size=(80, 60)).astype(np.float32)
SIGNAL = NOISE + np.float32(0.5)


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def axes_in(tree):
    """The axes of all kernels of a tree of shapes, by path."""
    shapes = jax.tree.map(lambda shape: shaped(*shape), tree, is_leaf=lambda x: type(x) is tuple)
    return {path: getattr(view, "axes", None) for path, view in find_kernels(shapes).items()}


@pytest.mark.parametrize(
    ("name", "shape", "axes"),
    [
        ("Dense_0/kernel", (80, 60), KernelAxes((0,), (1,))),
        ("layers/kernel", (4, 80, 60), None),  # a stack, by nothing told from a convolution
        ("embeddings.word_embeddings.weight", (80, 60), KernelAxes((0,), (1,))),
        ("conv1.weight", (60, 8, 3, 3), KernelAxes((0,), (1, 2, 3))),
        ("depthwise.weight", (60, 1, 3, 3), None),
        ("experts.weight", (64, 96, 64), None),  # a stack
        ("conv.weight", (64, 96, 64), KernelAxes((0,), (1, 2))),
        ("proj.weight", (64, 96, 16), KernelAxes((0,), (1, 2))),  # as long as a window
        ("self_attn.in_proj_weight", (180, 60), KernelAxes((0,), (1,))),
        ("lstm.weight_hh_l1_reverse", (240, 60), KernelAxes((0,), (1,))),
        ("mlp/~/linear_0/w", (80, 60), KernelAxes((0,), (1,))),
        ("embed/embeddings", (80, 60), KernelAxes((0,), (1,))),
        ("norm1.weight", (64, 64), None),
        ("ln_f.weight", (64, 64), None),
        ("layers.0.input_layernorm.weight", (64, 64), None),
        ("bn2.weight", (64, 64), None),
    ],
)
def test_kernels_are_known_by_name(name, shape, axes):
    leaf = shaped(*shape)
    assert is_kernel(name, leaf)
    assert guess_axes(name, leaf) == axes


@pytest.mark.parametrize(
    "name",
    ["norm.weight", "q.lora_A.weight", "q/lora_B/kernel", "a.hada_w1_b.weight", "ia3_l.weight"],
)
def test_vectors_and_adapters_are_not_kernels(name):
    assert not is_kernel(name, shaped(60) if name == "norm.weight" else shaped(80, 60))


TREES = {
    "Torch": {"layer.0.weight": SIGNAL, "layer.0.bias": SIGNAL[0]},
    "dotted Flax": {"params.Dense_0.kernel": SIGNAL},
    "tuples": traverse_util.flatten_dict({"Dense_0": {"kernel": SIGNAL, "bias": SIGNAL[0]}}),
    "Haiku": {"mlp/~/linear_0": {"w": SIGNAL, "b": SIGNAL[0]}},
    "Equinox": {"layers": [{"weight": SIGNAL}]},
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_kernels_of_other_libraries_are_planned_cut_and_pruned(tree):
    plan = rmtjax.plan(tree, multiple=1)
    (row,) = plan.values()
    assert row.rank == row.fit.num_spikes == 1
    cut = jax.tree.leaves(rmtjax.truncate(tree, plan))
    (matrix,) = (leaf for leaf in cut if leaf.ndim == 2)
    u, s, vt = np.linalg.svd(SIGNAL.astype(np.float64), full_matrices=False)
    # Rounding in float32 of entries up to 4.
    np.testing.assert_allclose(matrix, s[0] * np.outer(u[:, 0], vt[0]), atol=1e-5)
    state = rmtjax.prune_spectrum(1).init(tree)
    assert [*state.ranks] == [*plan]


@pytest.mark.parametrize("name", ["gate_up_proj", "weight_v", "original1", "weight_orig", "table"])
def test_other_floating_leaves_of_two_axes_are_told(name):
    tree = {
        "a": {"kernel": SIGNAL, name: SIGNAL, "bias": SIGNAL[0], "count": jnp.ones((3, 3), int)}
    }
    plan = rmtjax.plan(tree)
    assert [*plan] == ["a/kernel", f"a/{name}"]
    assert plan[f"a/{name}"].reason == "kept: not a kernel by its name, unless `where` chooses it"
    assert rmtjax.plan(tree, where=f"a/{name}")[f"a/{name}"].rank == 8


def test_adapters_are_told_in_files_of_torch_and_not_in_layers_of_flax():
    tree = {"q.lora_A.weight": SIGNAL, "k.lora_a": SIGNAL, "kernel": SIGNAL}
    assert [*rmtjax.plan(tree)] == ["kernel", "q.lora_A.weight"]


def test_a_tree_without_kernels_is_not_planned_in_silence():
    tree = {"a": {"table": NOISE, "bias": NOISE[0]}}
    masked = lambda tree: rmtjax.sparsity.magnitude_mask(tree, 0.5)
    for run in (rmtjax.plan, rmtjax.analyze, rmtjax.penalty, masked):
        with pytest.raises(
            ValueError, match=r"no tensor is chosen as a kernel, of 2 such as 'a/bias'"
        ):
            run(tree)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: rmtjax.prune_spectrum(1), "prune_spectrum"),
        (lambda: rmtjax.prune_entries(0.5), "prune_entries"),
        (lambda: rmtjax.agree(2), "agree"),
        (lambda: rmtjax.lowrank.shrink_tail(2, strength=0.1), "shrink_tail"),
        (lambda: rmtjax.admm(jnp.sign), "admm"),
        (lambda: rmtjax.drop_and_grow(optax.identity(), 2), "drop_and_grow"),
    ],
)
def test_a_transform_that_will_never_change_a_kernel_says_so(make, name):
    with pytest.warns(
        UserWarning, match=rf"`{name}` will never change a kernel. no tensor is chosen"
    ):
        make().init({"table": NOISE})
    with pytest.warns(UserWarning, match="will never change"):
        optax.masked(make(), {"kernel": False, "bias": True}).init(
            {"kernel": NOISE, "bias": NOISE[0]}
        )


@pytest.mark.parametrize("where", ["*attn*", ["kernel", "*attn*"], re.compile("attn")], ids=str)
def test_a_pattern_that_matches_nothing_is_refused_by_transforms_too(where):
    tree = {"kernel": NOISE, **{f"b{i}": NOISE[0] for i in range(8)}}
    words = r"attn.*' matches no tensor, of 9 such as 'kernel', 'b0', 'b1', 'b2', 'b3', \.\.\."
    with pytest.raises(ValueError, match=words):
        rmtjax.prune_spectrum(1, where=where).init(tree)
    # The pattern may be of what is hidden, and a group without leaves has nothing to match.
    mask = {name: name != "kernel" for name in tree}
    hides = optax.masked(rmtjax.prune_spectrum(1, where=where), mask)
    with pytest.warns(UserWarning, match=r"chosen by `where=.*attn.*` as a kernel, of 8 such as"):
        hides.init(tree)
    rmtjax.prune_spectrum(1, where=where).init({})


def test_a_function_or_a_mask_that_chooses_nothing_is_told_as_such():
    for where, who in ((lambda path, leaf: False, "function"), ({"kernel": False}, "mask")):
        with pytest.warns(UserWarning, match=f"no tensor is chosen by the {who} `where`"):
            rmtjax.prune_spectrum(1, where=where).init({"kernel": NOISE})


def test_a_transform_says_why_kernels_are_left_alone():
    with pytest.warns(UserWarning, match="'a/kernel': short side 8 under 50"):
        rmtjax.prune_spectrum(1).init({"a": {"kernel": jnp.ones((8, 90))}})


class Attention(nn.Module):
    """Attention that is scanned over layers, or not."""

    bias: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        return nn.MultiHeadDotProductAttention(4, use_bias=self.bias, name="attention")(x), None


class Convolutions(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), use_bias=self.bias, name="conv_in")(x)
        return nn.Conv(8, (3, 3), use_bias=self.bias)(nn.BatchNorm(True)(x))


def shapes_of(module, *args, vmapped=0):
    init = lambda key: module.init(key, *args)["params"]
    keys = jax.random.key(0)
    if vmapped:
        init, keys = jax.vmap(init), jax.random.split(keys, vmapped)
    return jax.eval_shape(init, keys)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_known_by_its_four_projections(bias):
    params = shapes_of(Attention(bias), jnp.ones((2, 5, 16)))
    views = find_kernels(params)
    for name in ("query", "key", "value"):
        assert views[f"attention/{name}/kernel"].axes == KernelAxes((0,), (1, 2))
    assert views["attention/out/kernel"].axes == KernelAxes((0, 1), (2,))


@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_are_known_by_vectors_beside_them(bias):
    views = find_kernels(shapes_of(Convolutions(bias), jnp.ones((2, 9, 9, 4))))
    assert len(views) == 2
    assert {view.axes for view in views.values()} == {KernelAxes((0, 1, 2), (3,))}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [3, 16])  # as many as a window is long, and as there are features
def test_an_ensemble_is_never_read_as_one_matrix(count, bias):
    for module, x in ((Convolutions(bias), (2, 9, 9, 4)), (Attention(bias), (2, 5, 16))):
        params = shapes_of(module, jnp.ones(x), vmapped=count)
        assert not any(hasattr(view, "axes") for view in find_kernels(params).values())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["query", "out", "conv_in", "key", "Conv_0"])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("layers", [3, 64])
def test_a_scanned_dense_layer_is_never_read_as_one_matrix(layers, place, name, bias):
    stack = lambda *shape: (*shape[:place], layers, *shape[place:])
    kernels = {n: {"kernel": stack(64, 32)} for n in ("query", "key", "value", name)}
    kernels["out"] = {"kernel": stack(32, 64)}
    if bias:
        kernels[name]["bias"] = (layers, 32) if place == 0 else (32, layers)
    # Another layer beside the stack proves nothing on it.
    tree = {"encoder": {"layer": kernels}, "head": {"kernel": (64, 10), "bias": (10,)}}
    found = axes_in(tree)
    assert found.pop("head/kernel") == KernelAxes((0,), (1,))
    assert not any(found.values())


def test_torch_weights_beside_a_bias_of_their_shape_are_not_matrices():
    tree = {"0.weight": (64, 64), "0.bias": (64, 64), "1.weight": (64, 64), "1.bias": (64,)}
    assert axes_in(tree) == {"0.weight": None, "1.weight": KernelAxes((0,), (1,))}
    stacked = {"conv.weight": (5, 64, 32, 3, 3), "conv.bias": (5, 64)}
    assert axes_in(stacked) == {"conv.weight": None}


def test_scalars_of_a_stack_prove_nothing():
    # One number for each of the layers has one axis as well.
    leaves = {"b/Conv_0/kernel": shaped(3, 3, 8, 16), "b/gain": shaped(3)}
    assert guess_axes("b/Conv_0/kernel", leaves["b/Conv_0/kernel"], Neighbours(leaves)) is None
