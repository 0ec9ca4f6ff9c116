"""Flattens a parameter tree to named arrays, and nests them again."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rmtjax._axes import is_factors
from rmtjax.checkpoint._tensor_names import named_parts
from rmtjax.checkpoint._tensors import CODES
from rmtjax.planning import path_name

# A Python number, and the dtypes it may be saved as: an integer of any size.
NUMBERS = {bool: np.bool_, int: np.integer, float: jnp.floating, complex: np.complexfloating}
Keys = tuple[str | int, ...]


def number_type(leaf: Any) -> type | None:
    """Returns the type of a Python number; None for anything else."""
    # `bool` comes first: a boolean is an instance of `int`, too.
    kinds = () if hasattr(leaf, "dtype") else NUMBERS
    return next((kind for kind in kinds if isinstance(leaf, kind)), None)


def _as_array(name: str, leaf: Any) -> Any:
    """Returns a leaf as an array that a checkpoint can hold, a Python number as jax casts it."""
    if number_type(leaf):
        leaf = jnp.asarray(leaf)
    dtype = getattr(leaf, "dtype", type(leaf).__name__)
    if dtype not in CODES:
        raise ValueError(
            f"the tree has a leaf of dtype {dtype} at {name!r}, which no checkpoint holds: cast "
            "it. Of a random key, take `jax.random.key_data`."
        )
    return leaf


def flatten(tree: PyTree) -> tuple[dict[str, Any], dict[str, Any], dict[str, Keys | None]]:
    """Returns path to array or `Factors`, name to array, and path to dictionary keys.

    Each factor has a name. Paths that splitting at "/" would give back have no keys.
    """
    leaves, arrays, keys = {}, {}, {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_factors):
        path = path_name(key_path)
        if not path:
            raise ValueError("a tree must have a name for each leaf: put the leaf in a dictionary.")
        key_names = _dictionary_keys(path, key_path)
        if key_names != tuple(path.split("/")):
            keys[path] = key_names
        for name, array in named_parts(path, leaf).items():
            if name in arrays:
                raise ValueError(f"two leaves have the path {name!r}: rename one of them.")
            arrays[name] = _as_array(name, array)
        leaves[path] = leaf if is_factors(leaf) else arrays[path]
    return leaves, arrays, keys


def _dictionary_keys(path: str, key_path: tuple[Any, ...]) -> Keys | None:
    """Returns the dictionary keys that lead to a leaf; None if other nodes lead there."""
    # Other nodes have a name in the path and no key. A box has neither.
    keys = tuple(key.key for key in key_path if hasattr(key, "key"))
    plain = all(type(key) in (str, int) for key in keys) and "/".join(map(str, keys)) == path
    return keys if plain else None


def nest(leaves: Mapping[str, Any], keys: Mapping[str, Keys | None]) -> dict[str | int, Any]:
    """Returns nested dictionaries of the leaves. A path without keys is split at "/"."""
    tree: dict[str | int, Any] = {}
    for path, leaf in leaves.items():
        names = keys.get(path, ())
        if names is None:
            raise ValueError(f"not keys alone lead to {path!r}: give a tree of that form as `like`")
        *parents, last = names or path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path!r} is below another leaf: restore it by `like`")
        if last in node:
            raise ValueError(f"{path!r} is both a leaf and a dictionary: restore it by `like`")
        node[last] = leaf
    return tree
