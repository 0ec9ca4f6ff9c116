"""The Marchenko-Pastur law: its gradients, and the dtypes, shapes and ranges that it takes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.law_cases import cdf, inside, pdf, ppf, RATIOS
from hypothesis import given, settings, strategies as st
from jax.test_util import check_grads

from rmtjax import marchenko_pastur as mp


def gradients(f):
    return jax.jit(jax.vmap(jax.grad(f, (0, 1, 2)), (0, None, None)))


GRADIENTS = {f: gradients(f) for f in (mp.pdf, mp.cdf, mp.ppf)}


@pytest.mark.parametrize("ratio", RATIOS)
def test_gradients_are_finite_everywhere(ratio):
    lower, upper = mp.support(ratio, 2.0)
    special = [lower, upper, -upper, 0 * upper, 2 * upper]
    x = jnp.stack([*special, *jnp.linspace(lower, upper, 101)])
    q = jnp.concatenate([jnp.array([0.0, 1.0, 1e-30, 1e-7, 1 - 1e-7]), jnp.linspace(0, 1, 101)])
    for function, values in [(mp.pdf, x), (mp.cdf, x), (mp.ppf, q)]:
        assert np.isfinite(GRADIENTS[function](values, ratio, 2.0)).all(), function.__name__
    for edge in (lambda *law: mp.support(*law)[0], lambda *law: mp.support(*law)[1]):
        assert np.isfinite(jax.grad(edge, (0, 1))(ratio, 2.0)).all()


@pytest.mark.parametrize("ratio", RATIOS)
def test_gradient_of_cdf_is_pdf(ratio):
    with jax.enable_x64(True):
        x = jnp.asarray(inside(ratio))
        slope, *_ = GRADIENTS[mp.cdf](x, ratio, 1.0)
        # 1e-9: the difference of two close numbers at the ends of a narrow support.
        np.testing.assert_allclose(slope, mp.pdf(x, ratio), rtol=1e-9)
        slope, *_ = GRADIENTS[mp.ppf](mp.cdf(x, ratio), ratio, 1.0)
        np.testing.assert_allclose(slope, 1 / mp.pdf(x, ratio), rtol=1e-9)


@pytest.mark.parametrize("ratio", [0.005, 0.1, 0.5, 0.95])
@pytest.mark.parametrize(("function", "x"), [(mp.pdf, 1.1), (mp.cdf, 1.1), (mp.ppf, 0.3)])
def test_gradients_are_finite_differences(function, x, ratio):
    with jax.enable_x64(True):
        # 1e-6: central differences with a step that is small for a support of width 0.3.
        law = x, ratio, 1.2
        check_grads(function, law, 1, ("fwd", "rev"), rtol=1e-6, atol=1e-6, eps=1e-6)


@pytest.mark.parametrize("ratio", [1e-6, *RATIOS])
def test_gradients_of_quantiles_keep_float32(ratio):
    ratio, q = float(np.float32(ratio)), np.float32([0.05, 0.3, 0.6, 0.95])
    got = GRADIENTS[mp.ppf](q, ratio, 1.0)
    with jax.enable_x64(True):
        expected = GRADIENTS[mp.ppf](np.float64(q), ratio, 1.0)
    # The worst is 6e-6; the closed form alone, without its series, loses 5e-4.
    np.testing.assert_allclose(got, expected, rtol=2e-5)


@pytest.mark.parametrize("function", [mp.pdf, mp.cdf, mp.ppf])
def test_low_precision_is_lifted(function):
    low = jnp.linspace(0.05, 0.95, 7, dtype=jnp.bfloat16)
    high = function(low.astype(jnp.float32), 0.7)
    got = function(low, jnp.bfloat16(0.7))
    assert got.dtype == jnp.float32
    # The lifted ratio is 0.69921875.
    np.testing.assert_array_equal(got, function(low.astype(jnp.float32), 0.69921875))
    np.testing.assert_array_equal(function(low, 0.7), high)
    assert function(1, 0.5).dtype == jnp.float32
    with jax.enable_x64(True):
        assert function(np.float64(0.5), 0.5).dtype == jnp.float64


@pytest.mark.parametrize("function", [mp.pdf, mp.cdf, mp.ppf])
def test_arguments_broadcast(function):
    x, ratio, variance = jnp.linspace(0.1, 0.9, 4), jnp.array([[0.2], [1.0]]), jnp.array([1, 2, 3])
    got = function(x[:, None, None, None], ratio, variance)
    assert got.shape == (4, 1, 2, 3)
    for i, j, k in np.ndindex(4, 2, 3):
        single = function(x[i], ratio[j, 0], variance[k])
        # Vectorised and single code may round differently.
        np.testing.assert_allclose(got[i, 0, j, k], single, rtol=1e-5)


@pytest.mark.parametrize("function", [mp.pdf, mp.cdf, mp.ppf])
@pytest.mark.parametrize("x", [-1.0, 0.0, 0.5, 1.0, 9.0])
def test_parameters_out_of_range_in_arrays_give_nan(function, x):
    for ratio in [jnp.nan, 0.0, -0.5, 1.001, jnp.inf]:
        assert jnp.isnan(function(x, jnp.float32(ratio), 1.0))
    for variance in [jnp.nan, 0.0, -1.0, jnp.inf]:
        assert jnp.isnan(function(x, 0.5, jnp.float32(variance)))
    assert jnp.isnan(function(jnp.nan, 0.5))


def test_probabilities_out_of_range_give_nan():
    assert jnp.isnan(mp.ppf(jnp.array([-0.1, 1.1, jnp.inf, -jnp.inf]), 0.5)).all()


@pytest.mark.parametrize("number", [float, np.float32, np.float64])
@pytest.mark.parametrize("function", [mp.pdf, mp.cdf, mp.ppf, lambda _, *law: mp.support(*law)])
def test_numbers_out_of_range_are_errors(function, number):
    for ratio in [0, -1, 1.5, math.nan, math.inf]:
        with pytest.raises(ValueError, match=r"`ratio` must be in \(0, 1\]"):
            function(0.5, number(ratio), 1.0)
    for variance in [0, -1, math.nan, math.inf]:
        with pytest.raises(ValueError, match="`variance` must be positive and finite"):
            function(0.5, 0.5, number(variance))


@settings(max_examples=30)
@given(q=st.floats(0.01, 0.99), ratio=st.floats(0.01, 1.0))
def test_eager_and_compiled_agree(q, ratio):
    x = mp.ppf(q, ratio)
    # 1e-5: fused operations may round differently; next to an edge of a narrow support.
    np.testing.assert_allclose(ppf(q, ratio), x, rtol=1e-5)
    np.testing.assert_allclose(cdf(x, ratio), mp.cdf(x, ratio), atol=1e-5)
    np.testing.assert_allclose(pdf(x, ratio), mp.pdf(x, ratio), rtol=1e-4)
