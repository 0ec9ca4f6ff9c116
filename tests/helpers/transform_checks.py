"""What tests of `prune_spectrum` share: kernels of known rank, steps, and their comparison."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rmtjax import prune_spectrum

SHAPE = (64, 96)
# Singular values of reference and transform differ by rounding: a few eps of the largest, 11.
ATOL = 2e-5


def planted(seed=0, shape=SHAPE, num_spikes=3, noise=0.1):
    """Noise with a few directions far above the threshold, which hold most of the squares."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, num_spikes)))[0] for n in shape)
    strengths = noise * np.sqrt(shape).sum() * np.linspace(6, 4, num_spikes)
    return jnp.asarray(noise * rng.normal(size=shape) + left * strengths @ right.T, jnp.float32)


def truncated(matrix, rank=3):
    """The reference, in float64."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u[..., :rank] * s[..., None, :rank] @ vt[..., :rank, :]


def perturbation(params, scale=0.01, seed=1):
    rng = np.random.default_rng(seed)
    noise = lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)
    return jax.tree.map(noise, params)


def make_params():
    return {
        "a": {"kernel": planted(0), "bias": jnp.ones(96)},
        "b": {"kernel": planted(1)},
    }


def make_gradients(seed=0):
    return perturbation(make_params(), seed=seed)


def prune_once(params, updates=None, **options):
    """Parameters and state after one pruning step."""
    optimizer = prune_spectrum(1, **options)
    updates = optax.tree.zeros_like(params) if updates is None else updates
    updates, state = optimizer.update(updates, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state


def run_from(params, gradients_at, optimizer, num_steps, wrap=lambda step: step):
    """Parameters and states after each step; the state before the first comes first."""

    # Without `jit` a transform compiles its work once for all tests with these shapes.
    @wrap
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    history = [(params, optimizer.init(params))]
    for seed in range(num_steps):
        history.append(step(*history[-1], gradients_at(seed)))
    return history


def run(optimizer, num_steps, wrap=lambda step: step):
    """The same from planted parameters on."""
    return run_from(make_params(), make_gradients, optimizer, num_steps, wrap)


def ranks_of(state):
    return {path: int(rank) for path, rank in optax.tree.get(state, "ranks").items()}


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def assert_close(actual, expected):
    """For results of two programs, which the compiler may have rounded in other places."""
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=ATOL), actual, expected)


def describe(tree):
    """Structure, shapes and dtypes: what decides whether `jit` compiles again."""
    return jax.tree.structure(tree), [
        (a.shape, a.dtype, a.weak_type) for a in jax.tree.leaves(tree)
    ]
