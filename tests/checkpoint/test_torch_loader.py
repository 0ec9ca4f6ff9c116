"""The loader of the docs for thin files in Torch, on a stand-in of Torch that computes in NumPy."""

import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import rmtjax
from rmtjax import checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "files.md"


class Linear:
    def __init__(self, inputs, outputs, bias=True):
        self.weight = np.full((outputs, inputs), np.nan, np.float32)
        self.bias = np.full(outputs, np.nan, np.float32) if bias else None

    def __call__(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Embedding:  # of a tied table, and of a layer with a fused kernel
    def __init__(self, kind, array):
        self.bias, self.kind = None, kind
        setattr(self, kind, array)


class Sequential:
    def __init__(self, *layers):
        self.layers = {str(place): layer for place, layer in enumerate(layers)}

    def __call__(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x

    def set_submodule(self, name, module):
        assert name in self.layers
        self.layers[name] = module

    def get_submodule(self, name):
        return self.layers[name]

    def named_parameters(self, remove_duplicate):
        assert not remove_duplicate
        for name, layer in self.layers.items():
            for kind in (getattr(layer, "kind", "weight"), "bias"):
                if getattr(layer, kind) is not None:
                    yield f"{name}.{kind}", getattr(layer, kind)

    def load_state_dict(self, state):
        left = dict(state)

        def fill(layers, prefix):
            for name, layer in layers.items():
                if isinstance(layer, Sequential):
                    fill(layer.layers, f"{prefix}{name}.")
                    continue
                kinds = (getattr(layer, "kind", "weight"), *(["bias"] * (layer.bias is not None)))
                for kind in kinds:
                    array = left.pop(f"{prefix}{name}.{kind}")
                    assert array.shape == getattr(layer, kind).shape
                    setattr(layer, kind, array)

        fill(self.layers, "")
        assert not left


def load_file(path):
    with checkpoint.open_tensors(path) as tensors:
        return {name: np.array(tensors.read(name)) for name in tensors.entries}


def load_thin(monkeypatch, model, path):
    """Runs the function of the page with the stand-in."""
    linear = SimpleNamespace(Linear=Linear, Sequential=Sequential)
    torch = SimpleNamespace(nn=linear, tensordot=np.tensordot)
    files = SimpleNamespace(load_file=load_file)
    for name, module in (("torch", torch), ("safetensors.torch", files)):
        monkeypatch.setitem(sys.modules, name, module)
    (code,) = re.findall(r"^    import torch.*\n(?:    .*\n|\n)+", PAGE.read_text(), re.MULTILINE)
    spelled = {}
    exec(textwrap.dedent(code), spelled)
    spelled["load_thin"](model, path)


def thin_file(folder, dense, where):
    paths = [folder / name for name in ("dense.safetensors", "thin.safetensors")]
    checkpoint.save(paths[0], dense)
    checkpoint.compress_file(*paths, rule=rmtjax.ranks.fixed(16), where=where)
    return paths[1]


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_the_loader_of_the_page_loads_a_thin_file(tmp_path, monkeypatch):
    dense = {"0.weight": draw(0, 60, 80), "0.bias": draw(1, 60), "1.weight": draw(2, 70, 60)}
    model = Sequential(Linear(80, 60), Linear(60, 70, bias=False))
    load_thin(monkeypatch, model, thin_file(tmp_path, dense, "0.*"))
    lower = rmtjax.truncate_matrix(dense["0.weight"], 16)
    x = draw(3, 5, 80)
    expected = (x @ np.asarray(lower).T + dense["0.bias"]) @ dense["1.weight"].T
    # Sums of 80 products in float32, of the order of 100.
    np.testing.assert_allclose(model(x), expected, atol=1e-2)
    assert isinstance(model.layers["0"], Sequential)


@pytest.mark.parametrize("kind", ["weight", "in_proj_weight"], ids=["tied", "fused"])
def test_the_loader_of_the_page_warns_about_tied_and_fused_kernels(tmp_path, monkeypatch, kind):
    model = Sequential(Linear(80, 60), Linear(80, 70, bias=False))
    shared = model.layers["1"].weight if kind == "weight" else np.zeros((70, 80), np.float32)
    model.layers["2"] = Embedding(kind, shared)
    dense = {"0.weight": draw(0, 60, 80), "0.bias": draw(1, 60), "1.weight": draw(2, 70, 80)}
    dense |= {f"2.{kind}": draw(3, 70, 80)}
    path = thin_file(tmp_path, dense, ["0.*", "2.*"])
    with pytest.warns(UserWarning, match=rf"2\.{kind} is tied, fused or not of a linear layer"):
        load_thin(monkeypatch, model, path)
    lower = rmtjax.truncate_matrix(dense[f"2.{kind}"], 16)
    # Rounding of two decompositions of a matrix whose largest value is about 18.
    np.testing.assert_allclose(getattr(model.layers["2"], kind), lower, atol=1e-4)
    assert isinstance(model.layers["0"], Sequential)
    assert type(model.layers["1"]) is Linear
