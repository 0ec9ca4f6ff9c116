"""Masks, patterns, grids and projections of random trees, against counts by NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmtjax
from campaign.oracle import eps_of, leaves_of, lowered, matrices_of
from campaign.verbs.transforms import on_device
from rmtjax import patterns, projections, ranks, sparsity
from rmtjax.sparse._masks import find_floating


def entries_of(tree):
    """The entries that may be removed, by path, in float64."""
    return {path: np.asarray(leaf, np.float64) for path, leaf in find_floating(tree, None).items()}


def check_magnitudes(tree, rule):
    """As many entries go as it says, and none is larger than one that stays."""
    del rule
    entries = entries_of(tree)
    mask = leaves_of(sparsity.magnitude_mask(tree, 0.5))
    values = np.concatenate([np.abs(array).ravel() for array in entries.values()] or [[]])
    stays = np.concatenate([np.asarray(mask[path]).ravel() for path in entries] or [[]]).astype(
        bool
    )
    assert np.sum(~stays) == np.round(np.float32(0.5) * values.size)
    gone, kept = values[~stays], values[stays]
    if gone.size and kept.size and not np.isnan(kept).any():
        assert not gone.max() > kept.min()
    others = [np.asarray(leaf).all() for path, leaf in mask.items() if path not in entries]
    assert all(others)


def check_random(tree, rule):
    """Layers have the densities that make the one of the tree, and masks have these counts."""
    del rule
    entries = entries_of(tree)
    for distribution in ("erdos_renyi_kernel", "erdos_renyi", "uniform"):
        densities = sparsity.layer_densities(tree, 0.3, distribution=distribution)
        total = sum(densities[path] * array.size for path, array in entries.items())
        size = sum(array.size for array in entries.values())
        np.testing.assert_allclose(total, 0.3 * size, rtol=1e-6)
        mask = leaves_of(sparsity.random_mask(tree, 0.3, distribution=distribution))
        for path, array in entries.items():
            count = max(1, round(densities[path] * array.size))
            assert abs(int(np.sum(mask[path])) - count) <= 1, path


def check_threshold(tree, rule):
    """No entry under the threshold stays, where the rule accepts the fit."""
    plan = rmtjax.plan(tree, rule=rule, min_size=2)
    mask = leaves_of(sparsity.threshold_mask(tree, plan, rule=rule))
    leaves = leaves_of(tree)
    for path, row in plan.items():
        kept = np.asarray(mask[path])
        if row.fit is None or row.axes.batch or kept.all():
            continue
        xi = float(sparsity.entry_threshold(row.fit.variance, row.shape))
        values = np.abs(np.asarray(leaves[path], np.float64))
        clear = np.abs(values - xi) > 1e-3 * xi
        assert ((values > xi) == kept)[clear].all(), path
    weights = sparsity.edge_weights(plan, 0.2)
    assert all((np.asarray(weight) >= 0.1 - 1e-6).all() for weight in weights.values())


def check_pattern(tree, rule):
    """Of each four inputs of an output the two largest stay."""
    del rule
    rows = {path: row for path, row in rmtjax.plan(tree, min_size=1).items() if row.axes}
    entries = entries_of(tree)
    divides = lambda path: path in entries and sides_of(entries[path], rows[path].axes)[1] % 4 == 0
    chosen = [path for path in rows if divides(path)]
    mask = leaves_of(patterns.nm_mask(tree, (2, 4), where=lambda path, _: path in chosen))
    for path in chosen:
        kept = matrices_of(np.asarray(mask[path]), rows[path].axes)
        groups = kept.reshape(len(kept), -1, 4, kept.shape[2])
        assert (groups.sum(axis=2) == 2).all(), path
        values = np.abs(matrices_of(entries[path], rows[path].axes)).reshape(groups.shape)
        if np.isfinite(values).all():
            best = np.sort(values, axis=2)[:, :, 2:].sum(axis=2)
            found = (values * groups).sum(axis=2)
            np.testing.assert_allclose(found, best, rtol=1e-6, err_msg=path)


def check_permuted(tree, rule):
    """An order of the inputs of a kernel is one of its rows, and no other leaf moves."""
    del rule
    leaves = leaves_of(tree)
    for path, row in rmtjax.plan(tree, min_size=1).items():
        if row.spectrum is None or len(row.shape) != 2:
            continue
        order = np.random.default_rng(0).permutation(row.shape[0])
        moved = leaves_of(patterns.permute(tree, order, {path: 0}))
        assert all(moved[name] is leaf for name, leaf in leaves.items() if name != path)
        wanted = np.asarray(leaves[path]).astype(np.float64)[order]
        np.testing.assert_array_equal(np.asarray(moved[path]).astype(np.float64), wanted)


def sides_of(array, axes):
    return matrices_of(array, axes).shape


ENTRIES = {
    "budget": {"sparsity": 0.5, "budget": None},
    "restore": {"sparsity": 0.5, "restore": 0.1, "select": 1, "magnitude_until": 0.2},
    "pattern": {"pattern": (2, 4)},
    "mask": {"sparsity": 0.5, "mask": None},
}


def check_pruned(tree, rule, name):
    """After a step of `prune_entries` as many entries are zero as it says."""
    options = dict(ENTRIES[name])
    tree, plan = on_device(tree), rmtjax.plan(tree, rule=rule, min_size=2)
    if "budget" in options:
        options["budget"] = partial(sparsity.edge_weights, plan)
    if "mask" in options:
        options["mask"] = sparsity.random_mask(tree, 0.9)
    transform = rmtjax.prune_entries(**options)
    state = transform.init(tree)
    zero = jax.tree.map(jnp.zeros_like, tree)
    for update in (transform.update, jax.jit(transform.update)):
        updates, state = update(zero, state, tree)
    landed = leaves_of(optax.apply_updates(tree, updates))
    size = sum(mask.size for mask in state.masks.values())
    gone = sum(int(np.sum(~np.asarray(mask))) for mask in state.masks.values())
    if name != "restore":
        assert gone == np.round(np.float32(0.5) * size), (gone, size)
    for path, mask in state.masks.items():
        values = np.asarray(landed[path], np.float64)
        assert not values[~np.asarray(mask)].any() or np.isnan(values).any(), path


def check_projected(tree, rule):
    """Grids of few bits, low rank, and the ranks of a plan."""
    del rule
    leaves = leaves_of(tree)
    rows = rmtjax.plan(tree, rule=ranks.fixed(2), min_size=1, multiple=1)
    lower = leaves_of(
        projections.project(tree, partial(projections.project_rank, rule=ranks.fixed(2)))
    )
    planned = leaves_of(projections.project(tree, projections.from_plan(rows)))
    for path, row in rows.items():
        if row.spectrum is None:
            assert lower[path] is leaves[path], path
            continue
        exact = matrices_of(leaves[path], row.axes)
        if not np.isfinite(exact).all():
            continue
        wanted = np.linalg.norm(exact - lowered(exact, 2), axis=(1, 2))
        norm = np.linalg.norm(exact, axis=(1, 2))
        for found in (lower[path], planned[path]):
            lost = np.linalg.norm(exact - matrices_of(found, row.axes), axis=(1, 2))
            assert (np.abs(lost - wanted) <= (1e-4 + 4 * eps_of(leaves[path])) * norm).all() or (
                found is planned[path] and path not in rows.changes
            ), path
    codes = leaves_of(projections.project(tree, partial(projections.project_bits, bits=2)))
    for path, row in rows.items():
        if row.spectrum is not None and np.isfinite(matrices_of(leaves[path], row.axes)).all():
            for matrix in matrices_of(codes[path], row.axes):
                assert len(np.unique(np.abs(matrix))) <= 2, path


VERBS = {
    "magnitude_mask": check_magnitudes,
    "random_mask": check_random,
    "threshold_mask": check_threshold,
    "nm_mask": check_pattern,
    "permute": check_permuted,
    "project": check_projected,
    **{f"prune_entries {name}": partial(check_pruned, name=name) for name in ENTRIES},
}
