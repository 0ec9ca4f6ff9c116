"""Shrinkage against its losses, minimised numerically, and against planted signals."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.test_util import check_grads
from scipy import optimize

import rmtjax
from rmtjax import KernelAxes, ranks, shrinkage

SHRINKERS = [shrinkage.frobenius, shrinkage.operator, shrinkage.nuclear]
every = pytest.mark.parametrize("shrink", SHRINKERS, ids=lambda f: f.__name__)
RATIOS = [0.05, 0.3, 0.784, 1.0]
TRANSFORMS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: jax.vmap(f, (0, None)),
}


def observed(strength, ratio):
    """Where the singular value of a spike lies in the limit (Benaych-Georges, Nadakuditi)."""
    return np.sqrt((strength + 1 / strength) * (strength + ratio / strength))


def cosines(strength, ratio):
    """Of the angles between the singular vectors of a spike and those observed."""
    power = strength**4 - ratio
    left = np.sqrt(power / (strength**4 + ratio * strength**2))
    return left, np.sqrt(power / (strength**4 + strength**2))


def error(value, strength, ratio):
    """Singular values of what is left of a spike of which `value` has been subtracted."""
    c, d = cosines(strength, ratio)
    s, t = np.sqrt(1 - c**2), np.sqrt(1 - d**2)
    block = [[strength - value * c * d, -value * c * t], [-value * s * d, -value * s * t]]
    return np.linalg.svd(block, compute_uv=False)


def best(loss, strength, ratio):
    """The value of least loss, by golden sections."""
    value = lambda value: loss(error(value, strength, ratio))
    bounds = (0, 2 * observed(strength, ratio))
    return optimize.minimize_scalar(value, bounds=bounds, method="bounded", options={"xatol": 1e-9})


STRENGTHS = np.array([1.05, 1.3, 2.0, 5.0])  # in units of the weakest that can be seen


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_each_minimises_its_loss(ratio, transform):
    strengths = STRENGTHS * ratio**0.25
    losses = {
        shrinkage.frobenius: lambda s: np.sum(s**2),
        shrinkage.nuclear: np.sum,
        # Of least operator norm for square matrices only: Leeb's factor for the others.
        shrinkage.operator: np.max,
    }
    with jax.enable_x64(True):
        for shrink, loss in losses.items():
            got = transform(shrink)(jnp.asarray(observed(strengths, ratio)), ratio)
            if shrink is shrinkage.operator:
                got *= np.sqrt((ratio + strengths**2) / (1 + strengths**2))
            expected = [best(loss, strength, ratio).x for strength in strengths]
            # A minimum is found to the root of the rounding.
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@given(ratio=st.floats(1e-3, 1), strength=st.floats(1.001, 1e3))
def test_operator_finds_the_strength(ratio, strength):
    with jax.enable_x64(True):
        strength *= ratio**0.25
        got = shrinkage.operator(observed(strength, ratio), ratio)
        # Near the edge, where the observed value is flat in the strength, digits are lost.
        np.testing.assert_allclose(got, strength, rtol=1e-10)


@pytest.mark.parametrize(
    ("y", "ratio", "values"),
    [  # by hand: strengths 2, 2 and 3 / 2
        (2.5, 1.0, (3 / 2, 2, 1)),
        (np.sqrt(2.5 * 2.125), 0.25, (63 / 16 / np.sqrt(5.3125), 2, 63 / 16 / 5.3125**0.5 - 1 / 4)),
        (13 / 6, 1.0, (5 / 6, 3 / 2, 1 / 6)),
        (2.0, 1.0, (0, 0, 0)),
        (1.4, 0.25, (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_golden_values(y, ratio, values, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        for shrink, value in zip(SHRINKERS, values, strict=True):
            got = shrink(jnp.asarray(y, dtype), jnp.asarray(ratio, dtype))
            assert got.dtype == jnp.promote_types(dtype, jnp.float32)
            # Roundoff of y, of which the slope is under 3 here.
            atol = 4 * float(jnp.finfo(dtype).eps) * y
            np.testing.assert_allclose(np.asarray(got, np.float64), value, rtol=0, atol=atol)


@every
@pytest.mark.parametrize("ratio", RATIOS)
def test_noise_becomes_zero_and_gradients_are_finite(shrink, ratio):
    edge = np.float32(rmtjax.marchenko_pastur.support(ratio)[1]) ** 0.5
    beyond = np.nextafter(edge, np.float32(3), dtype=np.float32)
    inside = jnp.asarray([0, 0.5, 1, edge])
    np.testing.assert_array_equal(shrink(inside, ratio), 0)
    y = jnp.concatenate([inside, jnp.asarray([beyond, 2.5, 1e3, 1e15])])
    slope = jax.vmap(jax.grad(shrink, (0, 1)), (0, None))(y, jnp.float32(ratio))
    assert all(jnp.isfinite(each).all() for each in slope)
    assert jnp.isnan(shrink(jnp.nan, ratio))
    np.testing.assert_allclose(shrink(1e15, ratio), 1e15, rtol=1e-6)  # float32
    with jax.enable_x64(True):
        check_grads(shrink, (jnp.asarray(2.3), jnp.asarray(ratio * 0.9)), 2, rtol=1e-5)


@every
def test_a_ratio_out_of_range_is_an_error(shrink):
    for ratio in (0, -0.5, 1.5):
        with pytest.raises(ValueError, match=r"`ratio` must be in \(0, 1\]"):
            shrink(2.0, ratio)
    assert jnp.isnan(shrink(2.0, jnp.asarray(1.5)))


@every
def test_arguments_broadcast(shrink):
    y, ratio = np.linspace(0, 4, 5)[:, None], np.array([0.2, 0.9])
    each = [[shrink(a, b) for b in ratio.tolist()] for a in y[:, 0].tolist()]
    np.testing.assert_allclose(shrink(y, ratio), each, rtol=1e-6)  # float32


def planted(strengths, shape=(200, 400), seed=0):
    """Signal of the given strengths, and the same with unit noise."""
    rng = np.random.default_rng(seed)
    count = len(strengths)
    u, v = (np.linalg.qr(rng.normal(size=(n, count)))[0] for n in shape)
    signal = u * np.asarray(strengths) * max(shape) ** 0.5 @ v.T
    return signal, signal + rng.normal(size=shape)


def test_shrinkage_has_less_error_than_truncation():
    strengths, ratio = np.array([0.95, 1.2, 2.0]), 0.5  # the weakest that can be seen is 0.84
    variance, edge = 1.0, 2.92  # the noise as it is
    fit = rmtjax.BulkFit(*jnp.asarray([variance, edge, edge, 0]), num_spikes=jnp.asarray(3))
    options = {"rule": ranks.fixed(3), "fits": {"kernel": fit}, "multiple": 1}

    def errors(shrink):
        for signal, noisy in (planted(strengths, seed=seed) for seed in range(8)):
            params = {"kernel": jnp.asarray(noisy, jnp.float32)}
            plan = rmtjax.plan(params, shrink=shrink, **options)
            yield np.sum((rmtjax.truncate(params, plan)["kernel"] - signal) ** 2) / 400

    squared = lambda s: np.sum(s**2)
    truncated, shrunken = list(errors(None)), list(errors(shrinkage.frobenius))
    assert all(np.less(shrunken, truncated))
    # Their limits; eight draws have a standard error of 1 to 1.5 %.
    limit = sum(squared(error(observed(x, ratio), x, ratio)) for x in strengths)
    np.testing.assert_allclose(np.mean(truncated), limit, rtol=0.05)
    limit = sum(best(squared, x, ratio).fun for x in strengths)
    np.testing.assert_allclose(np.mean(shrunken), limit, rtol=0.05)


# What a plan makes of it.


STACK = KernelAxes((1,), (2,), (0,))


def reference(matrix, variance, rank, formula):
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    scale, ratio = np.sqrt(max(matrix.shape) * variance), min(matrix.shape) / max(matrix.shape)
    s = scale * np.asarray([formula(y, ratio) for y in s / scale])
    return (u[:, :rank] * s[:rank]) @ vt[:rank], s


def textbook(y, ratio):
    gap = max((y**2 - ratio - 1) ** 2 - 4 * ratio, 0)
    return np.sqrt(gap) / y if y > 1 + np.sqrt(ratio) else 0.0


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_plan_shrinks_what_it_keeps(transform):
    # Two matrices, of noise levels of their own; the second has fewer spikes.
    scales = np.array([1.0, 0.3])
    counts = [planted([3, 2, 1.5], (60, 80), 3)[1], planted([2.5], (60, 80), 4)[1]]
    params = {"kernel": jnp.asarray(scales[:, None, None] * counts, jnp.float32)}
    options = {"rule": ranks.bema(level=0.1), "axes": lambda path, leaf: STACK}
    plan = rmtjax.plan(params, shrink=shrinkage.frobenius, **options)
    row = plan["kernel"]
    assert row.reason == "factorized: 3 of 60 are signal, rank 8, shrunk"
    assert row.shrink is shrinkage.frobenius
    thin = transform(lambda tree: rmtjax.factorize(tree, plan))(params)
    lower = transform(lambda tree: rmtjax.truncate(tree, plan))(params)["kernel"]
    assert thin["kernel"].left.shape == (2, 60, 8)
    merged = rmtjax.merge(thin)["kernel"]
    for i, num_spikes in enumerate([3, 1]):
        expected, s = reference(params["kernel"][i], row.fit.variance[i], 8, textbook)
        # What the multiple of 8 keeps below the edge has a shape and no effect.
        assert np.sum(s > 0) == num_spikes
        for got in (merged[i], lower[i]):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * s[0])  # float32
    # The factors can be shrunk as well, once they are factors.
    fits = {"kernel": jax.tree.map(jnp.asarray, row.fit)}
    exact = rmtjax.factorize(params, rmtjax.plan(params, **options))
    again = rmtjax.plan(exact, shrink=shrinkage.frobenius, fits=fits, **options)
    assert again["kernel"].reason == "factorized again: 3 of 8 are signal, rank 8, shrunk"
    np.testing.assert_allclose(
        rmtjax.merge(rmtjax.factorize(exact, again))["kernel"], merged, rtol=0, atol=1e-4
    )


def row_of(kernel, **options):
    return rmtjax.plan({"kernel": kernel}, shrink=shrinkage.frobenius, **options)["kernel"]


def test_without_a_noise_level_nothing_is_shrunk():
    _, noisy = planted([3, 2], (60, 80), 3)
    noisy = noisy.astype(np.float32)
    fixed = ranks.fixed(2)
    assert (
        row_of(noisy, rule=fixed).reason
        == "factorized: rank 8 of 60, where the rule asks for 2, shrunk"
    )
    lower = rmtjax.truncate_matrix(noisy, 20)
    assert row_of(lower, rule=fixed).reason == "kept: no noise level to shrink by"
    thin = rmtjax.factorize_matrix(noisy, 20)
    assert row_of(thin, rule=fixed).reason == "kept: no noise level to shrink by"
    assert row_of(thin, rule=fixed).shrink is None
    noise = planted([0], (60, 80), 3)[1].astype(np.float32)
    assert row_of(noise, rule=fixed).reason == "kept: shrinkage would leave nothing"
    # All directions are kept, and shrunk in their place.
    row = row_of(noisy, rule=fixed, multiple=60)
    words = "rank 60 of 60, where the rule asks for 2, shrunk"
    assert row.reason == f"truncated: no saving from factors ({words})"


def test_options_that_contradict_one_another_are_refused():
    plan = inspect.unwrap(rmtjax.plan)
    with pytest.raises(ValueError, match=r"`keep` must be 0 with `shrink`, got 0\.5"):
        plan({}, shrink=shrinkage.frobenius, keep=0.5)
    # The check of types that the suite adds may come first.
    with pytest.raises(TypeError, match=r"shrink.*'frobenius'"):
        plan({}, shrink="frobenius")
