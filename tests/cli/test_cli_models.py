"""The commands that run a model: moments of its kernels, and the drift of its outputs."""

import json

import jax
import numpy as np
import pytest
from helpers.cli_models import names_of, usage_error

import rmtjax
from rmtjax import checkpoint, cli
from rmtjax.cli import _models

BUILD = """
import flax.linen as nn, jax, jax.numpy as jnp
from flax import nnx

def linen():
    module = nn.Sequential([nn.Dense(96), nn.relu, nn.Dense(60)])
    return module, module.init(jax.random.key(0), jnp.ones((1, 80)))

def thin():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(80, 96, rngs=rngs), nnx.relu, nnx.Linear(96, 60, rngs=rngs))

class Torch(nn.Module):
    @nn.compact
    def __call__(self, x):
        draw = lambda name, *shape: self.param(name, nn.initializers.normal(0.1), shape)
        x = x @ draw("embed.weight", 80, 80).T
        x = nn.relu(jnp.einsum("...i,oi->...o", x, draw("layer.0.weight", 96, 80)))
        # As `Conv1D` of GPT-2 stores its weight; and one that is not used.
        draw("pooler.weight", 80, 80)
        return nn.Dense(60)(x @ draw("h.0.c_fc.weight", 96, 80))

def torch():
    module = Torch()
    return module, module.init(jax.random.key(0), jnp.ones((1, 80)))

def broken():
    raise KeyError("lost")

def number():
    return 3

def pair():
    return 3, 4
"""


def rows_of(seed, count=70, size=80):
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a file that builds models, and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build.py").write_text(BUILD)
    np.save("x.npy", rows_of(0))
    return tmp_path


def built(name):
    space = {}
    exec(BUILD, space)
    return space[name]()


@pytest.mark.parametrize("name", ["linen", "thin"])
def test_moments_compress_and_compare_from_end_to_end(folder, capsys, name):
    model = built(name)
    linen = name == "linen"
    params = model[1]["params"] if linen else rmtjax.nnx.params(model)
    checkpoint.save("model.safetensors", params)
    collect = ["moments", "--model", f"build.py:{name}", "--data", "x.npy"]
    assert cli.main([*collect, "--out", "m.safetensors", "--exclude", "*2/kernel"]) == 0
    shown = capsys.readouterr().out
    assert "1 matrices for 1 kernels -> m.safetensors" in shown
    argv = [*collect, "--out", "m.safetensors", "--batch-size", "50"]
    assert cli.main(argv) == 1  # it is there already
    assert cli.main([*argv, "--force", "--gradients"]) == 0
    collector = rmtjax.linen.moments if linen else rmtjax.nnx.moments
    batches = [rows_of(0)[:50], rows_of(0)[50:]]
    given = (*model, batches) if linen else (model, batches)
    expected = collector(*given, key=jax.random.key(0))
    found = checkpoint.load_moments("m.safetensors")
    assert [*found] == [*expected]
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)

    argv = ["compress", "model.safetensors", "--out", "small.safetensors", "--budget", "0.75"]
    assert cli.main([*argv, "--moments", "m.safetensors"]) == 0
    assert "removed_outputs" in capsys.readouterr().out
    files = ["model.safetensors", "small.safetensors"]
    argv = ["compare", *files, "--model", f"build:{name}", "--data", "x.npy"]
    assert cli.main([*argv, "--json", "-"]) == 0
    outputs, *tensors = json.loads(capsys.readouterr().out)["rows"]
    thin = checkpoint.restore(files[1])
    run = lambda tree: rmtjax.linen.apply(model[0], {"params": tree}, rows_of(0))
    replaced = lambda tree: rmtjax.nnx.replace(model, tree)(rows_of(0))
    before, after = ((run if linen else replaced)(tree) for tree in (params, thin))
    change = np.linalg.norm(after - before) / np.linalg.norm(before)
    # Sums of products in float32, in another order.
    np.testing.assert_allclose(outputs["relative"], change, rtol=1e-4)
    assert 0 < outputs["relative"] < 1
    assert 0.5 < outputs["cosine"] < 1
    dense = dict(zip((row["path"] for row in tensors), tensors, strict=True))
    kernel = next(path for path in dense if path.endswith("0/kernel"))
    one, other = (np.asarray(_leaf(rmtjax.merge(tree), kernel)) for tree in (params, thin))
    change = np.linalg.norm(other - one) / np.linalg.norm(one)
    np.testing.assert_allclose(dense[kernel]["relative"], change, rtol=1e-5)
    assert cli.main(argv) == 0
    head, *shown, blank, changed, equal = capsys.readouterr().out.splitlines()
    paths = [line.split()[0] for line in shown]
    assert paths[0] == "outputs"
    assert sorted(paths[1:]) == sorted(path for path in dense if path.endswith("kernel"))
    relative = [float(line.split()[2]) for line in shown[1:]]
    assert relative == sorted(relative, reverse=True)
    assert (head.split()[0], blank, changed) == ("path", "", "changed: 2 of 4 tensors")
    assert equal == "2 tensors are equal"


