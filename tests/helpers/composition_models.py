"""Models that tests of composition share, and the devices to place them on."""

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx


class Net(nn.Module):
    """A convolution and two dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(24, (3, 3))(x)).mean((1, 2))
        x = nn.tanh(nn.Dense(20)(x))
        return nn.Dense(16)(x)


class NnxNet(nnx.Module):
    """Attention, and a dense layer."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.linear = nnx.Linear(32, 24, rngs=rngs)

    def __call__(self, x):
        return self.linear(jnp.tanh(self.attention(x)))
