"""Kernels that are factorized already: cut again, against NumPy on their dense product."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import rmtjax
from rmtjax import BulkFit, Factors, ranks
from rmtjax._axes import factored_axes, kernel_shape, to_stack
from rmtjax.spectra._factors import multiply, svd

RANK, LOWER = 6, 3
# Shapes of both factors without the rank: input axes, output axes, batch axes.
KINDS = {
    "dense": ((24,), (18,), ()),
    "convolution": ((3, 2, 6), (18,), ()),
    "out": ((3, 8), (18,), ()),
    "several in, several out": ((3, 8), (2, 9), ()),
    "stack": ((24,), (18,), (5,)),
    "stack as large as the rank": ((24,), (18,), (RANK,)),
    "stack of convolutions": ((3, 8), (18,), (2,)),
    "stack of several": ((4, 6), (4, 6), (2,)),
    "rank above a side": ((4,), (18,), ()),
}
kinds = pytest.mark.parametrize(("inputs", "outputs", "batch"), KINDS.values(), ids=KINDS.keys())
# Rounding of entries under 4, of both factors and of each of the terms of their product.
ROUNDING = {jnp.float32: 1e-5, jnp.bfloat16: 12 * 2**-8, jnp.float16: 12 * 2**-11}


class Fixed(ranks.fixed):
    """Without a noise level of dense kernels, which is not needed here and compiles for long."""

    def fit(self, spectrum, rank=None):
        return BulkFit(*[jnp.ones_like(spectrum.ratio)] * 4, num_spikes=jnp.asarray(0, jnp.int32))


def make(inputs=(24,), outputs=(18,), batch=(), rank=RANK, dtype=jnp.float32, seed=0):
    """Factors that are not balanced, with directions apart enough to have stable cuts."""
    rng = np.random.default_rng(seed)
    strengths = np.geomspace(3, 0.1, rank)
    left = strengths * rng.normal(size=(*batch, *inputs, rank)) / np.prod(inputs) ** 0.5
    right = rng.normal(size=(*batch, rank, *outputs))
    return Factors(jnp.asarray(left, dtype), jnp.asarray(right, dtype))


def dense(factors):
    """The stack of matrices that factors stand for, in float64."""
    left, right = (np.asarray(a, np.float64) for a in to_stack(factors, factored_axes(factors)))
    return left @ right


def reference(factors, rank=LOWER):
    u, s, vt = np.linalg.svd(dense(factors), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :], s


def make_plan(factors, rule=None, **options):
    rule = rule or ranks.fixed(LOWER)
    return rmtjax.plan({"kernel": factors}, rule=rule, **({"min_size": 1, "multiple": 1} | options))


def row_of(factors, *args, **options):
    return make_plan(factors, *args, **options)["kernel"]


def check_cut(factors, transform, rounding):
    """Both changes against the product, in shape, dtype and value."""
    plan, tree = make_plan(factors), {"kernel": factors}
    expected, s = reference(factors)
    thin = transform(lambda tree: rmtjax.factorize(tree, plan))(tree)["kernel"]
    same = transform(lambda tree: rmtjax.truncate(tree, plan))(tree)["kernel"]
    size = min(RANK, s.shape[-1])
    assert plan["kernel"].reason == f"factorized again: rank 3 of {size}, as asked by the rule"
    assert thin.left.shape == (*factors.left.shape[:-1], LOWER)
    assert kernel_shape(thin) == kernel_shape(factors)
    assert jax.tree.map(jnp.shape, same) == jax.tree.map(jnp.shape, factors)
    for got in (thin, same):
        assert got.left.dtype == got.right.dtype == factors.left.dtype
        np.testing.assert_allclose(dense(got), expected, rtol=0, atol=rounding * s.max())


@kinds
def test_factors_are_cut_as_their_product_is(inputs, outputs, batch):
    check_cut(make(inputs, outputs, batch), lambda f: f, ROUNDING[jnp.float32])


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("batch", [(), (5,)], ids=["one", "stack"])
def test_factors_are_cut_as_their_product_is_under_jit_in_each_dtype(batch, dtype):
    check_cut(make(batch=batch, dtype=dtype), jax.jit, ROUNDING[dtype])


@kinds
def test_factors_that_are_cut_are_balanced(inputs, outputs, batch):
    factors = make(inputs, outputs, batch)
    thin = rmtjax.factorize({"kernel": factors}, make_plan(factors))["kernel"]
    left, right = to_stack(thin, factored_axes(thin))
    _, s = reference(factors)
    expected = s[..., None, :LOWER] * np.eye(LOWER)
    # Float32, sums of up to 36 terms.
    np.testing.assert_allclose(left.mT @ left, expected, rtol=0, atol=1e-5 * s.max())
    np.testing.assert_allclose(right @ right.mT, expected, rtol=0, atol=1e-5 * s.max())


@kinds
def test_the_spectrum_is_that_of_the_product(inputs, outputs, batch):
    factors = make(inputs, outputs, batch)
    row = row_of(factors)
    matrices = dense(factors)
    rows, columns = matrices.shape[-2:]
    _, s = reference(factors)
    assert row.shape == (*batch, *inputs, *outputs) == kernel_shape(factors)
    assert row.spectrum.ratio == np.float32(min(rows, columns) / max(rows, columns))
    got = row.spectrum.eigenvalues.reshape(s.shape)  # all of them, with the zeros
    expected = s**2 / max(rows, columns)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * expected.max())  # float32
    np.testing.assert_array_equal(got[..., RANK:], 0)


def sizes(jaxpr):
    """Sizes of all that a computation holds on its way."""
    is_jaxpr = lambda value: hasattr(value, "eqns")
    for equation in jaxpr.eqns:
        yield from (int(np.prod(out.aval.shape)) for out in equation.outvars)
        for inner in filter(is_jaxpr, jax.tree.leaves(equation.params, is_leaf=is_jaxpr)):
            yield from sizes(inner)


def test_the_product_is_never_formed():
    factors = make((300,), (200,))
    largest = lambda matrix: max(sizes(jax.make_jaxpr(svd)(matrix)))
    assert largest(factors) <= 300 * RANK
    assert largest(multiply(factors)) >= 300 * 200


@pytest.mark.parametrize(
    "batch", [(), pytest.param((3,), marks=pytest.mark.slow)], ids=["one", "stack"]
)
@given(
    count=st.sampled_from([1, 4, 9]),
    keep=st.floats(0, 1),
    min_rank=st.integers(1, 20),
    multiple=st.integers(1, 20),
)
def test_the_rank_never_rises(batch, count, keep, min_rank, multiple):
    factors = make(batch=batch)
    options = {"keep": keep, "min_rank": min_rank, "multiple": multiple}
    plan = make_plan(factors, ranks.fixed(count), **options)
    row = plan["kernel"]
    assert min(max(count, min_rank), RANK) <= row.rank <= RANK
    assert (row.action == "keep") == (row.rank == RANK)
    assert rmtjax.factorize({"kernel": factors}, plan)["kernel"].left.shape[-1] == row.rank


def test_factors_that_would_be_no_smaller_are_left_alone():
    factors = make()
    plan = make_plan(factors, ranks.fixed(4), multiple=8)
    assert plan["kernel"].reason == "kept: full rank (rank 6 of 6, where the rule asks for 4)"
    for change in (rmtjax.factorize, rmtjax.truncate):
        assert change({"kernel": factors}, plan)["kernel"] is factors


def test_zeros_are_no_directions_that_could_be_kept():
    # Published code counted those of a truncated matrix among the values under the threshold
    # (and fitted the noise to them: here nothing is fitted).
    factors = make((80,), (60,))
    rule = ranks.fixed(2)
    assert row_of(factors, rule, keep=0.5).rank == 2 + (RANK - 2) // 2
    assert np.isnan(row_of(factors, rule).fit.variance)
    # Cut in place first: two of the six directions are zeros now.
    lower = rmtjax.truncate({"kernel": factors}, make_plan(factors, ranks.fixed(4)))["kernel"]
    assert lower.left.shape[-1] == RANK
    assert row_of(lower, rule, keep=0.5).rank == 2 + (4 - 2) // 2
    assert row_of(lower, ranks.energy(1.0)).rank == 4
    assert row_of(lower, ranks.fixed(5)).rank == 4


@pytest.mark.parametrize(
    "rule", [ranks.bema(), pytest.param(ranks.gavish_donoho(), marks=pytest.mark.slow)], ids=str
)
def test_rules_of_noise_need_the_noise_level_of_the_training(rule):
    rng = np.random.default_rng(3)
    u, v = (np.linalg.qr(rng.normal(size=(n, 4)))[0] for n in (60, 80))
    strengths = np.array([5, 4, 3, 2.5]) * 80**0.5  # the edge is at 1.9, the thresholds above
    kernel = jnp.asarray(rng.normal(size=(60, 80)) + u * strengths @ v.T, jnp.float32)
    optimizer = optax.chain(
        optax.sgd(0.0), rmtjax.prune_spectrum(1, rule=rule, keep=0.1, max_removed=1.0)
    )
    params = {"kernel": kernel}
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    params, fits = optax.apply_updates(params, updates), rmtjax.noise_levels(state)
    first = rmtjax.plan(params, rule=rule, fits=fits, keep=0.1, multiple=1)
    thin = rmtjax.factorize(params, first)
    assert thin["kernel"].left.shape == (60, 4 + 5)
    again = rmtjax.plan(thin, rule=rule, fits=fits, multiple=1)
    assert again["kernel"].reason == "factorized again: 4 of 9 are signal, rank 4"
    assert again["kernel"].fit.num_spikes == 4
    assert again["kernel"].fit.variance == fits["kernel"].variance
    unknown = {"kernel": fits["kernel"]._replace(threshold=jnp.asarray(jnp.nan))}
    for given_fits in (None, {}, unknown):
        plan = rmtjax.plan(thin, rule=rule, fits=given_fits)
        assert plan["kernel"].reason == "kept: factorized, and `fits` has no noise level for it"
        assert rmtjax.factorize(thin, plan)["kernel"] is thin["kernel"]
    two = jax.tree.map(lambda a: jnp.stack([a, a]), fits["kernel"])
    with pytest.raises(ValueError, match="`fits` must have an entry for each matrix of 'kernel'"):
        rmtjax.plan(thin, rule=rule, fits={"kernel": two})


def test_a_network_keeps_its_biases():
    # Published code lost the bias of a layer that it split again.
    model = nn.Sequential([nn.Dense(40), nn.tanh, nn.Dense(3)])
    inputs = jax.random.normal(jax.random.key(0), (7, 40))
    params = jax.jit(model.init)(jax.random.key(1), inputs)["params"]
    params["layers_0"]["bias"] += 1.0
    options = {"multiple": 1, "min_size": 20}
    first = rmtjax.factorize(params, rmtjax.plan(params, rule=Fixed(9), **options))
    plan = rmtjax.plan(first, rule=Fixed(4), **options)
    again, lower = rmtjax.factorize(first, plan), rmtjax.truncate(first, plan)
    assert first["layers_0"]["kernel"].left.shape == (40, 9)
    assert again["layers_0"]["kernel"].left.shape == (40, 4)
    run = jax.jit(lambda tree: rmtjax.linen.apply(model, {"params": tree}, inputs))
    expected = run(rmtjax.truncate(params, rmtjax.plan(params, rule=Fixed(4), **options)))
    for tree in (again, lower):
        assert tree["layers_0"]["bias"] is params["layers_0"]["bias"]
        assert tree["layers_2"]["kernel"] is params["layers_2"]["kernel"]
        np.testing.assert_allclose(run(tree), expected, rtol=0, atol=1e-5)  # layers of order 1


def test_factors_are_not_made_to_look_like_those_of_a_stack():
    factors = make((LOWER, 8), (LOWER, 9))
    plan = make_plan(factors)
    assert plan["kernel"].reason == (
        "truncated: factors would look like those of a stack (rank 3 of 6, as asked by the rule)"
    )
    lower = rmtjax.factorize({"kernel": factors}, plan)["kernel"]
    assert lower.left.shape == factors.left.shape
    expected, s = reference(factors)
    np.testing.assert_allclose(dense(lower), expected, rtol=0, atol=1e-5 * s.max())  # float32


def test_a_plan_has_the_noise_levels_that_the_next_one_needs():
    noise = np.random.default_rng(0).normal(size=(100, 120)).astype(np.float32)
    params = {"kernel": noise + 2, "bias": noise[0], "scale": {"kernel": noise[:9]}}
    first = rmtjax.plan(params, multiple=1, keep=0.1)
    assert first.fits.keys() == {"kernel"}
    thin = rmtjax.factorize(params, first)
    assert rmtjax.plan(thin, fits=first.fits, multiple=1)["kernel"].rank == 1
    assert rmtjax.plan(thin)["kernel"].action == "keep"
    with pytest.raises(TypeError, match="fits"):
        rmtjax.plan(thin, fits=first)


@pytest.mark.parametrize("function", [rmtjax.plan, rmtjax.analyze])
def test_a_matrix_is_no_tree(function):
    with pytest.raises(TypeError, match="`params` must be a tree of parameters, got an array"):
        function(jnp.ones((60, 60)))


def test_a_stack_of_which_one_level_is_unknown_is_fitted_anew():
    kernel = np.random.default_rng(0).standard_normal((2, 64, 60)).astype(np.float32)
    kernel[:, :, 0] += 3
    options = {"axes": {"kernel": rmtjax.KernelAxes((1,), (2,), (0,))}, "multiple": 1}
    anew = rmtjax.plan({"kernel": kernel}, **options)["kernel"]
    # As a state tells that there is no level.
    threshold, distance = anew.fit.threshold * np.float32([1, 0]), np.float32([0.1, 1])
    half = anew.fit._replace(threshold=threshold, distance=distance)
    assert rmtjax.plan({"kernel": kernel}, fits={"kernel": half}, **options)["kernel"].rank == 1
    assert anew.rank == 1
