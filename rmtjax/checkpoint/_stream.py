"""Checkpoint files that may be larger than memory: analyzed and compressed a kernel at a time."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from rmtjax._types import Axes, BulkFit, Where
from rmtjax.checkpoint._manifest import KEY, Manifest
from rmtjax.checkpoint._open import (
    check_regular,
    check_target,
    open_tensors,
    SUFFIX,
    Tensors,
    write_tensors,
)
from rmtjax.checkpoint._rewrite import Changed, noise_levels, read_leaf, tell
from rmtjax.checkpoint._tensor_names import choose, find_leaves, read_manifest, tensor_axes
from rmtjax.noise import ranks, Shrink
from rmtjax.planning import in_place, make_clock, make_plan, Plan, PlanOptions
from rmtjax.report import Report

FilePath = str | os.PathLike[str]
# Called before each step, with the number of steps done, that of all steps, and a path.
Progress = Callable[[int, int, str], None]


def _check_dtype(dtype: Any) -> np.dtype | None:
    if dtype is None:
        return None
    found = np.dtype(dtype)
    if found.name not in ("float32", "float64"):
        raise ValueError(
            f"`dtype` must be float32 or float64, got {found}: it is that of the computation; what "
            "is written keeps the dtype of the kernel."
        )
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise ValueError(
            "`dtype` float64 needs `jax.config.update('jax_enable_x64', True)` before it."
        )
    return found


def _at(path: str, value: Any) -> Any:
    """An option of one kernel; None where a dictionary leaves it out."""
    if not isinstance(value, Mapping):
        return value
    return {path: value[path]} if path in value else None


class _Steps:
    """Tells the progress; counts what has been done."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, path: str) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, path)
        self.done += 1


class _Planned(NamedTuple):
    """A file, and what is planned for its kernels.

    Attributes:
      told: What it says of itself.
      leaves: Its tensors by path, factors as one.
      rows: The plan.
      steps: Of which those of planning are done.
    """

    told: Manifest | None
    leaves: dict[str, Any]
    rows: Plan
    steps: _Steps


def _plan_file(
    tensors: Tensors,
    *,
    where: Where | None,
    axes: Axes | None,
    fits: Mapping[str, BulkFit] | None,
    batch: int | Mapping[str, int] | None,
    dtype: np.dtype | None,
    progress: Progress | None,
    writes: bool = False,
    **options: Any,
) -> _Planned:
    """Plans a kernel at a time: each shape is compiled once for all."""
    told = read_manifest(tensors)
    leaves = find_leaves(tensors, told)
    kernels = choose(leaves, where, axes)
    steps = _Steps(progress, len(kernels) + writes * len(leaves))
    levels = noise_levels(told, leaves, fits)
    name_axes = axes if callable(axes) else tensor_axes
    rows, clock = Plan(), make_clock()
    for path, spec in kernels.items():
        steps(path)
        rows |= make_plan(
            {path: read_leaf(tensors, path, spec, dtype)},
            PlanOptions(
                where=lambda path, leaf: True,
                axes=(_at(path, axes) if isinstance(axes, Mapping) else None) or name_axes,
                fits=_at(path, levels),
                batch=_at(path, batch),
                **options,
            ),
            clock,
        )
    return _Planned(told, leaves, rows, steps)


def _write(
    tensors: Tensors, planned: _Planned, out: FilePath, rule: ranks.RankRule, dtype: np.dtype | None
) -> None:
    """Writes the file that a plan makes of another, a tensor at a time."""
    told, leaves, rows, steps = planned
    changed = Changed(tensors, leaves, rows, dtype)
    steps.total = steps.done + len(changed.entries)
    metadata = {**tensors.metadata, KEY: tell(told, rows, rule, changed)}

    def read(name: str) -> np.ndarray:
        steps(name)
        return changed.read(name)

    write_tensors(out, changed.entries, read, metadata)


def analyze_file(
    path: FilePath,
    *,
    rule: ranks.RankRule = ranks.bema(),  # noqa: B008 - a frozen value
    where: Where | None = None,
    axes: Axes | None = None,
    fits: Mapping[str, BulkFit] | None = None,
    multiple: int = 1,
    min_size: int = 50,
    exact_below: int = 4096,
    batch: int | Mapping[str, int] | None = None,
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
) -> Report:
    """Looks at every kernel of a checkpoint, one in memory at a time; changes nothing.

    Args:
      path: A .safetensors file, a folder of them with an index, or an orbax checkpoint.
      rule: A rank rule of `rmtjax.ranks`.
      where: `where(path, leaf)` chooses the kernels by name, shape and dtype; the leaf is a
        `jax.ShapeDtypeStruct`, or `Factors` of two. By default Flax's `kernel` and `embedding`,
        and Torch's weights with two axes or more; but not those of an optimizer's state: what lies
        below `opt_state`, or in a state alone below `0/mu`, `0/nu` or `0/trace` (any number).
      axes: The axes that make a kernel a matrix, as in `rmtjax.plan`. By default guessed from
        Flax's names, and for Torch's, which are stored as (outputs, inputs, *window), the first
        axis against the others. Torch's fused kernels (q, k and v; the gates of a recurrent layer)
        are one matrix; a stack of kernels cannot be told from its name, and has a row that says so:
        of Torch, three axes of which the last is over 16, without "conv" in the layer's name.
      fits: Noise levels to use instead of new fits, as in `rmtjax.plan`. What `compress_file`
        has cut is judged by those in the file.
      multiple: Ranks are rounded up to a multiple of it: 1 tells them as they are, 8 as
        `compress_file` makes them.
      min_size: Kernels with a shorter short side get a row without a fit.
      exact_below: Spectra are estimated from this short side on, as in `rmtjax.plan`.
      batch: Rows for which kernels are timed, dense and as factors, as in `rmtjax.plan`.
      dtype: float32 or float64, in which spectra are computed; by default that of the kernel,
        float32 at least, and float32 where jax has 64 bits switched off.
      progress: `progress(done, total, path)` is called before each kernel.

    Returns:
      A `Report`, the one that `rmtjax.analyze` makes of the tree.

    Raises:
      ValueError: The file is damaged, holds no kernel, or an option does not fit.
      OSError: It cannot be read.

    Examples:
      >>> import jax, pathlib, tempfile
      >>> from rmtjax import checkpoint
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "model.safetensors")
      ...     checkpoint.save(path, {"Dense_0": {"kernel": noise.at[:, 0].add(5.0)}})
      ...     print(checkpoint.analyze_file(path).rows[0].reason)
      factorized: 1 of 200 are signal, rank 1
    """
    options = {"rule": rule, "where": where, "axes": axes, "fits": fits, "min_size": min_size}
    options |= {"batch": batch, "dtype": _check_dtype(dtype), "progress": progress}
    options |= {"exact_below": exact_below}
    with open_tensors(path) as tensors:
        return Report(_plan_file(tensors, **options, multiple=multiple).rows)


