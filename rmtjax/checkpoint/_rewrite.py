"""Computes the tensors that a plan makes of a checkpoint, with one leaf in memory at a time."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmtjax._axes import MatrixView
from rmtjax.checkpoint._manifest import Manifest
from rmtjax.checkpoint._tensor_names import halves, named_parts
from rmtjax.checkpoint._tensors import Entry
from rmtjax.noise import ranks
from rmtjax.planning import changed_leaves, Factorized, Plan


def with_dtype(leaf: Any, dtype: np.dtype | None) -> Any:
    """Returns a stored leaf that is read in another dtype, if it is floating."""
    # float8 keeps its dtype, so that the plan reports that it has too few bits.
    wide = lambda part: jnp.issubdtype(part.dtype, jnp.floating) and part.dtype.itemsize > 1
    change = lambda part: dataclasses.replace(part, dtype=dtype) if wide(part) else part
    return jax.tree.map(change, leaf) if dtype else leaf


def find_outputs(leaves: Mapping[str, Any], plan: Plan) -> dict[str, Entry]:
    """Returns the tensors that are written; raises ValueError if two would have one name."""
    entries: dict[str, Entry] = {}
    for path, leaf in leaves.items():
        parts = {name: Entry.of(part) for name, part in named_parts(path, leaf).items()}
        row = plan.get(path)
        if isinstance(row, Factorized):
            inputs, outputs, batch = ([row.shape[axis] for axis in group] for group in row.axes)
            dtype = jax.tree.leaves(leaf)[0].dtype
            left = Entry((*batch, *inputs, row.rank), dtype)
            right = Entry((*batch, row.rank, *outputs), dtype)
            parts = dict(zip(halves(path), (left, right), strict=True))
        clash = next((name for name in parts if name != path and name in leaves), None)
        if clash is not None:
            raise ValueError(
                f"a factor would be {clash!r}, as another tensor: use `where` or `mode='truncate'`."
            )
        entries |= parts
    return entries


def write_outputs(
    leaves: Mapping[str, Any],
    plan: Plan,
    entries: Mapping[str, Entry],
    dtype: np.dtype | None,  # of the computation
    progress: Callable[[int, int, str], None],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and the data of each tensor that is written, leaf by leaf."""
    changes = plan.changes
    for place, (path, leaf) in enumerate(leaves.items(), len(plan)):
        progress(place, len(plan) + len(leaves), path)
        arrays = jax.tree.leaves(leaf)  # those that stay are still in the file
        if path in changes:
            view = MatrixView(path, with_dtype(leaf, dtype), changes[path].axes)
            arrays = jax.tree.leaves(dict(changed_leaves({path: view}, changes)))
        for name in [path] if path in entries else halves(path):
            # Each array is dropped before the next is read: a kernel may fill the memory.
            yield name, np.asarray(arrays.pop(0)).astype(entries[name].dtype, copy=False)


def last_changes(
    manifest: Manifest, plan: Plan, rule: ranks.RankRule
) -> tuple[Plan, ranks.RankRule | None]:
    """Returns the last change that was ever made to each kernel, and the rule if all have one."""
    earlier = manifest.plan or Plan()
    # A kernel that is kept this time may have been cut before. The old row says how.
    stay = (earlier.keys() - plan.keys()) | (earlier.changes.keys() - plan.changes.keys())
    one_rule = not stay or manifest.rule == str(rule)
    return Plan(earlier | plan | {path: earlier[path] for path in stay}), rule if one_rule else None
