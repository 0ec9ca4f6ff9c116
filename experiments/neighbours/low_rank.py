"""Arms of low rank: those of this library, and the rules that it stands beside."""

from functools import cache, partial

import numpy as np
import optax

import rmtjax
from experiments.neighbours import sizes, tracks
from experiments.neighbours.sizes import Thin
from experiments.neighbours.trainer import adam, fit, Phase, pretrained, Setting, start, Training
from rmtjax import lowrank, ranks

FIRST, REST = 0.7, 0.3  # shares of the steps: dense, and in the smaller network
LOOKS = 8  # pruning steps of the first phase


def _where(setting: Setting):
    return lambda path, leaf: path in setting.track.kernels


def _axes(setting: Setting):
    return tracks.dense(setting.track.module, setting.track).axes


def _options(setting: Setting) -> dict:
    return {"where": _where(setting), "axes": _axes(setting)}


def _period(steps: int, start: float = 0.25) -> dict[str, int]:
    """Returns looks that begin after a quarter of a phase, the last one before its end."""
    first = max(1, round(start * steps))
    return {"start": first, "every": max(1, (steps - first) // LOOKS)}


def _factorize(setting: Setting, training: Training, kept: dict[str, int]) -> Training:
    """Returns the network with kernels as factors of given ranks."""
    params = training.params
    for path, rank in kept.items():
        only = lambda p, leaf, path=path: p == path
        plan = rmtjax.plan(
            params, rule=ranks.fixed(rank), where=only, axes=_axes(setting), multiple=1, min_size=1
        )
        params = rmtjax.factorize(params, plan)
    return training._replace(params=params)


def _tuned_on(setting: Setting, training: Training) -> Thin:
    """Returns the smaller network after the rest of the steps."""
    return Thin(fit(setting, training, Phase(REST)))


def _values(setting: Setting, params) -> dict[str, np.ndarray]:
    """Returns the singular values of the kernels that are made smaller."""
    leaves = sizes.leaves_by_path(params)
    flat = lambda leaf: np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1])
    return {p: np.linalg.svd(flat(leaves[p]), compute_uv=False) for p in setting.track.kernels}


def _over_threshold(setting: Setting, params, rule) -> dict[str, np.ndarray]:
    """Returns singular values over the threshold that a rule finds in their kernel."""
    report = rmtjax.analyze(params, rule=rule, **_options(setting), min_size=1)
    thresholds = {row.path: row.threshold for row in report.rows}
    long = {path: max(pair) for path, pair in sizes.shapes(setting.track).items()}
    values = _values(setting, params)
    scale = lambda path: np.sqrt((thresholds[path] or 1.0) * long[path])
    return {path: s / scale(path) for path, s in values.items()}


def cut(setting: Setting, training: Training, rule: ranks.RankRule, taken: int = 0) -> Training:
    """Returns the network with the values that are largest over the threshold of their kernel."""
    values = _over_threshold(setting, training.params, rule)
    kept = sizes.ranked(setting.track, setting.level, values, taken)
    return _factorize(setting, training, kept)


_where_kernels = lambda extra: lambda path, leaf: path in extra


def _guarded(hyper, steps, extra):
    prune = rmtjax.prune_spectrum(
        **_period(steps), settled=0.2, max_rise=hyper["rise"], where=_where_kernels(extra)
    )
    return optax.chain(adam(hyper, steps), prune)


def rmt_guard(setting: Setting) -> Thin:
    """Cuts to the Marchenko-Pastur edge under the guard; then one budget over all kernels."""
    phase = Phase(FIRST, _guarded, guarded=True)
    kernels = dict.fromkeys(setting.track.kernels, 0.0)
    training = fit(setting, start(setting), phase, extra=kernels)
    return _tuned_on(setting, cut(setting, training, ranks.bema()))


def edge(setting: Setting) -> Thin:
    """Trains the dense network; keeps the values that are largest over the edge of their kernel."""
    return _tuned_on(setting, cut(setting, pretrained(setting, FIRST), ranks.bema()))


def gavish_donoho(setting: Setting) -> Thin:
    """As `edge`, over the threshold of Gavish and Donoho."""
    training = cut(setting, pretrained(setting, FIRST), ranks.gavish_donoho())
    return _tuned_on(setting, training)


