"""The leaves of a checkpoint file: read, and changed as planned, one at a time."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rmtjax._axes import Factors, is_factors, MatrixView
from rmtjax._types import BulkFit
from rmtjax.checkpoint._manifest import Manifest, to_json
from rmtjax.checkpoint._tensor_names import halves
from rmtjax.checkpoint._tensors import Entry, Tensors
from rmtjax.noise import ranks
from rmtjax.planning import changed_leaves, Factorized, Kept, LayerPlan, Plan, Truncated
from rmtjax.spectra import on_host


def read_leaf(tensors: Tensors, path: str, leaf: Any, dtype: np.dtype | None) -> Any:
    """A leaf of the file; the numbers of a kernel in `dtype`, if they have bits enough."""
    if is_factors(leaf):
        return Factors(*(jnp.asarray(read_leaf(tensors, h, None, dtype)) for h in halves(path)))
    array = tensors.read(path)
    floating = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize > 1
    array = array.astype(dtype, copy=False) if dtype is not None and floating else array
    wide = jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype
    # What the host decomposes stays as it is. Else it is given to JAX here, so that the copy which
    # came from the file is dropped before the work.
    return array if wide or on_host(array) else jnp.asarray(array)


def noise_levels(
    told: Manifest | None, leaves: Mapping[str, Any], fits: Mapping[str, BulkFit] | None
) -> dict[str, BulkFit]:
    """Noise levels by path: those given, else of what has been cut those that it was cut by."""
    unknown = (fits or {}).keys() - leaves.keys()
    if unknown:
        raise ValueError(f"`fits` has {min(unknown)!r}, which is no path of the file.")
    rows = (told and told.plan) or {}
    cut = {path: row.fit for path, row in rows.items() if row.action != "keep" and row.fit}
    return {path: fit for path, fit in cut.items() if path in leaves} | dict(fits or {})


def _outputs(path: str, spec: Any, row: LayerPlan | None) -> dict[str, Entry]:
    """The tensors that are written for a leaf."""
    entry = lambda leaf: Entry(tuple(leaf.shape), np.dtype(leaf.dtype))
    if not isinstance(row, Factorized):
        pairs = zip(halves(path), spec, strict=True) if is_factors(spec) else [(path, spec)]
        return {name: entry(leaf) for name, leaf in pairs}
    batch, inputs, outputs = (
        [row.shape[axis] for axis in group]
        for group in (row.axes.batch, row.axes.inputs, row.axes.outputs)
    )
    shapes = (*batch, *inputs, row.rank), (*batch, row.rank, *outputs)
    dtypes = [np.dtype(leaf.dtype) for leaf in (spec if is_factors(spec) else (spec, spec))]
    return dict(zip(halves(path), map(Entry, shapes, dtypes), strict=True))


def _check_names(outputs: Mapping[str, Mapping[str, Entry]]) -> None:
    """Refuses factors with the name of another tensor."""
    names = Counter(name for entries in outputs.values() for name in entries)
    twice = [name for name, times in names.items() if times > 1]
    if twice:
        raise ValueError(
            f"a factor would be called {twice[0]!r}, as another tensor of the file is. Leave its "
            "kernel out by `where`, or choose `mode='truncate'`."
        )


@dataclass(frozen=True)
class _InFile:
    """A tensor that is read from its file whenever NumPy asks for its numbers."""

    tensors: Tensors
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype=None, copy=None):
        del copy  # each reading is a new array
        return self.tensors.read(self.path).astype(dtype or self.dtype, copy=False)


class Changed:
    """What a plan makes of the tensors of a file, read and computed one leaf at a time."""

    def __init__(
        self, tensors: Tensors, leaves: Mapping[str, Any], made: Plan, dtype: np.dtype | None
    ):
        self.tensors, self.leaves, self.made, self.dtype = tensors, leaves, made, dtype
        self.outputs = {path: _outputs(path, spec, made.get(path)) for path, spec in leaves.items()}
        _check_names(self.outputs)
        self.entries = dict(item for part in self.outputs.values() for item in part.items())
        self.owners = {name: path for path, part in self.outputs.items() for name in part}
        self.ready: dict[str, np.ndarray] = {}  # a right factor, which comes with the left one

    def read(self, name: str) -> np.ndarray:
        """One tensor of the output."""
        path = self.owners[name]
        row = self.made.get(path)
        if row is None or isinstance(row, Kept):  # under the same names
            return self.tensors.read(name)
        if name not in self.ready:
            self.ready |= zip(
                self.outputs[path], jax.tree.leaves(self._leaf(path, row)), strict=True
            )
        array = np.asarray(self.ready.pop(name))
        return array.astype(self.entries[name].dtype, copy=False)

    def _leaf(self, path: str, row: Truncated | Factorized) -> Any:
        leaf = self.leaves[path]
        if is_factors(leaf):
            leaf = read_leaf(self.tensors, path, leaf, self.dtype)
        else:
            leaf = _InFile(self.tensors, path, leaf.shape, np.dtype(self.dtype or leaf.dtype))
        view = MatrixView(path, leaf, row.axes)
        return dict(changed_leaves({path: view}, {path: row}))[path]


def tell(told: Manifest | None, found: Plan, rule: ranks.RankRule, changed: Changed) -> str:
    """What the output says of itself: the last that was done to each kernel, ever."""
    before = (told and told.plan) or Plan()
    kept = {path for path, row in found.items() if row.action == "keep"}
    stay = {
        path: row
        for path, row in before.items()
        if path not in found or (path in kept and row.action != "keep")
    }
    # One rule is told for all: none, where some rows are by another one.
    one = not stay or (told and told.rule) == str(rule)
    return to_json(
        Plan(before | found | stay),
        rule if one else None,
        factors=[path for path, part in changed.outputs.items() if [*part] != [path]],
        entries=changed.entries,
        keys=told and told.keys,
    )
