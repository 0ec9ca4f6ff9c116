"""The spectra of what two checkpoints differ in, kernel by kernel."""

import contextlib
import dataclasses
from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rmtjax._progress import Progress, showing, Step
from rmtjax._types import Axes, Where
from rmtjax.checkpoint import (
    analyze_tensors,
    choose,
    Entry,
    FilePath,
    find_leaves,
    open_tensors,
    read_manifest,
    Tensors,
)
from rmtjax.noise import ranks
from rmtjax.planning import (
    count_others,
    decide_all,
    Findings,
    guess_axes,
    Kept,
    Neighbours,
    Plan,
    PlanOptions,
)
from rmtjax.report import Report


class Difference(NamedTuple):
    """Holds the changes between two checkpoints.

    Attributes:
      report: A row for each kernel that has changed, of the spectrum of its change.
      unchanged: Names of the tensors that are equal in both.
      others: Names of the tensors that have changed, and are not in the report.
      unmatched: Names of the tensors that only one checkpoint has, or both in other shapes or in a
        dtype that is not floating. Nothing is told of them.
      written: Paths of the kernels that `extract_lora` has written to the adapter.

    Examples:
      >>> import jax.numpy as jnp, rmtjax, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     paths = f"{folder}/base.safetensors", f"{folder}/tuned.safetensors"
      ...     for path, bias in zip(paths, (0.0, 1.0)):
      ...         rmtjax.checkpoint.save(path, {"kernel": jnp.ones((80, 60)), "bias": bias})
      ...     difference = rmtjax.adapters.analyze_difference(*paths)
      >>> difference.unchanged, difference.others
      (('kernel',), ('bias',))
    """

    report: Report
    unchanged: tuple[str, ...]
    others: tuple[str, ...]
    unmatched: tuple[str, ...]
    written: tuple[str, ...] = ()


