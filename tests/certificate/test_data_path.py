"""The data-path certificate against its formula in float64, and against networks."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rmtjax
from rmtjax.certificate import data_path


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


KERNEL, INPUTS, LAST = draw(20, 16), draw(40, 20, seed=1), draw(16, 5, seed=2)


def changed_by(how):
    if how == "mask":
        return jnp.where(jnp.abs(KERNEL) > 0.3, KERNEL, 0)
    return rmtjax.truncate_matrix(KERNEL, 9)


@pytest.mark.parametrize("place", [(0, 0), (30, 0), (59, 89)])
def test_a_bound_does_not_pass_over_nan(place):
    # As the largest of many numbers does, by XLA on CPU.
    kernel, inputs = draw(60, 90).at[place].set(jnp.nan), draw(7, 60)
    found = data_path(kernel, kernel / 2, inputs)
    assert jnp.isnan(found.shift).all()
    assert jnp.isnan(found.loss)
    trees = [{"a": {"kernel": one}} for one in (kernel, kernel / 2)]
    for labels in (None, jnp.arange(7)):
        options = {"layers": ["a"], "labels": labels}
        assert jnp.isnan(rmtjax.certificate.certify(*trees, inputs, **options).loss)


def test_kernels_of_eight_bits_are_certified():
    trees = [{"a": {"kernel": (KERNEL * scale).astype("float8_e4m3fn")}} for scale in (1, 0.5)]
    old, new = (np.asarray(tree["a"]["kernel"], np.float64) for tree in trees)
    found = rmtjax.certificate.certify(*trees, INPUTS, layers=["a"])
    assert (np.abs(np.asarray(INPUTS, np.float64) @ (old - new)) <= found.change).all()


def test_magnitudes_are_counted_where_squares_overflow():
    kernel = KERNEL * 1e25
    found = data_path(kernel, kernel / 2, INPUTS, l1=0.1)
    wanted = 0.05 * np.abs(np.asarray(kernel, np.float64)).sum()
    np.testing.assert_allclose(found.penalty, wanted, rtol=1e-4)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("how", ["mask", "truncation"])
def test_the_bounds_are_their_formulas_rounded_up(wrap, how):
    changed, constants = changed_by(how), jnp.linspace(0.5, 2, 40)
    call = lambda *arrays: data_path(*arrays, lipschitz=constants, l1=0.3, l2=0.02)
    found = wrap(call)(KERNEL, changed, INPUTS)
    old, new, x = (np.asarray(array, np.float64) for array in (KERNEL, changed, INPUTS))
    shift = np.asarray(constants, np.float64) * np.abs(x @ (old - new)).max(1)
    penalty = 0.3 * (np.abs(old).sum() - np.abs(new).sum())
    penalty += 0.02 * ((old**2).sum() - (new**2).sum())
    # Bounds of rounding grow with the number of terms: some 30 eps of sums of magnitudes.
    assert (found.shift >= shift).all()
    np.testing.assert_allclose(found.shift, shift, rtol=1e-4)
    assert 2 * shift.mean() <= found.loss <= 2 * shift.mean() * (1 + 1e-4)
    assert penalty * (1 - 1e-3) <= found.penalty <= penalty


@pytest.mark.parametrize("how", ["mask", "truncation"])
def test_no_network_behind_it_breaks_the_bounds(how):
    changed = changed_by(how)
    labels = jnp.arange(40) % 5
    run = lambda kernel: jax.nn.relu(INPUTS @ kernel) @ LAST
    constant = float(jnp.abs(LAST).sum(0).max())
    found = data_path(KERNEL, changed, INPUTS, lipschitz=constant)
    before, after = run(KERNEL), run(changed)
    assert (jnp.abs(after - before).max(1) <= found.shift).all()
    loss = lambda logits: -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(40), labels])
    assert loss(after) - loss(before) <= found.loss
    top = jnp.sort(before, axis=1)
    sure = top[:, -1] - top[:, -2] > 2 * found.shift
    assert (after.argmax(1) == before.argmax(1))[sure].all()


def test_it_says_when_the_sum_must_fall():
    small = 0.01 * INPUTS
    pruned = changed_by("mask")
    assert data_path(KERNEL, pruned, small, l1=0.1).lowers
    assert not data_path(KERNEL, pruned, INPUTS, l1=0.001).lowers
    # Without a penalty nothing is certain, however small the change.
    assert not data_path(KERNEL, pruned, small).lowers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"changed": KERNEL[:3]}, r"`changed` must have the shape of `kernel`, \(20, 16\)"),
        ({"inputs": INPUTS[:, :3]}, r"`inputs` the shape \(samples, 20\); got .* \(40, 3\)"),
        ({"l1": -1.0}, "`l1` must be at least 0, got -1.0"),
    ],
    ids=["changed", "inputs", "l1"],
)
def test_wrong_arguments_are_named(arguments, message):
    given = {"kernel": KERNEL, "changed": KERNEL, "inputs": INPUTS} | arguments
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(data_path)(**given)
