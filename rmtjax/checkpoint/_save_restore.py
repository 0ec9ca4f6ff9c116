"""Saves and restores parameter trees with their plans."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rmtjax._axes import Factors, is_factors
from rmtjax._modes import in_usual_modes
from rmtjax.checkpoint._manifest import Manifest, read_manifest, to_json
from rmtjax.checkpoint._open import open_tensors, SUFFIX
from rmtjax.checkpoint._orbax import save_folder
from rmtjax.checkpoint._safetensors import write_tensors
from rmtjax.checkpoint._tensor_names import (
    check_pairs,
    describe_parts,
    find_leaves,
    halves,
    is_moment,
    named_parts,
)
from rmtjax.checkpoint._tensors import CODES, Entry, FilePath, KEY, Tensors
from rmtjax.noise import check_rule, ranks
from rmtjax.planning import check_concrete, check_plan_fits, in_factor_layer, path_name, Plan

# A Python number, and the dtypes it may be saved as: an integer of any size.
_NUMBERS = {bool: np.bool_, int: np.integer, float: jnp.floating, complex: np.complexfloating}
Keys = tuple[str | int, ...]


def _number_type(leaf: Any) -> type | None:
    """Returns the type of a Python number; None for anything else."""
    # `bool` comes first: a boolean is an instance of `int`, too.
    kinds = () if hasattr(leaf, "dtype") else _NUMBERS
    return next((kind for kind in kinds if isinstance(leaf, kind)), None)


def _as_array(name: str, leaf: Any) -> Any:
    """Returns a leaf as an array that a checkpoint can hold, a Python number as jax casts it."""
    leaf = jnp.asarray(leaf) if _number_type(leaf) else leaf
    dtype = getattr(leaf, "dtype", type(leaf).__name__)
    if dtype not in CODES:
        raise ValueError(
            f"the tree has a leaf of dtype {dtype} at {name!r}, which no checkpoint holds: cast "
            "it. Of a random key, take `jax.random.key_data`."
        )
    return leaf


def _flatten(tree: PyTree) -> tuple[dict[str, Any], dict[str, Any], dict[str, Keys | None]]:
    """Returns leaves by path, arrays by name, and keys of the paths that "/" does not split."""
    leaves, arrays, keys = {}, {}, {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_factors):
        path = path_name(key_path)
        if not path:
            raise ValueError("a tree must have a name for each leaf: put the leaf in a dictionary.")
        # Nodes that are not dictionaries have a name in the path and no key. A box has neither.
        names = tuple(key.key for key in key_path if hasattr(key, "key"))
        plain = all(type(key) in (str, int) for key in names) and "/".join(map(str, names)) == path
        if not plain or names != tuple(path.split("/")):
            keys[path] = names if plain else None
        for name, array in named_parts(path, leaf).items():
            if name in arrays:
                raise ValueError(f"two leaves have the path {name!r}: rename one of them.")
            arrays[name] = _as_array(name, array)
        leaves[path] = leaf if is_factors(leaf) else arrays[path]
    return leaves, arrays, keys


def _nest(leaves: Mapping[str, Any], keys: Mapping[str, Keys | None]) -> dict[str | int, Any]:
    """Returns nested dictionaries of the leaves. A path without keys is split at "/"."""
    tree: dict[str | int, Any] = {}
    for path, leaf in leaves.items():
        names = keys.get(path, ())
        if names is None:
            raise ValueError(f"not only keys lead to {path!r}: give a tree of that form as `like`")
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


def _check_addressable(arrays: Mapping[str, Any]) -> None:
    """Raises an error if an array is spread over several processes, or traced."""
    # Each process would write the file, and none of them has all the data.
    for path, array in arrays.items():
        if isinstance(array, jax.core.Tracer):
            raise TypeError(f"{path!r} has no value yet: save the tree outside `jit`.")
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise ValueError(
                f"{path!r} is on devices of several processes: save it in one, after gathering by "
                "`jax.experimental.multihost_utils.process_allgather(params, tiled=True)` in each."
            )


def _check_no_halves(leaves: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Raises ValueError for the state of a thin nnx model, in which factors are single leaves."""
    # Restored, each half would be a kernel. The moments of an optimizer may be halves.
    layers = [path for path in leaves if not is_moment(path) and in_factor_layer(path)]
    single = layers + [half for path in plan for half in halves(path) if half in leaves]
    if single:
        raise ValueError(
            f"got {single[0]!r}, a single factor: of a thin model save `rmtjax.nnx.params(model)`."
        )


