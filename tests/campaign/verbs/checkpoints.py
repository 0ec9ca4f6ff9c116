"""Files of random trees: reports, smaller files, differences and adapters, against NumPy."""

import tempfile
from pathlib import Path

import jax
import numpy as np

import rmtjax
from campaign.oracle import eps_of, leaves_of, lowered, matrices_of
from rmtjax import adapters, checkpoint, ranks
from rmtjax._axes import native


def plain(leaf):
    """Whether a tuned leaf can be made: of a floating dtype with 16 bits or more."""
    return str(np.dtype(leaf.dtype)) in ("float32", "float16", "bfloat16", "float64")


def tuned(leaf):
    """A leaf after a change of rank 1."""
    array = np.asarray(native(leaf))
    if not plain(array) or array.ndim != 2 or not array.size:
        return array
    scale = np.median(np.abs(array[np.isfinite(array)].astype(np.float64))) if array.size else 0
    rng = np.random.default_rng(array.size)
    change = np.outer(rng.normal(size=array.shape[0]), rng.normal(size=array.shape[1]))
    with np.errstate(all="ignore"):
        return (array.astype(np.float64) + scale * change).astype(array.dtype)


def check_files(tree, rule):
    """A file has the report of its tree; the smaller one has what the plan says."""
    tree = jax.tree.map(native, tree)  # no file has other byte orders
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder, "a.safetensors"), Path(folder, "b.safetensors")
        checkpoint.save(path, tree)
        found = checkpoint.analyze_file(path, rule=rule, min_size=2, randomized=1, aspect=1.0)
        wanted = rmtjax.analyze(tree, rule=rule, min_size=2)
        rows = lambda report: {(row.shape, row.spikes, row.rank) for row in report if row.rank}
        assert rows(found) == rows(wanted)
        if not found.rows:
            return
        made = checkpoint.compress_file(path, out, rule=ranks.fixed(2), min_size=2, multiple=1)
        again = checkpoint.analyze_file(out, rule=ranks.fixed(2), min_size=2)
        # A matrix of a lower rank, such as a constant one, is cut again.
        assert all((row.rank or 0) <= (made[row.path].rank or 0) for row in again)
        back, old = checkpoint.restore(out), leaves_of(tree)
        for key, leaf in leaves_of(rmtjax.merge(back)).items():
            row = made.plan.changes.get(key)
            if row is None:
                assert np.asarray(leaf).tobytes() == np.asarray(old[key]).tobytes(), key
            elif np.isfinite(exact := matrices_of(old[key], row.axes)).all():
                lost = np.linalg.norm(matrices_of(leaf, row.axes) - exact)
                best = np.linalg.norm(lowered(exact, 2) - exact)
                assert abs(lost - best) <= (1e-4 + 8 * eps_of(leaf)) * np.linalg.norm(exact), key


def check_differences(tree, rule):
    """The change between two files, kernel by kernel, and an adapter of it."""
    del rule
    old, new = jax.tree.map(native, tree), jax.tree.map(tuned, tree)
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, "a.safetensors"), Path(folder, "b.safetensors")
        for path, one in zip(paths, (old, new), strict=True):
            checkpoint.save(path, one)
        drifts = {drift.path: drift for drift in checkpoint.compare_files(*paths).rows}
        pairs = [leaves_of(one) for one in (old, new)]
        for path, drift in drifts.items():
            one, other = (np.asarray(native(leaves[path])) for leaves in pairs)
            if one.dtype.kind != "c" and np.isfinite(one.astype(np.float64)).all():
                moved = np.linalg.norm(other.astype(np.float64) - one.astype(np.float64))
                norm = np.linalg.norm(one.astype(np.float64))
                if np.isfinite(moved) and norm:
                    np.testing.assert_allclose(drift.relative, moved / norm, rtol=1e-6)
        options = {"rule": ranks.energy(0.999), "min_size": 2}
        found = adapters.analyze_difference(*paths, **options)
        check_change(found.report, *pairs)
        adapters.extract_lora(*paths, Path(folder, "lora"), **options)


def check_change(report, old, new):
    """Spectra of changes are those of the differences in float64."""
    for path, row in report.plan.items():
        if row.spectrum is None:
            continue
        wide = np.float64 if np.dtype(new[path].dtype) == np.float64 else np.float32
        with np.errstate(invalid="ignore"):  # infinities that stay are no change, see below
            change = new[path].astype(wide) - old[path].astype(wide)
        matrices = matrices_of(np.where(new[path] == old[path], 0, change), row.axes)
        if not np.isfinite(matrices).all():
            continue
        values = np.linalg.svd(matrices, compute_uv=False) ** 2 / max(matrices.shape[1:])
        found = np.asarray(row.spectrum.eigenvalues, np.float64).reshape(values.shape)
        top = values.max(initial=0)
        np.testing.assert_allclose(found, values, rtol=1e-3, atol=1e-5 * top, err_msg=path)


VERBS = {
    "analyze_file, compress_file": check_files,
    "compare_files, analyze_difference, extract_lora": check_differences,
}
