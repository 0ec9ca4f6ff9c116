"""Bounds on changes of predictions, against what float64 measures: never violated."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.certificate_cases import (
    ACTIVATIONS,
    change_kernels,
    check_bounds,
    compiled,
    cross_entropy,
    halve,
    LAYERS,
    make_case,
    make_chain,
    run_in_float64,
)
from helpers.slow import slow_except
from hypothesis import given, settings, strategies as st

from rmtjax.certificate import certify, operator_norm

CHAINS = [  # of width 1 norms are attained
    ((1, 1, 1, 1), "relu"),
    ((6, 4), "relu"),
    ((5, 1, 3), "tanh"),
    ((7, 5, 4), "sigmoid"),
    ((40, 30, 20, 3), "relu"),
]


CHANGES = {  # by NumPy, which compiles nothing
    "truncate": lambda kernel, size: halve(kernel),
    "shift": lambda kernel, size: kernel + np.float32(size) * np.abs(kernel),
    "scale": lambda kernel, size: kernel * np.float32(1 - size),
    "zero": lambda kernel, size: 0 * kernel,
}


@functools.cache
def compiled_twice(depth, activation):
    """With labels and without, at once."""
    once = compiled(depth, activation)
    return jax.jit(lambda *trees, labels: (once(*trees, labels=labels), once(*trees)))


@pytest.mark.parametrize(("widths", "name"), CHAINS, ids=str)
@settings(max_examples=60)
@given(data=st.data())
def test_no_bound_is_ever_violated(widths, name, data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    params = make_chain(widths, rng, 10 ** draw(st.floats(-3, 2)))
    chosen = draw(st.sets(st.sampled_from(sorted(params)), min_size=1))
    change = CHANGES[draw(st.sampled_from(sorted(CHANGES)))]
    size = 10 ** draw(st.floats(-9, 0))
    after = change_kernels(params, chosen, lambda kernel: change(np.asarray(kernel), size))
    inputs = np.float32(10 ** draw(st.floats(-3, 2)) * rng.normal(size=(9, widths[0])))
    labels = rng.integers(0, widths[-1], 9)
    certificates = compiled_twice(len(params), name)(params, after, inputs, labels=labels)
    for found, known in zip(certificates, (labels, None), strict=True):
        assert np.isfinite(found.change).all()
        check_bounds(found, params, after, inputs, known, ACTIVATIONS[name][1])


EXACT = {"eager": functools.partial(certify, layers=LAYERS), "jit": compiled(3, "relu")}


@pytest.mark.parametrize("how", slow_except(("jit",), EXACT))
def test_of_the_last_layer_it_is_exact(how):
    certify = EXACT[how]
    params, inputs = make_case()
    after = change_kernels(params, {"Dense_2"}, halve)
    old, new = (run_in_float64(tree, inputs) for tree in (params, after))
    labels = old.argmax(axis=1)
    found = certify(params, after, inputs, labels=labels)
    change = check_bounds(found, params, after, inputs, labels)
    # Roundings of three products of up to 60 terms, summed up at their worst.
    np.testing.assert_allclose(found.change, change, atol=2e-3)
    rise = cross_entropy(new, labels) - cross_entropy(old, labels)
    np.testing.assert_allclose(found.loss, rise, atol=2e-3)
    margins = np.diff(np.sort(new, axis=1)[:, -2:], axis=1)[:, 0]
    clear = (labels == new.argmax(axis=1)) & (margins > 0.01)
    assert found.unchanged[clear].all()
    assert 0.1 < np.mean(found.unchanged) < 0.9


def test_layers_before_it_are_bounded_by_products_of_norms():
    params, inputs = make_case()
    after = change_kernels(params, {"Dense_0"}, halve)
    found = compiled(3, "relu")(params, after, inputs)
    kernels = [np.asarray(params[layer]["kernel"], np.float64) for layer in LAYERS]
    removed = kernels[0] - np.asarray(after["Dense_0"]["kernel"], np.float64)
    distance = np.linalg.norm(np.asarray(inputs, np.float64) @ removed, axis=1)
    distance *= np.linalg.norm(kernels[1], 2)
    columns = np.linalg.norm(kernels[2], axis=0)
    np.testing.assert_allclose(found.change, distance[:, None] * columns, rtol=1e-3)


def test_of_several_layers_the_bounds_add_up():
    params, inputs = make_case()
    trees = [params]  # the layers are cut one by one, the last first
    for layer in LAYERS[::-1]:
        trees.append(change_kernels(trees[-1], {layer}, halve))
    steps = [
        compiled(3, "relu")(before, after, inputs) for before, after in itertools.pairwise(trees)
    ]
    whole = compiled(3, "relu")(params, trees[-1], inputs)
    check_bounds(whole, params, trees[-1], inputs)
    np.testing.assert_allclose(whole.change, sum(step.change for step in steps), rtol=1e-3)
    np.testing.assert_allclose(whole.removed, sum(step.removed for step in steps), rtol=1e-3)


def test_the_tail_of_a_network_by_its_captured_inputs():
    params, inputs = make_case()
    after = change_kernels(params, {"Dense_1"}, halve)
    first = params["Dense_0"]
    captured = jnp.matmul(inputs, first["kernel"], precision="highest") + first["bias"][None]
    captured = jax.nn.relu(captured)
    tail = jax.jit(functools.partial(certify, layers=LAYERS[1:]))(params, after, captured)
    whole = compiled(3, "relu")(params, after, inputs)
    np.testing.assert_allclose(tail.change, whole.change, rtol=1e-3)
    assert (tail.change <= whole.change).all()  # which knows its inputs up to rounding only


def test_what_is_not_changed_does_not_change():
    params, inputs = make_case()
    found = compiled(3, "relu")(params, params, inputs, labels=jnp.zeros(200, jnp.int32))
    assert not found.change.any()
    assert found.loss == found.removed == 0
    assert np.mean(found.unchanged) > 0.98  # but for near ties


def test_removed_is_the_sum_of_squared_singular_values():
    params, inputs = make_case()
    after = change_kernels(params, {"Dense_1"}, halve)
    values = np.linalg.svd(np.asarray(params["Dense_1"]["kernel"], np.float64), compute_uv=False)
    found = compiled(3, "relu")(params, after, inputs)
    np.testing.assert_allclose(found.removed, (values[20:] ** 2).sum(), rtol=1e-3)


def test_noise_that_no_input_meets_certainly_lowers_the_loss():
    params, inputs = make_case()
    params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"].at[0].set(1.0)
    after = change_kernels(params, {"Dense_0"}, lambda kernel: kernel.at[0].set(0.0))
    inputs = inputs.at[:, 0].set(1e-3)
    labels = jnp.zeros(200, jnp.int32)
    found = compiled(3, "relu")(params, after, inputs, labels=labels)
    check_bounds(found, params, after, inputs, np.asarray(labels))
    assert found.lowers_loss(1e-3)
    assert not found.lowers_loss(0.0)
    any_labels = compiled(3, "relu")(params, after, inputs)
    assert any_labels.lowers_loss(1e-2)
    assert any_labels.loss > found.loss


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 4), (60, 200), (300, 50)])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e15])
def test_operator_norms_are_those_of_numpy_and_no_less(wrap, shape, scale):
    matrix = jnp.asarray(scale * np.random.default_rng(0).normal(size=shape), jnp.float32)
    norm = np.linalg.norm(np.asarray(matrix, np.float64), 2)
    actual = wrap(operator_norm)(matrix)
    assert norm <= actual <= norm * (1 + 4 * max(shape) * 1.2e-7)
    assert wrap(operator_norm)(0 * matrix) == 0
    assert jnp.isnan(wrap(operator_norm)(matrix.at[0, 0].set(jnp.nan)))
