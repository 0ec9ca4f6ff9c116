"""Save and restore parameter trees with their plans."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rmtjax._axes import Factors, is_factors, kernel_shape
from rmtjax.checkpoint._flatten import entries as entries_of, flatten, is_number, nest, number_types
from rmtjax.checkpoint._manifest import KEY, Manifest, to_json
from rmtjax.checkpoint._open import Entry, open_tensors, Tensors, write_tensors
from rmtjax.checkpoint._orbax import save_folder
from rmtjax.checkpoint._stream import analyze_file as analyze_file, compress_file as compress_file
from rmtjax.checkpoint._tensor_names import (
    check_factors,
    find_leaves,
    halves,
    is_moment,
    read_manifest,
)
from rmtjax.noise import ranks
from rmtjax.planning import check_plan, FACTORS, Plan

__all__ = ["analyze_file", "compress_file", "plan", "restore", "save"]

FilePath = str | os.PathLike[str]


def _check_plan(plan: Plan, leaves: Mapping[str, Any]) -> None:
    """Refuses a plan that is not that of these leaves, arrays or factors."""
    for path, row in plan.items():
        if path not in leaves:
            raise ValueError(f"the plan names {path!r}, which is no path of the tree")
        leaf = leaves[path]
        if kernel_shape(leaf) != row.shape:
            raise ValueError(
                f"the plan is of {path!r} with shape {row.shape}, and it is {kernel_shape(leaf)}"
            )
        if is_factors(leaf) and row.action == "factorize" and leaf.left.shape[-1] != row.rank:
            raise ValueError(
                f"the plan gives {path!r} rank {row.rank}, and it has {leaf.left.shape[-1]}"
            )


def _check_here(arrays: Mapping[str, Any]) -> None:
    """Refuses what other processes hold parts of: each would write, and none has all."""
    for path, array in arrays.items():
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise ValueError(
                f"{path!r} lies on devices of several processes: gather the tree first, by "
                "`jax.experimental.multihost_utils.process_allgather(params, tiled=True)`, and "
                "save it in one process."
            )


def _check_whole(leaves: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Refuses the state of a thin nnx model: nothing would tell that its factors are such.

    Their moments in the state of an optimizer may stand by themselves: they are restored into it.
    """
    layers = [
        path
        for path in leaves
        if not is_moment(path) and not {*path.split("/")}.isdisjoint(FACTORS)
    ]
    alone = layers + [half for path in plan for half in halves(path) if half in leaves]
    if alone:
        raise ValueError(
            f"the tree has {alone[0]!r}, a factor by itself: of a thin nnx model save "
            "`rmtjax.nnx.params(model)`, and not its state."
        )


def _compare(found: Mapping[str, Entry], wanted: Mapping[str, Entry], name: str) -> None:
    """Refuses all that is missing, of another shape or dtype, or not asked for."""
    faults = [f"{key!r} is missing" for key in wanted if key not in found]
    faults += [f"{key!r} is not in {name}" for key in found if key not in wanted]
    faults += [
        f"{key!r} is {found[key]}, and {entry} in {name}"
        for key, entry in wanted.items()
        if key in found and found[key] != entry
    ]
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ValueError("; ".join(faults[:10]) + more)


def save(
    path: FilePath, params: PyTree, plan: Plan | None = None, rule: ranks.RankRule | None = None
) -> None:
    """Saves a parameter tree with its plan; all of it, or nothing.

    Args:
      path: A name in .safetensors, which replaces the file that is there; else the folder for
        orbax, which must not exist.
      params: Nested dictionaries of arrays, dense or factorized; boxed (`nn.Partitioned`,
        `nnx.State`) they are saved without their boxes. Of a thin nnx model, give
        `rmtjax.nnx.params(model)`: its state has no `Factors`. Anything else, such as a list, has
        to be restored into a tree that is `like` it. For a file, sharded arrays are gathered one by
        one.
      plan: The plan of the tree: what was decided, why, and by which noise levels.
      rule: The rank rule by which the plan was made, for the record.

    Raises:
      ValueError: A leaf is no array of numbers, or lies on devices of several processes, two leaves
        have one path, two factors are not those of one kernel, or stand by themselves as in the
        state of a thin nnx model, the plan is not that of the tree, or the folder exists.
      TypeError: `plan` is no plan, or `rule` no rank rule.

    Examples:
      >>> import jax, pathlib, rmtjax, tempfile
      >>> params = {"Dense_0": {"kernel": jax.random.normal(jax.random.key(0), (200, 400))}}
      >>> plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(16))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "thin.safetensors")
      ...     rmtjax.checkpoint.save(path, rmtjax.factorize(params, plan), plan)
      ...     print(rmtjax.checkpoint.plan(path))
      Dense_0/kernel  factorized: 16 of 200 are signal, rank 16
    """
    if plan is not None:
        check_plan(plan)
    if rule is not None:
        ranks.check_rule(rule)
    leaves, arrays, keys = flatten(params)
    _check_here(arrays)
    _check_whole(leaves, plan or {})
    for name, leaf in leaves.items():
        if is_factors(leaf):
            check_factors(name, leaf)
    if plan is not None:
        _check_plan(plan, leaves)
    entries = entries_of(arrays)
    factors = [path for path, leaf in leaves.items() if is_factors(leaf)]
    text = to_json(plan, rule, factors=factors, entries=entries, keys=keys)
    metadata = {KEY: text}
    if Path(path).suffix == ".safetensors":
        write_tensors(path, entries, lambda name: np.asarray(arrays[name]), metadata)
    else:  # where an empty array stands in the manifest alone: orbax has none
        full = {path: leaf for path, leaf in leaves.items() if is_factors(leaf) or leaf.size}
        save_folder(Path(path), nest(full, keys), metadata)


