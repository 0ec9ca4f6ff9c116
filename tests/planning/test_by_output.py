"""Cuts by output: the nearest matrix in outputs, and what a plan says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers.plan_cases import Count

import rmtjax
from rmtjax import Factors, KernelAxes, ranks
from rmtjax.moments import Moments, sums_of_rows

SMALL = {"min_size": 1, "multiple": 1}
RULE = {"rule": Count(8), **SMALL}


def inputs(count, size, seed=0):
    """Rows whose entries differ in scale: what is large in the weights is not so in outputs."""
    draw = np.random.default_rng(seed)
    scales = 10.0 ** draw.uniform(-2, 0.5, size)
    turn = np.linalg.qr(draw.normal(size=(size, size)))[0]
    return (draw.normal(size=(count, size)) * scales @ turn + 0.1).astype(np.float32)


def moments_of(x, path="kernel", **options):
    return Moments({path: sums_of_rows(jnp.asarray(x)[None])}, {}, ((path, path),), **options)


def kernel(shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def best(x, w, rank):
    """The nearest matrix in outputs, by a generalized definition: P from an SVD of all outputs."""
    _, _, vt = scipy.linalg.svd(x.astype(np.float64) @ w, full_matrices=False)
    return w @ vt[:rank].T @ vt[:rank]


# More outputs than inputs, fewer, and fewer rows than inputs: singular moments.
SIZES = [(300, 60, 80), (300, 80, 60), (20, 60, 80), (20, 80, 60)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("size", SIZES)
def test_the_cut_is_the_nearest_in_outputs(size, compiled):
    count, m, n = size
    x, w = inputs(count, m), kernel((m, n))
    moments = moments_of(x, shrinkage=0.0)
    plan = rmtjax.plan({"kernel": w}, moments=moments, **RULE)
    cut = lambda params: rmtjax.factorize(params, plan, moments=moments)
    left, right = (jax.jit(cut) if compiled else cut)({"kernel": w})["kernel"]
    assert (left.shape, right.shape) == ((m, 8), (8, n))
    outputs, expected = x @ (left @ right), x @ best(x, w, 8)
    # In float32, relative to all outputs. The gap to the next direction is not small.
    assert np.linalg.norm(outputs - expected) < 2e-4 * np.linalg.norm(x @ w)
    lower = rmtjax.truncate({"kernel": w}, plan, moments=moments)["kernel"]
    np.testing.assert_allclose(x @ lower, outputs, atol=1e-4 * np.abs(outputs).max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shrinkage", [0.0, 0.1, "ledoit_wolf"])
def test_the_plan_says_what_each_rank_loses(size, shrinkage):
    count, m, n = size
    x, w = inputs(count, m), kernel((m, n))
    moments = moments_of(x, shrinkage=shrinkage)
    (row,) = rmtjax.plan({"kernel": w}, moments=moments, **RULE).values()
    full = min(m, n)
    assert row.loss.outputs.shape == row.loss.squares.shape == (full + 1,)
    for rank in (1, 8, 40):
        plan = rmtjax.plan({"kernel": w}, moments=moments, **RULE | {"rule": Count(rank)})
        lower = rmtjax.truncate({"kernel": w}, plan, moments=moments)["kernel"]
        moved = x.astype(np.float64) @ (w - np.asarray(lower, np.float64))
        # The largest outputs are rounded in float32, and the smallest directions with them.
        floor = 1e-6 * row.loss.outputs[0]
        said = row.loss.outputs[rank]
        np.testing.assert_allclose(np.sum(moved**2) / count, said, rtol=1e-3, atol=floor)
        lost = np.sum((w - np.asarray(lower, np.float64)) ** 2)
        np.testing.assert_allclose(row.loss.squares[rank], lost, rtol=1e-3)
    np.testing.assert_allclose(row.loss.outputs[0], np.sum((x @ w) ** 2) / count, rtol=1e-4)
    assert row.loss.outputs[-1] <= 1e-6 * row.loss.outputs[0]


def test_a_kernel_of_zeros_loses_nothing():
    params = {"kernel": np.zeros((12, 8), np.float32)}
    plan = rmtjax.plan(params, rule=ranks.fixed(2), moments=moments_of(inputs(30, 12)), **SMALL)
    (row,) = rmtjax.Report(plan).rows
    assert row.removed in (0, None)
    assert row.removed_outputs in (0, None)


def test_white_inputs_cut_by_the_weights():
    w = kernel((60, 80))
    white = moments_of(np.linalg.qr(inputs(200, 60))[0], shrinkage=0.0)
    plans = [rmtjax.plan({"kernel": w}, moments=m, **RULE) for m in (None, white)]
    expected = rmtjax.truncate({"kernel": w}, plans[0])["kernel"]
    lower = rmtjax.truncate({"kernel": w}, plans[1], moments=white)["kernel"]
    np.testing.assert_allclose(lower, expected, atol=1e-4)  # float32, entries of about 1
    (by_weights,), (by_output,) = (rmtjax.Report(plan).rows for plan in plans)
    assert by_weights.removed_outputs is None
    assert by_output.removed_outputs == pytest.approx(by_output.removed, rel=1e-4)
    assert by_output.removed == pytest.approx(by_weights.removed, rel=1e-4)
    assert by_output.reason == "factorized: rank 8 of 60 by output, as asked by the rule"


def test_large_outputs_are_kept_where_the_weights_alone_would_drop_them():
    x, w = inputs(500, 60), kernel((60, 60))
    moments = moments_of(x)
    y = x @ w
    error = lambda lower: np.linalg.norm(x @ np.asarray(lower) - y) / np.linalg.norm(y)
    cut = lambda m: rmtjax.truncate(
        {"kernel": w}, rmtjax.plan({"kernel": w}, moments=m, **RULE), moments=m
    )["kernel"]
    assert error(cut(moments)) < 0.7 * error(cut(None))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_factors_are_cut_again_without_their_product(compiled):
    x, left, right = inputs(300, 60), kernel((60, 20)), kernel((20, 80), 2)
    params, moments = {"kernel": Factors(left, right)}, moments_of(x, shrinkage=0.0)
    plan = rmtjax.plan(params, moments=moments, **RULE)
    assert plan["kernel"].loss.outputs.shape == (21,)
    cut = lambda params: rmtjax.factorize(params, plan, moments=moments)
    thin = (jax.jit(cut) if compiled else cut)(params)["kernel"]
    assert thin.left.shape == (60, 8)
    expected = x @ best(x, left @ right, 8)
    assert np.linalg.norm(x @ (thin.left @ thin.right) - expected) < 2e-4 * np.linalg.norm(expected)
    padded = rmtjax.truncate(params, plan, moments=moments)["kernel"]
    assert padded.left.shape == (60, 20)
    np.testing.assert_allclose(padded.left @ padded.right, thin.left @ thin.right, atol=1e-3)


def test_the_members_of_a_stack_have_their_moments_or_share_one():
    w, axes = kernel((3, 60, 80)), {"kernel": KernelAxes((1,), (2,), (0,))}
    x = np.stack([inputs(200, 60, seed) for seed in range(3)])
    options = {"axes": axes, **RULE}
    each = Moments(
        {"kernel": sums_of_rows(jnp.asarray(x))}, {}, (("kernel", "kernel"),), shrinkage=0.0
    )
    one = moments_of(x[0], shrinkage=0.0)
    for moments, rows in ((each, x), (one, np.stack([x[0]] * 3))):
        plan = rmtjax.plan({"kernel": w}, moments=moments, **options)
        assert plan["kernel"].loss.outputs.shape == (3, 61)
        lower = rmtjax.truncate({"kernel": w}, plan, moments=moments)["kernel"]
        for place in range(3):
            expected = rows[place] @ best(rows[place], w[place], 8)
            scale = np.linalg.norm(rows[place] @ w[place])
            assert np.linalg.norm(rows[place] @ lower[place] - expected) < 2e-4 * scale
    two = Moments({"kernel": sums_of_rows(jnp.asarray(x[:2]))}, {}, (("kernel", "kernel"),))
    with pytest.raises(ValueError, match=r"one moment for each matrix of 'kernel', 3, or one"):
        rmtjax.plan({"kernel": w}, moments=two, **options)


def weighted_best(x, w, weights, rank):
    """The nearest matrix in weighted outputs, by the definition: with inverses."""
    c = x.astype(np.float64).T @ x / len(x)
    left, right = scipy.linalg.sqrtm(c), scipy.linalg.sqrtm(weights)
    u, s, vt = scipy.linalg.svd(left @ w @ right, full_matrices=False)
    cut = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return np.linalg.solve(left, cut) @ np.linalg.inv(right)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("size", [(300, 60, 80), (300, 80, 60)])
def test_outputs_are_weighed_by_the_gradients(size, compiled):
    count, m, n = size
    x, w, gradients = inputs(count, m), kernel((m, n)), inputs(400, n, seed=7)
    names = (("kernel", "kernel"),)
    sums = {
        name: {"kernel": sums_of_rows(jnp.asarray(a)[None])}
        for name, a in (("x", x), ("g", gradients))
    }
    moments = Moments(sums["x"], sums["g"], names, shrinkage=0.0)
    weights = moments.second("kernel").weights[0]
    # At least a twentieth of the mean, so that it has an inverse.
    assert np.linalg.eigvalsh(weights).min() >= 0.049 * np.trace(weights) / n
    plan = rmtjax.plan({"kernel": w}, moments=moments, **RULE)
    cut = lambda params: rmtjax.factorize(params, plan, moments=moments)
    left, right = (
        np.asarray(a, np.float64)
        for a in (jax.jit(cut) if compiled else cut)({"kernel": w})["kernel"]
    )
    error = lambda lower: np.einsum("ni,ij,nj->", x @ (w - lower), weights, x @ (w - lower)) / count
    least = error(weighted_best(x, w, weights, 8))
    assert error(left @ right) == pytest.approx(least, rel=1e-3)  # float32
    loss = plan["kernel"].loss
    np.testing.assert_allclose(loss.weighted[8], least, rtol=1e-4)
    np.testing.assert_allclose(
        loss.outputs[8], np.sum((x @ (w - left @ right)) ** 2) / count, rtol=1e-3
    )
    np.testing.assert_allclose(loss.squares[8], np.sum((w - left @ right) ** 2), rtol=1e-3)
    # Weights change what counts, so that outputs alone would be cut elsewhere.
    assert error(best(x, w, 8)) > 1.05 * least


def test_kernels_without_moments_are_cut_by_their_weights():
    params = {"a": {"kernel": kernel((60, 80))}, "b": {"kernel": kernel((60, 80), 2)}}
    moments = moments_of(inputs(200, 60), "a/kernel")
    plan = rmtjax.plan(params, moments=moments, **RULE)
    assert plan["b/kernel"].reason.endswith("as asked by the rule (no moments: by weights)")
    lower = rmtjax.truncate(params, plan, moments=moments)
    alone = rmtjax.truncate(params["b"], rmtjax.plan(params["b"], **RULE))
    np.testing.assert_array_equal(lower["b"]["kernel"], alone["kernel"])


@pytest.mark.parametrize(
    ("moments", "words"),
    [
        (lambda: moments_of(inputs(9, 50)), r"of another model: it has 50 inputs for 'kernel'"),
        (lambda: moments_of(inputs(9, 60), "other"), r"`moments` has 'other', which is no path"),
        (lambda: moments_of(inputs(9, 60) * np.nan), r"`moments` is not finite for 'kernel'"),
        (lambda: inputs(9, 60), "moments"),
    ],
)
def test_wrong_moments_are_refused(moments, words):
    with pytest.raises((ValueError, TypeError), match=words):
        rmtjax.plan({"kernel": kernel((60, 80))}, moments=moments(), **RULE)


def test_a_plan_by_output_is_not_applied_without_its_moments():
    params, moments = {"kernel": kernel((60, 80))}, moments_of(inputs(200, 60))
    plan = rmtjax.plan(params, moments=moments, **RULE)
    with pytest.raises(
        ValueError, match="`moments` must have 'kernel', which the plan cuts by out"
    ):
        rmtjax.factorize(params, plan)
    with pytest.raises(TypeError, match="moments"):
        rmtjax.truncate(params, plan, moments={})


def test_values_are_not_shrunk_with_moments():
    with pytest.raises(ValueError, match="`shrink` must be None with `moments`"):
        rmtjax.plan(
            {"kernel": kernel((60, 80))},
            moments=moments_of(inputs(9, 60)),
            shrink=rmtjax.shrinkage.frobenius,
        )


def test_noise_is_looked_for_in_the_weights():
    w = np.random.default_rng(0).normal(size=(80, 120)).astype(np.float32)
    w[:, :2] += 6
    for moments in (None, moments_of(inputs(300, 80))):
        row = rmtjax.plan({"kernel": w}, moments=moments, rule=ranks.bema())["kernel"]
        assert row.fit.num_spikes == 1
        assert row.rank == 8


@pytest.mark.parametrize("centred", [False, True])
def test_a_kernel_that_is_multiplied_turned_is_cut_as_its_transpose(centred):
    x, w = inputs(300, 60), kernel((60, 80))
    bias = {"bias": np.ones(80, np.float32)}
    straight, turned = KernelAxes((0,), (1,)), KernelAxes((1,), (0,))
    found = []
    for tree, axes in (({"kernel": w, **bias}, straight), ({"kernel": w.T, **bias}, turned)):
        moments = moments_of(x, centred=centred, axes=(("kernel", axes),))
        plan = rmtjax.plan(tree, moments=moments, **RULE)
        thin = rmtjax.factorize(tree, plan, moments=moments)
        assert plan["kernel"].action == "factorize"
        lower = rmtjax.truncate(tree, plan, moments=moments)
        rough = rmtjax.factorize(tree, rmtjax.plan(tree, **RULE))
        again = rmtjax.refit(tree, rough, moments)
        back = lambda one, axes=axes: np.transpose(one["kernel"], axes.order)
        trees = [rmtjax.merge(one) for one in (thin, lower, again)]
        changes = [
            float(rmtjax.certificate.output_changes(tree, one, moments)["kernel"].change)
            for one in trees
        ]
        found.append(([back(one) for one in trees], [one["bias"] for one in trees], changes))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        # Float32 in another order of sums, over entries of about 1.
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
