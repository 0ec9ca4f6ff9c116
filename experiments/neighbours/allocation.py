"""How the numbers of a level are divided among kernels: the rank of each.

Ranks come from the network of the tuning seed, trained as that of the run is. They are shapes, so
all seeds of an arm have one program.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import numpy as np

import rmtjax
from experiments.neighbours import sizes, tracks
from experiments.neighbours.trainer import on_device, pretrained, Setting, Training
from rmtjax import ranks

TUNING_SEED = 100
FIRST, REST = 0.7, 0.3  # shares of the steps: dense, and in the smaller network
First = Callable[[Setting], Training]


@lru_cache(maxsize=512)
def _first(make: First, setting: Any, hyper: tuple) -> Training:
    return make(setting._replace(hyper=dict(hyper)))._replace(state=None)


def first(setting: Setting, make: First) -> Training:
    """Returns the first phase of a run, which all levels share."""
    hyper = tuple(sorted(setting.hyper.items()))
    return _first(make, setting._replace(hyper=None, level=None), hyper)


def dense(setting: Setting) -> Training:
    """Returns the dense network after the first phase."""
    return pretrained(setting, FIRST)


def options(setting: Setting) -> dict[str, Any]:
    """Returns how `rmtjax` finds the kernels that are made smaller."""
    axes = tracks.dense(setting.track.module, setting.track).axes
    return {"where": lambda path, leaf: path in setting.track.kernels, "axes": axes}


def _values(setting: Setting, params) -> dict[str, np.ndarray]:
    """Returns the singular values of the kernels that are made smaller."""
    leaves = sizes.leaves_by_path(params)
    flat = lambda leaf: np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1])
    return {p: np.linalg.svd(flat(leaves[p]), compute_uv=False) for p in setting.track.kernels}


def by_budget(setting: Setting, params, taken: int = 0) -> dict[str, int]:
    """Returns the ranks of `rmtjax.plan` for a budget; it may leave kernels whole."""
    limit = rmtjax.Budget(parameters=sizes.budget(setting.track, setting.level) - taken)
    plan = rmtjax.plan(params, budget=limit, multiple=1, min_size=1, **options(setting))
    return {path: int(row.rank) for path, row in plan.changes.items()}


def moments(setting: Setting, params) -> Any:
    """Returns what the training data feed to each kernel, and what the logits feel of it."""
    samples = on_device(setting.track, "train")[0][:1000]
    batches = [samples[i : i + 100] for i in range(0, len(samples), 100)]
    module, variables, key = setting.track.module, {"params": params}, jax.random.key(0)
    return rmtjax.linen.moments(
        module, variables, batches, key=key, train=False, **options(setting)
    )


def by_outputs(setting: Setting, params, taken: int = 0) -> dict[str, int]:
    """Returns the ranks of `rmtjax.plan` for a budget, by what a cut changes of the logits."""
    limit = rmtjax.Budget(parameters=sizes.budget(setting.track, setting.level) - taken)
    found = moments(setting, params)
    plan = rmtjax.plan(
        params, budget=limit, moments=found, multiple=1, min_size=1, **options(setting)
    )
    return {path: int(row.rank) for path, row in plan.changes.items()}


def by_energy(setting: Setting, params, taken: int = 0) -> dict[str, int]:
    """Returns the ranks that hold one share of the squares of each kernel, as large as fits."""
    values = _values(setting, params)
    held = {path: np.cumsum(s**2) / np.sum(s**2) for path, s in values.items()}
    # From one rank to the next a kernel needs a larger share: the smallest comes first.
    return sizes.ranked(setting.track, setting.level, {p: -h for p, h in held.items()}, taken)


def over(rule: ranks.RankRule) -> Callable[..., dict[str, int]]:
    """Returns a division by one order of singular values over the threshold of their kernel."""

    def by_threshold(setting: Setting, params, taken: int = 0) -> dict[str, int]:
        report = rmtjax.analyze(params, rule=rule, min_size=1, **options(setting))
        thresholds = {row.path: row.threshold for row in report.rows}
        long = {path: max(pair) for path, pair in sizes.shapes(setting.track).items()}
        scale = lambda path: np.sqrt((thresholds[path] or 1.0) * long[path])
        values = {path: s / scale(path) for path, s in _values(setting, params).items()}
        return sizes.ranked(setting.track, setting.level, values, taken)

    return by_threshold


by_edge, by_gavish_donoho = over(ranks.bema()), over(ranks.gavish_donoho())


@lru_cache(maxsize=512)
def _kept(make: First, divide: Callable, setting: Any, hyper: tuple, taken: int) -> tuple:
    setting = setting._replace(hyper=dict(hyper))
    params = rmtjax.merge(first(setting, make).params)
    return tuple(divide(setting, params, taken).items())


def kept(setting: Setting, make: First, divide: Callable, taken: int = 0) -> dict[str, int]:
    """Returns the rank of each kernel that becomes factors.

    Args:
      setting: The run.
      make: Its first phase.
      divide: The way to divide: `by_budget`, `by_energy`, `by_edge`, `by_gavish_donoho`.
      taken: Numbers that are not to be had.
    """
    hyper = tuple(sorted(setting.hyper.items()))
    unseeded = setting._replace(seed=TUNING_SEED, hyper=None)
    return dict(_kept(make, divide, unseeded, hyper, taken))


def numbers_of(setting: Setting, ranked: Mapping[str, int]) -> dict[str, int]:
    """Returns the numbers of each kernel as factors of given ranks."""
    return {path: rank * sum(sizes.shapes(setting.track)[path]) for path, rank in ranked.items()}


def factorize(
    setting: Setting, training: Training, ranked: Mapping[str, int], outputs: bool = False
) -> Training:
    """Returns the network with kernels as factors of given ranks, nearest in outputs if asked."""
    params, axes = training.params, options(setting)["axes"]
    how = {"moments": moments(setting, params) if outputs else None}
    for path, rank in ranked.items():
        only = lambda p, leaf, path=path: p == path
        rule: Any = ranks.fixed(rank)
        plan = rmtjax.plan(params, rule=rule, where=only, axes=axes, multiple=1, min_size=1, **how)
        params = rmtjax.factorize(params, plan, **how)
    return training._replace(params=params)
