"""Random trees: the verbs that take one, against singular values in float64."""

import tempfile
from functools import partial
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

import rmtjax
from campaign.leaves import Leaf, make, TREES
from rmtjax import Kept, KernelAxes, ranks
from rmtjax._axes import native
from rmtjax.planning import path_name

RULES = (ranks.bema(), ranks.gavish_donoho(), ranks.energy(0.9), ranks.fixed(3))
EACH_RULE = st.sampled_from(RULES)


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


def train(tree, make_transform):
    """One eager and one compiled step: updates have the structure, shapes and dtypes given."""
    transform = make_transform()
    transform.init(tree)
    # A program takes arrays of JAX alone.
    tree = jax.tree.map(lambda leaf: jnp.asarray(native(leaf)), tree)
    state = transform.init(tree)
    zero = jax.tree.map(lambda leaf: jnp.zeros(np.shape(leaf), jnp.asarray(leaf).dtype), tree)
    for update in (transform.update, jax.jit(transform.update)):
        updates, state = update(zero, state, tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(zero), strict=True):
            assert (new.shape, new.dtype) == (old.shape, old.dtype)
    return state


def restored(tree, plan):
    """What a file gives back, bit by bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        rmtjax.checkpoint.save(path, tree, plan)
        back = rmtjax.checkpoint.restore(path, like=tree)
        for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
            assert np.asarray(new).tobytes() == np.asarray(old).tobytes()
        if plan:
            assert rmtjax.checkpoint.load_plan(path).keys() == plan.keys()


TO_RANK_2 = partial(rmtjax.projections.project_rank, rule=ranks.fixed(2))
TRANSFORMS = {
    "prune_spectrum": lambda: rmtjax.prune_spectrum(1, rule=ranks.fixed(2), min_size=2),
    "prune_entries": lambda: rmtjax.prune_entries(0.5),
    "agree": lambda: rmtjax.agree(2),
    "monitor": lambda: rmtjax.monitor(1, min_size=2, columns=["spikes", "stable_rank"]),
    "shrink_tail": lambda: rmtjax.lowrank.shrink_tail(1, strength=0.1, rule=ranks.fixed(2)),
    "drop_and_grow": lambda: rmtjax.drop_and_grow(optax.identity(), 1, density=0.5),
    "admm": lambda: rmtjax.admm(TO_RANK_2, every=1),
    "masked": lambda: optax.masked(
        rmtjax.prune_entries(0.2), partial(jax.tree.map, lambda _: True)
    ),
}


def run_tree(tally, spec, rule, small):
    """All verbs on one tree."""
    tree, told = make(spec), str(spec)[:500]
    plan = None
    with tally.trial("plan", told):
        plan = rmtjax.plan(tree, rule=rule, min_size=2 if small else 50, multiple=1)
        leaves = leaves_of(tree)
        for path, row in plan.items():
            check_row(path, row, leaves[path])
    if plan is not None:
        with tally.trial("cut", told):
            check_cuts(tree, plan)
        with tally.trial("report", told):
            report = rmtjax.Report(plan)
            for form in (str, rmtjax.Report.to_json, rmtjax.Report.to_csv, rmtjax.Report.to_html):
                form(report)
            rmtjax.Report.to_markdown(report)
            rmtjax.Report.to_page(report)
    with tally.trial("analyze", told):
        metrics = rmtjax.analyze(tree, rule=rule, min_size=2 if small else 50)
        assert [row.path for row in metrics] == list(plan or metrics.plan)
    with tally.trial("budget", told):
        cut = rmtjax.plan(tree, budget=0.5, min_size=2 if small else 50)
        check_cuts(tree, cut)
    with tally.trial("file", told):
        restored(tree, plan)
    with tally.trial("penalty", told):
        assert float(rmtjax.penalty(tree, l2=1.0)) >= 0 or "nan" in told or "inf" in told
    with tally.trial("mask", told):
        mask = rmtjax.sparsity.magnitude_mask(tree, 0.5)
        assert all(leaf.dtype == bool for leaf in jax.tree.leaves(mask))
    with tally.trial("merge_replicas", told):
        merged = rmtjax.merge_replicas(tree, [tree, tree]).params
        assert jax.tree.structure(merged) == jax.tree.structure(tree)
    for name, transform in TRANSFORMS.items():
        with tally.trial(name, told):
            train(tree, transform)


def run(tally, rounds, seed):
    """Tries so many trees."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=rounds,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(TREES, EACH_RULE, st.booleans())
    def trial(spec, rule, small):
        run_tree(tally, spec, rule, small)
        if sum(tally.tried.values()) % 400 < 12:
            jax.clear_caches()  # each program holds memory mappings, of which Linux allows few

    trial()


# Kernels as large as those of real networks are few: a decomposition takes a second.
def run_large(tally, rounds, seed):
    """Tries large kernels, some of them stacks."""
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        rows, columns = (int(size) for size in rng.integers(200, 3000, 2))
        stack = int(rng.integers(1, 3)) if rows * columns < 10**6 else 1
        leaf = Leaf((stack, rows, columns), "float32", "signal", int(rng.integers(10**6)), True)
        tree = {"layers": {"kernel": leaf.array()}}
        with tally.trial("large", leaf):
            axes = {"layers/kernel": KernelAxes((1,), (2,), (0,))}
            plan = rmtjax.plan(tree, axes=axes, multiple=1)
            check_row("layers/kernel", plan["layers/kernel"], tree["layers"]["kernel"])
            check_cuts(tree, plan)
