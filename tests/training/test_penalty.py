"""The penalty on entries against NumPy in float64, its gradient and what it leaves out."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rmtjax
from rmtjax import penalty

UNCHECKED = inspect.unwrap(penalty)


def make_params(dtype="float32"):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {
        "Dense_0": {"kernel": normal(30, 40), "bias": normal(40)},
        "Conv_0": {"kernel": normal(3, 3, 4, 5)},
        "Embed_0": {"embedding": normal(7, 3)},
        "table": {"kernel": jnp.ones((2, 2), jnp.int32)},
    }


def reference(params, l1, l2):
    kernels = (
        params["Dense_0"]["kernel"],
        params["Conv_0"]["kernel"],
        params["Embed_0"]["embedding"],
    )
    kernels = [np.asarray(kernel, np.float64) for kernel in kernels]
    return sum(l1 * np.abs(kernel).sum() + l2 * np.square(kernel).sum() for kernel in kernels)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.3), (5e-6, 1e-6)])
def test_the_sum_over_kernels_alone(wrap, dtype, l1, l2):
    params = make_params(dtype)
    actual = wrap(lambda params: penalty(params, l1=l1, l2=l2))(params)
    # Sums of 1,401 terms of one sign in float32.
    np.testing.assert_allclose(actual, reference(params, l1, l2), rtol=1e-5)
    assert actual.dtype == jnp.float32
    assert actual.shape == ()


def test_the_gradient():
    params = make_params()
    del params["table"]
    params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"].at[0, 0].set(0.0)
    gradients = jax.grad(lambda params: penalty(params, l1=0.1, l2=0.3))(params)
    kernel = np.asarray(params["Dense_0"]["kernel"])
    np.testing.assert_allclose(
        gradients["Dense_0"]["kernel"], 0.1 * np.sign(kernel) + 0.6 * kernel, rtol=1e-5
    )
    assert not gradients["Dense_0"]["bias"].any()


def test_before_sgd_weight_decay_of_twice_the_coefficient_is_the_same():
    params = make_params()
    del params["table"]
    mask = jax.tree_util.tree_map_with_path(lambda key, _: "bias" not in str(key), params)
    decay = optax.chain(optax.add_decayed_weights(2 * 0.3, mask), optax.sgd(0.1))
    zeros = optax.tree.zeros_like(params)
    expected, _ = decay.update(zeros, decay.init(params), params)
    term, optimizer = lambda params: penalty(params, l2=0.3), optax.sgd(0.1)
    actual, _ = optimizer.update(jax.grad(term)(params), optimizer.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual, expected)


def test_factors_count_as_the_kernel_that_they_stand_for():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(30, 40)), jnp.float32)
    factors = rmtjax.factorize_matrix(kernel, 5)
    term = lambda leaf: penalty({"kernel": leaf}, l1=0.1, l2=0.3)
    product = np.asarray(factors.left, np.float64) @ np.asarray(factors.right, np.float64)
    expected = 0.1 * np.abs(product).sum() + 0.3 * np.square(product).sum()
    np.testing.assert_allclose(term(factors), expected, rtol=1e-5)
    # By the chain rule: the gradient for the product, times the other factor.
    slope = 0.1 * np.sign(product) + 0.6 * product
    gradients = jax.grad(term)(factors)
    np.testing.assert_allclose(gradients.left, slope @ factors.right.T, atol=1e-4)
    np.testing.assert_allclose(gradients.right, factors.left.T @ slope, atol=1e-4)


def test_where_chooses_and_coefficients_may_be_traced():
    params = make_params()
    biases = lambda path, leaf: path.endswith("bias")
    value = jax.jit(lambda l1: penalty(params, l1=l1, where=biases))(0.5)
    bias = np.abs(np.asarray(params["Dense_0"]["bias"], np.float64)).sum()
    np.testing.assert_allclose(value, 0.5 * bias, rtol=1e-6)
    with pytest.raises(ValueError, match="no tensor is chosen as a kernel, of 1 such as 'bias'"):
        penalty({"bias": jnp.ones(3)}, l1=1.0)


@pytest.mark.parametrize("name", ["l1", "l2"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_wrong_coefficient_is_named(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be at least 0 and finite, got {value}"):
        UNCHECKED(make_params(), **{name: value})
