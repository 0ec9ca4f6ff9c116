"""Projections against brute force in float64: the best scale of all, and truncated SVD."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from hypothesis import given, settings, strategies as st

import rmtjax
from rmtjax import projections

EITHER = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
# As users have them: the type checker of the tests would speak first, in its own words.
quantize, project_bits = map(inspect.unwrap, (projections.quantize_bits, projections.project_bits))
GRIDS = {1: (1,), 2: (0, 1), 3: (0, 1, 2, 3), 4: tuple(range(8)), (0, 1, 2): (0, 1, 2)}
GRIDS[0, 1, 2, 4] = (0, 1, 2, 4)


def draw(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
@pytest.mark.parametrize(
    "project",
    [
        lambda matrix: projections.project_bits(matrix, 3, 1),
        lambda matrix: projections.project_rank(matrix, rmtjax.ranks.fixed(2)),
    ],
    ids=["bits", "rank"],
)
def test_a_projection_does_not_depend_on_the_scale(project, scale):
    matrix = draw(12, 8)
    found = np.asarray(project(matrix * np.float32(scale)), np.float64) / scale
    np.testing.assert_allclose(found, project(matrix), atol=1e-5)


def test_a_kernel_without_entries_has_codes_without_entries():
    for axis in (None, 0, 1):
        assert projections.project_bits(np.zeros((0, 3), np.float32), 3, axis).shape == (0, 3)


def test_what_is_not_real_is_refused():
    for numbers in (np.ones((4, 4), int), np.ones((4, 4), complex)):
        with pytest.raises(TypeError, match="floating"):
            quantize(numbers, 2)
    with pytest.raises(TypeError, match="real"):
        inspect.unwrap(rmtjax.patterns.permute_inputs)(np.ones((4, 4), complex), (2, 4))


def test_a_grid_does_not_hide_what_is_not_finite():
    # The largest of many entries, by XLA on CPU, may pass over NaN.
    for place in ((0, 0), (30, 0), (59, 89)):
        kernel = draw(60, 90).at[place].set(jnp.nan)
        assert jnp.isnan(projections.project_bits(kernel, 3)).all()
        rows = jnp.isnan(projections.project_bits(kernel, 3, 0)).all(axis=1)
        assert rows.tolist() == [row == place[0] for row in range(60)]


def best_error(values, levels):
    """The least squared error of one scale: all scales at which a code changes are tried."""
    values, levels = np.abs(np.asarray(values, np.float64).ravel()), np.asarray(levels)
    middles = (levels[1:] + levels[:-1]) / 2
    changes = np.sort(np.concatenate([values / middle for middle in middles] or [[1.0]]))
    changes = changes[changes > 0]
    between = np.concatenate([changes[:1] / 2, (changes[1:] + changes[:-1]) / 2, 2 * changes[-1:]])
    best = np.inf
    for scale in between:
        codes = levels[np.searchsorted(middles, values / scale)]
        if (codes**2).sum():
            alpha = values @ codes / (codes**2).sum()
            best = min(best, ((values - alpha * codes) ** 2).sum())
    return best


@EITHER
@pytest.mark.parametrize("bits", GRIDS, ids=str)
def test_the_error_is_near_the_best_of_all_scales(wrap, bits):
    kernel = draw(12, 10)
    projected = wrap(functools.partial(project_bits, bits=bits))(kernel)
    error = np.sum((np.asarray(projected, np.float64) - np.asarray(kernel, np.float64)) ** 2)
    best = best_error(kernel, GRIDS[bits])
    # The alternation ends in a local minimum: the worst of 200 draws was 1.6 % above the best.
    assert best * (1 - 1e-6) <= error <= 1.05 * best


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_are_the_nearest_and_the_scale_is_that_of_least_squares(bits, axis):
    kernel = draw(6, 8, seed=1) * (1 + jnp.arange(8))[None]
    codes, scale = quantize(kernel, bits, axis, steps=30)
    assert codes.dtype == jnp.int8
    assert scale.shape == {None: (1, 1), 0: (6, 1), 1: (1, 8), -1: (1, 8)}[axis]
    wide, q = np.asarray(kernel, np.float64), np.asarray(codes, np.float64)
    levels = np.asarray(GRIDS[bits])
    allowed = np.unique(np.concatenate([-levels, levels]))
    distances = np.abs(wide[..., None] - np.asarray(scale, np.float64)[..., None] * allowed)
    np.testing.assert_array_equal(q, allowed[distances.argmin(-1)])
    axes = None if axis is None else tuple({0, 1} - {axis % 2})
    total = functools.partial(np.sum, axis=axes, keepdims=True)
    # After 30 turns nothing changes any more, up to the rounding of float32.
    np.testing.assert_allclose(scale, total(wide * q) / total(q * q), rtol=1e-5)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, (0, 1, 2, 4)]))
def test_a_projection_is_idempotent_and_takes_scale_and_sign_out(seed, bits):
    kernel = draw(5, 7, seed=seed)
    once = project_bits(kernel, bits)
    # A point of the grid is its own projection, but for rounding in its scale.
    np.testing.assert_allclose(project_bits(once, bits), once, rtol=2e-6)
    np.testing.assert_allclose(project_bits(-4 * kernel, bits), -4 * once, rtol=2e-6)


def test_zeros_have_the_scale_zero_and_dtypes_stay():
    for bits in (1, 2):
        codes, scale = quantize(jnp.zeros((3, 2)), bits, 1)
        assert not jnp.any(codes * scale)
    for dtype in ("bfloat16", "float16", "float32"):
        assert project_bits(draw(4, 3, dtype=dtype), 3).dtype == dtype


def test_a_convolution_has_a_scale_for_each_output():
    codes, scale = quantize(draw(3, 3, 4, 5), 3, scale_axis=3)
    assert codes.shape == (3, 3, 4, 5)
    assert scale.shape == (1, 1, 1, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "`bits` must be an integer from 1 to 8"),
        ({"bits": 9}, "`bits` must be"),
        ({"bits": (2, 1)}, r"`bits` must be .* got \(2, 1\)"),
        ({"bits": (0.5, 1.0)}, "`bits` must be"),
        ({"bits": 2, "scale_axis": 2}, "`scale_axis` must be None or one of 2 axes, got 2"),
        ({"bits": 2, "steps": 0}, "`steps` must be an integer of at least 1, got 0"),
    ],
    ids=str,
)
def test_wrong_grids_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.ones((2, 2)), **arguments)


@EITHER
@pytest.mark.parametrize("rank", [3, 9])
def test_a_projection_on_a_rank_is_the_truncated_decomposition(wrap, rank):
    matrix = draw(9, 14)
    u, s, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    rule = rmtjax.ranks.fixed(rank)
    projected = wrap(functools.partial(projections.project_rank, rule=rule))(matrix)
    # Some rounding of float32, relative to the largest value of 7.
    np.testing.assert_allclose(projected, u[:, :rank] * s[:rank] @ vt[:rank], atol=2e-5)


def test_the_edge_keeps_planted_directions_and_leaves_noise_alone():
    noise = draw(80, 100)
    spiked = noise + 3 * jnp.outer(draw(80, seed=1), draw(100, seed=2))
    assert jnp.linalg.matrix_rank(projections.project_rank(spiked)) == 1
    np.testing.assert_array_equal(projections.project_rank(noise), noise)


def test_projections_of_a_plan_have_its_ranks():
    spiked = draw(80, 100) + 3 * jnp.outer(draw(80, seed=1), draw(100, seed=2))
    params = {"a": {"kernel": spiked, "bias": jnp.ones(100)}, "b": {"kernel": draw(80, 100)}}
    plan = rmtjax.plan(params, multiple=1)
    found = projections.from_plan(plan)
    assert found.keys() == plan.changes.keys() == {"a/kernel"}
    projected = projections.project(params, found)
    truncated = rmtjax.truncate(params, plan)
    # Two decompositions of float32, with a largest value of about 250.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5e-4), projected, truncated)
    assert projected["b"]["kernel"] is params["b"]["kernel"]


def test_a_stack_has_a_projection_for_each_matrix():
    stack = draw(3, 6, 4) * jnp.array([1.0, 10.0, 100.0])[:, None, None]
    axes = lambda path, leaf: rmtjax.KernelAxes((1,), (2,), batch=(0,))
    ternary = functools.partial(project_bits, bits=2)
    projected = projections.project({"kernel": stack}, ternary, axes=axes)["kernel"]
    for one, matrix in zip(projected, stack, strict=True):
        np.testing.assert_allclose(one, ternary(matrix), rtol=1e-6)  # two programs


def test_what_is_no_projection_is_refused():
    params = {"kernel": jnp.ones((3, 2))}
    with pytest.raises(TypeError, match="`projection` must be a function of a matrix"):
        inspect.unwrap(projections.project)(params, "bits")
    with pytest.raises(ValueError, match=r"`projection` has the path 'other', .* are 'kernel'"):
        projections.project(params, {"other": lambda matrix: matrix})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix calls Flax by its old names
@pytest.mark.parametrize(("bits", "qtype"), [(4, "int4"), (8, "int8")])
def test_codes_and_scales_are_those_of_a_quantized_array_of_qwix(bits, qtype):
    kernel = draw(16, 12)
    codes, scale = quantize(kernel, bits, 1)
    stored = qwix.QArray(qvalue=codes.astype(qtype), scale=scale)
    np.testing.assert_array_equal(qwix.dequantize(stored), project_bits(kernel, bits, 1))
    # Its own calibration has a scale that is too small by 2 L / (2 L + 1). Then -L may be nearer to
    # -L - 1, and all other codes are the same.
    own = qwix.quantize(project_bits(kernel, bits, 1), qtype, channelwise_axes=(1,))
    reached = jnp.abs(codes).max(axis=0) == 2 ** (bits - 1) - 1
    clipped = jnp.maximum(own.qvalue.astype(jnp.int8), 1 - 2 ** (bits - 1))
    np.testing.assert_array_equal(clipped[:, reached], codes[:, reached])
    factor = (2**bits - 2) / (2**bits - 1)
    np.testing.assert_allclose((own.scale / scale)[:, reached], factor, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_qwix_has_quantized_runs_on_codes_and_scales():
    model, x = nn.Sequential([nn.Dense(24), nn.relu, nn.Dense(5)]), draw(6, 16)
    provider = qwix.PtqProvider([qwix.QuantizationRule(weight_qtype="int4")])
    quantized = qwix.quantize_model(model, provider)
    boxes = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    four_bits = functools.partial(project_bits, bits=4, scale_axis=1)
    params = model.init(jax.random.key(0), x)["params"]
    params = projections.project(params, four_bits)

    def store(leaf, box):
        if not hasattr(box, "how"):  # a bias
            return leaf
        codes, scale = quantize(leaf, 4, 1)
        return box.replace(array=qwix.QArray(qvalue=codes.astype("int4"), scale=scale))

    stored = jax.tree.map(store, params, boxes, is_leaf=lambda box: hasattr(box, "how"))
    # Sums of 16 and 24 products in another order.
    outputs = quantized.apply({"params": stored}, x)
    np.testing.assert_allclose(outputs, model.apply({"params": params}, x), atol=1e-5)
