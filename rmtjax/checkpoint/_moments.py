"""Moments of the inputs of kernels: as .safetensors files, and for the kernels of a file.

A model may multiply by a kernel the other way round than it is stored: Torch has (outputs, inputs).
Such a kernel is turned before it is cut, and its factors are turned back.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rmtjax._axes import factored_axes, FactoredKernel, Factors, is_factors, KernelAxes, MatrixView
from rmtjax._types import check_type
from rmtjax.checkpoint._open import open_tensors, SUFFIX
from rmtjax.checkpoint._safetensors import write_tensors
from rmtjax.checkpoint._tensors import Entry, FilePath, StoredTensor
from rmtjax.moments import Moment, Moments
from rmtjax.planning import changed_leaves, Factorized, Findings, PlanOptions, study, Truncated

_KEY, _FORMAT = "rmtjax.moments", 1  # in the metadata; raised when an older reader would misread it
_FIELDS = ("rows", "total", "second", "third", "fourth")
_KINDS = ("groups", "gradients", "transposed")


def save_moments(path: FilePath, moments: Moments) -> None:
    """Saves moments with their options. After an error, nothing has changed on disk.

    Args:
      path: A name in .safetensors; an existing file is replaced.
      moments: From `rmtjax.linen.moments` or `rmtjax.nnx.moments`.

    Raises:
      ValueError: `path` has another ending.
      TypeError: `moments` are not moments.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax, tempfile
      >>> module, x = nn.Dense(3), jnp.eye(4)
      >>> moments = rmtjax.linen.moments(module, module.init(jax.random.key(0), x), [x])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rmtjax.checkpoint.save_moments(f"{folder}/moments.safetensors", moments)
      ...     both = moments + rmtjax.checkpoint.load_moments(f"{folder}/moments.safetensors")
      >>> int(both["kernel"].rows[0])
      8
    """
    check_type("moments", moments, Moments, "Collect them with `rmtjax.linen.moments`.")
    if Path(path).suffix != SUFFIX:
        raise ValueError(f"`path` must end in {SUFFIX}, got '{path}': give '{path}{SUFFIX}'.")
    arrays = {
        f"{kind}/{name}/{field}": np.asarray(getattr(moment, field))
        for kind in _KINDS
        for name, moment in getattr(moments, kind).items()
        for field in _FIELDS
    }
    options: dict[str, Any] = {"names": moments.names, "axes": moments.axes}
    options |= {"centred": moments.centred, "shrinkage": moments.shrinkage}
    metadata = {_KEY: json.dumps({"format": _FORMAT, **options})}
    entries = {name: Entry.of(array) for name, array in arrays.items()}
    write_tensors(path, entries, arrays.items(), metadata)


def load_moments(path: FilePath) -> Moments:
    """Loads moments as NumPy arrays, with their options.

    Args:
      path: A file that `save_moments` has written.

    Raises:
      ValueError: The file holds no moments, or is damaged or of a newer format.
      OSError: The file cannot be read.

    Examples:
      >>> import jax.numpy as jnp, rmtjax, tempfile
      >>> moments = rmtjax.moments.Moments({}, {}, ())
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rmtjax.checkpoint.save_moments(f"{folder}/none.safetensors", moments)
      ...     len(rmtjax.checkpoint.load_moments(f"{folder}/none.safetensors"))
      0
    """
    with open_tensors(path) as tensors:
        text = tensors.metadata.get(_KEY)
        if text is None:
            raise ValueError(
                f"`path` '{path}' holds no moments: give a file that `save_moments` has written."
            )
        try:
            options = json.loads(text)
            if options["format"] > _FORMAT:
                raise ValueError(
                    f"format {options['format']} is newer than {_FORMAT}: upgrade rmtjax"
                )
            parts: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in _KINDS}
            for name in tensors.entries:
                kind, _, rest = name.partition("/")
                group, _, field = rest.rpartition("/")
                parts[kind].setdefault(group, {})[field] = tensors.read(name)
            found = {k: {n: Moment(**one) for n, one in part.items()} for k, part in parts.items()}
            names = tuple((str(path), str(group)) for path, group in options["names"])
            missing = min({group for _, group in names} - found["groups"].keys(), default=None)
            if missing is not None:
                raise ValueError(f"the sums of {missing!r} are missing")
            sums = found["groups"], found["gradients"]
            axes = tuple(
                (str(path), KernelAxes(*(tuple(map(int, group)) for group in groups)))
                for path, groups in options.get("axes", ())
            )
            more: Any = {"axes": axes, "transposed": found["transposed"]}
            moments = Moments(*sums, names, centred=bool(options["centred"]), **more)
            return moments.with_options(shrinkage=options["shrinkage"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the moments in '{path}' cannot be read: {error}. If damaged, save them again."
            ) from error


def check_moments(moments: Moments | None, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError for moments of a model that is not in the file, by the paths."""
    stray = min((path for path in moments or () if path not in leaves), default=None)
    if stray is not None:
        some = ", ".join(map(repr, [*leaves][:3]))
        raise ValueError(
            f"`moments` has {stray!r}, which is not in the file, which has {some}. Collect the "
            "moments with the model of this file, in the tree that was saved."
        )


