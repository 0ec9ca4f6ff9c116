"""Certificates of every dtype, of missing biases and of what is not finite; wrong arguments."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.certificate_cases import (
    change_kernels,
    check_bounds,
    compiled,
    halve,
    LAYERS,
    make_case,
)

import rmtjax
from rmtjax.certificate import certify


def test_biases_and_missing_biases():
    params, inputs = make_case()
    after = change_kernels(params, set(), halve)
    after["Dense_2"] = after["Dense_2"] | {"bias": after["Dense_2"]["bias"] + 1.0}
    found = compiled(3, "relu")(params, after, inputs)
    np.testing.assert_allclose(found.change, 1, rtol=1e-3)
    bare = {layer: {"kernel": leaves["kernel"]} for layer, leaves in params.items()}
    zero = jax.tree.map(jnp.zeros_like, params)
    zero = {layer: leaves | {"bias": zero[layer]["bias"]} for layer, leaves in params.items()}
    cut = change_kernels(bare, {"Dense_1"}, halve)
    found = compiled(3, "relu")(bare, cut, inputs)
    check_bounds(found, zero, change_kernels(zero, {"Dense_1"}, halve), inputs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_few_bits_are_lifted(dtype):
    params, inputs = make_case()
    params = jax.tree.map(lambda a: a.astype(dtype), params)
    after = change_kernels(params, {"Dense_0"}, halve)
    found = compiled(3, "relu")(params, after, inputs.astype(dtype))
    assert found.change.dtype == found.loss.dtype == jnp.float32
    check_bounds(found, params, after, inputs.astype(dtype))


def test_mixed_dtypes_are_computed_in_the_widest():
    params, inputs = make_case()
    after = change_kernels(params, {"Dense_2"}, lambda kernel: kernel * 1.001)
    with jax.enable_x64(True):
        wide = jnp.asarray(inputs, jnp.float64)
        found = compiled(3, "relu")(params, after, wide)
        assert found.change.dtype == jnp.float64
        change = check_bounds(found, params, after, wide)
        np.testing.assert_allclose(found.change, change, atol=1e-11)


def test_what_is_not_finite_certifies_nothing():
    params, inputs = make_case()
    broken = change_kernels(params, {"Dense_1"}, lambda kernel: kernel.at[0, 0].set(jnp.nan))
    found = compiled(3, "relu")(params, broken, inputs)
    assert not found.unchanged.any()
    assert not found.lowers_loss(1e9)
    for label in (-1, 10):
        labels = jnp.full(200, label)
        assert not compiled(3, "relu")(params, params, inputs, labels=labels).lowers_loss(1e9)


def spoil(tree, layer, name, leaf):
    return tree | {layer: tree[layer] | {name: leaf}}


PARAMS, INPUTS = make_case(samples=3)
FACTORS = rmtjax.factorize_matrix(PARAMS["Dense_0"]["kernel"], 2)
WRONG = {  # arguments in place of the right ones, and what is said
    "layer": ({"layers": ["Dense_7"]}, r"`layers` must be dense layers of `before`.*'Dense_7'"),
    "none": ({"layers": []}, "`layers` must name at least one"),
    "order": ({"layers": LAYERS[::-1]}, r"`layers\[0\]` must take 60 inputs, got 40"),
    "shape": (
        {"after": spoil(PARAMS, "Dense_1", "kernel", jnp.ones((50, 41)))},
        r"`after` must have the shapes of `before`.*`layers\[1\]`",
    ),
    "bias": ({"after": spoil(PARAMS, "Dense_1", "bias", jnp.ones(1))}, "`after` must have the sha"),
    "factors": ({"after": spoil(PARAMS, "Dense_0", "kernel", FACTORS)}, r"rmtjax.merge\(after\)"),
    "matrix": ({"before": spoil(PARAMS, "Dense_0", "kernel", jnp.ones((3, 3, 2, 8)))}, "matrix"),
    "dtype": (
        {"before": spoil(PARAMS, "Dense_0", "kernel", jnp.ones((60, 50), jnp.int32))},
        "matrix",
    ),
    "vector": ({"inputs": INPUTS[0]}, "inputs"),
    "no samples": ({"inputs": INPUTS[:0]}, "`inputs` must have shape"),
    "bytes": ({"inputs": INPUTS.astype(jnp.uint8)}, "inputs"),
    "labels": ({"labels": jnp.zeros(4, jnp.int32)}, "labels"),
    "one-hot": ({"labels": jnp.zeros((3, 10), jnp.int32)}, "labels"),
    "steep far out": (
        {"activation": lambda x: jnp.where(jnp.abs(x) > 9, 10 * x, x)},
        r"slopes .* got 10\.0",
    ),
    "oscillating": ({"activation": lambda x: jnp.sin(128 * jnp.pi * x)}, "slopes"),
    "not elementwise": ({"activation": jax.nn.softmax}, "`activation` must be elementwise"),
    "steep": ({"activation": jax.nn.gelu}, r"`activation` must have slopes .* got 1\.129"),
}


@pytest.mark.parametrize(("wrong", "words"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(wrong, words):
    right = {"before": PARAMS, "after": PARAMS, "inputs": INPUTS, "layers": LAYERS}
    with pytest.raises((ValueError, TypeError), match=words):
        certify(**(right | wrong))


def test_a_steep_activation_divided_by_its_slope():
    params, inputs = make_case()
    after = change_kernels(params, {"Dense_0"}, halve)
    gentle = lambda x: jax.nn.gelu(x) / 1.13
    bound = jax.jit(functools.partial(certify, layers=LAYERS, activation=gentle))
    assert bound(params, after, inputs).change.all()


@dataclasses.dataclass
class Ramp:
    """An activation that may change, and has no hash."""

    slope: float

    def __call__(self, x):
        return self.slope * x


@pytest.mark.slow
def test_an_activation_may_change_between_two_calls():
    before, inputs = make_case()
    after = change_kernels(before, LAYERS[-1:], halve)
    ramp = Ramp(0.5)
    find = lambda: certify(before, after, inputs, layers=LAYERS, activation=ramp)
    first = find()
    ramp.slope = 1.0
    assert find().change.mean() > 1.2 * first.change.mean()
    ramp.slope = 5.0
    with pytest.raises(ValueError, match=r"slopes in \[-1, 1\].* 5\.000"):
        find()


def test_a_layer_that_comes_twice_is_removed_once():
    params = {"D": {"kernel": jnp.diag(jnp.array([1.0, 0.5]))}}
    after = {"D": {"kernel": jnp.diag(jnp.array([1.0, 0.0]))}}
    found = jax.jit(functools.partial(certify, layers=["D", "D"]))(params, after, jnp.ones((3, 2)))
    np.testing.assert_allclose(found.removed, 0.25, rtol=1e-5)
