"""The layer table of `docs/layers.md` for kernels in other parts than two factors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layer_apis import assert_close, by_path, CAPABILITIES, Linen, Nnx, OPTIONS
from helpers.layer_cases import CASES
from helpers.slow import slow_except

import rmtjax
from rmtjax import checkpoint, KernelAxes, lowrank, ranks
from rmtjax._axes import FactoredKernel

# Kernels are 20 x 16; those of convolutions have a window of 2 x 2 and 5 channels.
MODES = {
    "operator": {"dense": ((4, 4), (5, 4)), "conv": ((1, 4), (5, 4))},
    "state": {"dense": ((4, 1), (5, 1), (1, 4), (1, 4)), "conv": ((5, 1), (1, 4), (1, 4))},
}
LAYERS = {
    "linen-Dense": "dense",
    "linen-DenseGeneral": "dense",
    "linen-Einsum": "dense",
    "linen-Conv": "conv",
    "linen-Conv, strides, padding, dilation": "conv",
    "linen-ConvTranspose": "conv",
    "linen-remat": "dense",
    "linen-own layer, registered": "dense",
    "nnx-Linear": "dense",
    "nnx-LinearGeneral": "dense",
    "nnx-Einsum": "dense",
    "nnx-Conv": "conv",
    "nnx-Conv, strides, padding, dilation": "conv",
    "nnx-ConvTranspose": "conv",
    "nnx-remat": "dense",
    "nnx-own layer, registered": "dense",
}
KINDS = ("spectral", "spatial", "operator", "state")
ALL = [
    f"{kind}-{layer}"
    for kind in KINDS
    for layer, form in LAYERS.items()
    if kind != "spatial" or form == "conv"
]
FAST = ("operator-linen-Dense", "operator-nnx-Conv", "spatial-linen-Conv", "spectral-nnx-Linear")
each_layer = pytest.mark.parametrize("name", slow_except(FAST, ALL), scope="module")


def to_parts(tree, kind, form, axes):
    """The tree with its kernels in parts, cut so that they differ from the kernels."""
    paths = {
        path: axes for path in by_path(tree) if path.rpartition("/")[2] in ("kernel", "weight")
    }
    if kind in MODES:
        modes = dict.fromkeys(paths, MODES[kind][form])
        return lowrank.to_trains(tree, modes, rule=ranks.fixed(3), axes=paths).params
    return lowrank.to_spectral(tree, rank=6, spatial=kind == "spatial", axes=paths)


@functools.cache
def layer(name):
    kind, _, name = name.partition("-")
    api, form = name.partition("-")[0], LAYERS[name]
    found = {"linen": Linen, "nnx": Nnx}[api](CASES[name])
    axes = {path: row.axes for path, row in found.analyze().plan.items()}
    assert len(axes) == 1
    (axes,) = axes.values()
    convert = functools.partial(to_parts, kind=kind, form=form, axes=axes)
    if api == "linen":
        found.factorize = lambda model, plan: convert(model)
        found.truncate = lambda model, plan: rmtjax.merge(convert(model))
    else:
        change = lambda model, tree: rmtjax.nnx.replace(model, tree)
        found.factorize = lambda model, plan: change(model, convert(found.tree(model)))
        found.truncate = lambda model, plan: change(model, rmtjax.merge(convert(found.tree(model))))
    return found


def held(found):
    leaves = by_path(found.tree(found.thin))
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, FactoredKernel)}


@each_layer
def test_analyze(name):
    found = layer(name)
    rule = {**OPTIONS, "min_size": 1}
    # A registered layer has a kernel of another name.
    paths = {path: leaf.axes for path, leaf in held(found).items()}
    plan = rmtjax.plan(found.tree(found.thin), multiple=1, axes=paths, **rule)
    dense = by_path(found.tree(found.truncated))
    for path, leaf in held(found).items():
        row = plan[path]
        assert row.reason.startswith(f"kept: held as {type(leaf).__name__} (rank 3 of ")
        assert row.axes == leaf.axes
        assert row.cost.parameters == sum(part.size for part in jax.tree.leaves(leaf))
        matrix = np.asarray(dense[path], np.float64).reshape(20, 16)
        expected = np.linalg.svd(matrix, compute_uv=False) ** 2 / 20
        # Float32, relative to the largest.
        np.testing.assert_allclose(
            row.spectrum.eigenvalues, expected, rtol=0, atol=1e-5 * expected.max()
        )


@each_layer
def test_factorize(name):
    """Outputs and gradients are those of the product, by the chain rule for the parts."""
    found = layer(name)
    assert held(found)
    _, outputs, grads, of_inputs = found.gradients("thin")
    _, wanted, of_dense, wanted_of_inputs = found.gradients("truncated")
    assert_close(outputs, wanted)
    assert_close(of_inputs, wanted_of_inputs)
    _, pull = jax.vjp(rmtjax.merge, found.tree(found.thin))
    (expected,) = pull(of_dense)
    assert_close(by_path(grads), by_path(expected))
    assert not found.words


@each_layer
def test_train_on(name):
    found = layer(name)
    trained = found.step()
    before, after = by_path(found.tree(found.thin)), by_path(found.tree(trained))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for one, other in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert np.any(one != other)
    assert found.gradient(trained)[0] < found.gradients("thin")[0]


@each_layer
def test_save(name, tmp_path):
    found, tree = layer(name), layer(name).tree(layer(name).thin)
    plan = rmtjax.plan(tree, multiple=1, **OPTIONS)
    for path in (tmp_path / "thin.safetensors", tmp_path / "orbax"):
        checkpoint.save(path, tree, plan)
        restored = checkpoint.restore(path)
        assert jax.tree.structure(restored) == jax.tree.structure(tree)
        jax.tree.map(np.testing.assert_array_equal, restored, tree)
        alike = checkpoint.restore(path, like=tree)
        jax.tree.map(np.testing.assert_array_equal, alike, tree)
        words = lambda plan: {path: row.reason for path, row in plan.items()}
        assert words(checkpoint.load_plan(path)) == words(plan)
    wanted = found.gradients("thin")[1]
    jax.tree.map(np.testing.assert_array_equal, found.gradient(found.refill(restored))[1], wanted)


@pytest.mark.slow  # compiles four models
@pytest.mark.parametrize("kind", ["spectral", "operator", "state"])
@pytest.mark.parametrize("name", ["linen-scan", "linen-vmap", "nnx-scan", "nnx-vmap", "nnx-shared"])
def test_stacks_run_in_loops_and_shared_kernels_once(name, kind):
    """Each member of a stack has its cores; layers that share a kernel share its parts."""
    found = {"linen": Linen, "nnx": Nnx}[name.partition("-")[0]](CASES[name])
    ((path, row),) = found.analyze().plan.items()
    rows = row.shape[-2]
    modes = {"operator": ((4, 4), (rows // 4, 4)), "state": ((rows, 1), (1, 4), (1, 4))}
    tree, options = found.tree(found.model), {"axes": {path: row.axes}}
    if kind == "spectral":
        parts = lowrank.to_spectral(tree, rank=6, **options)
    else:
        parts = lowrank.to_trains(tree, {path: modes[kind]}, rule=ranks.fixed(3), **options).params
    assert isinstance(by_path(parts)[path], FactoredKernel)
    outputs = [found.gradient(found.refill(one))[1] for one in (parts, rmtjax.merge(parts))]
    assert_close(*outputs)
    again = found.tree(found.refill(parts))
    assert jax.tree.structure(again) == jax.tree.structure(parts)


def test_every_capability_of_the_table_is_a_test():
    tests = {name.removeprefix("test_").replace("_", " ") for name in globals()}
    # A plan does not truncate what is held in parts.
    assert tests >= {*CAPABILITIES} - {"truncate"}


def test_files_are_analyzed_and_compressed_beside_kernels_in_parts(tmp_path):
    draw = lambda seed: jax.random.normal(jax.random.key(seed), (64, 48))
    params = {"a": {"kernel": draw(0)}, "b": {"kernel": draw(1)}}
    modes = {"b/kernel": lowrank.operator_modes((8, 8), (8, 6))}
    tree = lowrank.to_trains(params, modes, rule=ranks.fixed(3)).params
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    checkpoint.save(path, tree)
    report = checkpoint.analyze_file(path, rule=ranks.fixed(4), min_size=1)
    assert [row.action for row in report.rows] == ["factorize", "keep"]
    checkpoint.compress_file(path, out, rule=ranks.fixed(4), min_size=1, multiple=1)
    thin = checkpoint.restore(out)
    assert thin["a"]["kernel"].left.shape == (64, 4)
    jax.tree.map(np.testing.assert_array_equal, thin["b"], tree["b"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "Tucker"}, "KeyError 'Tucker'"),
        ({"names": ["cores/0", "cores/7"]}, "KeyError 'b/kernel/cores/7'"),
        ({"inputs": [8, 4]}, "do not give"),
        ({"inputs": None}, "TypeError"),
        ({"names": []}, "cannot be read"),
    ],
)
def test_a_manifest_whose_parts_do_not_fit_is_damaged(change, words):
    from rmtjax.checkpoint import _manifest, _tensor_names

    cores = tuple(jnp.ones(shape) for shape in ((1, 8, 8, 3), (3, 8, 6, 1)))
    leaf = lowrank.TensorTrain(cores, (64,), (48,))
    stored = _tensor_names.named_parts("b/kernel", leaf)
    described = _tensor_names.describe_parts({"b/kernel": leaf})
    text = _manifest.to_json(None, parts=described)
    fields = _manifest.parse(text).parts["b/kernel"]
    assert jax.tree.structure(
        _tensor_names._restore_parts("b/kernel", fields, stored)
    ) == jax.tree.structure(leaf)
    with pytest.raises(ValueError, match="the parts of 'b/kernel' cannot be read") as error:
        _tensor_names._restore_parts("b/kernel", {**fields, **change}, stored)
    assert words in str(error.value)


def test_spectral_parts_that_do_not_fit_are_refused():
    kernel = lowrank.to_spectral({"kernel": jnp.ones((6, 4))})["kernel"]
    parts = jax.tree.leaves(kernel)
    restore = lowrank.SpectralFactors.restore
    assert jax.tree.structure(restore({"spatial": False}, parts)) == jax.tree.structure(kernel)
    for description, wrong in (
        ({"spatial": False}, [parts[0], parts[1][:2], parts[2]]),
        ({"spatial": True}, parts),
        ({"spatial": 1}, parts),
        ({"spatial": False}, parts[:2]),
    ):
        with pytest.raises(ValueError, match=r"fit together|does not describe"):
            restore(description, wrong)


def test_an_embedding_in_an_operator_is_multiplied_out_with_a_warning():
    case = CASES["linen-Embed"]
    found = Linen(case)
    (path,) = by_path(found.model)
    modes = {path: MODES["operator"]["dense"]}
    tree = lowrank.to_trains(found.model, modes, rule=ranks.fixed(3)).params
    with pytest.warns(UserWarning, match="multiplied out"):
        outputs = rmtjax.linen.apply(case.make(), {"params": tree}, *case.inputs)
    dense = case.make().apply({"params": rmtjax.merge(tree)}, *case.inputs)
    assert_close(outputs, dense)


def test_replicas_in_parts_are_refused():
    tree = lowrank.to_spectral({"kernel": jnp.ones((20, 16))})
    with pytest.raises(ValueError, match="`start` holds 'kernel' as SpectralFactors"):
        rmtjax.merge_replicas(tree, [tree, tree])


def test_axes_of_a_train_are_those_of_its_kernel():
    train = lowrank.tensor_train(
        jnp.ones((2, 2, 5, 16)), MODES["operator"]["conv"], axes=KernelAxes((0, 1, 2), (3,))
    ).train
    assert train.axes == KernelAxes((0, 1, 2), (3,))
