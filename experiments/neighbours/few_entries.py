"""Arms of few entries and few bits: pruned after dense training, or sparse from the first step."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import rmtjax
from experiments.neighbours import allocation, sizes, tracks
from experiments.neighbours.sizes import Thin
from experiments.neighbours.trainer import adam, fit, Phase, pretrained, Setting, start

ROUNDS = 4  # in which entries go, in the first half of the second phase


def _rounds(extra, steps: int):
    """Returns the sparsity at each step: 20 %, then a geometric course of the density."""
    every = max(1, steps // (2 * ROUNDS))
    last = jnp.log(1 - extra["sparsity"])
    first = jnp.log(0.8)

    def sparsity(step):
        number = jnp.clip(step // every, 0, ROUNDS - 1) / (ROUNDS - 1)
        return 1 - jnp.exp(first + (last - first) * number)

    return sparsity, every


def pruning(restores: bool, hybrid: bool = False, **pattern: Any) -> Phase:
    """Returns the phase in which entries go: by a budget, or by a `pattern` with its `axes`."""

    def chain(hyper, steps, extra):
        sparsity, every = _rounds(extra, steps)
        weights = extra["weights"]
        options = dict(pattern) or {"budget": weights}
        if restores:  # beyond the target go as many as a share of what stays
            select = max(1, every // 3)
            share = hyper["restore"] * (1 - extra["sparsity"])
            options |= {"restore": share, "select": select}
        prune = rmtjax.prune_entries(
            sparsity,
            every=every,
            start=1,
            magnitude_until=0.21 if hybrid else 0.0,
            where=lambda path, leaf: path in weights,
            **options,
        )
        return optax.chain(adam(hyper, steps), prune)

    return Phase(allocation.REST, chain)


MAGNITUDE, RESTORED, HYBRID = pruning(False), pruning(True), pruning(True, hybrid=True)


def _pruned(setting: Setting, phase: Phase, strength: float | None) -> Thin:
    """Prunes the dense network, with the layer budget of the edge if it has a strength."""
    training = pretrained(setting, allocation.FIRST)
    sparsity = 1 - sizes.share(setting.track, setting.level)
    weights = dict.fromkeys(setting.track.kernels, 1.0)
    if strength is not None:
        axes = tracks.dense(setting.track.module, setting.track).axes
        where = lambda path, leaf: path in setting.track.kernels
        plan = rmtjax.plan(training.params, where=where, axes=axes, min_size=1)
        found = rmtjax.sparsity.edge_weights(plan, sparsity, strength=strength, until=1.0)
        weights = {path: jnp.asarray(found[path], jnp.float32) for path in weights}
    weights = {path: jnp.float32(one) for path, one in weights.items()}
    # Just under the level: counts are rounded.
    extra = {"sparsity": jnp.float32(sparsity + 1e-4), "weights": weights}
    return Thin(fit(setting, training, phase, extra=extra), sparse=True)


def magnitude(setting: Setting) -> Thin:
    """Prunes the entries of smallest magnitude over all kernels."""
    return _pruned(setting, MAGNITUDE, None)


def edge_budget(setting: Setting) -> Thin:
    """Prunes by magnitude over a weight that the edge of each kernel gives."""
    return _pruned(setting, MAGNITUDE, setting.hyper["strength"])


def reallocated(setting: Setting) -> Thin:
    """Prunes beyond the target and puts a part back: spectral edge reallocation (SER)."""
    return _pruned(setting, RESTORED, setting.hyper["strength"])


def hybrid(setting: Setting) -> Thin:
    """Prunes by magnitude to 20 %, and by SER from there on."""
    return _pruned(setting, HYBRID, setting.hyper["strength"])


@cache
def _moving(density: float, seed: int, grow: str, kernels: tuple[str, ...]):
    def chain(hyper, steps, extra):
        del extra
        drop = lambda step: hyper["drop"] * (1 + jnp.cos(jnp.pi * step / steps)) / 2
        every = max(1, steps // 30)
        where = lambda path, leaf: path in kernels
        return rmtjax.drop_and_grow(
            adam(hyper, steps),
            every,
            density=density,
            drop=drop,
            grow=grow,
            seed=seed,
            where=where,
        )

    return chain


def _sparse_from_scratch(setting: Setting, grow: str) -> Thin:
    density = sizes.share(setting.track, setting.level) - 1e-4  # counts are rounded
    # The seed of the masks is one for all, so that the program is: weights and batches differ.
    chain = _moving(density, 0, grow, setting.track.kernels)
    return Thin(fit(setting, start(setting), Phase(1.0, chain)), sparse=True)


def random_growth(setting: Setting) -> Thin:
    """Trains a sparse network whose entries move at random (SET)."""
    return _sparse_from_scratch(setting, "random")


def gradient_growth(setting: Setting) -> Thin:
    """Trains a sparse network whose entries move to where gradients are large (RigL)."""
    return _sparse_from_scratch(setting, "gradient")


@cache
def _to_bits(bits: int, kernels: tuple[str, ...]):
    projection = partial(rmtjax.projections.project_bits, bits=bits, scale_axis=1)
    projections = dict.fromkeys(kernels, projection)

    def chain(hyper, steps, extra):
        del extra
        pull = rmtjax.admm(projections, rho=lambda _: hyper["rho"], every=max(1, steps // 20))
        return optax.chain(pull, adam(hyper, steps))

    return projections, chain


def few_bits(setting: Setting) -> Thin:
    """Trains the dense network, then towards a grid by ADMM: as many bits as the bytes allow.

    All kernels are on the grid, also those that other arms leave.
    """
    bits = sizes.best_bits(setting.track, setting.level)
    leaves = sizes.leaves_by_path(tracks.dense(setting.track.module, setting.track).shapes)
    projections, chain = _to_bits(bits, tuple(p for p in leaves if p.endswith("kernel")))
    training = fit(setting, pretrained(setting, allocation.FIRST), Phase(allocation.REST, chain))
    axes = tracks.dense(setting.track.module, setting.track).axes
    params = rmtjax.projections.project(training.params, projections, axes=axes)
    return Thin(training._replace(params=jax.block_until_ready(params)), bits=bits)
