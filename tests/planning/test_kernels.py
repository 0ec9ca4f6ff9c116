"""The kernels of real Flax models: where they are, and the matrices that they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

import rmtjax
from rmtjax import KernelAxes
from rmtjax._axes import MatrixView
from rmtjax.planning import find_kernels

KEY = jax.random.key(0)
# Products of float32 summed in another order: some eps of the largest entry.
CLOSE = {"rtol": 0, "atol": 1e-5}


class Net(nn.Module):
    """One of each layer that has a kernel."""

    @nn.compact
    def __call__(self, tokens):
        hidden = nn.Embed(50, 16, name="embed")(tokens)
        hidden = nn.LayerNorm()(hidden)
        hidden = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=24)(hidden)
        hidden = nn.Conv(12, (3,))(hidden)
        hidden = nn.DenseGeneral(8, axis=(-2, -1))(hidden)
        return nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])(hidden)


def zeros(module, *args):
    """Variables of the right shapes; nothing is compiled for them."""
    shapes = jax.eval_shape(module.init, KEY, *args)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def axes_by_path(params):
    """The axes in a plan that fits nothing: no kernel is long enough."""
    return {path: row.axes for path, row in rmtjax.plan(params, min_size=10_000).items()}


def view_of(path, params):
    """A kernel at a path of a tree, with the axes that follow from its neighbours."""
    return find_kernels(params)[path]


def inputs_first(ndim):
    return KernelAxes(tuple(range(ndim - 1)), (ndim - 1,))


def test_kernels_are_found_by_path_with_their_axes():
    params = zeros(Net(), jnp.zeros((2, 10), jnp.int32))["params"]
    attention = "MultiHeadDotProductAttention_0"
    assert axes_by_path(params) == {
        "Conv_0/kernel": inputs_first(3),
        "DenseGeneral_0/kernel": None,  # its name does not say how many axes it contracts
        "Dense_0/kernel": inputs_first(2),
        "Dense_1/kernel": inputs_first(2),
        f"{attention}/key/kernel": KernelAxes((0,), (1, 2)),
        f"{attention}/out/kernel": KernelAxes((0, 1), (2,)),
        f"{attention}/query/kernel": KernelAxes((0,), (1, 2)),
        f"{attention}/value/kernel": KernelAxes((0,), (1, 2)),
        "embed/embedding": inputs_first(2),
    }


def test_kernels_of_a_bare_layer_are_found():
    params = zeros(nn.Dense(4), jnp.ones((1, 3)))["params"]
    assert axes_by_path(params) == {"kernel": KernelAxes((0,), (1,))}


def test_stacks_are_told_by_the_axes_given():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, carry, _):
            return nn.Dense(5)(carry), None

    lifted = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3}
    module, inputs = nn.scan(Block, **lifted)(), jnp.ones((2, 5))
    variables = zeros(module, inputs, None)
    (path,) = axes_by_path(variables["params"])
    axes = rmtjax.linen.kernel_axes(module, variables, inputs, None)
    row = rmtjax.plan(variables["params"], axes=axes, min_size=6)[path]
    assert row.axes == KernelAxes((1,), (2,), (0,))
    assert row.reason == "kept: short side 5 under 6"


@pytest.mark.parametrize(
    ("window", "names", "options"),
    [
        ((3,), ("NWC", "WIO", "NWC"), {}),
        ((3, 2), ("NHWC", "HWIO", "NHWC"), {"strides": 2}),
        ((2, 3), ("NHWC", "HWIO", "NHWC"), {"padding": "VALID"}),
    ],
)
def test_the_matrix_of_a_convolution_multiplies_patches(window, names, options):
    inputs = jax.random.normal(KEY, (2, *(7,) * len(window), 5))
    layer = nn.Conv(4, window, **options)
    outputs, variables = layer.init_with_output(KEY, inputs)
    (matrix,) = view_of("Conv_0/kernel", {"Conv_0": variables["params"]}).matrices()
    strides = (options.get("strides", 1),) * len(window)
    patches = lax.conv_general_dilated_patches(
        inputs, window, strides, options.get("padding", "SAME"), dimension_numbers=names
    )
    # JAX's patches are (channels, window); the rows of the matrix are (window, channels).
    patches = patches.reshape(*patches.shape[:-1], 5, -1).swapaxes(-1, -2)
    flat = patches.reshape(*patches.shape[:-2], -1)
    np.testing.assert_allclose(flat @ matrix, outputs, **CLOSE)


@pytest.mark.parametrize("name", ["query", "key", "value", "out"])
def test_the_matrices_of_attention_multiply_as_its_projections_do(name):
    module = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12, use_bias=False)
    inputs = jax.random.normal(KEY, (2, 4, 8))
    variables = module.init(KEY, inputs)
    calls = []

    def record(next_fun, args, kwargs, context):
        outputs = next_fun(*args, **kwargs)
        if context.module.name == name:
            calls.append((args[0], outputs))
        return outputs

    with nn.intercept_methods(record):
        module.apply(variables, inputs)
    ((seen, outputs),) = calls
    (matrix,) = view_of(f"{name}/kernel", variables["params"]).matrices()
    rows = seen.reshape(2, 4, -1)
    np.testing.assert_allclose(rows @ matrix, outputs.reshape(2, 4, -1), **CLOSE)


def test_the_matrix_of_a_dense_layer_is_its_kernel():
    inputs = jax.random.normal(KEY, (2, 8))
    outputs, variables = nn.Dense(5, use_bias=False).init_with_output(KEY, inputs)
    (matrix,) = view_of("kernel", variables["params"]).matrices()
    np.testing.assert_allclose(inputs @ matrix, outputs, **CLOSE)


@st.composite
def shapes_and_axes(draw):
    """A shape of up to four axes, dealt out to inputs, outputs and batch in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    order = tuple(draw(st.permutations(range(len(shape)))))
    first, last = sorted(draw(st.tuples(*[st.integers(0, len(shape))] * 2)))
    return shape, KernelAxes(order[first:last], order[last:], order[:first])


