"""What a plan says about entries: thresholds against Gaussian probabilities, and edge weights."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax import KernelAxes, sparsity

EITHER = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
# As users have them: the type checker of the tests would speak first, in its own words.
edge_weights, threshold_mask = map(inspect.unwrap, (sparsity.edge_weights, sparsity.threshold_mask))


def noise(shape, scale=1.0, seed=0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_a_threshold_does_not_depend_on_the_scale(scale):
    kernel = np.asarray(noise((60, 90)).at[:4, :5].add(20.0))
    for params in ({"kernel": kernel}, {"kernel": kernel * np.float32(scale)}):
        mask = threshold_mask(params, rmtjax.plan(params))["kernel"]
        assert int(mask.sum()) == 20


def lawless():
    """Singular values that fall off geometrically: no Marchenko-Pastur law fits them."""
    rng = np.random.default_rng(9)
    left, right = (np.linalg.qr(rng.normal(size=(n, 64)))[0] for n in (64, 96))
    return jnp.asarray(left * np.geomspace(10, 0.01, 64) @ right.T, jnp.float32)


def passing_probability(threshold, size):
    """P(any of `size` unit Gaussians is larger in magnitude), exactly."""
    return -math.expm1(size * math.log1p(-math.erfc(threshold / math.sqrt(2))))


@EITHER
@pytest.mark.parametrize("variance", [0.0, 1e-4, [[0.3, 2.0]]], ids=str)
@pytest.mark.parametrize("delta", [1e-3, 0.05, 0.9])
def test_the_threshold_is_its_formula(wrap, variance, delta):
    threshold = lambda variance: sparsity.entry_threshold(variance, (784, 1000), delta)
    expected = np.sqrt(2 * np.asarray(variance) * np.log(2 * 784 * 1000 / delta))
    actual = wrap(threshold)(jnp.asarray(variance))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)  # a few roundings of float32


@pytest.mark.parametrize("delta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(3, 4), (20, 30)])
def test_noise_passes_as_often_as_gauss_says_and_under_delta(delta, shape):
    draws = 4_000
    matrices = 2.0 * np.random.default_rng(0).normal(size=(draws, *shape))
    threshold = float(sparsity.entry_threshold(4.0, shape, delta))
    rate = np.mean(np.abs(matrices).max(axis=(1, 2)) > threshold)
    exact = passing_probability(threshold / 2, math.prod(shape))
    # Four standard deviations of a share of that many draws.
    assert abs(rate - exact) < 4 * math.sqrt(exact * (1 - exact) / draws)
    assert rate < delta


def test_the_bound_is_as_loose_as_the_docstring_says():
    threshold = float(sparsity.entry_threshold(1.0, (784, 1000), 0.05))
    exact = passing_probability(threshold, 784_000)
    assert exact == pytest.approx(0.4 * 0.05 / threshold, rel=0.04)  # 1 / x^2 of Mills' ratio


@EITHER
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_planted_entries_pass_and_noise_does_not(wrap, dtype):
    threshold = math.sqrt(2 * math.log(2 * 80 * 120 / 0.05))
    planted = np.zeros((80, 120))
    places = np.random.default_rng(1).choice(planted.size, 20, replace=False)
    planted.flat[places] = 2.3 * threshold * np.where(places % 2, 1, -1)
    kernel = (noise((80, 120)) + planted).astype(dtype)
    params = {"kernel": kernel, "bias": jnp.zeros(120), "head": {"kernel": noise((80, 10))}}
    plan = rmtjax.plan(params)
    mask = wrap(lambda params: sparsity.threshold_mask(params, plan))(params)
    np.testing.assert_array_equal(mask["kernel"], planted != 0)
    assert all(leaf.all() for leaf in (mask["bias"], mask["head"]["kernel"]))


def test_each_matrix_of_a_stack_has_its_own_threshold():
    matrices = noise((2, 60, 80)) * jnp.array([1.0, 10.0])[:, None, None]
    params = {"kernel": jnp.moveaxis(matrices, 0, 1)}
    plan = rmtjax.plan(params, axes=lambda *_: KernelAxes((0,), (2,), (1,)))
    mask = sparsity.threshold_mask(params, plan, delta=0.999)["kernel"]
    for index, variance in enumerate(plan["kernel"].fit.variance):
        cut = math.sqrt(2 * float(variance) * math.log(2 * 60 * 80 / 0.999))
        expected = np.abs(np.asarray(matrices[index])) > cut
        np.testing.assert_array_equal(mask[:, index], expected)


def test_a_kernel_whose_noise_level_is_not_believed_is_kept_whole():
    broken = noise((64, 96)).at[0, 0].set(jnp.nan)
    params = {"lawless": {"kernel": lawless()}, "nan": {"kernel": broken}, "zero": {}}
    params["zero"]["kernel"] = jnp.zeros((64, 96))
    mask = sparsity.threshold_mask(params, rmtjax.plan(params))
    assert all(leaf.all() for leaf in jax.tree.leaves(mask))
    believed = sparsity.threshold_mask(params, rmtjax.plan(params), rule=rmtjax.ranks.fixed(3))
    assert jax.tree.structure(believed) == jax.tree.structure(params)


@pytest.mark.parametrize("strength", [0.5, 2.0])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_edge_weights_are_their_formula(strength, power):
    scales = {"a": 1.0, "b": 2.0, "c": 5.0}
    params = {name: {"kernel": noise((60, 90), scale)} for name, scale in scales.items()}
    params["head"] = {"kernel": noise((60, 10))}
    plan = rmtjax.plan(params)
    options = {"strength": strength, "until": 0.6, "power": power}
    weights = sparsity.edge_weights(plan, 0.15, **options)
    edges = np.sqrt([90 * float(plan[f"{name}/kernel"].fit.edge) for name in scales])
    z = (edges - edges.mean()) / edges.std()
    expected = np.maximum(0.1, 1 + strength * 0.75**power * z)
    actual = [weights[f"{name}/kernel"] for name in scales]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)  # roundings of float32
    assert weights["head/kernel"] == 1
    traced = jax.jit(lambda share: sparsity.edge_weights(plan, share, **options))(0.15)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), traced, weights)


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"until": 0.3}, {"until": 0.1}], ids=str)
def test_without_their_say_edges_leave_plain_magnitudes_to_the_bit(options):
    params = {name: {"kernel": noise((60, 90), scale)} for name, scale in (("a", 1.0), ("b", 3.0))}
    weights = sparsity.edge_weights(rmtjax.plan(params), 0.3, **options)
    assert all(weight == 1 for weight in weights.values())
    actual, expected = (
        sparsity.magnitude_mask(params, 0.3, weights=given) for given in (weights, None)
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, actual, expected))


def test_edges_that_are_equal_or_missing_weigh_nothing():
    same = {name: {"kernel": noise((60, 90))} for name in "abc"}
    for params in (same, {"a": same["a"]}, {"head": {"kernel": noise((60, 10))}}, {}):
        weights = sparsity.edge_weights(rmtjax.plan(params), 0.1)
        assert len(weights) == len(params)
        assert all(weight == 1 for weight in weights.values())


def test_the_matrices_of_a_stack_are_weighed_each():
    stack = jnp.stack([noise((60, 80), scale) for scale in (1.0, 2.0, 4.0)], axis=1)
    alone = {name: {"kernel": stack[:, index]} for index, name in enumerate("abc")}
    plan = rmtjax.plan({"kernel": stack}, axes=lambda *_: KernelAxes((0,), (2,), (1,)))
    weights = sparsity.edge_weights(plan, 0.2)
    expected = list(sparsity.edge_weights(rmtjax.plan(alone), 0.2).values())
    assert weights["kernel"].shape == (1, 3, 1)
    np.testing.assert_allclose(weights["kernel"].ravel(), expected, rtol=1e-5)
    mask = sparsity.magnitude_mask({"kernel": stack}, 0.2, weights=weights)["kernel"]
    separate = sparsity.magnitude_mask(
        alone, 0.2, weights=dict(zip(("a/kernel", "b/kernel", "c/kernel"), expected, strict=True))
    )
    for index, name in enumerate("abc"):
        np.testing.assert_array_equal(mask[:, index], separate[name]["kernel"])


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, float("nan")])
def test_a_wrong_delta_is_named(delta):
    with pytest.raises(ValueError, match=r"^`delta` must be in \(0, 1\), got"):
        sparsity.entry_threshold(1.0, (4, 3), delta)
    params = {"kernel": noise((60, 80))}
    with pytest.raises(ValueError, match=r"^`delta` must be in \(0, 1\), got"):
        sparsity.threshold_mask(params, rmtjax.plan(params), delta=delta)


@pytest.mark.parametrize("shape", [(), (0, 3)], ids=str)
def test_a_shape_without_entries_is_refused(shape):
    with pytest.raises(ValueError, match=r"^`shape` must be that of a matrix with entries, got"):
        sparsity.entry_threshold(1.0, shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -0.1}, "`strength` must be at least 0"),
        ({"until": 0.0}, "`until` and `power` above 0"),
        ({"power": 0.0}, "`until` and `power` above 0"),
        ({"sparsity": 1.0}, r"`sparsity` must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"`sparsity` must be in \[0, 1\), got -0.1"),
    ],
    ids=str,
)
def test_wrong_options_of_edge_weights_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sparsity.edge_weights(rmtjax.plan({}), **{"sparsity": 0.1, **options})


def test_what_is_no_plan_is_refused():
    report = rmtjax.analyze({"kernel": noise((60, 80))})
    for call in (
        lambda: edge_weights(report, 0.1),
        lambda: threshold_mask({"kernel": noise((60, 80))}, report),
    ):
        with pytest.raises(
            TypeError, match=r"`plan` must be a `rmtjax.Plan`.* `report.plan`, got Report"
        ):
            call()


@pytest.mark.parametrize(
    "params",
    [
        {"kernel": noise((60, 81))},
        {"other": {"kernel": noise((60, 80))}},
        {"kernel": rmtjax.factorize_matrix(noise((60, 80)), 3)},
    ],
    ids=["shape", "path", "factors"],
)
def test_a_plan_for_another_tree_is_refused(params):
    plan = rmtjax.plan({"kernel": noise((60, 80))})
    with pytest.raises(
        ValueError, match=r"^`plan` is for another tree.*'kernel' of shape \(60, 80"
    ):
        sparsity.threshold_mask(params, plan)
