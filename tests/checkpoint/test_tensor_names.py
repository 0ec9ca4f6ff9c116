"""Kernels of a checkpoint, known by the names of its tensors."""

import jax
import jax.numpy as jnp
import pytest

from rmtjax import KernelAxes
from rmtjax.checkpoint._tensor_names import is_kernel_tensor, tensor_axes


@pytest.mark.parametrize(
    ("name", "shape", "axes"),
    [
        ("Dense_0/kernel", (80, 60), KernelAxes((0,), (1,))),
        ("Conv_0.kernel", (3, 3, 8, 60), KernelAxes((0, 1, 2), (3,))),
        ("layers/kernel", (4, 80, 60), None),  # a stack, by nothing told from a convolution
        ("embeddings.word_embeddings.weight", (80, 60), KernelAxes((0,), (1,))),
        ("conv1.weight", (60, 8, 3, 3), KernelAxes((0,), (1, 2, 3))),
        ("depthwise.weight", (60, 1, 3, 3), None),
        ("experts.weight", (64, 96, 64), None),  # a stack
        ("conv.weight", (64, 96, 64), KernelAxes((0,), (1, 2))),
        ("proj.weight", (64, 96, 16), KernelAxes((0,), (1, 2))),  # as long as a window
        ("self_attn.in_proj_weight", (180, 60), KernelAxes((0,), (1,))),
        ("lstm.weight_hh_l1_reverse", (240, 60), KernelAxes((0,), (1,))),
    ],
)
def test_kernels_are_known_by_name(name, shape, axes):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert is_kernel_tensor(name, leaf)
    assert tensor_axes(name, leaf) == axes


@pytest.mark.parametrize("name", ["norm.weight", "lstm.bias_hh_l0", "position_ids", "weight_g"])
def test_what_is_no_kernel_has_no_row(name):
    assert not is_kernel_tensor(name, jax.ShapeDtypeStruct((60,), jnp.float32))
    assert not is_kernel_tensor("attention.masked_bias", jax.ShapeDtypeStruct((80, 60), jnp.int8))


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("opt_state/0/mu/Dense_0/kernel", True),
        ("opt_state.0.nu.fc.weight", True),
        ("state/opt_state/inner_states/a/inner_state/0/trace/kernel", True),
        ("0/mu/Dense_0/kernel", True),
        ("1/0/nu/Embed_0/embedding", True),
        ("encoder/mu/kernel", False),  # a layer of an autoencoder
        ("layers.0.mu.weight", False),
        ("params/mu/kernel", False),
    ],
)
def test_moments_of_an_optimizer_are_no_kernels(name, moment):
    assert is_kernel_tensor(name, jax.ShapeDtypeStruct((80, 60), jnp.float32)) != moment
