"""Analyzes and compresses checkpoint files larger than memory, a kernel at a time."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import DTypeLike

from rmtjax._axes import FactoredKernel
from rmtjax._modes import in_usual_modes
from rmtjax._progress import Progress, showing, Step
from rmtjax._types import Axes, BulkFit, Where
from rmtjax.checkpoint._manifest import Manifest, read_manifest, to_json
from rmtjax.checkpoint._moments import (
    change_kernel,
    check_moments,
    stored_axes,
    study_kernel,
)
from rmtjax.checkpoint._open import check_target, open_tensors, SUFFIX
from rmtjax.checkpoint._safetensors import check_codes, check_regular, write_tensors
from rmtjax.checkpoint._tensor_names import (
    choose,
    find_leaves,
    halves,
    named_parts,
    pair_adapters,
    unchosen,
)
from rmtjax.checkpoint._tensors import check_dtype, Entry, FilePath, KEY, Tensors, with_dtype
from rmtjax.moments import Moments
from rmtjax.noise import ranks, Shrink
from rmtjax.planning import (
    Budget,
    count_others,
    decide_all,
    Factorized,
    Findings,
    guess_axes,
    merge_findings,
    Neighbours,
    Plan,
    PlanOptions,
    rows_by_path,
    without_values,
)
from rmtjax.report import Extra, Report


def _plan_kernels(
    leaves: Mapping[str, Any],
    manifest: Manifest,
    options: PlanOptions,
    dtype: np.dtype | None,
    progress: Step,
    later: int = 0,
    extra: Extra = Extra(),  # noqa: B008 - a frozen value
) -> tuple[Plan, Findings, PlanOptions, dict[str, Any]]:
    """Returns the plan of a file, and what it was made of; each kernel is read alone.

    `later` steps follow in the progress.
    """
    kernels = choose(leaves, options)
    # A kernel that was cut has lost its noise. One that was only kept is fitted like any other.
    changes = manifest.plan.changes if manifest.plan else {}
    known = {path: row.fit for path, row in changes.items() if not row.equalized}
    fits = known | dict(options.fits or {})
    rows_by_path(options.batch, kernels)  # raises an error for other paths before the work
    check_moments(options.moments, leaves)
    others = unchosen(leaves, kernels) if options.where is None else {}
    axes, tree = options.axes, Neighbours(leaves)
    # A table of `rmtjax.linen` is a dictionary too. As a function it also knows stacked leaves.
    if not callable(axes):
        table = axes or {}
        axes = lambda path, leaf: table[path] if path in table else guess_axes(path, leaf, tree)
    options = dataclasses.replace(options, where=lambda path, leaf: True, axes=axes, fits=fits)
    found, extras = Findings({}, {}, {}, {}, {}), {}
    for place, (path, leaf) in enumerate(kernels.items(), len(others)):
        progress(place, len(others) + len(kernels) + later, path)
        known = {path: fits[path]} if path in fits else None
        moments = options.moments and options.moments.of([path])
        alone = dataclasses.replace(options, fits=known, moments=moments, batch=None)
        stored = stored_axes(moments, path, leaf, axes)
        one = study_kernel(path, with_dtype(leaf, dtype), alone, stored)
        found, extras = merge_findings(found, one), extras | extra.of(one, options)
    found = found._replace(others=others)
    return decide_all(found, options), without_values(found), options, extras


def _find_outputs(leaves: Mapping[str, Any], plan: Plan) -> dict[str, Entry]:
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


def _write_outputs(
    leaves: Mapping[str, Any],
    plan: Plan,
    entries: Mapping[str, Entry],
    dtype: np.dtype | None,
    progress: Step,
    moments: Moments | None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and the data of each tensor that is written, leaf by leaf."""
    changes = plan.changes
    for place, (path, leaf) in enumerate(leaves.items(), len(plan)):
        progress(place, len(plan) + len(leaves), path)
        arrays = jax.tree.leaves(leaf)  # those that stay are still in the file
        if path in changes:
            new = change_kernel(path, with_dtype(leaf, dtype), changes[path], moments)
            arrays = jax.tree.leaves(new)
        held = named_parts(path, leaf) if isinstance(leaf, FactoredKernel) else halves(path)
        for name in [path] if path in entries else held:
            if entries[name].is_packed:  # bytes, which are copied
                yield name, leaf.tensors.read(name)  # pyright: ignore[reportAttributeAccessIssue]
                continue
            # Each array is dropped before the next is read: a kernel may fill the memory.
            yield name, np.asarray(arrays.pop(0)).astype(entries[name].dtype, copy=False)


