"""Random models of nnx, their parameters by path, plans of one rank, and comparisons."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import rmtjax


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda leaf: isinstance(leaf, rmtjax.Factors)
    )
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def make_random(make):
    """A model with random variables. Only their shapes come from `make`: nothing is compiled."""
    rng = np.random.default_rng(0)
    # At the start biases and adapters are 0, and recurrent kernels have no best approximation.
    random = lambda leaf: jnp.asarray((0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype))
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    fill = lambda leaf: jax.random.key(0) if is_key(leaf) else random(leaf)
    graphdef, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graphdef, jax.tree.map(fill, state))


def rank_plan(model, rank, **options):
    """A plan without a look at the spectra, which would compile for each shape."""
    axes = rmtjax.nnx.kernel_axes(model, **options)
    kernels = by_path(rmtjax.nnx.params(model, **options))
    fit = rmtjax.BulkFit(1.0, 1.0, 1.0, 0.0, 0)  # not used where nothing is shrunk
    row = lambda path: rmtjax.Factorized("", kernels[path].shape, axes[path], rank, fit)
    return rmtjax.Plan({path: row(path) for path in axes})


def close(actual, expected):
    """Equal to 1e-5 of the largest entry: some dozen roundings in float32.

    A bias of the keys changes no attention: its gradient is nothing but roundings.
    """
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max() + 1e-6)


def update(optimizer, model, grads):
    """A step, as newer Flax has it, or older Flax, where the optimizer holds the model."""
    if hasattr(optimizer, "model"):
        optimizer.update(grads)
    else:
        optimizer.update(model, grads)
