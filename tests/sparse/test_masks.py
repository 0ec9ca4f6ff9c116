"""Masks by magnitude against a stable sort in float64."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.virtual_devices import run_on_devices
from hypothesis import given, settings, strategies as st
from rmtjax.sparsity import magnitude_mask

import rmtjax

SHAPES = {"a": (4, 3), "b": (2, 5), "c": (2, 2, 2)}
SIZE = 30
# As users have it: the type checker of the tests would speak first, in its own words.
UNCHECKED = inspect.unwrap(magnitude_mask)


def tree_of(values):
    """A tree of kernels from a flat list, in the order of their paths."""
    ends = np.cumsum([math.prod(shape) for shape in SHAPES.values()])
    parts = np.split(np.asarray(values), ends[:-1])
    shaped = zip(SHAPES.items(), parts, strict=True)
    return {name: {"kernel": jnp.asarray(part.reshape(shape))} for (name, shape), part in shaped}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def smallest(scores, count):
    """The reference: where a stable sort in float64 has the first `count`."""
    kept = np.ones(len(scores), bool)
    kept[np.argsort(np.asarray(scores, np.float64), kind="stable")[:count]] = False
    return kept


VALUES = st.lists(st.integers(-4, 4), min_size=SIZE, max_size=SIZE)
SHARES = st.floats(0, 1, exclude_max=True, width=32)


@settings(max_examples=50)
@given(VALUES, SHARES, st.sampled_from(["float32", "bfloat16", "float16"]), st.booleans())
def test_exactly_the_smallest_go_and_of_ties_the_first(values, share, dtype, compiled):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), tree_of(np.asarray(values) / 4))
    call = jax.jit(magnitude_mask) if compiled else magnitude_mask
    mask = call(params, share)
    # The product, too, is a float32: that is how `sparsity` is understood.
    count = int(np.round(np.float32(share) * np.float32(SIZE)))
    np.testing.assert_array_equal(flat(mask), smallest(np.abs(values), count))


@settings(max_examples=50)
@given(
    st.lists(st.floats(allow_subnormal=False, width=32), min_size=SIZE, max_size=SIZE),
    st.lists(st.sampled_from([0.25, 1.0, 2.0]), min_size=3, max_size=3),
    SHARES,
)
def test_weights_divide_magnitudes_of_any_floats(values, weights, share):
    named = {f"{name}/kernel": weight for name, weight in zip(SHAPES, weights, strict=True)}
    params = tree_of(np.asarray(values, np.float32))
    mask = magnitude_mask(params, share, weights=named)
    each = np.repeat(np.float32(weights), [math.prod(shape) for shape in SHAPES.values()])
    with np.errstate(over="ignore", under="ignore"):
        scores = np.abs(np.asarray(values, np.float32)) / each
    # A compiled program rounds what is smaller than any normal number to 0.
    scores[scores < np.finfo(np.float32).tiny] = 0
    count = int(np.round(np.float32(share) * np.float32(SIZE)))
    np.testing.assert_array_equal(flat(mask), smallest(scores, count))


@settings(max_examples=30)
@given(VALUES, VALUES, SHARES, SHARES)
def test_an_earlier_mask_only_shrinks(first, second, one, other):
    before = magnitude_mask(tree_of(np.float32(first)), one)
    after = magnitude_mask(tree_of(np.float32(second)), other, mask=before)
    kept, earlier = flat(after), flat(before)
    assert not (kept & ~earlier).any()
    counts = [int(np.round(np.float32(share) * np.float32(SIZE))) for share in (one, other)]
    assert (~kept).sum() == max(counts)
    scores = np.where(earlier, np.abs(second), -1)
    np.testing.assert_array_equal(kept, smallest(scores, max(counts)))


def test_magnitudes_are_compared_in_double_precision_where_kernels_are():
    with jax.enable_x64(True):
        values = 1 + np.random.default_rng(0).permutation(SIZE) * 1e-12
        mask = magnitude_mask(tree_of(values), 0.5)
        np.testing.assert_array_equal(flat(mask), smallest(values, 15))
        mixed = {"a": {"kernel": jnp.ones(2, "float32")}, "b": {"kernel": jnp.ones(2, "float64")}}
        mixed["b"]["kernel"] -= 1e-12
        np.testing.assert_array_equal(flat(magnitude_mask(mixed, 0.5)), [1, 1, 0, 0])


def test_a_large_tree_against_the_sort():
    kernels = [jax.random.normal(jax.random.key(seed), (300, 400)) / (seed + 1) for seed in (0, 1)]
    params = {"a": {"kernel": kernels[0]}, "b": {"kernel": kernels[1].astype("bfloat16")}}
    mask = magnitude_mask(params, 0.9)
    magnitudes = flat(jax.tree.map(lambda leaf: np.abs(np.asarray(leaf, np.float64)), params))
    np.testing.assert_array_equal(flat(mask), smallest(magnitudes, 216_000))


def test_only_kernels_have_entries_to_remove():
    params = {
        "Dense_0": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)},
        "Embed_0": {"embedding": np.arange(6.0, dtype=np.float32).reshape(3, 2)},
        "thin": {"kernel": rmtjax.factorize_matrix(jnp.zeros((4, 4)), 2)},
        "table": {"kernel": jnp.zeros((2, 2), jnp.int32)},
        "small": {"kernel": jnp.zeros((2, 2), "float8_e4m3fn")},
        "norm": {"scale": jnp.zeros(3)},
    }
    mask = magnitude_mask(params, 0.5)
    applied = jax.tree.map(jnp.multiply, params, mask)
    expected = [[0, 0, 0], [3, 4, 5]]
    np.testing.assert_array_equal(applied["Dense_0"]["kernel"], expected)
    np.testing.assert_array_equal(applied["Embed_0"]["embedding"].ravel(), np.ravel(expected))
    assert all(leaf.dtype == bool for leaf in jax.tree.leaves(mask))
    assert all(
        leaf.all()
        for name in ("thin", "table", "small", "norm")
        for leaf in jax.tree.leaves(mask[name])
    )
    assert mask["Dense_0"]["bias"].all()


def test_where_chooses_the_kernels_and_may_choose_vectors():
    bias = {"bias": jnp.array([3.0, 1.0, 2.0])}
    np.testing.assert_array_equal(
        magnitude_mask(bias, 0.5, where=lambda *_: True)["bias"], [True, False, False]
    )
    params = tree_of(np.arange(1.0, SIZE + 1, dtype=np.float32))
    mask = magnitude_mask(params, 0.5, where=lambda path, leaf: path == "b/kernel")
    np.testing.assert_array_equal(flat(mask), smallest([9] * 12 + [1] * 5 + [9] * 13, 5))


@pytest.mark.parametrize("params", [{}, {"kernel": jnp.ones((0, 3))}], ids=str)
def test_a_tree_without_entries_is_kept(params):
    mask = magnitude_mask(params, 0.5)
    assert jax.tree.all(jax.tree.map(lambda leaf, kept: leaf.shape == kept.shape, params, mask))
    assert all(leaf.all() for leaf in jax.tree.leaves(mask))


@pytest.mark.parametrize(
    "call",
    [
        lambda params: magnitude_mask(params, 0.5),
        lambda params: rmtjax.sparsity.random_mask(params, 0.5),
        lambda params: rmtjax.patterns.nm_mask(params, (2, 4)),
        lambda params: rmtjax.projections.project(params, jnp.sign),
        lambda params: rmtjax.lowrank.to_spectral(params),
    ],
    ids=["magnitude", "random", "pattern", "projection", "spectral"],
)
def test_a_tree_without_kernels_is_an_error(call):
    with pytest.raises(ValueError, match="no tensor is chosen as a kernel, of 1 such as 'bias'"):
        call({"bias": jnp.ones((8, 4))})
    with pytest.raises(ValueError, match="no tensor is chosen as a kernel, of 1 such as ''"):
        call(jnp.ones((8, 4)))


def test_an_ensemble_is_masked_member_by_member():
    members = [tree_of(np.random.default_rng(seed).normal(size=SIZE)) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    masks = jax.vmap(magnitude_mask)(stacked, jnp.array([0.0, 0.5, 0.9]))
    for index, share in enumerate((0.0, 0.5, 0.9)):
        member = jax.tree.map(lambda leaf: leaf[index], masks)  # noqa: B023
        np.testing.assert_array_equal(flat(member), flat(magnitude_mask(members[index], share)))


@pytest.mark.parametrize("share", [1.0, 1.5, -0.1, float("nan")])
def test_a_wrong_sparsity_is_named(share):
    with pytest.raises(ValueError, match=r"^`sparsity` must be in \[0, 1\), got"):
        magnitude_mask(tree_of(np.ones(SIZE, np.float32)), share)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"weights": {"a/kernel": 1.0}}, r"`weights` must have an entry .* none for 'b/kernel'"),
        ({"mask": {"a": {"kernel": jnp.ones((4, 3), bool)}}}, r"`mask` .* none for 'b/kernel'"),
        ({"mask": tree_of(np.ones(SIZE))}, r"`mask` must have booleans .* 'a/kernel', got float32"),
        (
            {"mask": jax.tree.map(lambda leaf: leaf.ravel() > 0, tree_of(np.ones(SIZE)))},
            r"`mask` must have booleans of shape \(4, 3\) .*, got bool of shape \(12,\)",
        ),
    ],
    ids=["weights", "mask", "numbers", "shape"],
)
def test_weights_and_masks_of_another_tree_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        UNCHECKED(tree_of(np.ones(SIZE)), 0.5, **option)


def test_sharded_kernels_stay_where_they_are():
    code = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from rmtjax.sparsity import magnitude_mask
mesh = jax.make_mesh((4,), ("x",))
rng = np.random.default_rng(0)
whole = {name: {"kernel": rng.integers(-9, 9, (8, 12)).astype(np.float32)} for name in "ab"}
spec = {"a": {"kernel": P("x", None)}, "b": {"kernel": P(None, "x")}}
place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
sharded = jax.tree.map(place, whole, spec)
compiled = jax.jit(magnitude_mask).lower(sharded, 0.7).compile()
masks, expected = compiled(sharded, 0.7), magnitude_mask(whole, 0.7)
assert jax.tree.all(jax.tree.map(np.array_equal, masks, expected))
assert jax.tree.all(jax.tree.map(lambda m, p: m.sharding == p.sharding, masks, sharded))
text = compiled.as_text()
assert "all-reduce" in text and "all-gather" not in text
"""
    run_on_devices(4, code)


def test_too_many_entries_to_count_are_refused():
    huge = {"kernel": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}
    with pytest.raises(ValueError, match=r"less than 2\*\*31 entries.* got 2147483648"):
        jax.eval_shape(lambda params: magnitude_mask(params, 0.5), huge)
