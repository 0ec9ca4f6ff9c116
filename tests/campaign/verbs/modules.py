"""Dense layers of linen and nnx with strange kernels: outputs against NumPy in float64."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

import rmtjax
from campaign.oracle import eps_of, lowered
from campaign.verbs import matrices
from campaign.verbs.matrices import is_matrix

INPUTS = np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32)
RULE = rmtjax.ranks.fixed(2)


def check_close(found, x, kernel, exact, eps):
    """Outputs near those of a kernel in float64, which may be cut."""
    found, norm = np.asarray(found, np.float64), np.linalg.norm(exact)
    if not np.isfinite(exact).all() or not 1e-15 < norm < 1e15:
        return
    far = np.linalg.norm(found - x.astype(np.float64) @ kernel)
    assert far <= (1e-3 + 8 * eps) * np.linalg.norm(x) * norm / np.sqrt(len(x)), (far, norm)


def check_linen(leaf, exact):
    """A module of linen, unmodified, on thin parameters; its axes and its moments."""
    module, x = nn.Dense(exact.shape[1], use_bias=False), INPUTS[:, : len(exact)]
    params = {"kernel": leaf}
    axes = rmtjax.linen.kernel_axes(module, {"params": params}, x)
    plan = rmtjax.plan(params, rule=RULE, axes=axes, min_size=1, multiple=1)
    thin = rmtjax.factorize(params, plan)
    found = rmtjax.linen.apply(module, {"params": thin}, x)
    wanted = lowered(exact, 2) if plan.changes else exact
    check_close(found, x, wanted, exact, eps_of(leaf))
    with rmtjax.linen.factorized():
        again = module.apply({"params": thin}, x)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(found))
    moments = rmtjax.linen.moments(module, {"params": params}, [x])
    second = np.asarray(moments["kernel"].second, np.float64)[0]
    rounded = x.astype(leaf.dtype).astype(np.float64) if eps_of(leaf) > 1e-6 else x
    room = 1e-3 + 2 * eps_of(leaf)
    wanted = rounded.T.astype(np.float64) @ rounded
    np.testing.assert_allclose(second, wanted, atol=room * np.abs(wanted).max())


def check_nnx(leaf, exact):
    """A model of nnx: its plans, its thin layers, and its state as a tree."""
    model, x = nnx.Linear(*exact.shape, use_bias=False, rngs=nnx.Rngs(0)), INPUTS[:, : len(exact)]
    model.kernel = nnx.Param(leaf)
    tree = rmtjax.nnx.params(model)
    assert tree["kernel"].shape == exact.shape
    axes = rmtjax.nnx.kernel_axes(model)["kernel"]
    assert axes == rmtjax.KernelAxes((0,), (1,))
    options = {"rule": RULE, "min_size": 1}
    plan = rmtjax.nnx.plan(model, multiple=1, **options)
    report = rmtjax.nnx.analyze(model, randomized=1, **options)
    assert report.rows[0].spikes == rmtjax.analyze(tree, **options).rows[0].spikes
    lower, thin = rmtjax.nnx.truncate(model, plan), rmtjax.nnx.factorize(model, plan)
    wanted = lowered(exact, 2) if plan.changes else exact
    for one in (lower, thin, rmtjax.nnx.merge(thin)):
        check_close(one(x), x, wanted, exact, eps_of(leaf))
    same = rmtjax.nnx.replace(model, tree)
    check_close(same(x), x, exact, exact, eps_of(leaf))
    state = nnx.state(model, nnx.Param)
    other = rmtjax.plan(state, multiple=1, **options)
    assert [row.reason for row in other.values()] == [row.reason for row in plan.values()]
    cut = jax.tree.leaves(rmtjax.truncate(state, other))[0]
    if np.isfinite(exact).all():
        far = np.linalg.norm(
            np.asarray(cut, np.float64) - np.asarray(lower.kernel[...], np.float64)
        )
        assert far <= (1e-3 + 4 * eps_of(leaf)) * np.linalg.norm(exact)
    if np.isfinite(exact).all():
        moments = rmtjax.nnx.moments(model, [x[:100], x[100:]])
        assert int(moments["kernel"].rows[0]) == len(x)


VERBS = {"linen": check_linen, "nnx": check_nnx}


def run_module(tally, spec):
    """Modules of both APIs with one kernel that JAX has."""
    leaf = spec.array()
    if not isinstance(leaf, jax.Array) or not is_matrix(leaf) or leaf.dtype.itemsize < 2:
        return
    exact = np.asarray(leaf, np.float64)
    for name, check in VERBS.items():
        # Inputs of a kernel that are not finite have no moments.
        with tally.trial(f"module: {name}", str(spec), must=np.isfinite(exact).all()):
            check(leaf, exact)


run = partial(matrices.run, run_one=run_module)
