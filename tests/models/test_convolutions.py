"""Convolutions in branches: the same numbers, and the layout that has fast code on CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import draws
from jax import lax

from rmtjax.models._convolutions import fast_convolutions

# Of inputs, kernel and outputs.
LAYOUTS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("HNWC", "IHOW", "CNHW")]


def _loss(layout, options):
    def loss(kernel, x):
        product = lax.conv_general_dilated(x, kernel, dimension_numbers=layout, **options)
        return jnp.sum(jnp.sin(jnp.tanh(product)))

    return loss


def _arrays(layout, groups=1):
    """Returns a kernel and inputs of 5 x 6 pixels."""
    sizes = {"N": 3, "C": 4, "H": 5, "W": 6}, {"H": 3, "W": 2, "I": 4 // groups, "O": 2}
    x, kernel = (tuple(sizes[i][name] for name in layout[i]) for i in range(2))
    return draws.normal(1, *kernel), draws.normal(2, *x)


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 1), "padding": ((1, 0), (2, 1)), "rhs_dilation": (1, 2)},
        {"window_strides": (1, 1), "padding": ((0, 0), (1, 0)), "lhs_dilation": (2, 1)},
        {"window_strides": (1, 2), "padding": "SAME", "feature_group_count": 2},
    ],
    ids=["same", "strides", "dilated", "groups"],
)
def test_losses_and_gradients_are_the_same(options):
    arrays = [_arrays(layout, options.get("feature_group_count", 1)) for layout in LAYOUTS]
    slopes = [jax.value_and_grad(_loss(layout, options), (0, 1)) for layout in LAYOUTS]

    @jax.jit
    def both(arrays):
        pairs = list(zip(slopes, arrays, strict=True))
        plain = [slope(*pair) for slope, pair in pairs]
        return plain, [fast_convolutions(slope)(*pair) for slope, pair in pairs]

    # Sums of 24 products in another order.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, *both(arrays))


@pytest.mark.parametrize("layout", [("NCW", "OIW", "NCW"), ("NHWDC", "HWDIO", "NHWDC")])
def test_any_number_of_axes_and_wide_sums(layout):
    sizes = {"N": 2, "C": 3, "H": 4, "W": 5, "D": 3, "I": 3, "O": 2}
    x, kernel = (draws.normal(i, *(sizes[name] for name in layout[i])) for i in range(2))
    narrow = [array.astype(jnp.bfloat16) for array in (kernel, x)]
    loss = _loss(layout, {"window_strides": (1,) * (x.ndim - 2), "padding": "SAME"})
    wide = lambda *arrays: loss(*arrays).astype(jnp.float32)
    plain, fast = jax.jit(wide)(*narrow), jax.jit(fast_convolutions(wide))(*narrow)
    np.testing.assert_allclose(fast, plain, rtol=1e-2)  # bfloat16 has 8 bits


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices take any layout")
def test_gradients_in_a_branch_have_the_fast_layout():
    layout = LAYOUTS[0]
    kernel, x = _arrays(layout)
    plain = jax.grad(_loss(layout, {"window_strides": (1, 1), "padding": "SAME"}))

    def layouts(function):
        branch = lambda goes, *arrays: lax.cond(goes, function, lambda kernel, x: kernel, *arrays)
        text = jax.jit(branch).lower(True, kernel, x).compile().as_text()
        return set(re.findall(r"dim_labels=(\S+?)[,\s]", text))

    # If XLA rewrites those in branches too one day, this module is not needed any more.
    assert layouts(plain) != {"b01f_01io->b01f"}
    assert layouts(fast_convolutions(plain)) == {"b01f_01io->b01f"}


def test_calls_are_followed_and_other_programs_are_left_alone():
    layout = LAYOUTS[0]
    kernel, x = _arrays(layout)
    inner = jax.jit(_loss(layout, {"window_strides": (1, 1), "padding": "SAME"}))
    outer = lambda kernel: {"loss": inner(kernel, x), "steps": lax.fori_loop(0, 3, jnp.add, 1)}
    found = jax.jit(fast_convolutions(outer))(kernel)
    np.testing.assert_allclose(found["loss"], inner(kernel, x), rtol=1e-5)
    assert found["steps"] == 4
