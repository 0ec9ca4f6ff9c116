"""Models of the structure of Flax's examples, from the first report to a saved, smaller model.

Each is analyzed, pruned while it is trained, factorized, run, trained on, saved and restored.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import architectures
from helpers.linen_checks import assert_close
from helpers.slow import slow_except

import rmtjax
from rmtjax import checkpoint, linen, nnx as rmt_nnx

RNGS = {name: jax.random.key(seed) for seed, name in enumerate(("params", "dropout", "latent"))}
STEPS = 10
CASES = [("linen", name) for name in architectures.LINEN]
CASES += [("nnx", name) for name in architectures.NNX]


class Run(NamedTuple):
    """A model that has been pruned while it was trained, as trees of parameters.

    Attributes:
      start: Before training.
      report: Of `start`.
      params: After training.
      ranks: In the state of the optimizer, by path.
      plan: Of `params`, by the noise levels in the state.
      thin: `params`, factorized.
      step: From parameters, dense or thin, to outputs and parameters after one step more.
    """

    start: Any
    report: rmtjax.Report
    params: Any
    ranks: dict[str, int]
    plan: rmtjax.Plan
    thin: Any
    step: Callable[[Any], tuple[Any, Any]]


def make_optimizer(case, axes):
    """Cuts once, when there is something to see."""
    prune = rmtjax.prune_spectrum(STEPS, max_removed=1.0, axes=axes, where=case.where)
    return optax.chain(optax.adam(1e-2), prune)


def make_step(case, optimizer, apply):
    """A step of training in linen, which tells the outputs that it started from too."""

    @jax.jit
    def step(variables, state):
        def loss(params):
            options = {"train": True, "rngs": RNGS, "mutable": ["batch_stats"]}
            outputs, written = apply({**variables, "params": params}, case.inputs, **options)
            return case.loss(outputs), (outputs, written)

        grads, (outputs, written) = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return (outputs, written), {**variables, **written, "params": params}, state

    return step


def run_linen(case) -> Run:
    module = case.make()
    variables = jax.jit(lambda: module.init(RNGS, case.inputs, train=True))()
    start, call = variables["params"], {"train": False, "rngs": RNGS}
    axes = linen.kernel_axes(module, variables, case.inputs, **call)
    optimizer = make_optimizer(case, axes)
    dense_step = make_step(case, optimizer, module.apply)
    thin_step = make_step(case, optimizer, functools.partial(linen.apply, module))
    state = optimizer.init(start)
    for _ in range(STEPS):
        _, variables, state = dense_step(variables, state)
    params = variables["params"]
    # What pruning has held back in these few steps is cut here all the same.
    fits = {p: fit for p, fit in rmtjax.noise_levels(state).items() if (fit.threshold >= 0).all()}
    plan = rmtjax.plan(params, axes=axes, fits=fits)
    thin = rmtjax.factorize(params, plan)

    def step(tree):
        now = {**variables, "params": tree}
        if jax.tree.structure(tree) == jax.tree.structure(params):
            outputs, new, _ = dense_step(now, state)
        else:
            outputs, new, _ = thin_step(now, rmtjax.transfer_opt_state(state, params, tree))
        return outputs, new["params"]

    ranks = jax.tree.map(int, optax.tree.get(state, "ranks"))
    return Run(start, rmtjax.analyze(start, axes=axes), params, ranks, plan, thin, step)


def run_nnx(case) -> Run:
    model = case.make(nnx.Rngs(0))
    axes, report = rmt_nnx.kernel_axes(model), rmt_nnx.analyze(model)
    start = jax.tree.map(np.array, rmt_nnx.params(model))
    transform = make_optimizer(case, axes)

    @nnx.jit
    def update(model, optimizer):
        def loss(model):
            outputs = model(case.inputs)
            return case.loss(outputs), outputs

        grads, outputs = nnx.grad(loss, has_aux=True)(model)
        # Older Flax keeps the model in the optimizer.
        optimizer.update(*((grads,) if hasattr(optimizer, "model") else (model, grads)))
        return outputs, nnx.state(model, nnx.BatchStat)

    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    for _ in range(STEPS):
        update(model, optimizer)
    plan = rmt_nnx.plan(model, fits=rmtjax.noise_levels(optimizer.opt_state))

    def step(tree):
        other = rmt_nnx.replace(model, tree)
        outputs = update(other, nnx.Optimizer(other, transform, wrt=nnx.Param))
        return outputs, rmt_nnx.params(other)

    found = optax.tree.get(optimizer.opt_state, "ranks")
    ranks = {path: int(found[path][...]) for path in found}
    thin = rmt_nnx.params(rmt_nnx.factorize(model, plan))
    return Run(start, report, rmt_nnx.params(model), ranks, plan, thin, step)


FAST = (("linen", "MLP"), ("nnx", "CNN"))


@pytest.fixture(scope="module", params=slow_except(FAST, CASES))
def run(request):
    api, name = request.param
    if api == "linen":
        return run_linen(architectures.LINEN[name])
    return run_nnx(architectures.NNX[name])


def by_path(tree):
    name = lambda key: jax.tree_util.keystr(key, simple=True, separator="/")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name(key): np.asarray(leaf) for key, leaf in leaves}


def numerical_rank(kernel, axes):
    """That of the richest matrix of a stack."""
    order = (*axes.batch, *axes.inputs, *axes.outputs)
    stack = [kernel.shape[axis] for axis in axes.batch]
    rows = int(np.prod([kernel.shape[axis] for axis in axes.inputs]))
    return np.linalg.matrix_rank(kernel.transpose(order).reshape(*stack, rows, -1), rtol=1e-4).max()


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_every_kernel_is_analyzed(run):
    named = [path for path in by_path(run.start) if path.split("/")[-1] in ("kernel", "embedding")]
    assert [row.path for row in run.report.rows] == named
    assert all(row.reason for row in run.report.rows)
    # Initial kernels are noise, of which one in ten shows a spike; recurrent ones are orthogonal.
    refused = {row.path for row in run.report.rows if "law does not fit" in row.reason}
    assert refused == {path for path in named if "LSTMCell" in path and "/h" in path}


# In the few steps of these nothing stands out of noise whose rows and columns differ in scale.
NOTHING_YET = {"linen-ResNet", "linen-VAE"}


def test_training_prunes(run, request):
    before, after = (
        {path: numerical_rank(by_path(tree)[path], run.plan[path].axes) for path in run.ranks}
        for tree in (run.start, run.params)
    )
    assert run.ranks == after
    cut = {path for path in before if after[path] < before[path]}
    assert bool(cut) == (request.node.callspec.id not in NOTHING_YET)
    # Orthogonal kernels, in which there is no noise to be found, stay as they are.
    assert not any("/h" in path for path in cut)


def test_a_factorized_model_is_smaller_and_computes_the_same(run):
    assert any(row.action == "factorize" for row in run.plan.values())
    assert count(run.thin) < count(run.params)
    outputs, _ = run.step(run.thin)
    wanted, _ = run.step(rmtjax.truncate(run.params, run.plan))
    assert_close(outputs, wanted)  # products of float32 in another order


def test_training_goes_on_in_the_factors(run):
    _, params = run.step(run.thin)
    assert jax.tree.structure(params) == jax.tree.structure(run.thin)
    halves = {path for path in by_path(params) if path.endswith(("/left", "/right"))}
    assert len(halves) == 2 * sum(row.action == "factorize" for row in run.plan.values())
    before = by_path(run.thin)
    assert all((leaf != before[path]).any() for path, leaf in by_path(params).items())


def test_what_is_saved_comes_back(run, request, tmp_path):
    layout = CASES.index(request.node.callspec.params["run"]) % 2
    path = tmp_path / ("thin.safetensors", "thin")[layout]  # a name without an end is orbax's
    checkpoint.save(path, run.thin, run.plan)
    restored = checkpoint.restore(path)
    assert jax.tree.structure(restored) == jax.tree.structure(run.thin)
    reasons = {path: row.reason for path, row in run.plan.items()}
    assert {path: row.reason for path, row in checkpoint.load_plan(path).items()} == reasons
    one, other = run.step(restored), run.step(run.thin)
    jax.tree.map(np.testing.assert_array_equal, one, other)