def _check_entries(entries: Mapping[str, Entry], wanted: Mapping[str, Entry], source: str) -> None:
    """Raises ValueError unless the entries of a file are exactly those that a source names."""
    faults = [f"{name!r} is missing" for name in wanted if name not in entries]
    faults += [f"{name!r} is not in {source}" for name in entries if name not in wanted]
    other = [name for name, entry in wanted.items() if entries.get(name, entry) != entry]
    faults += [f"{name!r} is {entries[name]}, and {wanted[name]} in {source}" for name in other]
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ValueError("; ".join(faults[:10]) + more)


@in_usual_modes
def save(
    path: FilePath, params: PyTree, plan: Plan | None = None, rule: ranks.RankRule | None = None
) -> None:
    """Saves a parameter tree with its plan. After an error, nothing has changed on disk.

    Args:
      path: A name in .safetensors, which replaces an existing file. Any other name is a new folder
        for orbax.
      params: Nested dictionaries of arrays, dense or factorized. Boxes (`nn.Partitioned`,
        `nnx.State`) are left out. Lists and other nodes are restored only into a `like`. Of a thin
        nnx model give `rmtjax.nnx.params(model)`. For a file, sharded arrays are gathered in turn.
      plan: The plan of the tree: decisions, reasons and noise levels.
      rule: The rank rule by which the plan was made, for the record.

    Raises:
      ValueError: A leaf is not an array of numbers, or is on devices of several processes. Two
        leaves have one path. Factors or the plan do not fit the tree. The folder exists.
      TypeError: `plan` is not a plan, `rule` is not a rank rule, or a leaf has no value.

    Examples:
      >>> import jax, rmtjax, tempfile
      >>> params = {"Dense_0": {"kernel": jax.random.normal(jax.random.key(0), (200, 400))}}
      >>> plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(16))
      >>> thin = rmtjax.factorize(params, plan)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rmtjax.checkpoint.save(f"{folder}/thin.safetensors", thin, plan)
      ...     print(rmtjax.checkpoint.load_plan(f"{folder}/thin.safetensors"))
      Dense_0/kernel  factorized: rank 16 of 200, as asked by the rule
    """
    if rule is not None:
        check_rule(rule)
    check_concrete(params)
    leaves, arrays, keys = _flatten(params)
    _check_addressable(arrays)
    _check_no_halves(leaves, plan or {})
    check_pairs(leaves)
    if plan is not None:
        check_plan_fits(plan, leaves, plan, applied=True)
    entries = {name: Entry.of(array) for name, array in arrays.items()}
    factors = [path for path, leaf in leaves.items() if isinstance(leaf, Factors)]
    parts = describe_parts(leaves)
    metadata = {KEY: to_json(plan, rule, factors=factors, entries=entries, keys=keys, parts=parts)}
    if Path(path).suffix == SUFFIX:
        write_tensors(path, entries, arrays.items(), metadata)
    else:
        # Orbax does not save empty arrays. The manifest has them, and `restore` makes them anew.
        full = {path: leaf for path, leaf in leaves.items() if is_factors(leaf) or leaf.size}
        for place in parts:  # by the names that the manifest has
            of_kernel = named_parts(place, full[place])
            full[place] = _nest({n.removeprefix(f"{place}/"): a for n, a in of_kernel.items()}, {})
        named = {path: names for path, names in keys.items() if names is not None}
        save_folder(Path(path), _nest(full, named), metadata)


def _with_empty(tensors: Tensors, manifest: Manifest) -> Tensors:
    """Returns an orbax folder with the empty arrays that only its manifest has."""
    named = manifest.entries if manifest.entries and tensors.layout == "orbax" else {}
    empty = {name: entry for name, entry in named.items() if 0 in entry.shape}
    read = lambda name: np.empty(*empty[name]) if name in empty else tensors.read(name)
    return dataclasses.replace(tensors, entries={**tensors.entries, **empty}, read=read)


