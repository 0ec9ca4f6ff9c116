"""Penalties of SVD training against NumPy in float64, and their derivatives by differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rmtjax.lowrank import hoyer, hoyer_square, orthogonality, SpectralFactors

each_way = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])


def draw(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


def make_params(dtype="float32"):
    """A matrix, a convolution and a stack, beside leaves that do not count."""
    make = lambda u, s, v: SpectralFactors(
        draw(*u, dtype=dtype), draw(*s, dtype=dtype), draw(*v, dtype=dtype)
    )
    return {
        "Dense_0": {"kernel": make((9, 5), (5,), (5, 7)), "bias": draw(7)},
        "Conv_0": {"kernel": make((3, 2, 4, 6), (6,), (6, 8))},
        "scan": {"kernel": make((2, 9, 5), (2, 5), (2, 5, 7))},
        "plain": {"kernel": draw(4, 4)},
    }


def stacks(kernel):
    rank = kernel.s.shape[-1]
    u, s, v = (np.asarray(part, np.float64) for part in (kernel.u, kernel.s, kernel.v))
    stack = s.reshape(-1, rank)
    return u.reshape(len(stack), -1, rank), stack, v.reshape(len(stack), rank, -1)


def of_vectors(kernel):
    u, s, v = stacks(kernel)
    deviation = lambda a: np.sum((np.swapaxes(a, 1, 2) @ a - np.eye(s.shape[1])) ** 2)
    return (deviation(u) + deviation(np.swapaxes(v, 1, 2))) / s.shape[1] ** 2


def of_values(power):
    def ratio(kernel):
        s = stacks(kernel)[1]
        return np.sum((np.abs(s).sum(1) / np.sqrt(np.sum(s**2, 1))) ** power - 1)

    return ratio


REFERENCE = {orthogonality: of_vectors, hoyer: of_values(1), hoyer_square: of_values(2)}
each_penalty = pytest.mark.parametrize("penalty", REFERENCE, ids=lambda f: f.__name__)


def reference(penalty, params):
    return sum(REFERENCE[penalty](params[name]["kernel"]) for name in ("Dense_0", "Conv_0", "scan"))


@each_way
@each_penalty
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sum_over_kernels_in_spectral_form(penalty, wrap, dtype):
    params = make_params(dtype)
    value = wrap(penalty)(params)
    assert (value.dtype, value.shape) == (jnp.float32, ())
    # Sums of some hundred terms of one sign in float32.
    np.testing.assert_allclose(value, reference(penalty, params), rtol=1e-5)


@each_penalty
def test_the_derivative_is_that_of_differences(penalty):
    with jax.enable_x64(True):
        params = make_params("float64")
        gradients = jax.jit(jax.grad(penalty))(params)
        move = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), params)
        at = lambda t: reference(penalty, jax.tree.map(lambda a, b: a + t * b, params, move))
        slope = (at(1e-6) - at(-1e-6)) / 2e-6
        found = sum(
            jnp.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (gradients, move)), strict=True)
        )
        np.testing.assert_allclose(found, slope, rtol=1e-6)  # h^2 and eps / h
        forward_of = jax.jit(lambda params, move: jax.jvp(penalty, (params,), (move,)))
        _, forward = forward_of(params, move)
        np.testing.assert_allclose(forward, found, rtol=1e-12)
    assert not gradients["Dense_0"]["bias"].any()
    assert not gradients["plain"]["kernel"].any()


def spectral(s):
    eye = jnp.eye(len(s))
    return {"kernel": SpectralFactors(eye, jnp.asarray(s, jnp.float32), eye)}


@each_way
@pytest.mark.parametrize("penalty", [hoyer, hoyer_square], ids=lambda f: f.__name__)
def test_zeros_have_a_finite_derivative(penalty, wrap):
    value, slope = wrap(jax.value_and_grad(penalty))(spectral([0.0, 0.0, 0.0]))
    assert value == 0
    assert not slope["kernel"].s.any()
    value, slope = wrap(jax.value_and_grad(penalty))(spectral([3.0, 0.0, 4.0]))
    np.testing.assert_allclose(value, {hoyer: 0.4, hoyer_square: 0.96}[penalty], rtol=1e-6)
    # A zero stays: it has the smallest subgradient. By hand, with sums 7 and 25.
    by_hand = {
        hoyer: np.array([1 - 7 * 3 / 25, 0, 1 - 7 * 4 / 25]) / 5,
        hoyer_square: np.array([1 - 7 * 3 / 25, 0, 1 - 7 * 4 / 25]) * 14 / 25,
    }
    np.testing.assert_allclose(slope["kernel"].s, by_hand[penalty], atol=1e-6)


@settings(max_examples=30)
@given(
    values=st.lists(
        st.floats(-10, 10, width=32).filter(lambda x: abs(x) > 1e-3), min_size=5, max_size=5
    ),
    scale=st.sampled_from([1e-18, 1e-3, 1.0, 1e18]),
)
def test_bounds_scale_and_orthogonality_of_the_derivative(values, scale):
    """The ratio is in its bounds, has no scale, and its slope is orthogonal to the values."""
    params = spectral(np.float32(scale) * np.asarray(values, np.float32))
    for penalty, most in ((hoyer, len(values) ** 0.5 - 1), (hoyer_square, len(values) - 1)):
        value, slope = COMPILED[penalty](params)
        assert -1e-5 <= value <= most + 1e-5
        np.testing.assert_allclose(value, reference_of(values, penalty), rtol=1e-4, atol=1e-5)
        s, moved = (np.asarray(tree["kernel"].s, np.float64) for tree in (params, slope))
        assert np.isfinite(moved).all()
        assert abs(s @ moved) <= 1e-5 * np.linalg.norm(s) * np.linalg.norm(moved) + 1e-5


COMPILED = {penalty: jax.jit(jax.value_and_grad(penalty)) for penalty in (hoyer, hoyer_square)}


def reference_of(values, penalty):
    s = np.asarray(values, np.float64)
    return (np.abs(s).sum() / np.sqrt(np.sum(s**2))) ** {hoyer: 1, hoyer_square: 2}[penalty] - 1


def test_descent_on_the_penalties_gives_orthonormal_vectors_and_few_values():
    params = {"kernel": make_params()["Dense_0"]["kernel"]}
    loss = lambda params: orthogonality(params) + 0.1 * hoyer_square(params)

    @jax.jit
    def descend(params):
        step = lambda params, _: (
            jax.tree.map(lambda a, b: a - 0.1 * b, params, jax.grad(loss)(params)),
            None,
        )
        return jax.lax.scan(step, params, length=3000)[0]

    ended = descend(params)
    assert orthogonality(ended) < 1e-6
    assert hoyer(ended) < 0.2 < hoyer(params)


@each_penalty
def test_a_tree_without_such_kernels_is_an_error(penalty):
    with pytest.raises(
        ValueError, match=rf"^`{penalty.__name__}` needs a tree with `SpectralFactors`"
    ):
        penalty({"kernel": jnp.ones((3, 3))})