def _last_changes(
    manifest: Manifest, plan: Plan, rule: ranks.RankRule
) -> tuple[Plan, ranks.RankRule | None]:
    """Returns the last change that was ever made to each kernel, and the rule if all have one."""
    earlier = manifest.plan or Plan()
    # A kernel that is kept this time may have been cut before. The old row says how.
    stay = (earlier.keys() - plan.keys()) | (earlier.changes.keys() - plan.changes.keys())
    one_rule = not stay or manifest.rule == str(rule)
    return Plan(earlier | plan | {path: earlier[path] for path in stay}), rule if one_rule else None


@in_usual_modes
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
    moments: Moments | None = None,
    budget: Budget | float | None = None,
    randomized: int = 0,
    aspect: float | None = None,
    seed: int = 0,
    dtype: DTypeLike | None = None,
    progress: Progress = None,
) -> Report:
    """Analyzes every kernel of a checkpoint with one in memory at a time; changes nothing.

    Args:
      path: A .safetensors file, a folder of them with an index, or an orbax checkpoint. Of an
        adapter (LoRA, by PEFT's names) a kernel is the product B A, which is never formed.
      where: Chooses the kernels, as in `rmtjax.plan`, or by a dictionary from paths to booleans. A
        leaf has a shape and a dtype, or is `Factors` of two such leaves. By default as there, and
        the state of an optimizer is not chosen: the leaves below `opt_state`, or below `0/mu`,
        `0/nu` or `0/trace` with any number.
      axes: As in `rmtjax.plan`. Torch stores (outputs, inputs, *window): its first axis against the
        others. A third axis longer than 16 means a stack, unless the name has "conv" in it.
      fits: As in `rmtjax.plan`. By default the levels by which `compress_file` has cut kernels.
      multiple: Ranks are rounded up to a multiple of it; `compress_file` uses 8.
      rule, min_size, exact_below, batch, budget: As in `rmtjax.plan`.
      moments: As in `rmtjax.plan`, by the paths of the file. They are not centred, since the bias
        stays as it is. They know which axes of a kernel of Torch are its inputs.
      randomized, aspect, seed: As in `rmtjax.analyze`.
      dtype: float32 or float64, for the computation. By default the dtype of the kernel, but at
        least float32, and float32 if 64 bits are switched off in jax.
      progress: True shows the progress on stderr. A function `progress(done, total, path)` is
        called before each kernel.

    Returns:
      A `Report`, as `rmtjax.analyze` makes it of the tree.

    Raises:
      ValueError: The file is damaged, has no kernel, or an option does not fit it.
      OSError: The file cannot be read.

    Examples:
      >>> import jax, rmtjax, tempfile
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = f"{folder}/model.safetensors"
      ...     rmtjax.checkpoint.save(path, {"Dense_0": {"kernel": noise.at[:, 0].add(5.0)}})
      ...     print(rmtjax.checkpoint.analyze_file(path).rows[0].reason)
      factorized: 1 of 200 are signal, rank 1
    """
    sizes: dict[str, Any] = {"multiple": multiple, "min_size": min_size, "exact_below": exact_below}
    sizes |= {"moments": moments, "budget": budget}
    options = PlanOptions(rule, where=where, axes=axes, fits=fits, batch=batch, **sizes)
    checked, extra = check_dtype(dtype), Extra(randomized, aspect, seed)
    with open_tensors(path) as tensors, showing(progress, "analyze_file") as step:
        return analyze_tensors(tensors, options, step, checked, extra, adapters=True)


