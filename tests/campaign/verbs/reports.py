"""Reports of random trees: their forms, columns, changes, and plans again from stored spectra."""

import jax
import numpy as np

import rmtjax
from campaign.oracle import eps_of, leaves_of, matrices_of
from campaign.verbs import figures
from rmtjax import shrinkage

OPTIONS = {"min_size": 2, "randomized": 2, "aspect": 0.5}


def check_forms(report):
    """All forms of a report with all columns, also those of shuffled kernels and of blocks."""
    for columns in ((), ("all", "traps", "pooled", "change")):
        for form in ("table", "to_json", "to_csv", "to_markdown", "to_html", "to_pandas"):
            getattr(report, form)(*columns)
        report.to_dict(*columns)
        report.cells(*columns)
    for text in (str(report), repr(report), report.summary, report.to_page()):
        assert isinstance(text, str)
    assert len(report.rows) == len(report)
    assert report.totals.parameters == sum(row.parameters or 0 for row in report)


def check_extras(report, tree):
    """Numbers of shuffled entries and of blocks, where a kernel has a finite spectrum."""
    leaves = leaves_of(tree)
    for path, numbers in report.metrics.items():
        row, extra = report.plan[path], report.extras.get(path)
        if row.spectrum is None or not np.isfinite(row.spectrum.eigenvalues).all():
            assert extra is None, path
            continue
        assert 0 <= numbers["shuffled_rate"] <= 1, path
        exact = matrices_of(leaves[path], row.axes)
        spread = np.abs(exact - exact.mean(axis=(1, 2), keepdims=True)).max() > 0
        assert (numbers["shuffled_top"] is not None) == bool(spread), path
        values = np.linalg.svd(exact, compute_uv=False)
        norm = np.mean(np.linalg.norm(values, axis=1))
        if 1e-15 < norm < 1e15:  # squares are in the range of float32
            np.testing.assert_allclose(numbers["frobenius_norm"], norm, rtol=1e-3, err_msg=path)


def check_replanned(report, tree, rule):
    """A report under another rule is the one that is made anew."""
    again, anew = report.replan(rule), rmtjax.analyze(tree, rule=rule, min_size=2)
    for one, other in zip(again, anew, strict=True):
        assert (one.path, one.reason, one.rank) == (other.path, other.reason, other.rank)
        assert (one.spikes, one.threshold) == (other.spikes, other.threshold)


def check_changes(report, tree, plain):
    """Kernels that are half as large again have changed by half of their norm."""
    half = lambda leaf: leaf * np.asarray(1.5, leaf.dtype) if is_plain(leaf) else leaf
    changed = rmtjax.compare_reports(plain, rmtjax.analyze(jax.tree.map(half, tree), min_size=2))
    leaves = leaves_of(tree)
    for path, numbers in changed.extras.items():
        row = report.plan[path]
        if row.spectrum is None or not is_plain(leaves[path]):
            continue
        # In a matrix at the ends of float32 squares are lost.
        norm = np.linalg.norm(matrices_of(leaves[path], row.axes))
        if not 1e-15 < norm < 1e15:
            continue
        for name in ("spectrum_change", "norm_change"):
            np.testing.assert_allclose(numbers[name], 0.5, rtol=0.02, err_msg=path)


def is_plain(leaf):
    """Whether an array is of a dtype whose products JAX and NumPy both have."""
    return str(np.dtype(leaf.dtype)) in ("float32", "float16", "bfloat16", "float64")


def check_report(tree, rule):
    report = rmtjax.analyze(tree, rule=rule, **OPTIONS)
    check_forms(report)
    check_extras(report, tree)
    check_replanned(report, tree, rmtjax.ranks.fixed(2))
    check_replanned(report, tree, rmtjax.ranks.gavish_donoho())
    check_changes(report, tree, rmtjax.analyze(tree, min_size=2))


def check_chosen(tree, rule):
    """Kernels with most signal have a spike each, and a mask has them alone."""
    report = rmtjax.analyze(tree, rule=rule, min_size=2)
    chosen = rmtjax.most_signal(report, top=0.5)
    assert all(report[path].spikes for path in chosen)
    mask = leaves_of(rmtjax.mask(tree, chosen))
    assert {path for path, value in mask.items() if value} == {*chosen}


def check_equalized(tree, rule):
    """Plans by kernels over the scales of their noise, or with advice about it."""
    del rule
    for equalize in (True, "advise"):
        plan = rmtjax.plan(tree, rule=rmtjax.ranks.bema(equalize=equalize), min_size=2)
        cut, leaves = rmtjax.truncate(tree, plan), leaves_of(tree)
        for path, leaf in leaves_of(cut).items():
            row = plan.changes.get(path)
            if row is None:
                assert leaf is leaves[path], path
                continue
            matrices = matrices_of(leaf, row.axes)
            largest = np.abs(matrices_of(leaves[path], row.axes)).max()
            s = np.linalg.svd(matrices, compute_uv=False)
            assert (s[:, row.rank :] <= 0.02 * s[:, :1]).all(), path  # rounded in 8 bits
            assert np.abs(matrices).max() <= 10 * largest, path


def check_shrunk(tree, rule):
    """Values that are kept and made smaller: no larger than before, in the same directions."""
    leaves = leaves_of(tree)
    for shrink in (shrinkage.frobenius, shrinkage.nuclear, shrinkage.operator):
        plan = rmtjax.plan(tree, rule=rule, shrink=shrink, min_size=2, multiple=1)
        cut, thin = rmtjax.truncate(tree, plan.in_place()), rmtjax.factorize(tree, plan)
        merged = leaves_of(rmtjax.merge(thin))
        for path, leaf in leaves_of(cut).items():
            row = plan.changes.get(path)
            if row is None:
                assert leaf is leaves[path], path
                continue
            old, new, other = (
                matrices_of(one, row.axes) for one in (leaves[path], leaf, merged[path])
            )
            room = (1e-3 + 8 * eps_of(leaf)) * np.linalg.norm(old)
            assert np.linalg.norm(new - other) <= room, path
            s, t = (np.linalg.svd(matrices, compute_uv=False) for matrices in (old, new))
            assert (t <= s + room).all(), path


def check_sizes(tree, rule):
    """The points of a trade-off are plans, and each is as large as it says."""
    del rule
    curve = rmtjax.trade_off(tree, min_size=2, multiple=1)
    assert (np.diff(curve.sizes) < 0).all()
    assert (np.diff(curve.removed) >= -1e-6).all()
    middle = len(curve.sizes) // 2
    plan = curve.plan(float(curve.shares[middle]))
    kernels = [row for path, row in plan.items() if path in curve.findings.kernels]
    assert sum(row.cost.parameters_after for row in kernels) <= curve.sizes[middle] + 1
    figures.check_plan(plan, curve)


VERBS = {
    "analyze, replan, compare_reports": check_report,
    "most_signal, mask": check_chosen,
    "equalize": check_equalized,
    "shrink, in_place": check_shrunk,
    "trade_off": check_sizes,
}
