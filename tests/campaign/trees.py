"""Random trees: the verbs that take one, against singular values in float64."""

import tempfile
from pathlib import Path

import hypothesis
import jax
import numpy as np
from hypothesis import strategies as st

import rmtjax
from campaign.leaves import FEW_TREES, Leaf, make, TREES
from campaign.oracle import check_cuts, check_row, leaves_of
from campaign.verbs import checkpoints, data, masks, parts, reports
from campaign.verbs.transforms import train, TRANSFORMS
from rmtjax import KernelAxes, ranks

RULES = (ranks.bema(), ranks.gavish_donoho(), ranks.energy(0.9), ranks.fixed(3))
EACH_RULE = st.sampled_from(RULES)
VERBS = reports.VERBS | masks.VERBS | parts.VERBS | data.VERBS | checkpoints.VERBS


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


def each_tree(rounds, seed, trees=TREES):
    """Calls a function with so many trees, rules, and whether small kernels are fitted."""
    settings = hypothesis.settings(
        max_examples=rounds,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    given = hypothesis.given(trees, EACH_RULE, st.booleans())
    return lambda trial: hypothesis.seed(seed)(settings(given(trial)))()


def forget(tally):
    """Clears programs now and then: each holds memory mappings, of which Linux allows few."""
    if sum(tally.tried.values()) % 400 < 12:
        jax.clear_caches()


def run(tally, rounds, seed):
    """Tries so many trees."""

    @each_tree(rounds, seed)
    def trial(spec, rule, small):
        run_tree(tally, spec, rule, small)
        forget(tally)


def run_verbs(tally, rounds, seed, names=VERBS):
    """Tries so many trees under the verbs of the files of `verbs`."""

    @each_tree(rounds, seed, FEW_TREES)
    def trial(spec, rule, small):
        del small
        tree, told = make(spec), str(spec)[:500]
        for name in names:
            with tally.trial(name, told):
                VERBS[name](tree, rule)
        forget(tally)


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
