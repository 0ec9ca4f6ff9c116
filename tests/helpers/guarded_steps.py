"""Steps of `prune_spectrum` with losses whose cuts have known costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from helpers.transform_checks import planted
from rmtjax import prune_spectrum

PARAMS = {"a": {"kernel": planted(0)}, "b": {"kernel": planted(1)}, "bias": jnp.ones(96)}
PATHS = ("a/kernel", "b/kernel")
SIZE, RANK = 64, 3
EVEN = 64 * 96 / (64 + 96)  # the rank from which on factors are smaller


def squares(path):
    """The squared singular values of a kernel, by the reference, in float64."""
    kernel = np.asarray(PARAMS[path[0]]["kernel"], np.float64)
    return np.linalg.svd(kernel, compute_uv=False) ** 2


def loss_with(weights):
    """A loss that is quadratic around the parameters: a cut costs the squares that it removes."""

    def loss(params):
        apart = lambda name: jnp.sum(jnp.square(params[name]["kernel"] - PARAMS[name]["kernel"]))
        return sum(weight * apart(name) for name, weight in weights.items())

    return loss


def gain(weights):
    """By how much the loss is below that of zeros."""
    return sum(weight * squares(name).sum() for name, weight in weights.items())


# One program for most tests: the options and the weights of the loss are traced.
@functools.partial(jax.jit, static_argnames=("every", "start"))
def update(updates, state, params, weights, max_rise, every=1, start=0, offset=0.0):
    optimizer = prune_spectrum(every, start=start, max_rise=max_rise, max_removed=1.0)
    value_fn = lambda params: loss_with(weights)(params) + offset
    return optimizer.update(updates, state, params, value_fn=value_fn)


def step(weights, max_rise):
    """What a pruning step lands on, and its state."""
    zeros, state = jax.tree.map(jnp.zeros_like, PARAMS), prune_spectrum(1).init(PARAMS)
    updates, state = update(zeros, state, PARAMS, weights, max_rise)
    return optax.apply_updates(PARAMS, updates), state


def step_of(optimizer, weights, params=PARAMS):
    """The same of any optimizer, in a program of its own."""
    zeros, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
    update = functools.partial(optimizer.update, value_fn=loss_with(weights))
    updates, state = jax.jit(update)(zeros, state, params)
    return optax.apply_updates(params, updates), state


EQUAL = {"a": 1.0, "b": 1.0}
CHEAP_B = {"a": 1.0, "b": 1e-4}


def passes_of(optimizer, num_steps=4):
    """How often each of some steps asks for the loss, and how often the step is compiled."""
    passes, counts = [], []

    def counted(params):
        jax.debug.callback(lambda: passes.append(1))
        return loss_with(EQUAL)(params)

    update = jax.jit(lambda *args: optimizer.update(*args, value_fn=counted))
    zeros, state = jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS)
    for _ in range(num_steps):
        _, state = update(zeros, state, PARAMS)
        jax.effects_barrier()
        counts.append(len(passes))
        passes.clear()
    return counts, update._cache_size()
