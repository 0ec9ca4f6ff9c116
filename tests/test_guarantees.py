"""Each promise of the page of guarantees has a test."""

import ast
import hashlib
import re
from pathlib import Path

import jax
import numpy as np

import rmtjax

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "guarantees.md"
ROW = re.compile(r"^\| (?!promise|-)(.+?) \| `(\w+)` \|$", re.MULTILINE)


def names_in(path):
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


def test_every_promise_names_a_test_that_exists():
    known = set().union(*map(names_in, TESTS.rglob("test_*.py")))
    page = PAGE.read_text()
    rows = ROW.findall(page)
    assert len(rows) == len([line for line in page.splitlines() if line.startswith("| ")]) - 4
    for promise, name in rows:
        assert name in known, promise
        assert name.startswith(("test_", "Test")), promise


def test_the_package_runs_no_code_from_files():
    risky = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    for path in Path(rmtjax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.partition(".")[0] for alias in node.names}
                assert not risky & {*names, getattr(node, "module", None)}, path
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") not in ("eval", "exec", "compile"), path
                words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert words.get("allow_pickle", "False") == "False", path


def digest():
    """Of the factors and the fits of a plan."""
    kernel = np.random.default_rng(0).normal(size=(60, 80)).astype(np.float32) + 1
    params = {"b": {"kernel": kernel}, "a": {"kernel": kernel.T.copy()}}
    plan = rmtjax.plan(params, multiple=1)
    leaves = jax.tree.leaves((rmtjax.factorize(params, plan), dict(plan.fits)))
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def test_the_same_inputs_give_the_same_bits():
    first = digest()
    jax.clear_caches()  # as in a new process
    assert digest() == first
