"""The loader of the docs for thin files in Torch, on a stand-in of Torch that computes in NumPy."""

import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import rmtjax
from rmtjax import checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "files.md"


class Linear:
    def __init__(self, inputs, outputs, bias=True):
        self.weight = np.full((outputs, inputs), np.nan, np.float32)
        self.bias = np.full(outputs, np.nan, np.float32) if bias else None

    def __call__(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


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

    def load_state_dict(self, state):
        left = dict(state)

        def fill(layers, prefix):
            for name, layer in layers.items():
                if isinstance(layer, Sequential):
                    fill(layer.layers, f"{prefix}{name}.")
                    continue
                for kind in ("weight", "bias") if layer.bias is not None else ("weight",):
                    array = left.pop(f"{prefix}{name}.{kind}")
                    assert array.shape == getattr(layer, kind).shape
                    setattr(layer, kind, array)

        fill(self.layers, "")
        assert not left


def load_file(path):
    with checkpoint.open_tensors(path) as tensors:
        return {name: np.array(tensors.read(name)) for name in tensors.entries}


def test_the_loader_of_the_page_loads_a_thin_file(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    dense = {"0.weight": draw(60, 80), "0.bias": draw(60), "1.weight": draw(70, 60)}
    names = [tmp_path / name for name in ("dense.safetensors", "thin.safetensors")]
    checkpoint.save(names[0], dense)
    checkpoint.compress_file(*names, rule=rmtjax.ranks.fixed(16), where="0.*")
    torch = SimpleNamespace(nn=SimpleNamespace(Linear=Linear, Sequential=Sequential))
    files = SimpleNamespace(load_file=load_file)
    for name, module in (("torch", torch), ("safetensors.torch", files)):
        monkeypatch.setitem(sys.modules, name, module)
    (code,) = re.findall(r"^    import torch\n(?:    .*\n|\n)+", PAGE.read_text(), re.MULTILINE)
    spelled = {}
    exec(textwrap.dedent(code), spelled)
    model = Sequential(Linear(80, 60), Linear(60, 70, bias=False))
    spelled["load_thin"](model, names[1])
    lower = rmtjax.truncate_matrix(dense["0.weight"], 16)
    x = draw(5, 80)
    expected = (x @ np.asarray(lower).T + dense["0.bias"]) @ dense["1.weight"].T
    # Sums of 80 products in float32, of the order of 100.
    np.testing.assert_allclose(model(x), expected, atol=1e-2)
    assert isinstance(model.layers["0"], Sequential)
