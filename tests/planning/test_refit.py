"""Factors refitted on the outputs of the dense kernel: the least squares of the rows themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.plan_cases import Count

import rmtjax
from rmtjax import Factors, KernelAxes
from rmtjax.moments import Moments, sums_of_rows

DRAW = np.random.default_rng(0)
X = (DRAW.normal(size=(400, 60)) * 10.0 ** DRAW.uniform(-1, 1, 60) + 2).astype(np.float32)
W = DRAW.normal(size=(60, 80)).astype(np.float32)
RULE = {"rule": Count(8), "min_size": 1, "multiple": 1}


def moments_of(x, path="kernel", **options):
    stack = x if x.ndim == 3 else x[None]
    return Moments({path: sums_of_rows(jnp.asarray(stack))}, {}, ((path, path),), **options)


def thin(params, **options):
    return rmtjax.factorize(params, rmtjax.plan(params, **RULE, **options))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_right_factor_is_the_least_squares_of_the_rows(dtype):
    factors = thin({"kernel": W})["kernel"]
    factors = Factors(*(jnp.asarray(part, dtype) for part in factors))
    again = rmtjax.refit({"kernel": W}, {"kernel": factors}, moments_of(X, shrinkage=0.0))["kernel"]
    assert again.left is factors.left
    assert again.right.dtype == dtype
    hidden, wide = (X.astype(np.float64) @ np.asarray(a, np.float64) for a in (factors.left, W))
    expected = np.linalg.lstsq(hidden, wide, rcond=None)[0]
    # Moments in float32, and the result in the dtype of the factors.
    atol = {"float32": 1e-4, "bfloat16": 2e-2}[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(again.right, np.float64), expected, atol=atol)


def test_the_bias_takes_up_the_mean_if_moments_are_centred():
    params = {"kernel": W, "bias": np.ones(80, np.float32)}
    factored = thin(params)
    again = rmtjax.refit(params, factored, moments_of(X, shrinkage=0.0, centred=True))
    hidden = np.column_stack(
        [X.astype(np.float64) @ np.asarray(factored["kernel"].left), np.ones(400)]
    )
    expected = np.linalg.lstsq(hidden, X.astype(np.float64) @ W + 1, rcond=None)[0]
    np.testing.assert_allclose(
        again["kernel"].right, expected[:-1], atol=1e-3 * np.abs(expected).max()
    )
    np.testing.assert_allclose(again["bias"], expected[-1], atol=2e-3 * np.abs(expected).max())
    raw = rmtjax.refit(params, factored, moments_of(X))
    assert raw["bias"] is factored["bias"]


def test_factors_that_were_cut_by_output_stay():
    moments = moments_of(X, shrinkage=0.0)
    plan = rmtjax.plan({"kernel": W}, moments=moments, **RULE)
    factored = rmtjax.factorize({"kernel": W}, plan, moments=moments)
    again = rmtjax.refit({"kernel": W}, factored, moments)["kernel"]
    products = [np.asarray(one.left @ one.right) for one in (factored["kernel"], again)]
    np.testing.assert_allclose(*products, atol=1e-3)  # float32, entries of about 1


def test_stacks_and_kernels_without_factors_or_moments():
    stack = np.random.default_rng(1).normal(size=(2, 60, 80)).astype(np.float32)
    axes = {"a/kernel": KernelAxes((1,), (2,), (0,))}
    params = {"a": {"kernel": stack}, "b": {"kernel": W}, "c": {"kernel": W.T}}
    factored = thin(params, axes=axes) | {"c": {"kernel": W.T}}
    rows = np.stack([X, X[::-1] * np.linspace(0, 2, 60, dtype=np.float32)])
    moments = moments_of(rows, "a/kernel", shrinkage=0.0)
    again = rmtjax.refit(params, factored, moments, axes=axes)
    assert again["b"]["kernel"] is factored["b"]["kernel"]
    assert again["c"]["kernel"] is factored["c"]["kernel"]
    for place in range(2):
        hidden = rows[place].astype(np.float64) @ np.asarray(factored["a"]["kernel"].left[place])
        expected = np.linalg.lstsq(
            hidden, rows[place].astype(np.float64) @ stack[place], rcond=None
        )[0]
        seen = again["a"]["kernel"].right[place]
        np.testing.assert_allclose(seen, expected, atol=1e-3 * np.abs(expected).max())


def test_other_trees_are_refused():
    factors = jax.tree.map(lambda a: a[:, :40], thin({"kernel": W}))
    with pytest.raises(
        ValueError, match=r"`factored` must have factors of shape \(60, 80\) for 'ker"
    ):
        rmtjax.refit({"kernel": W}, factors, moments_of(X))
