"""Truncating, factorizing and merging trees, against NumPy in float64."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import BulkFit, Factors, KernelAxes, ranks

RANK = 4
MATRIX = KernelAxes((0,), (1,))
# Shape and axes of the kernel of each kind of layer, and of some that no layer has.
KINDS = {
    "dense": ((24, 18), MATRIX),
    "dense, wide": ((18, 24), MATRIX),
    "convolution": ((3, 2, 6, 18), KernelAxes((0, 1, 2), (3,))),
    "query": ((18, 3, 8), KernelAxes((0,), (1, 2))),
    "out": ((3, 8, 18), KernelAxes((0, 1), (2,))),
    "several in, several out": ((3, 8, 2, 9), KernelAxes((0, 1), (2, 3))),
    "stack": ((5, 24, 18), KernelAxes((1,), (2,), (0,))),
    "stack of one": ((1, 24, 18), KernelAxes((1,), (2,), (0,))),
    "stack as large as the rank": ((RANK, 24, 18), KernelAxes((1,), (2,), (0,))),
    "stack of convolutions": ((2, 3, 8, 18), KernelAxes((1, 2), (3,), (0,))),
    "stack of outs": ((5, 3, 8, 18), KernelAxes((1, 2), (3,), (0,))),
    "stack of queries": ((5, 18, 3, 8), KernelAxes((1,), (2, 3), (0,))),
    "stack of several": ((2, 4, 6, 4, 6), KernelAxes((1, 2), (3, 4), (0,))),
    "stack on the second axis": ((24, 5, 18), KernelAxes((0,), (2,), (1,))),
    "stack on two axes": ((2, 3, 24, 18), KernelAxes((2,), (3,), (0, 1))),
    "outputs first": ((18, 24), KernelAxes((1,), (0,))),
    "inputs turned": ((8, 3, 18), KernelAxes((1, 0), (2,))),
    "ambiguous": ((RANK, 6, RANK, 6), KernelAxes((0, 1), (2, 3))),
}
kinds = pytest.mark.parametrize(("shape", "axes"), KINDS.values(), ids=KINDS.keys())
# Float32 singular vectors of entries of order 1: four times the worst seen, 2.6e-6.
CLOSE = {"rtol": 0, "atol": 1e-5}


class Fixed(ranks.fixed):
    """Without a noise level, which is not needed here and compiles for long."""

    def fit(self, spectrum):
        return BulkFit(*[jnp.ones_like(spectrum.ratio)] * 4, num_spikes=jnp.asarray(0, jnp.int32))


def make_plan(params, axes=None, rank=RANK, **options):
    """A plan of one rank for all kernels."""
    named = axes and (lambda path, leaf: axes)
    options = {"min_size": 1, "multiple": 1, "axes": named} | options
    return rmtjax.plan(params, rule=Fixed(rank), **options)


def reference(kernel, axes, rank=RANK):
    """The truncation in float64, by another route: one matrix after the other."""
    order = (*axes.batch, *axes.inputs, *axes.outputs)
    moved = np.transpose(np.asarray(kernel, np.float64), order)
    rows = int(np.prod([kernel.shape[axis] for axis in axes.inputs]))
    columns = int(np.prod([kernel.shape[axis] for axis in axes.outputs]))
    lower = []
    for matrix in moved.reshape(-1, rows, columns):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        lower.append(u[:, :rank] * s[:rank] @ vt[:rank])
    return np.transpose(np.reshape(lower, moved.shape), np.argsort(order))


def make(shape, axes=MATRIX, seed=0):
    """RANK directions of order 1 and a tenth of noise: the gap makes the truncation stable."""
    signal, noise = np.random.default_rng(seed).normal(size=(2, *shape))
    return (reference(signal, axes) + 0.1 * noise).astype(np.float32)


@kinds
def test_truncate_agrees_with_numpy(shape, axes):
    params = {"kernel": make(shape, axes)}
    lower = rmtjax.truncate(params, make_plan(params, axes))["kernel"]
    np.testing.assert_allclose(lower, reference(params["kernel"], axes), **CLOSE)


@kinds
def test_factorize_then_merge_is_truncate(shape, axes):
    params = {"kernel": make(shape, axes)}
    plan = make_plan(params, axes)
    merged = rmtjax.merge(rmtjax.factorize(params, plan))["kernel"]
    assert merged.shape == shape
    np.testing.assert_allclose(merged, rmtjax.truncate(params, plan)["kernel"], **CLOSE)


@kinds
def test_factors_hold_their_rank_times_both_sides(shape, axes):
    params = {"kernel": make(shape, axes)}
    plan = make_plan(params, axes)
    thin = rmtjax.factorize(params, plan)
    stack, rows, columns = (
        int(np.prod([shape[axis] for axis in group]))
        for group in (axes.batch, axes.inputs, axes.outputs)
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(thin))
    if plan["kernel"].action == "factorize":
        assert size == stack * RANK * (rows + columns) < np.prod(shape)
        left, right = thin["kernel"]
        batch, inputs, outputs = (
            tuple(shape[axis] for axis in group)
            for group in (axes.batch, axes.inputs, axes.outputs)
        )
        assert left.shape == (*batch, *inputs, RANK)
        assert right.shape == (*batch, RANK, *outputs)
    else:
        assert not isinstance(thin["kernel"], Factors)
        assert size == np.prod(shape)


def test_the_usual_kinds_are_factorized():
    unusual = ("second axis", "two axes", "outputs first", "turned", "ambiguous")
    for name, (shape, axes) in KINDS.items():
        row = make_plan({"kernel": make(shape, axes)}, axes)["kernel"]
        kept_dense = any(name.endswith(words) for words in unusual)
        assert row.action == ("truncate" if kept_dense else "factorize"), name


@pytest.mark.parametrize("change", [rmtjax.truncate, rmtjax.factorize])
def test_what_is_kept_stays_the_same_object(change):
    params = {
        "a": {"kernel": make((24, 18)), "bias": np.ones(18)},
        "b": {"kernel": np.ones((24, 3), np.float32), "scale": 1.0},
        "c": {"kernel": np.ones((2, 2)), "steps": np.ones(3, np.int32)},
    }
    changed = change(params, make_plan(params, min_size=10))
    assert changed["a"]["bias"] is params["a"]["bias"]
    assert changed["b"]["kernel"] is params["b"]["kernel"]
    assert changed["b"]["scale"] is params["b"]["scale"]
    assert changed["c"]["kernel"] is params["c"]["kernel"]
    assert changed["c"]["steps"] is params["c"]["steps"]
    assert changed["a"]["kernel"] is not params["a"]["kernel"]


@pytest.mark.parametrize("tree", [dict, flax.core.FrozenDict], ids=["dict", "FrozenDict"])
def test_a_tree_stays_of_its_kind(tree):
    params = tree({"a": tree({"kernel": make((24, 18))})})
    plan = make_plan(params)
    lower, thin = rmtjax.truncate(params, plan), rmtjax.factorize(params, plan)
    assert jax.tree.structure(lower) == jax.tree.structure(params)
    assert type(thin) is type(thin["a"]) is tree
    assert jax.tree.structure(rmtjax.merge(thin)) == jax.tree.structure(params)


@pytest.mark.parametrize("axes", [KINDS["dense"], KINDS["stack"]], ids=["dense", "stack"])
def test_truncate_and_factorize_work_under_jit_with_the_plan_held_fixed(axes):
    shape, axes = axes
    params = {"kernel": jnp.asarray(make(shape, axes)), "bias": jnp.ones(3)}
    plan = make_plan(params, axes)
    for change in (rmtjax.truncate, rmtjax.factorize):
        compiled = jax.jit(lambda params, change=change: change(params, plan))(params)
        eager = change(params, plan)
        assert jax.tree.structure(compiled) == jax.tree.structure(eager)
        products = rmtjax.merge(compiled), rmtjax.merge(eager)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), *products)
        # Single directions have any sign, and two ways of rounding turn them by the rounding unit
        # over the relative gap to the next singular value, here 0.02: 1.1e-5 at the worst.
        close = lambda a, b: np.testing.assert_allclose(abs(a), abs(b), rtol=0, atol=5e-5)
        jax.tree.map(close, compiled, eager)


@pytest.mark.parametrize(
    ("dtype", "eps"), [(jnp.float32, 0.0), (jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)]
)
def test_dtypes_are_preserved(dtype, eps):
    shape, axes = KINDS["dense"]
    params = {"kernel": jnp.asarray(make(shape, axes), dtype)}
    plan = make_plan(params, axes)
    lower, thin = rmtjax.truncate(params, plan), rmtjax.factorize(params, plan)
    expected = reference(np.asarray(params["kernel"], np.float32), axes)
    for leaf in (lower["kernel"], *thin["kernel"], rmtjax.merge(thin)["kernel"]):
        assert leaf.dtype == dtype
    # Entries are under 4: one rounding of them here, and there one of each factor and of each
    # of the RANK terms' sum, of the same order.
    np.testing.assert_allclose(
        np.asarray(lower["kernel"], np.float32), expected, rtol=0, atol=4 * eps + 1e-5
    )
    merged = np.asarray(rmtjax.merge(thin)["kernel"], np.float32)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=12 * eps + 1e-5)


def test_kernels_that_save_nothing_are_truncated_where_they_are():
    params = {"small": {"kernel": make((18, 18))}, "large": {"kernel": make((40, 40))}}
    plan = make_plan(params, rank=12)
    thin = rmtjax.factorize(params, plan)
    assert [row.action for row in plan.values()] == ["factorize", "truncate"]
    expected = rmtjax.truncate(params, plan)["small"]["kernel"]
    np.testing.assert_array_equal(thin["small"]["kernel"], expected)
    assert isinstance(thin["large"]["kernel"], Factors)


def test_a_truncated_tree_is_truncated_to_itself():
    params = {"kernel": make((24, 18))}
    plan = make_plan(params)
    lower = rmtjax.truncate(params, plan)
    again = rmtjax.truncate(lower, plan)["kernel"]
    np.testing.assert_allclose(again, lower["kernel"], **CLOSE)


def test_a_plan_serves_another_tree_of_the_same_shapes():
    params, other = {"kernel": make((24, 18))}, {"kernel": make((24, 18), seed=1)}
    lower = rmtjax.truncate(other, make_plan(params))["kernel"]
    np.testing.assert_allclose(lower, reference(other["kernel"], MATRIX), **CLOSE)


@pytest.mark.parametrize("change", [rmtjax.truncate, rmtjax.factorize])
@pytest.mark.parametrize(
    ("other", "seen"),
    [
        ({}, "is not there"),
        ({"b": {"kernel": make((24, 18))}}, "is not there"),
        ({"a": {"kernel": make((18, 24))}}, r"has shape \(18, 24\)"),
        ({"a": {"kernel": np.ones((4, 24, 18))}}, r"has shape \(4, 24, 18\)"),
        ({"a": {"kernel": 1.0}}, r"has shape \(\)"),
        (
            {"a": {"kernel": Factors(jnp.ones((24, 2)), jnp.ones((2, 18)))}},
            "is factorized with rank 2, and not 4",
        ),
    ],
    ids=["empty", "other path", "other shape", "other rank", "number", "factorized"],
)
def test_a_plan_for_another_tree_is_refused(change, other, seen):
    plan = make_plan({"a": {"kernel": make((24, 18))}})
    words = rf"`plan` is for another tree: it has 'a/kernel' of shape \(24, 18\), which {seen}"
    with pytest.raises(ValueError, match=words):
        change(other, plan)


@pytest.mark.parametrize("change", [rmtjax.truncate, rmtjax.factorize])
def test_a_plan_serves_factors_of_the_same_kernel(change):
    whole = {"kernel": jnp.asarray(make((24, 18)))}
    thin = {"kernel": rmtjax.factorize_matrix(whole["kernel"], 9)}
    for tree, other in ((whole, thin), (thin, whole), (thin, thin)):
        got = rmtjax.merge(change(tree, make_plan(other)))["kernel"]
        np.testing.assert_allclose(got, reference(whole["kernel"], MATRIX), **CLOSE)


@pytest.mark.parametrize("change", [rmtjax.truncate, rmtjax.factorize])
def test_a_plan_for_factors_along_other_axes_is_refused(change):
    thin = lambda left, right: {"kernel": Factors(jnp.ones((*left, 6)), jnp.ones((6, *right)))}
    plan = make_plan(thin((4, 6), (8,)))
    with pytest.raises(
        ValueError, match=r"shape \(4, 6, 8\), which is factorized along other axes"
    ):
        change(thin((4,), (6, 8)), plan)


def test_a_row_that_keeps_asks_nothing_of_the_tree():
    plan = make_plan({"a": {"kernel": np.ones((24, 3), np.float32)}}, min_size=10)
    other = {"b": {"kernel": np.ones((2, 2))}}
    assert rmtjax.truncate(other, plan)["b"]["kernel"] is other["b"]["kernel"]


def test_merge_leaves_a_dense_tree_alone():
    params = {"a": {"kernel": make((24, 18))}, "b": 1.0}
    merged = rmtjax.merge(params)
    assert merged["a"]["kernel"] is params["a"]["kernel"]
    assert merged["b"] is params["b"]


def test_merge_is_differentiable():
    factors = Factors(jnp.asarray(make((24, 4))), jnp.asarray(make((4, 18))))
    weights = make((24, 18))
    loss = lambda factors: jnp.sum(rmtjax.merge({"kernel": factors})["kernel"] * weights)
    left, right = jax.grad(loss)(factors)
    # The chain rule in float64.
    np.testing.assert_allclose(left, weights @ np.asarray(factors.right, np.float64).T, **CLOSE)
    np.testing.assert_allclose(right, np.asarray(factors.left, np.float64).T @ weights, **CLOSE)