def _comparable(one: Entry | None, other: Entry | None) -> bool:
    """Returns True for two floating tensors of one shape."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return all(jnp.issubdtype(e.dtype, jnp.floating) and not e.is_packed for e in (one, other))


def _rounding(one: np.ndarray, other: np.ndarray) -> str | None:
    """Returns the dtype whose rounding explains why two arrays differ; None if none does.

    No entry has then moved by more than its last place. Arrays of float32 may hold what 16 bits
    have rounded, which all of their entries show.
    """
    kinds, halves = [one.dtype, other.dtype], [np.dtype(jnp.bfloat16), np.dtype(np.float16)]
    with np.errstate(over="ignore", invalid="ignore"):
        one, other = (array.astype(np.float64) for array in (one, other))
        same = lambda array, kind: np.array_equal(array, array.astype(kind).astype(np.float64))
        kinds += [kind for kind in halves if same(one, kind) or same(other, kind)]
        moved, size = np.abs(one - other), np.maximum(np.abs(one), np.abs(other))
        for kind in kinds:
            limits = jnp.finfo(kind)
            # The last place of x is worth at most eps |x|, or the smallest number.
            least = float(limits.smallest_subnormal)
            if np.all((moved <= np.maximum(float(limits.eps) * size, least)) | (one == other)):
                return kind.name
    return None


# What tells by its name whether rounding explains a change.
Rounding = Callable[[str], str | None]


@contextlib.contextmanager
def _open(base: FilePath, tuned: FilePath) -> Iterator[tuple[Tensors, set[str], Rounding]]:
    """Opens the changes of the tensors as a checkpoint; yields the names of all others, too."""
    with open_tensors(base) as before, open_tensors(tuned) as after:
        names = [*after.entries, *(name for name in before.entries if name not in after.entries)]
        half = next((name for name in names if ".lora_A." in name), None)
        if half is not None:
            raise ValueError(
                f"{half!r} is half of an adapter, and the difference of halves is not that of "
                "their products: merge the adapters into their models first."
            )
        pairs = {name: (before.entries.get(name), after.entries.get(name)) for name in names}
        both = [name for name, pair in pairs.items() if _comparable(*pair)]
        if not both:
            raise ValueError(
                f"{str(base)!r} and {str(tuned)!r} have no floating tensor of one name and shape, "
                f"but such as {names[:3]}: give two checkpoints of one model."
            )
        # The rounding of a difference in 16 bits would be of its own size.
        wide = lambda name: np.dtype("f8" if after.entries[name].dtype == np.float64 else "f4")

        def read(name: str) -> np.ndarray:
            one, other = (tensors.array(name).astype(wide(name)) for tensors in (after, before))
            # Masks have infinities, whose difference would be NaN.
            differ = (one != other) & ~(np.isnan(one) & np.isnan(other))
            return np.subtract(one, other, out=np.zeros_like(one), where=differ)

        entries = {name: Entry(after.entries[name].shape, wide(name)) for name in both}
        files = (*after.files, *before.files)
        change = dataclasses.replace(after, entries=entries, metadata={}, read=read, files=files)
        rounding = lambda name: _rounding(after.array(name), before.array(name))
        yield change, {*names} - {*both}, rounding


def analyze_difference(
    base: FilePath,
    tuned: FilePath,
    *,
    rule: ranks.RankRule = ranks.bema(),  # noqa: B008 - a frozen value
    where: Where | None = None,
    axes: Axes | None = None,
    multiple: int = 1,
    min_size: int = 50,
    exact_below: int = 4096,
    progress: Progress = None,
) -> Difference:
    r"""Analyzes the change $W_{tuned} - W_{base}$ of each kernel between two checkpoints.

    A fine-tuning adds directions to a kernel, and noise: that of its steps, and the rounding of 16
    bits. The rule tells how many directions stand out of this noise. A change without noise above
    rounding, as of an adapter that was merged, has the rank that is above rounding. A kernel in
    which no entry has moved by more than its last place is kept, since rounding explains that. Its
    spikes would be those of the sizes of its entries.

    Args:
      base, tuned: Two checkpoints of one model, as in `rmtjax.checkpoint.analyze_file`.
      rule, where, axes, multiple, min_size, exact_below, progress: As there.

    Returns:
      A `Difference`.

    Raises:
      ValueError: No tensor has one name and one shape in both; or as in `analyze_file`.
      OSError: A file cannot be read.

    Examples:
      >>> import jax, rmtjax, tempfile
      >>> from rmtjax import adapters
      >>> draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> base, change = draw(0, 128, 96), draw(1, 128, 4) @ draw(2, 4, 96)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     paths = f"{folder}/base.safetensors", f"{folder}/tuned.safetensors"
      ...     for path, kernel in zip(paths, (base, base + change + draw(3, 128, 96) / 9)):
      ...         rmtjax.checkpoint.save(path, {"kernel": kernel})
      ...     print(adapters.analyze_difference(*paths).report.rows[0].reason)
      factorized: 4 of 96 are signal, rank 4
    """
    sizes: dict[str, Any] = {"multiple": multiple, "min_size": min_size, "exact_below": exact_below}
    options = PlanOptions(rule, where=where, axes=axes, **sizes)
    with analyzed(base, tuned, options, progress, "analyze_difference") as (_, difference):
        return difference


@contextlib.contextmanager
def analyzed(
    base: FilePath, tuned: FilePath, options: PlanOptions, progress: Progress, task: str
) -> Iterator[tuple[Tensors, Difference]]:
    """Opens the changes of the tensors, and yields them with what is found of them."""
    opened = _open(base, tuned)
    with opened as (change, unmatched, rounding), showing(progress, task) as step:
        yield change, _analyze_change(change, unmatched, rounding, options, step)


def _among(change: Tensors, changed: Container[str], options: PlanOptions) -> PlanOptions | None:
    """Returns the options for the tensors that have changed, by all; None if none is a kernel."""
    leaves = find_leaves(change, read_manifest(change))
    chosen = [path for path in choose(leaves, options) if path in changed]
    axes, tree = options.axes, Neighbours(leaves)
    if not callable(axes):
        table = axes or {}
        axes = {p: table[p] if p in table else guess_axes(p, leaves[p], tree) for p in chosen}
    where = None if options.where is None else dict.fromkeys(chosen, True)
    return dataclasses.replace(options, where=where, axes=axes) if chosen else None


def _without_noise(row: Any) -> Any:
    """Returns a measurement that trusts the numerical rank where there is no noise to fit."""
    eigenvalues = row.spectra.eigenvalues
    eps = np.finfo(eigenvalues.dtype).eps
    longer = eigenvalues.shape[-1] / row.spectra.ratio[:, None]
    # An estimate squares the matrix: its zeros were seen at up to 1.6 eps of the largest.
    unit = 10 * eps if row.estimated else (longer * eps) ** 2
    floor = np.maximum(unit * eigenvalues[:, :1], np.nan_to_num(row.fits.threshold)[:, None])
    count = np.sum(eigenvalues > floor, axis=-1, dtype=np.int32)
    # The bulk of an estimated spectrum does not tell its rank.
    told = ~row.noisy & (count <= row.values.num_exact)
    signal = np.where(told, count, row.signal)
    return row._replace(accepted=row.accepted | told, signal=signal)


def _count_above_rounding(report: Report) -> Report:
    """Returns the report with the numerical rank of the changes that have no noise to fit."""
    found: Any = report.findings
    options: Any = report.options
    if not options.rule.needs_noise:
        return report
    silent = [path for path, row in found.measured.items() if not row.noisy.all()]
    exact = {path: _without_noise(found.measured[path]) for path in silent}
    found = found._replace(measured=found.measured | exact)
    plan = decide_all(found, options)
    for path in exact:
        row = plan[path]
        if row.reason != report.plan[path].reason:
            plan[path] = dataclasses.replace(row, reason=f"{row.reason} (no noise above rounding)")
    return dataclasses.replace(report, plan=plan, findings=found)


def _keep_rounding(report: Report, rounding: Rounding) -> Report:
    """Returns the report with the changes kept that rounding explains, without a spectrum."""
    options: Any = report.options
    plan = Plan(report.plan)
    for path, row in report.plan.items() if options.rule.needs_noise else ():
        if row.fit is None or row.cost is None or (kind := rounding(path)) is None:
            continue
        before = row.cost[:3]
        reason = f"kept: rounding of {kind} explains the change: each entry is within its unit"
        plan[path] = Kept(reason, row.shape, row.axes, cost=type(row.cost)(*before, *before))
    return dataclasses.replace(report, plan=plan, difference=True)


def _analyze_change(
    change: Tensors, unmatched: set[str], rounding: Rounding, options: PlanOptions, step: Step
) -> Difference:
    """Analyzes the tensors that have changed, and sorts the names of the others."""
    entries = {name: entry for name, entry in change.entries.items() if np.any(change.array(name))}
    if not entries:
        cause = f"nothing has changed in {str(change.path)!r}"
        if unmatched:
            cause += f", of what both have; {min(unmatched)!r} and others are in one alone, or in "
            raise ValueError(f"{cause}other shapes: multiply factors out by `rmtjax.merge`.")
        raise ValueError(f"{cause}: give a tuned checkpoint.")
    moved, able = dataclasses.replace(change, entries=entries), _among(change, entries, options)
    if able is None:
        none = count_others(find_leaves(moved, read_manifest(moved)), {})
        report = Report(Plan(), none, False, Findings({}, {}, {}, {}, {}), options)
    else:
        report = _count_above_rounding(analyze_tensors(moved, able, step))
        report = _keep_rounding(report, rounding)
    equal = tuple(name for name in change.entries if name not in entries)
    others = tuple(name for name in entries if name not in report.plan)
    return Difference(report, equal, others, tuple(sorted(unmatched)))
