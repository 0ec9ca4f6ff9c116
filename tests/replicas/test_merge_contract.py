"""What `merge_replicas` refuses, and what it is beside other functions of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.replica_cases import noisy

from rmtjax import Factors, merge_replicas

START = {"a": {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(4)}}
REPLICAS = jax.tree.map(lambda leaf: jnp.stack([leaf + 1, leaf + 2]), START)
ONE = jax.tree.map(lambda leaf: leaf[0], REPLICAS)
WRONG = jax.tree.map(lambda leaf: leaf[None], ONE)
BAD = {
    "one in a list": ([ONE], ValueError, r"`replicas` must be at least 2 trees, got 1"),
    "none": ([], ValueError, r"at least 2 trees, got 0"),
    "an axis of one": (WRONG, ValueError, r"leading axis of at least 2, got \(1, 4\)"),
    "no axis": (
        ONE,
        ValueError,
        r"a leading axis before the shapes of `start`, got \(4,\) for \(4,\) at 'a/bias'",
    ),
    "two axes": (
        {"a": REPLICAS["a"] | {"kernel": jnp.zeros((2, 2, 6, 4))}},
        ValueError,
        r"got \(2, 2, 6, 4\) for \(6, 4\) at 'a/kernel'",
    ),
    "unequal axes": (
        {"a": REPLICAS["a"] | {"kernel": jnp.zeros((3, 6, 4))}},
        ValueError,
        r"got \(3, 6, 4\) for \(6, 4\) at 'a/kernel', and 2 replicas in the first leaf",
    ),
    "a scalar": ({"a": {"kernel": 1.0, "bias": 1.0}}, ValueError, r"got \(\) for \(4,\)"),
    "another tree": ({"b": ONE["a"]}, ValueError, r"`replicas` must have the structure of `start`"),
    "another tree in a list": (
        [ONE, {"b": ONE["a"]}],
        ValueError,
        r"`replicas\[1\]` must have the structure of `start`",
    ),
    "another shape in a list": (
        [ONE, {"a": ONE["a"] | {"kernel": jnp.zeros((4, 6))}}],
        ValueError,
        r"`replicas\[1\]` must have the shapes of `start`, got \(4, 6\) in the place of \(6, 4\)",
    ),
    "no tree": (3, ValueError, r"`replicas` must have the structure of `start`"),
    "abstract": (
        jax.eval_shape(lambda: REPLICAS),
        TypeError,
        r"`replicas` must be a tree of arrays",
    ),
    "words": (
        [ONE, {"a": ONE["a"] | {"bias": "b"}}],
        TypeError,
        r"`replicas\[1\]` must be a tree of",
    ),
}


@pytest.mark.parametrize(("replicas", "error", "words"), BAD.values(), ids=BAD)
def test_replicas_that_do_not_fit_are_refused(replicas, error, words):
    with pytest.raises(error, match=words):
        merge_replicas(START, replicas)


def test_a_start_without_values_or_that_is_a_model_is_refused():
    with pytest.raises(TypeError, match=r"`start` must be a tree of arrays.*jax.eval_shape"):
        merge_replicas(jax.eval_shape(lambda: START), REPLICAS)
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="got the model Linear"):
        merge_replicas(model, [model, model])


@pytest.mark.parametrize("rest", [-0.1, 1.1, np.nan])
def test_a_share_out_of_range_is_refused(rest):
    with pytest.raises(ValueError, match=r"`rest` must be in \[0, 1\]"):
        merge_replicas(START, REPLICAS, rest=rest)


def test_shapes_are_known_without_values_and_arguments_stay_as_they_are():
    found = jax.eval_shape(merge_replicas, START, REPLICAS)
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jax.tree.all(jax.tree.map(same, found.params, START))
    changes = noisy(2, (6, 4))
    before = changes.copy()
    merge_replicas({"kernel": np.zeros((6, 4), np.float32)}, {"kernel": changes})
    np.testing.assert_array_equal(changes, before)


def test_a_second_call_compiles_nothing_and_vmap_merges_each():
    call, changes = jax.jit(merge_replicas), noisy(2, (3, 12, 8))
    start = {"kernel": jnp.zeros((12, 8))}
    run = lambda index: call(start, {"kernel": changes[:, index]}).params["kernel"]
    wanted = jnp.stack([run(index) for index in range(3)])
    assert call._cache_size() == 1
    of_each = jax.vmap(
        lambda one: merge_replicas(start, {"kernel": one}).params["kernel"], in_axes=1
    )
    # Turns of directions with equal values, as in `test_merge`.
    np.testing.assert_allclose(of_each(changes), wanted, rtol=0, atol=0.02)


def test_a_traced_share_is_not_checked():
    rests = jnp.asarray([0.0, 0.5, 1.0])
    kernels = jax.vmap(lambda rest: merge_replicas(START, REPLICAS, rest=rest).params)(rests)
    np.testing.assert_allclose(kernels["a"]["kernel"][2], jnp.full((6, 4), 1.5), rtol=1e-6)


def test_stacks_of_factors_are_merged_in_one_program():
    # Two batched decompositions side by side in one program waited for one another for ever.
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    start = {"kernel": Factors(draw(12, 300, 40), draw(12, 40, 300))}
    other = jax.tree.map(lambda leaf: leaf + 0.1 * draw(*leaf.shape), start)
    merged = merge_replicas(start, [other, other])
    product = lambda tree: np.asarray(tree["kernel"].left @ tree["kernel"].right)
    apart = np.linalg.norm(product(merged.params) - product(other))
    assert apart < 0.3 * np.linalg.norm(product(other) - product(start))


def test_derivatives_take_directions_for_constants():
    changes = jnp.asarray(np.random.default_rng(1).normal(size=(2, 30, 20)), jnp.float32)

    def total(scale):
        start, replicas = {"kernel": jnp.zeros((30, 20))}, {"kernel": scale * changes}
        return jnp.sum(merge_replicas(start, replicas).params["kernel"])

    value, slope = jax.jit(jax.value_and_grad(total))(2.0)
    # The merge is homogeneous: its directions do not change with the scale.
    np.testing.assert_allclose(slope, value / 2, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_narrow_leaves_are_averaged_also_under_strict_promotion(dtype):
    replicas = {"bias": jnp.asarray([[1.0, 2.0], [2.0, 4.0]], dtype)}
    with jax.numpy_dtype_promotion("strict"):
        merged = merge_replicas({"bias": jnp.ones(2, dtype)}, replicas).params["bias"]
    assert merged.dtype == dtype
    assert merged.astype(jnp.float32).tolist() == [1.5, 3.0]
