"""Plans of random trees by moments of their inputs and by replicas, against the data."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmtjax
from campaign.oracle import eps_of, leaves_of, matrices_of
from campaign.verbs.transforms import on_device
from rmtjax import ranks
from rmtjax.moments import Moment, Moments


def data_of(tree, rows):
    """Inputs of each kernel with a finite spectrum: an array (stack, rows, inputs)."""
    leaves, inputs = leaves_of(tree), {}
    for place, (path, row) in enumerate(rows.items()):
        if row.spectrum is None or not np.isfinite(row.spectrum.eigenvalues).all():
            continue
        stack, side, _ = matrices_of(leaves[path], row.axes).shape
        rng = np.random.default_rng(place)
        inputs[path] = rng.normal(size=(stack, 2 * side + 3, side)) * rng.uniform(0.1, 2, side)
    return inputs


def moments_of(inputs):
    """The sums over inputs, by NumPy."""
    groups = {}
    for path, x in inputs.items():
        norms = np.sum(x**2, axis=2)
        sums = x.sum(axis=1), np.einsum("bni,bnj->bij", x, x), np.einsum("bn,bni->bi", norms, x)
        groups[path] = Moment(np.full(len(x), x.shape[1]), *sums, (norms**2).sum(axis=1))
    return Moments(groups, {}, tuple((path, path) for path in inputs), shrinkage=0.0)


def outputs_of(x, matrices):
    return np.einsum("bni,bij->bnj", x, matrices)


def check_outputs(tree, rule):
    """A cut by outputs loses as much of them as the best of this rank, and says how much."""
    del rule
    rows = rmtjax.plan(tree, min_size=1)
    inputs, leaves = data_of(tree, rows), leaves_of(tree)
    moments = moments_of(inputs)
    planned = rmtjax.plan(tree, rule=ranks.fixed(2), moments=moments, min_size=1, multiple=1)
    cut = rmtjax.truncate(tree, planned, moments=moments)
    thin = rmtjax.factorize(tree, planned, moments=moments)
    report = {row.path: row for row in rmtjax.Report(planned)}
    changes = rmtjax.certificate.output_changes(tree, cut, moments)
    for path, x in inputs.items():
        exact, lower = (
            matrices_of(leaf, rows[path].axes) for leaf in (leaves[path], leaves_of(cut)[path])
        )
        if not 1e-12 < np.abs(exact).max() < 1e12:
            continue
        lost, energy = (np.sum(outputs_of(x, a) ** 2) for a in (exact - lower, exact))
        found = np.sum(changes[path].change) * x.shape[1]
        np.testing.assert_allclose(found, lost, rtol=1e-4, atol=1e-6 * energy, err_msg=path)
        if path in planned.changes:
            s = np.linalg.svd(outputs_of(x, exact), compute_uv=False)
            best = np.sum(s[:, 2:] ** 2)
            room = (1e-4 + 16 * eps_of(leaves[path])) * energy
            assert best - room <= lost <= best + room, (path, best, lost, energy)
            np.testing.assert_allclose(
                report[path].removed_outputs, best / energy, rtol=1e-3, atol=1e-4, err_msg=path
            )
    check_refit(tree, thin, moments, inputs, rows)


def check_refit(tree, thin, moments, inputs, rows):
    """Factors that are fitted again lose no more of the outputs than before."""
    again = rmtjax.refit(tree, thin, moments)
    before, after = (leaves_of(rmtjax.merge(one)) for one in (thin, again))
    leaves = leaves_of(tree)
    for path, x in inputs.items():
        exact = matrices_of(leaves[path], rows[path].axes)
        if not 1e-12 < np.abs(exact).max() < 1e12:
            continue
        lost = [
            np.sum(outputs_of(x, exact - matrices_of(one[path], rows[path].axes)) ** 2)
            for one in (before, after)
        ]
        energy = np.sum(outputs_of(x, exact) ** 2)
        room = (1e-4 + 32 * eps_of(leaves[path])) * energy
        assert lost[1] <= lost[0] * (1 + 1e-3) + room, (path, lost, energy)


def check_budgets(tree, rule):
    """Budgets by outputs, the file of the moments, and their options."""
    del rule
    moments = moments_of(data_of(tree, rmtjax.plan(tree, min_size=1)))
    for options in ({}, {"centred": True}, {"shrinkage": "ledoit_wolf"}):
        plan = rmtjax.plan(tree, moments=moments.with_options(**options), budget=0.9, min_size=2)
        kernels = rmtjax.planning.find_kernels(tree)
        sizes = [row.cost for path, row in plan.items() if path in kernels]
        total = sum(cost.parameters for cost in sizes)
        assert sum(cost.parameters_after for cost in sizes) <= 0.9 * total + 1
    with tempfile.TemporaryDirectory() as folder:
        rmtjax.checkpoint.save_moments(Path(folder, "m.safetensors"), moments)
        back = rmtjax.checkpoint.load_moments(Path(folder, "m.safetensors"))
    assert [*back] == [*moments]
    for one, other in zip(*map(jax.tree.leaves, (back, moments)), strict=True):
        np.testing.assert_array_equal(one, other)
    half = [*moments][::2]
    assert [*moments.of(half)] == half
    assert not any(map(moments.weighs, moments))  # no gradients were collected
    rmtjax.trade_off(tree, moments=moments + back, min_size=2).plan(0.9)


def check_replicas(tree, rule):
    """Replicas that are equal agree on all, and copies are copies."""
    del rule
    half = lambda leaf: leaf * np.asarray(1.5, leaf.dtype) if leaf.dtype.kind == "f" else leaf
    copies, moved = rmtjax.replicate(tree, 2), jax.tree.map(half, on_device(tree))
    for one, old in zip(jax.tree.leaves(copies), jax.tree.leaves(on_device(tree)), strict=True):
        assert one.shape == (2, *old.shape)
        if old.size:  # JAX takes no part of an empty array on a mesh with explicit axes
            assert np.asarray(one[1]).tobytes() == np.asarray(old).tobytes()
    replicas = rmtjax.replicate(moved, 3)
    merged = rmtjax.merge_replicas(tree, replicas)
    wanted, found = leaves_of(moved), leaves_of(merged.params)
    for path, share in merged.kept.items():
        old = np.asarray(wanted[path], np.float64)
        if not np.isfinite(old).all():
            continue
        far = np.linalg.norm(np.asarray(found[path], np.float64) - old)
        assert far <= (1e-3 + 4 * eps_of(wanted[path])) * np.linalg.norm(old), (path, far)
        assert float(share) == 0 or abs(float(share) - 1) < 1e-3, (path, share)
    parts = rmtjax.deal(jax.random.key(0), 11, 2)
    assert len({*np.ravel(parts).tolist()}) == parts.size == 10


def check_average(tree, rule):
    """The mean of parameters that do not move is what they are."""
    del rule
    tree = on_device(tree)
    optimizer = optax.chain(optax.identity(), rmtjax.average_params(1))
    state, zero = optimizer.init(tree), jax.tree.map(jnp.zeros_like, tree)
    for update in (optimizer.update, jax.jit(optimizer.update)):
        for loss in (1.0, 2.0):
            _, state = update(zero, state, tree, value=loss)
    for new, old in zip(*map(jax.tree.leaves, (rmtjax.averaged(state, tree), tree)), strict=True):
        assert new.dtype == old.dtype
        # NumPy does not know the NaN of 8 bits.
        same = (np.asarray(leaf).astype(np.complex128) for leaf in (new, old))
        np.testing.assert_array_equal(*same)


def check_state(tree, rule):
    """What the states of transforms say of kernels: levels of noise for plans, and numbers."""
    tree = on_device(tree)
    transform = rmtjax.prune_spectrum(1, rule=rule, min_size=2)
    state, zero = transform.init(tree), jax.tree.map(jnp.zeros_like, tree)
    _, state = transform.update(zero, state, tree)
    numbers = rmtjax.metrics(state)
    assert all(np.isfinite(np.asarray(number, np.float64)).all() for number in numbers.values())
    levels = rmtjax.noise_levels(state)
    plan = rmtjax.plan(tree, rule=rule, fits=levels, min_size=2, multiple=1)
    for path, rank in ((key[5:], rank) for key, rank in numbers.items() if key.startswith("rank/")):
        if plan[path].spectrum is not None and np.isfinite(plan[path].spectrum.eigenvalues).all():
            assert 0 <= int(rank) <= plan[path].spectrum.eigenvalues.shape[-1], path


def check_penalty(tree, rule):
    """The sum of magnitudes and of squares over the kernels."""
    del rule
    found = float(rmtjax.penalty(tree, l1=0.5, l2=0.25))
    kernels = rmtjax.planning.find_kernels(tree).values()
    floating = [kernel for kernel in kernels if jnp.issubdtype(kernel.dtype, jnp.floating)]
    values = [np.asarray(kernel.leaf, np.float64) for kernel in floating]
    with np.errstate(all="ignore"):
        wanted = sum(0.5 * np.abs(a).sum() + 0.25 * (a**2).sum() for a in values)
    if np.isfinite(wanted) and wanted < 1e37:
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-30)
    else:
        assert not found < 1e37


VERBS = {
    "penalty by parts": check_penalty,
    "moments, output_changes, refit": check_outputs,
    "budget by moments": check_budgets,
    "replicate, merge_replicas": check_replicas,
    "average_params": check_average,
    "noise_levels, metrics": check_state,
}