def _like_leaf(array: np.ndarray, leaf: Any) -> Any:
    """Returns a saved array as a Python number or an array of jax, placed as the leaf."""
    if kind := _number_type(leaf):
        return kind(array.item())
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array  # of 64 bits, which are switched off in jax
    # An array that was never placed by name may move with the computation, and so may this one.
    sharding = getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None
    return jax.device_put(array, sharding)


def _check_like(like: PyTree, arrays: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Raises ValueError unless a file has the entries that fill a tree, whose arrays are given."""
    wanted = {name: Entry.of(array) for name, array in arrays.items()}
    for name, leaf in zip(arrays, jax.tree.leaves(like), strict=True):
        # A Python number takes any size of its kind: orbax saves the step of Flax in 64 bits.
        kind, entry = _number_type(leaf), entries.get(name)
        if kind and entry and entry.shape == () and jnp.issubdtype(entry.dtype, _NUMBERS[kind]):
            wanted[name] = entry
    _check_entries(entries, wanted, "`like`")


@in_usual_modes
def restore(path: FilePath, like: PyTree | None = None) -> PyTree:
    """Restores a checkpoint completely, or raises an error that names what does not fit.

    Args:
      path: A .safetensors file, a folder of them, or a folder of orbax, also from elsewhere.
      like: A tree to fill, of arrays or of `jax.ShapeDtypeStruct`, boxed or not. Shapes and dtypes
        must be those that were saved. A sharding of a leaf is used for its array. A Python number
        takes one of its type in any size.

    Returns:
      A tree such as `like`. By default nested dictionaries, with names that are split at "/" and
      not at dots, and with `Factors` for kernels that were saved as factors. Leaves are jax arrays
      of the dtypes saved, or NumPy arrays for 64 bits if these are switched off in jax.

    Raises:
      ValueError: The file is damaged, or the manifest or `like` has other names, shapes or dtypes.
      FileNotFoundError: There is nothing at `path`.

    Examples:
      >>> import jax.numpy as jnp, rmtjax, tempfile
      >>> params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rmtjax.checkpoint.save(f"{folder}/a.safetensors", params)
      ...     restored = rmtjax.checkpoint.restore(f"{folder}/a.safetensors", like=params)
      >>> restored["Dense_0"]["kernel"].shape
      (3, 2)
    """
    arrays = _flatten(like)[1]
    with open_tensors(path) as tensors:
        try:
            manifest = read_manifest(tensors)
            tensors = _with_empty(tensors, manifest)
            if manifest.entries is not None:
                _check_entries(tensors.entries, manifest.entries, "its manifest")
            leaves = find_leaves(tensors, manifest)
            plan = manifest.plan or Plan()
            check_plan_fits(plan, leaves, plan, applied=True)
            if like is None:
                like = _nest(leaves, manifest.keys)
                arrays = {leaf.name: leaf for leaf in jax.tree.leaves(like)}
            else:
                _check_like(like, arrays, tensors.entries)
        except ValueError as error:
            cause = str(error).rstrip(".")
            raise ValueError(f"cannot restore {os.fspath(path)!r}: {cause}.") from error
        names = jax.tree.unflatten(jax.tree.structure(like), arrays)
        return jax.tree.map(lambda name, leaf: _like_leaf(tensors.array(name), leaf), names, like)


def load_plan(path: FilePath) -> Plan:
    """Loads the plan that a checkpoint carries, without its spectra.

    Give its noise levels to `rmtjax.plan(params, fits=plan.fits)` to cut the same kernels again.

    Raises:
      ValueError: There is no plan, or it cannot be read.

    Examples:
      >>> import jax, rmtjax, tempfile
      >>> params = {"Dense_0": {"kernel": jax.random.normal(jax.random.key(0), (200, 400))}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rmtjax.checkpoint.save(f"{folder}/a.safetensors", params, rmtjax.plan(params))
      ...     plan = rmtjax.checkpoint.load_plan(f"{folder}/a.safetensors")
      >>> plan["Dense_0/kernel"].reason
      'kept: no signal stands out of the noise'
    """
    with open_tensors(path) as tensors:
        manifest = read_manifest(tensors)
    if manifest.plan is None:
        raise ValueError(f"{str(path)!r} carries no plan: make one by `rmtjax.plan`, and save it.")
    return manifest.plan
