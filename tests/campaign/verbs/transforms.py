"""Transforms of optax on random trees: updates have the structure, shapes and dtypes given."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmtjax
from rmtjax import ranks
from rmtjax._axes import native


def on_device(tree):
    """Arrays of JAX: a program takes these alone."""
    return jax.tree.map(lambda leaf: jnp.asarray(native(leaf)), tree)


def slopes_of(function, tree):
    """The derivatives of a function of a tree, which JAX has on a mesh only if it is set."""
    sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        return jax.jit(jax.grad(function))(tree)


def train(tree, make_transform):
    """One eager and one compiled step: updates have the structure, shapes and dtypes given."""
    transform = make_transform()
    transform.init(tree)
    tree = on_device(tree)
    state = transform.init(tree)
    zero = jax.tree.map(lambda leaf: jnp.zeros(np.shape(leaf), jnp.asarray(leaf).dtype), tree)
    for update in (transform.update, jax.jit(transform.update)):
        updates, state = update(zero, state, tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(zero), strict=True):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
    for name, number in rmtjax.metrics(state).items():
        assert np.isfinite(np.asarray(number, np.float64)).all(), name
    return state


TO_RANK_2 = partial(rmtjax.projections.project_rank, rule=ranks.fixed(2))
TRANSFORMS = {
    "prune_spectrum": lambda: rmtjax.prune_spectrum(1, rule=ranks.fixed(2), min_size=2),
    "prune_entries": lambda: rmtjax.prune_entries(0.5),
    "agree": lambda: rmtjax.agree(2),
    "monitor": lambda: rmtjax.monitor(1, min_size=2, columns=["spikes", "stable_rank"]),
    "shrink_tail": lambda: rmtjax.lowrank.shrink_tail(1, strength=0.1, rule=ranks.fixed(2)),
    "drop_and_grow": lambda: rmtjax.drop_and_grow(optax.identity(), 1, density=0.5),
    "admm": lambda: rmtjax.admm(TO_RANK_2, every=1),
    "masked": lambda: optax.masked(
        rmtjax.prune_entries(0.2), partial(jax.tree.map, lambda _: True)
    ),
}
