"""Random trees of leaves: how each leaf is made, and where it lies."""

import collections
from dataclasses import dataclass
from functools import cache

import flax.core
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

SIZES = (0, 1, 2, 3, 50, 60, 90)
DTYPES = {
    "float32": 6,
    "float16": 1,
    "bfloat16": 1,
    "float64": 1,
    ">f4": 1,
    "longdouble": 1,
    "int32": 1,
    "bool": 1,
    "complex64": 1,
    "float8_e4m3fn": 1,
    "int4": 1,
}
FILLS = {
    "noise": 4,
    "signal": 6,
    "constant": 1,
    "zeros": 1,
    "nan": 1,
    "inf": 1,
    "dead rows": 2,
    "dead columns": 1,
    "duplicates": 1,
    "huge": 1,
    "tiny": 1,
}
NAMES = (
    *("kernel", "kernel", "kernel", "embedding", "weight", "w", "bias", "scale", "lora_A.weight"),
    *("a/b", "a.b", "=1+1", "<b>", "\x1b[31m", "", "é", "\u202e", "0", "gate_up_proj", "x" * 200),
)
# How a kernel is divided over a mesh of 2 x 2 devices: the names of the mesh's axes for the first
# axis of the kernel, and for its last one. JAX divides no axis unevenly.
SPLITS = {
    "no": 12,
    "replicated": 1,
    "first": 2,
    "last": 2,
    "both": 2,
    "first by four": 1,
    "last by four": 1,
    "second": 1,
}
Pair = collections.namedtuple("Pair", ["kernel", "bias"])


@cache
def mesh_of(explicit):
    """A mesh of 2 x 2 devices, where there are so many: see `__main__.py`."""
    side = 2 if jax.device_count() >= 4 else 1
    kind = AxisType.Explicit if explicit else AxisType.Auto
    devices = jax.devices()[: side**2]
    return jax.make_mesh((side, side), ("a", "b"), axis_types=(kind, kind), devices=devices)


def spec_of(split, ndim):
    """The names of the mesh's axes for each axis of an array."""
    spec = [None] * ndim
    if split == "second":  # as columns of a matrix, or rows of a stack
        spec[min(1, ndim - 1)] = "a"
    if split.startswith("last"):
        spec[-1] = ("a", "b") if "four" in split else "b"
    if split in ("first", "both"):
        spec[0] = "a"
    if split == "both" and ndim > 1:
        spec[-1] = "b"
    if split == "first by four":
        spec[0] = ("a", "b")
    return spec


def weighted(choices):
    return st.sampled_from([name for name, weight in choices.items() for _ in range(weight)])


@dataclass(frozen=True)
class Leaf:
    """How to make a leaf: random numbers come from its seed."""

    shape: tuple
    dtype: str
    fill: str
    seed: int
    device: bool
    split: str = "no"

    def array(self, explicit=None):
        """The array; divided over a mesh with explicit axes or without, which its seed decides."""
        array = self.numbers()
        if not isinstance(array, jax.Array) or self.split == "no" or not array.ndim:
            return array
        spec = spec_of(self.split, array.ndim)
        explicit = self.seed % 2 == 1 if explicit is None else explicit
        # JAX neither compiles a function of an empty array on explicit axes nor takes a part.
        mesh = mesh_of(explicit and array.size > 0)
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        try:
            sharding.shard_shape(array.shape)
        except ValueError:  # an axis that the devices do not divide
            return array
        return jax.device_put(array, sharding)

    def numbers(self):
        rng = np.random.default_rng(self.seed)
        array = rng.normal(size=self.shape)
        if self.fill == "constant":
            array[...] = 1.5
        elif self.fill == "zeros":
            array[...] = 0
        elif self.fill == "signal":
            array = array + 1.0
        elif self.fill in ("nan", "inf") and array.size:
            array.flat[array.size // 2] = float(self.fill)
        elif self.fill == "dead rows" and array.ndim:
            array[: array.shape[0] // 3] = 0
        elif self.fill == "dead columns" and array.ndim:
            array[..., ::3] = 0
        elif self.fill == "duplicates" and array.ndim:
            array[: array.shape[0] // 2] = array[array.shape[0] // 2 :][: array.shape[0] // 2]
        dtype = np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))
        wide = (dtype.kind == "f" and dtype.itemsize >= 4) or self.dtype == "bfloat16"
        if wide:
            array *= {"huge": 1e25, "tiny": 1e-25}.get(self.fill, 1)
        with np.errstate(all="ignore"):
            array = array.astype(dtype)
        known = self.device and dtype.isnative and self.dtype not in ("longdouble", "float64")
        return jnp.asarray(array) if known else array


LEAVES = st.builds(
    Leaf,
    st.lists(st.sampled_from(SIZES), min_size=2, max_size=2).map(tuple)
    | st.lists(st.sampled_from(SIZES[:5]), max_size=4).map(tuple)
    | st.just((60, 90)),
    weighted(DTYPES),
    weighted(FILLS),
    st.integers(0, 10**6),
    st.booleans(),
    weighted(SPLITS),
)


def nodes(children):
    named = st.dictionaries(st.sampled_from(NAMES), children, max_size=4)
    lists = st.lists(children, max_size=3)
    pairs = st.builds(Pair, children, children)
    return named | named | lists | lists.map(tuple) | pairs | named.map(flax.core.freeze)


TREES = nodes(st.recursive(LEAVES, nodes, max_leaves=5))
# Kernels of few shapes: verbs with large programs compile once for many trees.
FEW = st.builds(
    Leaf,
    weighted(
        {(60, 90): 6, (90, 60): 3, (60, 60): 2, (4, 52): 1, (52, 3): 1, (1, 60): 1}
        | dict.fromkeys([(0, 50), (3, 60, 52), (60,), (), (2, 2, 4, 52), (50, 2, 3)], 1)
    ),
    weighted(DTYPES),
    weighted(FILLS),
    st.integers(0, 99),
    st.booleans(),
    weighted(SPLITS),
)
FEW_TREES = nodes(st.recursive(FEW, nodes, max_leaves=4))
is_leaf = lambda node: isinstance(node, Leaf)


def make(spec):
    """The tree of arrays; those that are divided have one mesh, which their seeds decide."""
    leaves = jax.tree.leaves(spec, is_leaf=is_leaf)
    explicit = sum(leaf.seed for leaf in leaves) % 2 == 1
    return jax.tree.map(lambda leaf: leaf.array(explicit), spec, is_leaf=is_leaf)
