"""Replicas of a tree, samples dealt to them, and training loops of Flax that merge them."""

import inspect

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.transform_checks import assert_same_bits
from hypothesis import given, strategies as st

from rmtjax import deal, replicate

TREES = {
    "array": jnp.arange(6.0).reshape(2, 3),
    "nested": {"a": [jnp.ones(3, jnp.int32), None], "b": (jnp.ones((), bool),)},
    "frozen": flax.core.freeze({"kernel": jnp.ones((2, 2), jnp.bfloat16)}),
    "numbers": {"rate": 0.1, "count": 3, "host": np.float32(2)},
}


def test_a_long_double_is_one_that_jax_has():
    for leaf in (np.longdouble(2), np.full(3, 2, np.longdouble)):
        assert replicate({"x": leaf}, 2)["x"].tolist() == [np.float64(leaf).tolist()] * 2


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "compiled"])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("k", [2, 5])
def test_each_replica_is_the_tree(tree, k, wrap):
    replicas = wrap(lambda tree: replicate(tree, k))(tree)
    expected = jax.tree.map(jnp.asarray, tree)
    for index in range(k):
        assert_same_bits(jax.tree.map(lambda leaf: leaf[index], replicas), expected)  # noqa: B023


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_keys_are_split_and_no_two_are_the_same(shape):
    key = jax.random.split(jax.random.key(1), shape) if shape else jax.random.key(1)
    replicas = replicate({"key": key}, 4)["key"]
    assert replicas.shape == (4, *shape)
    assert jnp.issubdtype(replicas.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(replicas).reshape(-1, 2).tolist()
    assert len({*map(tuple, data)}) == len(data)


# Each size is a program.
@given(st.sampled_from([2, 3, 7]), st.sampled_from([0, 1, 5, 60]), st.integers(0, 2**31 - 1))
def test_parts_are_equal_and_no_sample_is_in_two(k, more, seed):
    size = k + more
    parts = deal(jax.random.key(seed), size, k)
    assert parts.shape == (k, size // k)
    found = parts.ravel().tolist()
    assert len({*found}) == len(found)
    assert {*found} <= {*range(size)}


def test_parts_are_random_and_all_samples_come_in_turn():
    deals = np.stack([deal(jax.random.key(seed), 10, 3) for seed in range(200)])
    # Each sample is in each part in 3 of 10 deals: 60 of 200, with a deviation of 6.5.
    counts = np.stack([(deals == sample).any(2).sum(0) for sample in range(10)])
    assert np.abs(counts - 60).max() < 5 * 6.5
    assert_same_bits(
        deal(jax.random.key(7), 10, 3),
        jax.jit(deal, static_argnums=(1, 2))(jax.random.key(7), 10, 3),
    )


@pytest.mark.parametrize("k", [1, 0, -2, 2.0, True])
def test_a_wrong_number_of_replicas_is_named(k):
    message = f"^`k` must be an integer of at least 2, got {k}"
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(replicate)({}, k)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(deal)(jax.random.key(0), 10, k)
    with pytest.raises(TypeError, match="`k` must be a Python integer"):
        jax.jit(inspect.unwrap(replicate))({}, 2)


@pytest.mark.parametrize("size", [1, 2.5, -3, (4,)])
def test_a_wrong_number_of_samples_is_named(size):
    with pytest.raises(ValueError, match="`size` must be an integer of at least `k`, 2 samples"):
        inspect.unwrap(deal)(jax.random.key(0), size, 2)


def test_a_seed_is_no_key():
    with pytest.raises(TypeError, match=r"`key` must be a key, as of `jax.random.key\(0\)`, got 0"):
        inspect.unwrap(deal)(0, 10, 2)
