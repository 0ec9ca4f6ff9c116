"""Kernels of random trees in singular vectors and in trains, and what they are multiplied out."""

import jax
import numpy as np
import optax

import rmtjax
from campaign.oracle import eps_of, leaves_of, lowered, matrices_of
from campaign.verbs.transforms import on_device, slopes_of
from rmtjax import lowrank, ranks
from rmtjax._axes import is_factors


def near(found, leaf, axes, wanted):
    """Whether a kernel, multiplied out, is near matrices in float64."""
    exact, got = matrices_of(leaf, axes), matrices_of(found, axes)
    if not np.isfinite(exact).all():
        return True
    far = np.linalg.norm(got - wanted, axis=(1, 2))
    rest = np.linalg.norm(exact - got, axis=(1, 2)) - np.linalg.norm(exact - wanted, axis=(1, 2))
    room = (1e-4 + 8 * eps_of(leaf)) * np.linalg.norm(exact, axis=(1, 2))
    return bool((np.minimum(far, np.abs(rest)) <= room).all())


def parts_of(tree):
    """The leaves of a tree, with kernels in parts as one leaf."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_factors)
    return {rmtjax.planning.path_name(key): leaf for key, leaf in pairs}


def check_spectral(tree, rule):
    """Kernels in singular vectors: the same tree, penalties, and fewer values."""
    del rule
    rows, leaves = rmtjax.plan(tree, min_size=1), leaves_of(tree)
    held = lowrank.to_spectral(tree)
    for same in (rmtjax.merge(held), rmtjax.merge(lowrank.to_factors(held))):
        for path, leaf in leaves_of(same).items():
            row = rows.get(path)
            if row is not None and row.spectrum is not None:
                exact = matrices_of(leaves[path], row.axes)
                assert near(leaf, leaves[path], row.axes, exact), path
            else:
                assert leaf is leaves[path], path
    kernels = [leaf for leaf in parts_of(held).values() if is_factors(leaf)]
    values = [
        np.asarray(kernel.s, np.float64).reshape(-1, kernel.s.shape[-1]) for kernel in kernels
    ]
    if all(np.isfinite(s).all() for s in values):
        check_penalties(held, np.concatenate([*map(ratios_of, values), []]))
    pruned = lowrank.prune_values(held, rule=ranks.fixed(2), exact=True)
    for path, leaf in leaves_of(rmtjax.merge(pruned.params)).items():
        if path in pruned.ranks and np.isfinite(np.asarray(leaves[path], np.float64)).all():
            wanted = lowered(matrices_of(leaves[path], rows[path].axes), 2)
            assert near(leaf, leaves[path], rows[path].axes, wanted), path


def ratios_of(values):
    """The sum of magnitudes over the root of the sum of squares, of each matrix of a stack."""
    live = values[values.any(axis=1)]
    unit = live / np.abs(live).max(axis=1, keepdims=True, initial=1e-300)
    return np.abs(unit).sum(axis=1) / np.sqrt((unit**2).sum(axis=1))


def check_penalties(held, ratios):
    """Penalties on values by their formula, on vectors near 0, and derivatives that are finite."""
    close = lambda found, wanted: np.testing.assert_allclose(
        float(found), wanted, rtol=1e-3, atol=1e-3
    )
    close(lowrank.hoyer(held), np.sum(ratios - 1))
    close(lowrank.hoyer_square(held), np.sum(ratios**2 - 1))
    parts = [kernel for kernel in parts_of(held).values() if is_factors(kernel)]
    coarse = max(eps_of(kernel.u) for kernel in parts)
    assert float(lowrank.orthogonality(held)) <= 1e-3 + 100 * len(parts) * coarse
    tree = [kernel for kernel in parts if np.dtype(kernel.s.dtype).kind == "f"]
    if tree:
        for penalty in (lowrank.hoyer, lowrank.hoyer_square, lowrank.orthogonality):
            slopes = slopes_of(penalty, tree)
            assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(slopes))


def check_trains(tree, rule):
    """Kernels as trains without a cut, and cut by a rule to bonds that it allows."""
    del rule
    rows, leaves = rmtjax.plan(tree, min_size=1), leaves_of(tree)
    modes = {}
    for path, row in rows.items():
        if row.spectrum is not None and row.axes.order == tuple(range(len(row.shape))):
            _, *sides = matrices_of(leaves[path], row.axes).shape
            divided = (lowrank.balanced_modes(side, 2) for side in sides)
            modes[path] = lowrank.operator_modes(*divided)
    whole, cut = (lowrank.to_trains(tree, modes, rule=r) for r in (None, ranks.fixed(2)))
    bonds = [bond for fit in cut.fits.values() for bond in fit.bonds]
    assert all(bond.rank <= 2 for bond in bonds if np.isfinite(bond.values).all())
    merged = leaves_of(rmtjax.merge(whole.params))
    for path in modes:
        exact = matrices_of(leaves[path], rows[path].axes)
        assert near(merged[path], leaves[path], rows[path].axes, exact), path
        if np.isfinite(exact).all():
            lost = exact - matrices_of(cut.fits[path].train.multiply(), rows[path].axes)
            room = (1e-3 + 8 * eps_of(leaves[path])) * np.linalg.norm(exact)
            assert np.linalg.norm(lost) <= cut.fits[path].error * 1.001 + room, path


def check_moved_state(tree, rule):
    """Momentum of a kernel becomes that of its factors by the chain rule."""
    del rule
    tree = on_device(tree)
    plan = rmtjax.plan(tree, rule=ranks.fixed(2), min_size=1, multiple=1)
    thin = rmtjax.factorize(tree, plan)
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = optimizer.init(tree)
    trace = jax.tree.map(lambda leaf: leaf * np.asarray(0.5, leaf.dtype), tree)
    state = (state[0]._replace(trace=trace), *state[1:])
    moved = rmtjax.transfer_opt_state(state, tree, thin)
    reset = rmtjax.transfer_opt_state(state, tree, thin, moments="reset", optimizer=optimizer)
    shapes = lambda one: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), one)
    assert shapes(moved) == shapes(reset) == shapes(optimizer.init(thin))
    old, factors, new = leaves_of(trace), parts_of(thin), parts_of(moved[0].trace)
    for path, leaf in factors.items():
        if not is_factors(leaf) or leaf.left.ndim + leaf.right.ndim != 4:
            continue
        if np.abs(np.asarray(old[path], np.float64)).max() > 1e20:  # products leave float32
            continue
        moment, left, right, got, other = (
            np.asarray(part, np.float64) for part in (old[path], *leaf, *new[path])
        )
        room = (1e-4 + 8 * eps_of(leaf.left)) * np.linalg.norm(moment)
        assert np.linalg.norm(got - moment @ right.T) <= room * np.linalg.norm(right) + 1e-30, path
        assert np.linalg.norm(other - left.T @ moment) <= room * np.linalg.norm(left) + 1e-30, path


VERBS = {
    "to_spectral": check_spectral,
    "to_trains": check_trains,
    "transfer_opt_state": check_moved_state,
}
