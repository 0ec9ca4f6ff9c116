"""Arms of low rank: those of this library, and the rules that it stands beside."""

from functools import cache, partial
from typing import Any

import optax

import rmtjax
from experiments.neighbours import allocation, sizes
from experiments.neighbours.allocation import factorize, FIRST, first, kept, REST
from experiments.neighbours.sizes import Thin
from experiments.neighbours.trainer import adam, fit, Phase, pretrained, Setting, start, Training
from rmtjax import lowrank, ranks

LOOKS = 8  # pruning steps of the first phase


def period(steps: int) -> dict[str, Any]:
    """Returns looks that begin after a quarter of a phase, the last one before its end."""
    begin = max(1, steps // 4)
    return {"start": begin, "every": max(1, (steps - begin) // LOOKS)}


def _kernels(setting: Setting) -> dict[str, float]:
    """Returns the kernels for a chain, as a tree whose names it sees."""
    return dict.fromkeys(setting.track.kernels, 0.0)


def _thin(setting: Setting, make: allocation.First, divide) -> Thin:
    """Returns the network after a first phase, a cut by a division, and the rest of the steps."""
    outputs = divide is allocation.by_outputs
    cut = factorize(setting, first(setting, make), kept(setting, make, divide), outputs)
    return Thin(fit(setting, cut, Phase(REST)))


def truncated_svd(setting: Setting) -> Thin:
    """Trains the dense network; each kernel keeps the same share of its squares."""
    return _thin(setting, allocation.dense, allocation.by_energy)


def edge(setting: Setting) -> Thin:
    """Trains the dense network; keeps the values that are largest over the edge of their kernel."""
    return _thin(setting, allocation.dense, allocation.by_edge)


def gavish_donoho(setting: Setting) -> Thin:
    """As `edge`, over the threshold of Gavish and Donoho."""
    return _thin(setting, allocation.dense, allocation.by_gavish_donoho)


def budget(setting: Setting) -> Thin:
    """Trains the dense network; `rmtjax.plan` divides a budget."""
    return _thin(setting, allocation.dense, allocation.by_budget)


def outputs(setting: Setting) -> Thin:
    """Trains the dense network; a budget and cuts by what the logits feel of them."""
    return _thin(setting, allocation.dense, allocation.by_outputs)


def from_scratch(setting: Setting) -> Thin:
    """Trains factors of the ranks of truncated SVD, from the cut of the initial network."""
    ranked = kept(setting, allocation.dense, allocation.by_energy)
    return Thin(fit(setting, factorize(setting, start(setting), ranked), Phase(1.0)))


def _guarding(hyper, steps, extra):
    where = lambda path, leaf: path in extra
    prune = rmtjax.prune_spectrum(**period(steps), settled=0.2, max_rise=hyper["rise"], where=where)
    return optax.chain(adam(hyper, steps), prune)


def _guarded(setting: Setting) -> Training:
    phase = Phase(FIRST, _guarding, guarded=True)
    return fit(setting, start(setting), phase, extra=_kernels(setting))


def rmt_guard(setting: Setting) -> Thin:
    """Cuts to the Marchenko-Pastur edge under the guard; then as `outputs`."""
    return _thin(setting, _guarded, allocation.by_outputs)


@cache
def _fading(ranked: tuple):
    def chain(hyper, steps, extra):
        del extra
        prune = [
            rmtjax.prune_spectrum(
                **period(steps),
                rule=ranks.fixed(rank),
                fade=hyper["fade"],
                where=lambda path, leaf, kernel=kernel: path == kernel,
                min_size=1,
            )
            for kernel, rank in ranked
        ]
        return optax.chain(adam(hyper, steps), *prune)

    return chain


def faded(setting: Setting) -> Thin:
    """Lets fade what is beyond the ranks of a budget while the network trains."""
    ranked = kept(setting, allocation.dense, allocation.by_budget)
    phase = Phase(FIRST, _fading(tuple(ranked.items())), guarded=True)
    training = factorize(setting, fit(setting, start(setting), phase), ranked)
    return Thin(fit(setting, training, Phase(REST)))


def _orthogonal(params, hyper):
    return hyper["orthogonality"] * lowrank.orthogonality(params)


def _sparse_values(params, hyper):
    return _orthogonal(params, hyper) + hyper["hoyer"] * lowrank.hoyer(params)


def _spectral(setting: Setting) -> Training:
    before = start(setting)
    held = lowrank.to_spectral(before.params, **allocation.options(setting))
    phase = Phase(0.4, penalty=_orthogonal)
    training = fit(setting, before._replace(params=held), phase)
    return fit(setting, training, Phase(FIRST - 0.4, penalty=_sparse_values))


def svd_training(setting: Setting) -> Thin:
    """Trains singular vectors and values: orthogonal, then few values, then those alone."""
    training = first(setting, _spectral)
    params = training.params
    for path, rank in kept(setting, _spectral, allocation.by_energy).items():
        only = lambda p, leaf, path=path: p == path
        rule = ranks.fixed(rank)
        params = lowrank.prune_values(params, rule=rule, exact=True, where=only).params
    training = training._replace(params=lowrank.to_factors(params))
    return Thin(fit(setting, training, Phase(REST)))


def _shrinking(hyper, steps, extra):
    where = lambda path, leaf: path in extra
    strength = lambda step: hyper["strength"]
    shrink = lowrank.shrink_tail(**period(steps), strength=strength, where=where)
    return optax.chain(adam(hyper, steps), shrink)


def _shrunk(setting: Setting) -> Training:
    phase = Phase(FIRST, _shrinking)
    return fit(setting, start(setting), phase, extra=_kernels(setting))


def local_drop(setting: Setting) -> Thin:
    """Shrinks the values under the edge while the network trains; then a budget."""
    return _thin(setting, _shrunk, allocation.by_budget)


@cache
def _pulling(ranked: tuple):
    project = rmtjax.projections.project_rank
    projections = {path: partial(project, rule=ranks.fixed(rank)) for path, rank in ranked}

    def chain(hyper, steps, extra):
        del extra
        pull = rmtjax.admm(projections, rho=lambda _: hyper["rho"], every=max(1, steps // 20))
        return optax.chain(pull, adam(hyper, steps))

    return chain


def admm_rank(setting: Setting) -> Thin:
    """Pulls kernels towards low rank by ADMM, after dense training; then factors train on."""
    ranked = kept(setting, allocation.dense, allocation.by_budget)
    phase = Phase(FIRST - 0.4, _pulling(tuple(ranked.items())))
    training = factorize(setting, fit(setting, pretrained(setting, 0.4), phase), ranked)
    return Thin(fit(setting, training, Phase(REST)))


def whole(setting: Setting) -> Thin:
    """Trains the dense network, which has all parameters."""
    return Thin(fit(setting, start(setting), Phase(1.0)))


def narrow(setting: Setting) -> Thin:
    """Trains a narrower dense network from the first step on."""
    module = sizes.narrow(setting.track, setting.level).clone(dropout=setting.hyper["dropout"])
    return Thin(fit(setting, start(setting, module), Phase(1.0), module), module)