def analyze_tensors(
    tensors: Tensors,
    options: PlanOptions,
    step: Step,
    dtype: np.dtype | None = None,
    extra: Extra = Extra(),  # noqa: B008 - a frozen value
    *,
    adapters: bool = False,
) -> Report:
    """Analyzes every kernel of an open checkpoint; with `adapters` the A and B of one are one."""
    manifest = read_manifest(tensors)
    leaves = find_leaves(tensors, manifest)
    leaves = pair_adapters(leaves) if adapters else leaves
    found = _plan_kernels(leaves, manifest, options, dtype, step, extra=extra)
    plan, findings, options, extras = found
    return Report(plan, count_others(leaves, plan), False, findings, options, extras)


@in_usual_modes
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
    moments: Moments | None = None,
    budget: Budget | float | None = None,
    mode: Literal["factorize", "truncate"] = "factorize",
    dtype: DTypeLike | None = None,
    progress: Progress = None,
) -> Report:
    """Writes a checkpoint whose kernels are cut to their signal, with one in memory at a time.

    Tensors that are kept, or are not kernels, are copied bit by bit. The output carries its plan,
    so it can be analyzed and compressed again, and `rmtjax.checkpoint.restore` makes a tree of it.

    On CPU, the memory is a constant plus three times the largest tensor, counted in float32. It is
    four times if more than half of the directions of a kernel are kept and shrunk. It is up to
    seven times for a kernel in float64, or computed in float64.

    Args:
      path, rule, where, axes, fits, moments, dtype: As in `analyze_file`. The output has the
        input's dtypes.
      out: The file to write, with a name in .safetensors. An existing file is replaced when the new
        one is complete; its mode is kept, and a link is followed.
      keep, shrink, min_rank, multiple, min_size, exact_below, batch, budget: As in `rmtjax.plan`.
      mode: "factorize" writes PATH/left and PATH/right if they are smaller. "truncate" keeps names
        and shapes, for programs that do not know factors.
      progress: As in `analyze_file`; it is also called before each leaf that is written.

    Returns:
      A `Report` of what was done.

    Raises:
      ValueError: As in `analyze_file`. Or `out` is the input or in its folder, does not end in
        .safetensors, or is not a regular file. Or a factor would have the name of another tensor.
      OSError: The input cannot be read, or the output cannot be written.

    Examples:
      >>> import jax, rmtjax, tempfile
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path, out = f"{folder}/dense.safetensors", f"{folder}/thin.safetensors"
      ...     rmtjax.checkpoint.save(path, {"Dense_0": {"kernel": noise.at[:, 0].add(5.0)}})
      ...     report = rmtjax.checkpoint.compress_file(path, out)
      ...     print(rmtjax.checkpoint.restore(out)["Dense_0"]["kernel"].left.shape)
      (200, 8)
    """
    sizes = min_rank, multiple, min_size, exact_below
    options = PlanOptions(rule, keep, shrink, where, axes, fits, *sizes, batch, moments, budget)
    if mode not in ("factorize", "truncate"):
        raise ValueError(f"`mode` must be 'factorize' or 'truncate', got {mode!r}.")
    checked = check_dtype(dtype)
    with open_tensors(path) as tensors, showing(progress, "compress_file") as step:
        check_target(tensors, out, "`out`")
        check_regular(Path(out), "out")
        # `checkpoint.restore` and `save` tell a file from a folder by this ending.
        if Path(out).suffix != SUFFIX:
            raise ValueError(f"`out` must end in {SUFFIX}, and got '{out}': give '{out}{SUFFIX}'.")
        manifest = read_manifest(tensors)
        check_codes(tensors.entries)  # before hours of work
        leaves = find_leaves(tensors, manifest)
        plan, *_ = _plan_kernels(leaves, manifest, options, checked, step, later=len(leaves))
        if mode == "truncate":
            plan = plan.in_place()
        entries = _find_outputs(leaves, plan)
        parts = manifest.parts  # of kernels that a plan does not change
        factors = [path for path in leaves if path not in entries and path not in parts]
        record = _last_changes(manifest, plan, rule)
        text = to_json(*record, factors=factors, entries=entries, keys=manifest.keys, parts=parts)
        arrays = _write_outputs(leaves, plan, entries, checked, step, moments)
        write_tensors(out, entries, arrays, {**tensors.metadata, KEY: text})
    return Report(plan, count_others(leaves, plan), applied=True)
