"""Compares the spectra of two checkpoints of one model, kernel by kernel."""

from dataclasses import replace
from typing import Any

import numpy as np

from rmtjax._types import check_type
from rmtjax.planning import LayerPlan
from rmtjax.report._extra import SpectralChange
from rmtjax.report._report import Report
from rmtjax.report._row import to_number


def _values(layer: LayerPlan) -> np.ndarray | None:
    """Returns the singular values of all matrices, over the root of the long side; or None."""
    if layer.spectrum is None or not np.isfinite(layer.spectrum.eigenvalues).all():
        return None
    return np.sqrt(np.maximum(np.asarray(layer.spectrum.eigenvalues, np.float64), 0))


def _difference(new: Any, old: Any) -> float | None:
    return None if new is None or old is None else to_number(np.float64(new) - old)


def _change(path: str, old: Report, new: Report) -> SpectralChange:
    """Returns what has changed in a kernel that both reports have."""
    before, after = (_values(report.plan[path]) for report in (old, new))
    kinds = {(report.plan[path].shape, report.plan[path].equalized) for report in (old, new)}
    if before is None or after is None or len(kinds) > 1:
        return SpectralChange()
    size = np.linalg.norm(before)
    relative = lambda number: to_number(number / size) if size else None
    rows, metrics = (new[path], old[path]), (new.metrics[path], old.metrics[path])
    of_row = lambda name: _difference(*(getattr(row, name) for row in rows))
    of_spectrum = lambda name: _difference(*(numbers[name] for numbers in metrics))
    return SpectralChange(
        spectrum_change=relative(np.linalg.norm(np.subtract(after, before))),
        norm_change=relative(np.linalg.norm(after) - size),
        spikes_change=of_row("spikes"),
        distance_change=of_row("distance"),
        stable_rank_change=of_spectrum("stable_rank"),
        alpha_change=of_spectrum("alpha"),
    )


def compare_reports(old: Report, new: Report) -> Report:
    """Returns the new of two reports with the columns of `SpectralChange`, group "change".

    Args:
      old: The report of an earlier checkpoint, from `rmtjax.analyze` or `analyze_file`.
      new: That of a later one, made with the same options.

    Returns:
      A `Report` of the new checkpoint. Its tables, CSV, JSON and data frames take the columns.

    Raises:
      TypeError: An argument is not a `Report`.
      ValueError: No kernel is in both.

    Examples:
      >>> import jax, rmtjax
      >>> kernel = jax.random.normal(jax.random.key(0), (80, 60))
      >>> old, new = (rmtjax.analyze({"kernel": k}) for k in (kernel, 2 * kernel.at[:, 0].add(4)))
      >>> changes = rmtjax.compare_reports(old, new)
      >>> print(changes.table("path", "spikes", "spikes_change", "norm_change"))
      path    spikes  spikes_change  norm_change
      kernel  1       1              1.226

    References:
      Mirsky, Q. J. Math. 11 (1960) 50-59.
    """
    for name, report in (("old", old), ("new", new)):
        check_type(name, report, Report, "Make it by `rmtjax.analyze`.")
    shared = [path for path in new.plan if path in old.plan]
    if not shared:
        raise ValueError(
            f"`old` and `new` must have kernels in common, got {list(old.plan)[:3]} and "
            f"{list(new.plan)[:3]}: give reports of one model."
        )
    extras = {path: dict(new.extras.get(path, {})) for path in new.plan}
    for path in new.plan:
        change = _change(path, old, new) if path in old.plan else SpectralChange()
        extras[path] |= change._asdict()
    return replace(new, extras=extras)
