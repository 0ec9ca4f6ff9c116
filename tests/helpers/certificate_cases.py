"""Chains of layers for tests of certificates, changes of them, and bounds checked in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit, log_softmax

from rmtjax.certificate import certify

ACTIVATIONS = {  # ours, and NumPy's
    "relu": (jax.nn.relu, lambda x: np.maximum(x, 0)),
    "tanh": (jnp.tanh, np.tanh),
    "sigmoid": (jax.nn.sigmoid, expit),
}
LAYERS = ("Dense_0", "Dense_1", "Dense_2")


def halve(kernel):
    """The best approximation of half the rank, by NumPy, which compiles nothing."""
    u, s, vt = np.linalg.svd(np.asarray(kernel, np.float32), full_matrices=False)
    rank = min(kernel.shape) // 2
    return jnp.asarray(u[:, :rank] * s[:rank] @ vt[:rank], jnp.asarray(kernel).dtype)


def make_chain(widths, rng, scale=1.0, dtype=jnp.float32):
    return {
        f"Dense_{depth}": {
            "kernel": jnp.asarray(scale * rng.normal(size=shape), dtype),
            "bias": jnp.asarray(scale * rng.normal(size=shape[1]), dtype),
        }
        for depth, shape in enumerate(itertools.pairwise(widths))
    }


def make_case(seed=0, widths=(60, 50, 40, 10), samples=200):
    """A chain of common scale, inputs and their labels."""
    rng = np.random.default_rng(seed)
    params = make_chain(widths, rng)
    params = jax.tree.map(lambda a: a / len(a) ** 0.5, params)
    return params, jnp.asarray(rng.normal(size=(samples, widths[0])), jnp.float32)


def change_kernels(params, chosen, change):
    new = {
        layer: leaves
        | {"kernel": change(leaves["kernel"]) if layer in chosen else leaves["kernel"]}
        for layer, leaves in params.items()
    }
    return new


def run_in_float64(params, inputs, activation=ACTIVATIONS["relu"][1]):
    hidden = np.asarray(inputs, np.float64)
    for depth, leaves in enumerate(params.values()):
        hidden = activation(hidden) if depth else hidden
        hidden = hidden @ np.asarray(leaves["kernel"], np.float64)
        hidden = hidden + np.asarray(leaves["bias"], np.float64)
    return hidden


def cross_entropy(logits, labels):
    return -np.take_along_axis(log_softmax(logits, axis=1), labels[:, None], axis=1).mean()


def squares(params):
    return sum((np.asarray(leaves["kernel"], np.float64) ** 2).sum() for leaves in params.values())


def check_bounds(found, before, after, inputs, labels=None, activation=ACTIVATIONS["relu"][1]):
    """No bound is violated; returns the measured change of the logits."""
    old, new = (run_in_float64(tree, inputs, activation) for tree in (before, after))
    rounding = 1e-14 * np.abs(old).max()  # of float64, far below that of float32
    assert (np.abs(new - old) <= found.change + rounding).all()
    same = old.argmax(axis=1) == new.argmax(axis=1)
    assert same[np.asarray(found.unchanged)].all()
    some = [labels] if labels is not None else [old.argmax(axis=1), new.argmin(axis=1)]
    rises = [cross_entropy(new, classes) - cross_entropy(old, classes) for classes in some]
    assert max(rises) <= found.loss + rounding + 1e-14
    lost = squares(before) - squares(after)
    assert found.removed <= lost
    for l2 in (0.0, 1e-3, 1.0, 1e3):
        if found.lowers_loss(l2):
            assert max(rises) < np.float32(l2) * lost + rounding + 1e-14
    return np.abs(new - old)


@functools.cache
def compiled(depth, activation):
    layers = [f"Dense_{number}" for number in range(depth)]
    ours = ACTIVATIONS[activation][0]
    return jax.jit(functools.partial(certify, layers=layers, activation=ours))