@pytest.mark.slow
def test_kernels_of_torch_have_their_moments_and_are_cut_by_them(folder, capsys):
    module, variables = built("torch")
    checkpoint.save("model.safetensors", variables["params"])
    argv = ["moments", "--model", "build.py:torch", "--data", "x.npy", "--out", "m.safetensors"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "4 matrices for 4 kernels" in shown
    assert "by their weights: 1 (pooler.weight):\nno product with their inputs was found" in shown
    moments = checkpoint.load_moments("m.safetensors")
    sides = {path: axes.inputs for path, axes in moments.axes}
    expected = {"embed.weight": (1,), "layer.0.weight": (1,), "h.0.c_fc.weight": (0,)}
    assert sides == {"Dense_0/kernel": (0,), **expected}
    second = np.asarray(moments["embed.weight"].second)[0]
    np.testing.assert_allclose(second, rows_of(0).T @ rows_of(0), rtol=1e-4, atol=1e-3)
    change = {}
    for name, more in {"weights": [], "outputs": ["--moments", "m.safetensors"]}.items():
        argv = ["compress", "model.safetensors", "--out", f"{name}.safetensors"]
        assert cli.main([*argv, "--budget", "0.5", "--exclude", "pooler.weight", *more]) == 0
        thin = rmtjax.merge(checkpoint.restore(f"{name}.safetensors"))
        dense = module.apply(variables, rows_of(0))
        change[name] = np.linalg.norm(module.apply({"params": thin}, rows_of(0)) - dense)
    files = ["model.safetensors", "weights.safetensors"]
    # Without a warning that its factors are multiplied out.
    assert cli.main(["compare", *files, "--model", "build.py:torch", "--data", "x.npy"]) == 0
    # The data have 70 rows in 80 dimensions: directions without inputs cost nothing.
    assert change["outputs"] < 0.8 * change["weights"]


def _leaf(tree, path):
    for key in path.split("/"):
        tree = tree[key] if key in tree else tree[int(key)]
    return tree


def test_arguments_of_a_model_are_the_arrays_of_a_file_in_order(folder):
    np.savez("two.npz", b=rows_of(1), a=rows_of(2, size=3))
    batches = _models.load_batches("two.npz", 40)
    assert [[array.shape for array in batch] for batch in batches] == [
        [(40, 80), (40, 3)],
        [(30, 80), (30, 3)],
    ]
    np.testing.assert_array_equal(batches[1][0], rows_of(1)[40:])


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("build.py:broken", "x.npy", "build.py:broken: the function fails: KeyError: 'lost'"),
        ("build.py:number", "x.npy", "returned int: return a linen module with its variables"),
        ("build.py:pair", "x.npy", "returned a tuple of (int, int): return the module and its"),
        ("build.py:none", "x.npy", "'build.py' has no function 'none'"),
        ("no.py:build", "x.npy", "there is no file 'no.py': give FILE.py:FUNCTION"),
        ("no_such:build", "x.npy", "there is no module 'no_such' here"),
        ("build.py:linen", "build.py", "--data 'build.py' is not a file of arrays: write it with"),
        (
            "build.py:linen",
            "wrong.npy",
            "fails on --data, 70 samples of 'wrong.npy' (70,) float32: ScopeParamShapeError",
        ),
        ("build.py:linen", "nan.npy", "not finite, in batch 0"),
        ("build.py:linen", "uneven.npz", "(70, 80), (69, 80): the first axis must be that of"),
        ("build.py:linen", "empty.npy", "the first axis must be that of the samples"),
    ],
)
def test_a_fault_of_the_model_or_the_data_is_one_line(folder, capsys, model, data, message):
    np.save("wrong.npy", rows_of(0, size=70))
    np.save("nan.npy", np.full((3, 80), np.nan, np.float32))
    np.save("empty.npy", rows_of(0, count=0))
    np.savez("uneven.npz", rows_of(0), rows_of(0, count=69))
    argv = ["moments", "--model", model, "--data", data, "--out", "m.safetensors"]
    assert cli.main(argv) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (folder / "m.safetensors").exists()