def stored_axes(
    moments: Moments | None, path: str, leaf: Any, axes: Callable[[str, Any], Any]
) -> KernelAxes | None:
    """Returns the axes, as they are stored, of a kernel that a model multiplies by turned.

    Args:
      moments: They know the axes along which they met the kernel.
      path: Of the kernel.
      leaf: The kernel.
      axes: Returns those of the file, or that were given, of a dense kernel.

    Returns:
      None for a kernel that is not turned, or without moments.

    Raises:
      ValueError: The moments met other axes.
    """
    met = dict(moments.axes).get(path) if moments is not None else None
    if met is None or isinstance(leaf, FactoredKernel):
        return None
    named = factored_axes(leaf) if is_factors(leaf) else axes(path, leaf)
    if named is None:
        return None
    named, stored = KernelAxes(*map(tuple, named)), KernelAxes(met.outputs, met.inputs)
    in_order = stored.order == tuple(range(len(named.order)))
    if in_order and not named.batch and named in (stored, met):
        return stored
    # A kernel may have been stacked since, as the gates of a recurrent cell.
    if len(met.order) == len(named.order) and met.inputs != named.inputs:
        raise ValueError(
            f"`moments` met {path!r} along its axes {met.inputs}, and the file is read with inputs "
            f"along {named.inputs}: give the `axes` that the moments were collected with."
        )
    return None


@dataclass(frozen=True, eq=False)
class _TurnedTensor:
    """Stands for a stored tensor with its axes in another order; each read is a new array."""

    tensor: StoredTensor
    order: tuple[int, ...]
    dtype = property(lambda self: self.tensor.dtype)
    shape = property(lambda self: tuple(self.tensor.shape[axis] for axis in self.order))
    ndim = property(lambda self: len(self.order))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.transpose(self.tensor.__array__(dtype, copy), self.order)


def _turn(leaf: Any, axes: KernelAxes) -> Any:
    """Returns a kernel with its output axes before its input axes, which are in order."""
    if isinstance(leaf, Factors):
        left, right = leaf
        first, last = (*range(1, right.ndim), 0), (left.ndim - 1, *range(left.ndim - 1))
        return Factors(_transpose(right, first), _transpose(left, last))
    return _transpose(leaf, (*axes.outputs, *axes.inputs))


def _transpose(array: Any, order: tuple[int, ...]) -> Any:
    if isinstance(array, StoredTensor):
        return _TurnedTensor(array, order)
    return jnp.transpose(array, order)


def _after(axes: KernelAxes) -> KernelAxes:
    """Returns the axes of a kernel that was turned."""
    count, last = len(axes.outputs), len(axes.order)
    return KernelAxes(tuple(range(count)), tuple(range(count, last)))


def study_kernel(path: str, leaf: Any, options: PlanOptions, stored: KernelAxes | None) -> Findings:
    """Measures one kernel of a file; one that is stored turned is measured as it is multiplied."""
    if stored is None:
        return study({path: leaf}, options)
    axes, view = _after(stored), MatrixView(path, leaf, stored)
    moments = replace(options.moments, axes=((path, axes),)) if options.moments else None
    turned = replace(options, axes=lambda path, leaf: axes, moments=moments)
    found = study({path: _turn(leaf, stored)}, turned)
    # From here on it is as in the file. Rows and columns change places.
    rows = {p: replace(row, shape=view.shape, axes=stored) for p, row in found.rows.items()}
    measured = {p: one._replace(live=one.live[:, ::-1]) for p, one in found.measured.items()}
    return found._replace(kernels={path: view}, rows=rows, measured=measured)


def change_kernel(
    path: str, leaf: Any, row: Truncated | Factorized, moments: Moments | None
) -> Any:
    """Returns the new leaf of a kernel of a file, in the order of axes of the file."""
    stored = stored_axes(moments, path, leaf, lambda path, leaf: row.axes)
    if stored is None or moments is None:
        views = {path: MatrixView(path, leaf, row.axes)}
        return dict(changed_leaves(views, {path: row}, moments))[path]
    axes = _after(stored)
    views = {path: MatrixView(path, _turn(leaf, stored), axes)}
    turned = replace(moments, axes=((path, axes),))
    return _turn(dict(changed_leaves(views, {path: row}, turned))[path], axes)