def truncated_svd(setting: Setting) -> Thin:
    """Trains the dense network; each kernel keeps the same share of its numbers."""
    kept = sizes.equal_ranks(setting.track, setting.level)
    return _tuned_on(setting, _factorize(setting, pretrained(setting, FIRST), kept))


def from_scratch(setting: Setting) -> Thin:
    """Trains factors of these ranks from the first step on, from the cut of the initial network."""
    kept = sizes.equal_ranks(setting.track, setting.level)
    return Thin(fit(setting, _factorize(setting, start(setting), kept), Phase(1.0)))


@cache
def _faded(rule):
    """Returns the chain of `size`, which lets fade what the rule does not keep."""

    def chain(hyper, steps, extra):
        prune = rmtjax.prune_spectrum(
            **_period(steps), rule=rule, fade=hyper["fade"], where=_where_kernels(extra), min_size=1
        )
        return optax.chain(adam(hyper, steps), prune)

    return chain


def size(setting: Setting) -> Thin:
    """Asks for a size; what is beyond it fades while the network trains, by what gradients feel."""
    rule = sizes.rule(setting.track, setting.level)
    chain = _faded(rule)  # always the same, so that it is compiled once
    kernels = dict.fromkeys(setting.track.kernels, 0.0)
    training = fit(setting, start(setting), Phase(FIRST, chain, guarded=True), extra=kernels)
    kept = sizes.equal_ranks(setting.track, setting.level)
    return _tuned_on(setting, _factorize(setting, training, kept))


def _orthogonal(params, hyper):
    return hyper["orthogonality"] * lowrank.orthogonality(params)


def _sparse_values(params, hyper):
    return _orthogonal(params, hyper) + hyper["hoyer"] * lowrank.hoyer(params)


def svd_training(setting: Setting) -> Thin:
    """Trains singular vectors and values: orthogonal, then few values, then those alone."""
    before = start(setting)
    held = lowrank.to_spectral(before.params, **_options(setting))
    first = Phase(0.4, penalty=_orthogonal)
    training = fit(setting, before._replace(params=held), first)
    training = fit(setting, training, Phase(FIRST - 0.4, penalty=_sparse_values))
    params = training.params
    for path, rank in sizes.equal_ranks(setting.track, setting.level).items():
        only = lambda p, leaf, path=path: p == path
        rule = ranks.fixed(rank)
        params = lowrank.prune_values(params, rule=rule, exact=True, where=only).params
    return _tuned_on(setting, training._replace(params=lowrank.to_factors(params)))


def _shrinking(hyper, steps, extra):
    strength = lambda step: hyper["strength"]
    where = _where_kernels(extra)
    shrink = lowrank.shrink_tail(**_period(steps), strength=strength, where=where)
    return optax.chain(adam(hyper, steps), shrink)


def local_drop(setting: Setting) -> Thin:
    """Shrinks the values under the edge while the network trains; then as truncated SVD."""
    kernels = dict.fromkeys(setting.track.kernels, 0.0)
    training = fit(setting, start(setting), Phase(FIRST, _shrinking), extra=kernels)
    kept = sizes.equal_ranks(setting.track, setting.level)
    return _tuned_on(setting, _factorize(setting, training, kept))


@cache
def _to_rank(kept):
    projections = {
        path: partial(rmtjax.projections.project_rank, rule=ranks.fixed(rank))
        for path, rank in kept
    }

    def chain(hyper, steps, extra):
        del extra
        pull = rmtjax.admm(projections, rho=lambda _: hyper["rho"], every=max(1, steps // 20))
        return optax.chain(pull, adam(hyper, steps))

    return chain


def admm_rank(setting: Setting) -> Thin:
    """Pulls kernels towards low rank by ADMM, after dense training; then factors train on."""
    kept = sizes.equal_ranks(setting.track, setting.level)
    chain = _to_rank(tuple(kept.items()))
    training = fit(setting, pretrained(setting, 0.4), Phase(FIRST - 0.4, chain))
    return _tuned_on(setting, _factorize(setting, training, kept))


def dense(setting: Setting) -> Thin:
    """Trains the dense network, which has all parameters."""
    return Thin(fit(setting, start(setting), Phase(1.0)))


def narrow(setting: Setting) -> Thin:
    """Trains a narrower dense network from the first step on."""
    module = sizes.narrow(setting.track, setting.level).clone(dropout=setting.hyper["dropout"])
    return Thin(fit(setting, start(setting, module), Phase(1.0), module), module)