def test_wrong_usage_of_both_commands_is_told_before_the_work(folder, capsys):
    need = ["moments", "--model", "build.py:linen", "--data", "x.npy", "--out"]
    assert "--out must end in .safetensors" in usage_error(capsys, *need, "m.npz")
    assert "--batch-size: must be an integer" in usage_error(
        capsys, *need, "m.safetensors", "--batch-size", "0"
    )
    assert "must be MODULE:FUNCTION" in usage_error(
        capsys, *need[:1], "--model", "build", *need[3:], "m.safetensors"
    )
    checkpoint.save("a.safetensors", {"kernel": rows_of(0)})
    pair = ["compare", "a.safetensors", "a.safetensors"]
    assert "--model and --data belong together" in usage_error(capsys, *pair, "--data", "x.npy")
    assert cli.main([*pair, "--json", "a.safetensors"]) == 1
    assert "--json must not be the input" in capsys.readouterr().err
    assert names_of("a.safetensors") == {"kernel"}


def test_equal_tensors_are_counted_and_have_no_nan(folder, capsys):
    same = {"zero": np.zeros((3, 4), np.float32), "one": np.ones(3, np.float32)}
    for name, kernel in {"a": np.ones((4, 4)), "b": 2 * np.ones((4, 4))}.items():
        checkpoint.save(f"{name}.safetensors", {**same, "kernel": kernel.astype(np.float32)})
    assert cli.main(["compare", "a.safetensors", "b.safetensors"]) == 0
    row, *rest = capsys.readouterr().out.splitlines()[1:]
    assert row.split() == ["kernel", "4x4", "1", "1", "1"]
    assert rest == ["", "changed: 1 of 3 tensors", "2 tensors are equal"]
    assert cli.main(["compare", "a.safetensors", "b.safetensors", "--all"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == ["kernel", "one", "zero"]
    assert "nan" not in shown
    assert cli.main(["compare", "a.safetensors", "a.safetensors"]) == 0
    assert capsys.readouterr().out == "changed: 0 of 3 tensors\n3 tensors are equal\n"
    assert cli.main(["compare", "a.safetensors", "b.safetensors", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    # Up to the rounding of float64.
    assert [row["cosine"] for row in rows] == pytest.approx([1, 1, 1], abs=1e-12)


def test_a_checkpoint_of_another_model_is_named(folder, capsys):
    checkpoint.save("a.safetensors", {"kernel": rows_of(0)})
    checkpoint.save("b.safetensors", {"weight": rows_of(0)})
    assert cli.main(["compare", "a.safetensors", "b.safetensors"]) == 1
    assert "have no tensor of one name and shape" in capsys.readouterr().err
    argv = ["compare", "a.safetensors", "a.safetensors", "--model", "build.py:linen"]
    assert cli.main([*argv, "--data", "x.npy"]) == 1
    assert "does not have the parameters of --model build.py:linen" in capsys.readouterr().err
