"""Chooses the kernels with most signal: those that are worth training on, or worth keeping."""

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
from jaxtyping import PyTree

from rmtjax.noise import ranks
from rmtjax.planning import path_name
from rmtjax.report._report import Report


def _kind(path: str) -> str:
    """Returns what kernels of one kind have in common: the path without its numbers."""
    return re.sub(r"\d+", "*", path)


def _with_signal(report: Report) -> set[str]:
    """Returns the kernels with a spike at the level that all of them share (Bonferroni)."""
    rule = None if report.options is None else report.options.rule
    if isinstance(rule, ranks.bema):
        report = report.replan(replace(rule, level=rule.level / max(len(report), 1)))
    return {row.path for row in report if row.spikes}


def most_signal(report: Report, top: float = 0.25, *, by_kind: bool = True) -> tuple[str, ...]:
    r"""Returns the paths of the kernels with the highest ratio of signal to noise.

    The ratio is the energy above the threshold over the energy below, $\sum_{\lambda > T} \lambda /
    \sum_{\lambda \le T} \lambda$, the column `snr`. A kernel without a spike is never chosen. Here
    spikes count at the level of the rule over the number of kernels, so that a model of pure noise
    has a kernel in the list about as rarely as `level` says, however many kernels it has.

    Args:
      report: From `rmtjax.analyze` or `rmtjax.checkpoint.analyze_file`, with a rule that fits the
        noise.
      top: Share of the kernels, in (0, 1]; of each kind at least one, if it has signal.
      by_kind: Takes this share of each kind: of the kernels whose paths differ only in numbers. A
        kind with large ratios would otherwise take all places.

    Returns:
      The paths in the order of the report.

    Raises:
      ValueError: `top` is out of range.

    Examples:
      >>> import jax, rmtjax
      >>> draw = jax.random.normal(jax.random.key(0), (2, 100, 80))
      >>> params = {"layer_0": draw[0], "layer_1": draw[1].at[:, 0].add(3.0)}
      >>> report = rmtjax.analyze(params, where=lambda path, leaf: True)
      >>> rmtjax.most_signal(report, top=0.5)
      ('layer_1',)
    """
    if not 0 < top <= 1:
        raise ValueError(f"`top` must be in (0, 1], a share of the kernels, got {top}.")
    rows = {row.path: row for row in report.rows}
    ratios = {path: numbers["snr"] for path, numbers in report.metrics.items()}
    kinds: dict[str, list[str]] = {}
    for path in rows:
        kinds.setdefault(_kind(path) if by_kind else "", []).append(path)
    chosen, known = set(), _with_signal(report)
    for paths in kinds.values():
        signal = [path for path in paths if path in known and ratios[path]]
        best = sorted(signal, key=lambda path: -ratios[path])
        # In binary, 0.07 * 100 is just above 7.
        chosen |= {*best[: max(1, math.ceil(top * len(paths) - 1e-9))]}
    return tuple(path for path in rows if path in chosen)


def mask(params: PyTree, paths: Iterable[str]) -> PyTree:
    """Returns a tree of booleans, True for the leaves with these paths, as optax takes it.

    Args:
      params: Any tree of parameters.
      paths: Paths of leaves, as in the rows of a report.

    Raises:
      TypeError: `paths` is one text, whose letters would be taken for paths.
      ValueError: A path is not in the tree.

    Examples:
      >>> import rmtjax
      >>> rmtjax.mask({"a": {"kernel": 1.0, "bias": 0.0}}, ["a/kernel"])
      {'a': {'bias': False, 'kernel': True}}
    """
    if isinstance(paths, str):
        raise TypeError(f"`paths` must be several paths, got the text {paths!r}: give a list.")
    wanted = {*paths}
    found: set[str] = set()

    def is_wanted(key: Any, leaf: Any) -> bool:
        del leaf
        path = path_name(key)
        found.add(path)
        return path in wanted

    tree = jax.tree_util.tree_map_with_path(is_wanted, params)
    missing = min(wanted - found, default=None)
    if missing is not None:
        some = ", ".join(map(repr, sorted(found)[:3]))
        raise ValueError(f"`paths` has {missing!r}, which is not in the tree, which has {some}.")
    return tree