@settings(max_examples=40)  # each shape is compiled anew
@given(shapes_and_axes(), st.randoms(use_true_random=False))
def test_matrices_hold_each_entry_at_its_place_and_go_back(case, random):
    shape, axes = case
    kernel = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    view = MatrixView("kernel", jnp.asarray(kernel), axes)
    matrices = view.matrices()
    assert matrices.shape == (view.stack, view.rows, view.columns)
    index = [random.randrange(size) for size in shape]
    place = [0, 0, 0]
    for position, group in enumerate((axes.batch, axes.inputs, axes.outputs)):
        for axis in group:
            place[position] = place[position] * shape[axis] + index[axis]
    assert np.asarray(matrices)[tuple(place)] == kernel[tuple(index)]
    np.testing.assert_array_equal(view.from_matrices(matrices), kernel)


def test_an_entry_of_axes_that_names_none_is_refused():
    for named in ((0, 1), "io", 3):
        with pytest.raises(TypeError, match=r"`axes` must have `rmtjax.KernelAxes` .* 'a/kernel'"):
            find_kernels({"a": {"kernel": np.ones((3, 4))}}, axes=lambda *_: named)  # noqa: B023


@pytest.mark.parametrize(
    "axes",
    [
        KernelAxes((0,), ()),
        KernelAxes((0,), (0,)),
        KernelAxes((0,), (2,)),
        KernelAxes((0,), (-1,)),
        KernelAxes((0,), (1,), (1,)),
    ],
    ids=str,
)
def test_axes_that_are_not_the_kernels_are_refused(axes):
    params = {"Dense_0": {"kernel": jnp.ones((4, 3))}}
    with pytest.raises(ValueError, match=r"`axes` must name each of the 2 axes of 'Dense_0/kern"):
        rmtjax.plan(params, axes=lambda path, leaf: axes)