def compress_file(
    path: FilePath,
    out: FilePath,
    *,
    rule: ranks.RankRule = ranks.bema(),  # noqa: B008 - a frozen value
    keep: float = 0.0,
    shrink: Shrink | None = None,
    where: Where | None = None,
    axes: Axes | None = None,
    fits: Mapping[str, BulkFit] | None = None,
    min_rank: int = 1,
    multiple: int = 8,
    min_size: int = 50,
    exact_below: int = 4096,
    batch: int | Mapping[str, int] | None = None,
    mode: Literal["factorize", "truncate"] = "factorize",
    dtype: DTypeLike | None = None,
    progress: Progress | None = None,
) -> Report:
    """Writes a checkpoint whose kernels are cut to their signal; one is in memory at a time.

    The file is read twice: once to plan, once to write. What is no kernel, or is kept, is copied
    bit by bit. The output is there when all of it has been written, and carries its plan: it can be
    analyzed and compressed again, and `rmtjax.checkpoint.restore` makes a tree of it.

    Memory, on CPU, is three times the largest tensor, counted in float32, and a constant; four
    times where more than half of the directions of a kernel are kept and shrunk, and up to seven
    times a kernel of float64, or that is computed in it.

    Args:
      path: A .safetensors file, a folder of them with an index, or an orbax checkpoint.
      out: The file to write, a name in .safetensors; it takes the place of the file that is
        there, and has its mode. A link is followed.
      rule: As in `analyze_file`.
      keep: As in `rmtjax.plan`.
      shrink: As in `rmtjax.plan`.
      where: As in `analyze_file`.
      axes: As in `analyze_file`.
      fits: As in `analyze_file`.
      min_rank: As in `rmtjax.plan`.
      multiple: As in `rmtjax.plan`.
      min_size: As in `rmtjax.plan`.
      exact_below: As in `rmtjax.plan`.
      batch: As in `rmtjax.plan`.
      mode: "factorize" writes PATH/left and PATH/right where these are smaller; "truncate" keeps
        names and shapes, for programs that know nothing of factors.
      dtype: As in `analyze_file`; the output has the dtypes of the input.
      progress: `progress(done, total, path)` is called before each kernel that is planned, and
        before each tensor that is written.

    Returns:
      A `Report` of what has been done.

    Raises:
      ValueError: As `analyze_file`; or `out` is read, lies in the folder that is read, has no name
        in .safetensors, or is no regular file; or a factor would have the name of another tensor.
      OSError: The input cannot be read, or the output not written.

    Examples:
      >>> import jax, pathlib, tempfile
      >>> from rmtjax import checkpoint
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path, out = (pathlib.Path(folder, name) for name in ("dense", "thin.safetensors"))
      ...     checkpoint.save(path, {"Dense_0": {"kernel": noise.at[:, 0].add(5.0)}})
      ...     report = checkpoint.compress_file(path, out)
      ...     print(checkpoint.restore(out)["Dense_0"]["kernel"].left.shape)
      (200, 8)
    """
    if mode not in ("factorize", "truncate"):
        raise ValueError(f"`mode` must be 'factorize' or 'truncate', got {mode!r}.")
    check_regular(Path(out), "out")
    found = _check_dtype(dtype)
    options = {"rule": rule, "where": where, "axes": axes, "fits": fits, "min_size": min_size}
    options |= {"batch": batch, "dtype": found, "progress": progress, "keep": keep}
    options |= {"shrink": shrink, "min_rank": min_rank, "multiple": multiple}
    options |= {"exact_below": exact_below}
    with open_tensors(path) as tensors:
        check_target(tensors, out, "`out`")
        if Path(out).suffix != SUFFIX:  # by which `checkpoint.save` tells a file from a folder
            raise ValueError(
                f"`out` must end in {SUFFIX}, which is what is written, got {os.fspath(out)!r}: "
                f"give {os.fspath(out) + SUFFIX!r}."
            )
        planned = _plan_file(tensors, **options, writes=True)
        if mode == "truncate":
            rows = {path: in_place(row) for path, row in planned.rows.items()}
            planned = planned._replace(rows=Plan(rows))
        _write(tensors, planned, out, rule, found)
    return Report(planned.rows)
