"""The spectra of what two checkpoints differ in, kernel by kernel."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rmtjax._progress import Progress, showing, Step
from rmtjax._types import Axes, Where
from rmtjax.checkpoint import analyze_tensors, Entry, FilePath, open_tensors, Tensors
from rmtjax.noise import ranks
from rmtjax.planning import PlanOptions
from rmtjax.report import Report


class Difference(NamedTuple):
    """Holds the changes between two checkpoints.

    Attributes:
      report: A row for each kernel that has changed, of the spectrum of its change.
      unchanged: Names of the tensors that are equal in both.
      others: Names of the tensors that have changed, and are not in the report.
      unmatched: Names of the tensors that only one checkpoint has, or both in other shapes or in a
        dtype that is not floating. Nothing is told of them.
    """

    report: Report
    unchanged: tuple[str, ...]
    others: tuple[str, ...]
    unmatched: tuple[str, ...]


def _comparable(one: Entry | None, other: Entry | None) -> bool:
    """Returns True for two floating tensors of one shape."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return all(jnp.issubdtype(e.dtype, jnp.floating) and not e.is_packed for e in (one, other))


@contextlib.contextmanager
def open_difference(base: FilePath, tuned: FilePath) -> Iterator[tuple[Tensors, set[str]]]:
    """Opens the changes of the tensors as a checkpoint, and yields the names of all others."""
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
        wide = lambda name: jnp.promote_types(jnp.float32, after.entries[name].dtype)

        def read(name: str) -> np.ndarray:
            # In float32: the rounding of a difference in 16 bits would be of its own size.
            return after.array(name).astype(wide(name)) - before.array(name).astype(wide(name))

        entries = {name: Entry(after.entries[name].shape, np.dtype(wide(name))) for name in both}
        files = (*after.files, *before.files)
        change = dataclasses.replace(after, entries=entries, metadata={}, read=read, files=files)
        yield change, {*names} - {*both}


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
    bits. The rule tells how many directions stand out of this noise.

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
    opened = open_difference(base, tuned)
    with opened as (change, unmatched), showing(progress, "analyze_difference") as step:
        return analyze_change(change, unmatched, options, step)


def analyze_change(
    change: Tensors, unmatched: set[str], options: PlanOptions, step: Step
) -> Difference:
    """Analyzes the tensors that have changed, and sorts the names of the others."""
    entries = {name: entry for name, entry in change.entries.items() if np.any(change.array(name))}
    if not entries:
        raise ValueError(f"nothing has changed in {str(change.path)!r}: give a tuned checkpoint.")
    report = analyze_tensors(dataclasses.replace(change, entries=entries), options, step)
    equal = tuple(name for name in change.entries if name not in entries)
    others = tuple(name for name in entries if name not in report.plan)
    return Difference(report, equal, others, tuple(sorted(unmatched)))
