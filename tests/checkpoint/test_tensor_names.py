"""Kernels of a checkpoint, known by the names of its tensors."""

import jax
import jax.numpy as jnp
import pytest

from rmtjax.checkpoint._tensor_names import is_kernel_tensor


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
