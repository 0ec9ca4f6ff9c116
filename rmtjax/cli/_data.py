"""The commands that run a model on data, or compare files: `moments` and `compare`."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rmtjax import checkpoint
from rmtjax._progress import Progress, showing
from rmtjax._text import align, brief, printable
from rmtjax.checkpoint import Drift, Sums
from rmtjax.cli._arguments import parse_pattern, UsageError
from rmtjax.cli._models import load_batches, load_model
from rmtjax.cli._outputs import is_stdout, write_text
from rmtjax.moments import Moments
from rmtjax.planning import check_matches, is_kernel, leaves_by_path, path_name


def _chosen(params: Any, args: argparse.Namespace) -> Callable[[str, Any], bool]:
    """Returns the choice of kernels by patterns; raises ValueError if one matches nothing."""
    leaves = leaves_by_path(params, lambda path, leaf: True)
    matchers = {p: parse_pattern(p) for p in (*args.include, *args.exclude)}
    for pattern in matchers:
        check_matches(pattern, leaves)

    def where(path: str, leaf: Any) -> bool:
        if any(matchers[pattern](path) for pattern in args.exclude):
            return False
        named = any(matchers[pattern](path) for pattern in args.include)
        return named if args.include else is_kernel(path, leaf)

    return where


def _print(head: list[str], rows: list[list[str]]) -> None:
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    print(align(head, rows, shutil.get_terminal_size().columns if narrow else None), flush=True)


def collect_moments(args: argparse.Namespace, progress: Progress) -> Callable[[], None]:
    """Collects the moments of a model on data and writes them; returns what prints them."""
    if Path(args.out).suffix != ".safetensors":  # before the work
        raise UsageError(f"--out must end in .safetensors, got {args.out!r}.")
    model = load_model(args.model)
    where = _chosen(model.params, args)
    key = jax.random.key(0) if args.gradients else None
    batches = load_batches(args.data, args.batch_size)
    moments = model.moments(batches, where=where, key=key, progress=progress)
    checkpoint.save_moments(args.out, moments)
    without = [path for path in leaves_by_path(model.params, where) if path not in moments]
    return lambda: _tell_moments(moments, without, args.out)


def _tell_moments(moments: Moments, without: list[str], out: str) -> None:
    rows = []
    for path, moment in moments.items():
        shrunk = float(np.max(moments.second(path).intensity))
        count = int(np.max(np.asarray(moment.rows)))
        rows.append([printable(path), f"{moment.size:,}", f"{count:,}", f"{shrunk:.4g}"])
    _print(["path", "inputs", "rows", "shrinkage"], rows)
    size = os.path.getsize(out) / 1e6
    gradients = ", with gradients" if moments.gradients else ""
    print(f"\n{len(moments.groups)} matrices for {len(moments)} kernels{gradients}", end="")
    print(f" -> {printable(out)}, {size:,.1f} MB")
    if without:
        names = ", ".join(map(printable, without[:3])) + (", ..." if without[3:] else "")
        print(f"without moments, and cut by their weights: {len(without)} ({names}):")
        print("no product with their inputs was found, or one with their transpose too")


def _compare_outputs(args: argparse.Namespace, progress: Progress) -> list[Drift]:
    """Returns how far the outputs of a model are from one another with two checkpoints."""
    model = load_model(args.model)
    batches = load_batches(args.data, args.batch_size)
    calls = [model.outputs_of(path, batches) for path in (args.file, args.after)]
    sums: dict[str, Sums] = {}
    angles: dict[str, list[np.ndarray]] = {}
    with showing(progress, "outputs") as step:
        for place, batch in enumerate(batches):
            step(place, len(batches), "outputs")
            before, after = (jax.tree_util.tree_leaves_with_path(call(*batch)) for call in calls)
            for (key, one), (_, other) in zip(before, after, strict=True):
                name = "/".join(filter(None, ("outputs", path_name(key))))
                pair = np.asarray(one), np.asarray(other)
                sums.setdefault(name, Sums()).add(*pair)
                angles.setdefault(name, []).append(_cosines(*pair))
    means = {name: float(np.mean(np.concatenate(found))) for name, found in angles.items()}
    return [Drift(n, None, s.relative, means[n], s.largest) for n, s in sums.items()]


def _cosines(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Returns the cosine of the angle between each pair of vectors along the last axis.

    It is 1 for two zeros, and NaN where one of both is zero.
    """
    wide = (np.atleast_1d(array).astype(np.float64) for array in (before, after))
    one, other = (array.reshape(-1, array.shape[-1]) for array in wide)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosines = np.sum(one * other, axis=1) / np.where(norms > 0, norms, np.nan)
    return np.where(one.any(axis=1) | other.any(axis=1), cosines, 1.0)


def compare(args: argparse.Namespace, progress: Progress) -> Callable[[], None]:
    """Compares two checkpoints and writes the reports; returns what prints the rows."""
    if bool(args.model) != bool(args.data):
        raise UsageError("--model and --data belong together: give both, or compare tensors alone.")
    for source in (args.file, args.after):
        with checkpoint.open_tensors(source) as tensors:
            for form, target in args.reports:
                if not is_stdout(target):
                    checkpoint.check_target(tensors, target, f"--{form}")
    outputs = _compare_outputs(args, progress) if args.model else []
    found = checkpoint.compare_files(args.file, args.after, progress=progress)
    rows = [*outputs, *found.rows]
    plain = lambda row: {name: _plain(value) for name, value in row._asdict().items()}
    data = {"rows": [plain(row) for row in rows], "unmatched": list(found.unmatched)}
    for _, path in args.reports:
        write_text(path, json.dumps(data, indent=2) + "\n")
    return lambda: _tell_drifts(rows, found.unmatched, everything=args.all)


def _plain(value: Any) -> Any:
    """Returns a value that JSON can hold: it has neither infinities nor NaN."""
    if isinstance(value, tuple):
        return list(value)
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _tell_drifts(rows: list[Drift], unmatched: tuple[str, ...], *, everything: bool) -> None:
    """Prints outputs, then the tensors that have changed, the largest change first."""
    tensors = [row for row in rows if row.shape is not None]
    changed = [row for row in tensors if row.largest != 0]
    # A change that is not a number is the largest.
    size = lambda row: np.inf if np.isnan(row.relative) else row.relative
    shown = [row for row in rows if row.shape is None] + sorted(changed, key=size, reverse=True)
    if everything:
        shown += [row for row in tensors if row.largest == 0]
    cells = []
    for path, shape, relative, cosine, largest in shown:
        sides = "" if shape is None else "x".join(map(str, shape))
        # Four digits would show a cosine of 1 for a change of half a percent.
        numbers = brief(relative), f"{cosine:.6g}", brief(largest)
        cells.append([printable(path), sides, *numbers])
    if cells:
        _print(["path", "shape", "relative", "cosine", "largest"], cells)
        print()
    print(f"changed: {len(changed)} of {len(tensors)} tensors")
    equal = len(tensors) - len(changed)
    if equal:
        print(f"{equal} tensor{'s are' if equal > 1 else ' is'} equal")
    if unmatched:
        names = ", ".join(map(printable, unmatched[:3])) + (", ..." if unmatched[3:] else "")
        print(f"in one file only, in other shapes, or not read: {len(unmatched)} ({names})")