def _with_empty(tensors: Tensors, told: Manifest | None) -> Tensors:
    """An orbax folder with the empty arrays that only its manifest knows."""
    if tensors.layout != "orbax" or told is None or told.entries is None:
        return tensors
    empty = {name: entry for name, entry in told.entries.items() if 0 in entry.shape}
    read = lambda name: np.empty(*empty[name]) if name in empty else tensors.read(name)
    return dataclasses.replace(tensors, entries={**tensors.entries, **empty}, read=read)


def _to_jax(array: np.ndarray, like: Any = None) -> Any:
    """A jax array, placed as the leaf that it is like; never in another dtype."""
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array  # 64 bits, which are switched off in jax
    sharding = getattr(like, "sharding", None)
    # An array that has not been put anywhere may move; one put there by name may not.
    if sharding is None or not getattr(like, "committed", True):
        return jnp.asarray(array)
    return jax.device_put(array, sharding)


def _nested_paths(told: Manifest | None, leaves: Mapping[str, Any]) -> dict[str | int, Any]:
    """Nested dictionaries with the path of each leaf in its place."""
    keys = told.keys if told else {}
    for path in leaves:
        if path in keys and keys[path] is None:
            raise ValueError(
                f"not only dictionaries lead to {path!r}: give a tree of that form as `like`"
            )
    return nest({path: path for path in leaves}, keys)


def restore(path: FilePath, like: PyTree | None = None) -> PyTree:
    """Restores what `save` or `compress_file` wrote, or a checkpoint from elsewhere; all of it.

    Args:
      path: A .safetensors file or a folder of them, or a folder of orbax.
      like: A tree to fill, of arrays or of `jax.ShapeDtypeStruct`, boxed or not; with a sharding of
        theirs. Shapes and dtypes must be those that were saved. A Python number is filled with one
        of its type, if one of its kind was saved, of however many bits.

    Returns:
      A tree such as `like`; by default nested dictionaries, of names that are split at "/"
      (Torch's, with dots, stay whole), with `Factors` where they were saved.
      The leaves are jax arrays of the dtypes saved; of 64 bits, where jax has these switched off,
      NumPy arrays.

    Raises:
      ValueError: An entry is missing, is there besides, or has another shape or dtype than it was
        saved with or than in `like`; or the file is damaged.
      FileNotFoundError: There is nothing at `path`.

    Examples:
      >>> import jax.numpy as jnp, pathlib, rmtjax, tempfile
      >>> params = {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "dense.safetensors")
      ...     rmtjax.checkpoint.save(path, params)
      ...     restored = rmtjax.checkpoint.restore(path, like=params)
      >>> restored["Dense_0"]["kernel"].shape
      (3, 2)
    """
    wanted = None if like is None else flatten(like)[1]
    numbers = number_types(like)
    with open_tensors(path) as tensors:
        try:
            told = read_manifest(tensors)
            tensors = _with_empty(tensors, told)
            if told and told.entries is not None:
                _compare(tensors.entries, told.entries, "its manifest")
            leaves = find_leaves(tensors, told)
            _check_plan((told and told.plan) or Plan(), leaves)
            if wanted is not None:
                expected = entries_of(wanted) | {
                    name: entry
                    for name, entry in tensors.entries.items()
                    if name in numbers and is_number(entry, numbers[name])
                }
                _compare(tensors.entries, expected, "`like`")
            paths = _nested_paths(told, leaves) if wanted is None else None
        except ValueError as error:
            cause = str(error).rstrip(".")
            raise ValueError(f"cannot restore {os.fspath(path)!r}: {cause}.") from error
        get = lambda name, like=None: _to_jax(tensors.read(name), like)
        if wanted is None:
            halved = lambda path: Factors(*map(get, halves(path)))
            return jax.tree.map(lambda p: halved(p) if is_factors(leaves[p]) else get(p), paths)
        arrays = [
            numbers[name](tensors.read(name).item()) if name in numbers else get(name, leaf)
            for name, leaf in wanted.items()
        ]
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def plan(path: FilePath) -> Plan:
    """The plan that a checkpoint carries: all of it but the spectra.

    Its noise levels are of use where what was cut is to be cut again:
    `rmtjax.plan(params, fits={path: row.fit for path, row in plan.items() if row.fit})`.

    Args:
      path: Of the checkpoint.

    Raises:
      ValueError: There is no plan, or none that can be read.
      FileNotFoundError: There is nothing at `path`.

    Examples:
      >>> import jax, pathlib, rmtjax, tempfile
      >>> params = {"Dense_0": {"kernel": jax.random.normal(jax.random.key(0), (200, 400))}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "dense.safetensors")
      ...     rmtjax.checkpoint.save(path, params, rmtjax.plan(params))
      ...     plan = rmtjax.checkpoint.plan(path)
      >>> plan["Dense_0/kernel"].reason
      'kept: no signal stands out of the noise'
    """
    with open_tensors(path) as tensors:
        told = read_manifest(tensors)
    if told is None or told.plan is None:
        raise ValueError(
            f"{os.fspath(path)!r} carries no plan: make one by `rmtjax.plan`, and save it with it."
        )
    return told.plan
