"""Computes the tensors that a plan makes of a checkpoint, with one leaf in memory at a time."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmtjax._axes import MatrixView
from rmtjax.checkpoint._manifest import Manifest, to_json
from rmtjax.checkpoint._tensor_names import halves, named_parts
from rmtjax.checkpoint._tensors import Entry
from rmtjax.noise import ranks
from rmtjax.planning import changed_leaves, Factorized, Kept, LayerPlan, Plan

# The tensors that are written, by the path of their leaf and their name.
Outputs = Mapping[str, Mapping[str, Entry]]


def with_dtype(leaf: Any, dtype: np.dtype | None) -> Any:
    """Returns a stored leaf that is read in another dtype, if it is floating."""

    def change(part):
        # float8 keeps its dtype, so that the plan reports that it has too few bits.
        floating = jnp.issubdtype(part.dtype, jnp.floating) and part.dtype.itemsize > 1
        return dataclasses.replace(part, dtype=dtype) if dtype and floating else part

    return jax.tree.map(change, leaf)


def _leaf_outputs(path: str, leaf: Any, row: LayerPlan | None) -> dict[str, Entry]:
    """Returns the tensors that are written for a leaf."""
    if isinstance(row, Factorized):
        batch, inputs, outputs = (
            [row.shape[axis] for axis in group]
            for group in (row.axes.batch, row.axes.inputs, row.axes.outputs)
        )
        shapes = (*batch, *inputs, row.rank), (*batch, row.rank, *outputs)
        entries = [Entry(shape, jax.tree.leaves(leaf)[0].dtype) for shape in shapes]
        return dict(zip(halves(path), entries, strict=True))
    return {name: Entry.of(part) for name, part in named_parts(path, leaf).items()}


def find_outputs(leaves: Mapping[str, Any], plan: Plan) -> Outputs:
    """Returns the tensors that are written; raises ValueError if two would have one name."""
    outputs = {path: _leaf_outputs(path, leaf, plan.get(path)) for path, leaf in leaves.items()}
    names = Counter(name for entries in outputs.values() for name in entries)
    for name in names - Counter([*names]):
        raise ValueError(
            f"a factor would be called {name!r}, as another tensor of the file is. Leave its "
            "kernel out by `where`, or choose `mode='truncate'`."
        )
    return outputs


def _leaf_arrays(path: str, leaf: Any, row: LayerPlan | None, dtype: np.dtype | None) -> Any:
    """Returns the arrays of a leaf after the plan; those that stay are still in the file."""
    if row is None or isinstance(row, Kept):
        return leaf
    view = MatrixView(path, with_dtype(leaf, dtype), row.axes)
    return dict(changed_leaves({path: view}, {path: row}))[path]


def write_outputs(
    leaves: Mapping[str, Any],
    plan: Plan,
    outputs: Outputs,
    dtype: np.dtype | None,
    progress: Callable[[int, int, str], None],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and the data of each tensor that is written, leaf by leaf.

    `dtype` is that of the computation. The steps of `progress` follow those of the plan.
    """
    for place, (path, leaf) in enumerate(leaves.items(), len(plan)):
        progress(place, len(plan) + len(leaves), path)
        arrays = jax.tree.leaves(_leaf_arrays(path, leaf, plan.get(path), dtype))
        for name, entry in outputs[path].items():
            # Each array is dropped before the next is read: a kernel may fill the memory.
            yield name, np.asarray(arrays.pop(0)).astype(entry.dtype, copy=False)


def output_manifest(manifest: Manifest, plan: Plan, rule: ranks.RankRule, outputs: Outputs) -> str:
    """Returns the manifest of the output: the last change that was ever made to each kernel."""
    earlier = manifest.plan or Plan()
    # A kernel that is kept this time may have been cut before. The old row says how.
    stay = {
        path: row
        for path, row in earlier.items()
        if path not in plan or (isinstance(plan[path], Kept) and not isinstance(row, Kept))
    }
    # The manifest has one rule for all rows, so it has none if the rows have several.
    one_rule = not stay or manifest.rule == str(rule)
    return to_json(
        Plan(earlier | plan | stay),
        rule if one_rule else None,
        factors=[path for path, entries in outputs.items() if [*entries] != [path]],
        entries={name: entry for part in outputs.values() for name, entry in part.items()},
        keys=manifest.keys,
    )
