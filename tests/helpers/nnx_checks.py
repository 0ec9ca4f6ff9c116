"""What tests of `rmtjax.nnx` share."""

import jax
import numpy as np

import rmtjax


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda leaf: isinstance(leaf, rmtjax.Factors)
    )
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


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
