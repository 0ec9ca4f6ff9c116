"""The interpreter gives the outputs of the dense kernel, and multiplies it out only if it must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import rmtjax
from rmtjax import Factors
from rmtjax.models._jaxpr_interpreter import evaluate


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


X, IMAGES = draw(4, 6), draw(2, 7, 6, 8)
MATRIX = {"w": Factors(draw(6, 3), draw(3, 5))}
HEADS = {"w": Factors(draw(6, 3), draw(3, 2, 5))}
WINDOW = {"w": Factors(draw(3, 3, 8, 2), draw(2, 5))}
STACK = {"w": Factors(draw(4, 6, 3), draw(4, 3, 5))}
DIMS = ("NHWC", "HWIO", "NHWC")
convolve = lambda x, w, dims=DIMS, **options: jax.lax.conv_general_dilated(
    x, w, (2, 1), "SAME", dimension_numbers=dims, **options
)
CASES = {
    "product": (lambda t: X @ t["w"], MATRIX),
    "kernel first": (lambda t: t["w"].T @ X.T, MATRIX),
    "kernel first, columns": (lambda t: t["w"] @ draw(5, 4), MATRIX),
    "both ways": (lambda t: jax.nn.relu(X @ t["w"]) @ t["w"].T, MATRIX),
    "einsum": (lambda t: jnp.einsum("bi,io->ob", X, t["w"]), MATRIX),
    "heads": (lambda t: jnp.einsum("bi,iho->boh", X, t["w"]), HEADS),
    "heads back": (lambda t: jnp.einsum("boh,iho->bi", draw(4, 5, 2), t["w"]), HEADS),
    "convolution": (lambda t: convolve(IMAGES, t["w"], rhs_dilation=(1, 2)), WINDOW),
    "convolution, channels first": (
        lambda t: convolve(
            jnp.moveaxis(IMAGES, -1, 1),
            jnp.transpose(t["w"], (3, 2, 0, 1)),
            ("NCHW", "OIHW", "NCHW"),
        ),
        WINDOW,
    ),
    "vmap": (lambda t: jax.vmap(lambda x: x @ t["w"])(X), MATRIX),
    "jit inside": (lambda t: jax.jit(jnp.dot)(X, t["w"]), MATRIX),
    "custom gradient": (lambda t: jax.nn.silu(X @ t["w"]), MATRIX),
    "two kernels": (lambda t: X @ t["w"] + X @ t["v"], {**MATRIX, "v": draw(6, 5)}),
}


def assert_equal(found, wanted):
    # Float32 sums of up to 72 products in another order, relative to the largest.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize(("function", "tree"), CASES.values(), ids=CASES.keys())
def test_products_with_factors_are_thin_and_right(function, tree):
    outputs, multiplied_out = evaluate(function, tree)
    assert not multiplied_out
    wanted = function(rmtjax.merge(tree))
    assert outputs.dtype == wanted.dtype
    assert_equal(outputs, wanted)
    compiled = jax.jit(lambda tree: evaluate(function, tree)[0])
    assert_equal(compiled(tree), wanted)


@pytest.mark.parametrize("name", ["both ways", "heads", "convolution"])
def test_gradients_follow_the_chain_rule(name):
    function, tree = CASES[name]
    loss = lambda outputs: jnp.sum(jnp.sin(outputs))
    found = jax.grad(lambda tree: loss(evaluate(function, tree)[0]))(tree)
    wanted = jax.grad(lambda tree: loss(function(rmtjax.merge(tree))))(tree)
    jax.tree.map(assert_equal, found, wanted)


@pytest.mark.parametrize(
    ("function", "tree"),
    [
        (lambda t: X @ (2 * t["w"]), MATRIX),
        (lambda t: jnp.einsum("i,iho->ho", X[0], t["w"]) + t["w"][0], HEADS),
        (lambda t: t["w"].T @ t["w"], MATRIX),
        (lambda t: X @ (9 * t["w"]).astype(jnp.int32).astype(jnp.float32), MATRIX),
        (lambda t: X @ t["w"].astype(jnp.int32).astype(jnp.float32), MATRIX),
        (lambda t: jnp.einsum("bi,iho->bio", X, t["w"]), HEADS),
        (lambda t: jnp.einsum("bho,iho->bhi", draw(4, 2, 5), t["w"]), HEADS),
        (
            lambda t: jnp.einsum("bi,bio->bo", X, t["w"]),
            {"w": Factors(draw(4, 6, 3), draw(4, 3, 5))},
        ),
        (lambda t: convolve(IMAGES[..., :4], t["w"][:, :, :4], feature_group_count=1), WINDOW),
        (lambda t: jax.lax.scan(lambda c, _: (c + t["w"][:, :1], None), X.T, None, 2)[0], MATRIX),
    ],
    ids=[
        "scaled",
        "sliced",
        "squared",
        "rounded",
        "cut",
        "kept",
        "one of two",
        "stack",
        "part",
        "scan",
    ],
)
def test_other_uses_multiply_the_kernel_out_and_are_right(function, tree):
    outputs, multiplied_out = evaluate(function, tree)
    assert multiplied_out
    assert_equal(outputs, function(rmtjax.merge(tree)))


def test_a_kernel_that_is_returned_is_dense():
    outputs, _ = evaluate(lambda t: (t["w"], t["w"].T), MATRIX)
    dense = rmtjax.merge(MATRIX)["w"]
    assert_equal(outputs[0], dense)
    assert_equal(outputs[1], dense.T)


def test_outputs_that_are_not_arrays_are_returned():
    outputs, multiplied_out = evaluate(
        lambda t: {"y": X @ t["w"], "name": "logits", "layers": 3}, MATRIX
    )
    assert (outputs["name"], outputs["layers"], type(outputs["layers"])) == ("logits", 3, int)
    assert not multiplied_out


def test_weak_types_stay_weak():
    tree = {**MATRIX, "scale": jnp.asarray(2.0)}
    assert tree["scale"].weak_type
    outputs, _ = evaluate(lambda t: t["scale"] * X.astype(jnp.bfloat16), tree)
    assert outputs.dtype == jnp.bfloat16


def test_low_precision_is_that_of_the_product():
    tree = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), MATRIX)
    product = lambda t: jax.lax.dot(X.astype(jnp.bfloat16), t["w"])
    wide = lambda t: jax.lax.dot(X.astype(jnp.bfloat16), t["w"], preferred_element_type=jnp.float32)
    assert evaluate(product, tree)[0].dtype == jnp.bfloat16
    assert evaluate(wide, tree)[0].dtype == jnp.float32
    # The merged kernel is rounded to bfloat16, and here the hidden values are.
    largest = float(jnp.max(jnp.abs(product(rmtjax.merge(tree)))))
    for function in (product, wide):
        found = np.asarray(evaluate(function, tree)[0], np.float32)
        wanted = np.asarray(function(rmtjax.merge(tree)), np.float32)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2**-5 * largest)


def test_the_dense_kernel_is_not_in_the_program():
    tree = {"w": Factors(draw(300, 2), draw(2, 400))}
    function = lambda tree: evaluate(lambda t: draw(5, 300) @ t["w"], tree)[0]
    text = str(jax.make_jaxpr(function)(tree))
    assert "300,400" not in text


@settings(max_examples=25)
@given(st.permutations("hio"), st.permutations("bho"), st.booleans())
def test_every_order_of_axes(kernel, outputs, contract_outputs):
    # The kernel is transposed first, from the order (i, h, o) of the factors to any other.
    transposed = lambda t: jnp.einsum(f"iho->{''.join(kernel)}", t["w"])
    if contract_outputs:
        function = lambda t: jnp.einsum(f"boh,{''.join(kernel)}->bi", draw(4, 5, 2), transposed(t))
    else:
        equation = f"bi,{''.join(kernel)}->{''.join(outputs)}"
        function = lambda t: jnp.einsum(equation, X, transposed(t))
    found, multiplied_out = evaluate(function, HEADS)
    assert not multiplied_out
    assert_equal(found, function(rmtjax.merge(HEADS)))
