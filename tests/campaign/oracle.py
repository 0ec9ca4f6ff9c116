"""What must hold of kernels and of cut trees, by NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import rmtjax
from rmtjax import Kept
from rmtjax.planning import path_name


def matrices_of(leaf, axes):
    """The matrices of a kernel in float64."""
    array = np.asarray(leaf).astype(np.float64).transpose(axes.order)
    count = lambda group: int(np.prod([leaf.shape[axis] for axis in group], dtype=int))
    return array.reshape(count(axes.batch), count(axes.inputs), count(axes.outputs))


def eps_of(leaf):
    dtype = np.dtype(leaf.dtype)
    known = dtype == np.float64 or dtype.itemsize > 8
    # Without 64 bits, JAX computes in float32.
    return float(jnp.finfo(np.float32 if known else dtype).eps) if dtype.kind != "i" else 0


def check_row(path, row, leaf):
    """What a row says of a kernel, against NumPy in float64."""
    if row.spectrum is None:
        assert isinstance(row, Kept), path
        return
    matrices = matrices_of(leaf, row.axes)
    finite = np.isfinite(matrices).all()
    assert ("not finite" in row.reason) == (not finite), (path, row.reason)
    if not finite:
        return
    assert ("all zero" in row.reason) == (not matrices.any()), (path, row.reason)
    values = np.linalg.svd(matrices, compute_uv=False) ** 2 / max(matrices.shape[1:])
    found = np.asarray(row.spectrum.eigenvalues, np.float64).reshape(values.shape)
    # Singular values in float32 are off by about p eps of the largest one.
    top = values.max(initial=0)
    np.testing.assert_allclose(found, values, rtol=1e-3, atol=1e-5 * top, err_msg=path)
    threshold = np.asarray(row.fit.threshold, np.float64).reshape(-1, 1)
    # A threshold among the rounding of the values decides nothing of these.
    clear = np.abs(values - threshold) > 1e-3 * threshold + 1e-5 * top
    above = ((values > threshold) & clear).sum(axis=1)
    unsure = (~clear).sum(axis=1)
    count = np.ravel(row.fit.num_spikes)
    if np.isfinite(threshold).all() and "rounding" not in row.reason:
        assert ((above <= count) & (count <= above + unsure)).all(), (path, above, count)
    live = matrices.any(axis=2).sum(axis=1).max()
    if live and "cut" not in row.reason:
        dead = matrices.shape[1] - min(m.any(axis=1).sum() for m in matrices if m.any())
        assert (f"{dead} rows" in row.reason) == (dead > 0), (path, dead, row.reason)


def lowered(matrices, rank):
    u, s, vt = np.linalg.svd(matrices, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def check_cuts(tree, plan):
    """Truncated and factorized trees, against NumPy in float64."""
    old = leaves_of(tree)
    cut, thin = rmtjax.truncate(tree, plan), rmtjax.factorize(tree, plan)
    merged = rmtjax.merge(thin)
    for result in (cut, merged):
        assert jax.tree.structure(result) == jax.tree.structure(tree)
        for path, leaf in leaves_of(result).items():
            row = plan.changes.get(path)
            if row is None:
                assert leaf is old[path], path
                continue
            matrices = matrices_of(old[path], row.axes)
            wanted = lowered(matrices, row.rank)
            found = matrices_of(leaf, row.axes)
            # Values that are nearly equal may turn into one another: compare what is left.
            norm = np.linalg.norm(matrices, axis=(1, 2))
            far = np.linalg.norm(found - wanted, axis=(1, 2))
            rest = lambda kept, old=matrices: np.linalg.norm(old - kept, axis=(1, 2))
            close = (
                np.minimum(far, np.abs(rest(found) - rest(wanted)))
                <= (1e-4 + 4 * eps_of(old[path])) * norm
            )
            assert close.all(), (path, far, norm)


def leaves_of(tree):
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(key): leaf for key, leaf in pairs}
