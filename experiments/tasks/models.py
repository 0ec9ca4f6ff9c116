"""The networks of the tasks: small, with the layers and the normalization of their kind."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class MLP(nn.Module):
    """Dense layers with ReLU."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        del train
        x = x.reshape(len(x), -1)
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class CNN(nn.Module):
    """Two convolutions with pooling, and two dense layers."""

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        del train
        x = x[..., None]
        for features in (32, 64):
            x = nn.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class ResNet(nn.Module):
    """Residual blocks of convolutions with BatchNorm."""

    features: tuple[int, ...] = (64, 64)

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        norm = lambda: nn.BatchNorm(not train, momentum=0.9)
        conv = lambda width, strides=1: nn.Conv(width, (3, 3), strides, use_bias=False)
        x = nn.relu(norm()(conv(64, 2)(x[..., None])))
        for width in self.features:
            y = norm()(conv(width)(nn.relu(norm()(conv(width)(x)))))
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class _Block(nn.Module):
    """One layer of a transformer, as `nn.scan` takes it."""

    width: int

    @nn.compact
    def __call__(self, x, _):
        attend = nn.MultiHeadDotProductAttention(4, deterministic=True, name="attention")
        x = x + attend(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(hidden), None


class ScannedTransformer(nn.Module):
    """A transformer over pairs of rows of an image, its layers scanned."""

    width: int = 128
    layers: int = 2

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        del train
        x = nn.Dense(self.width)(x.reshape(len(x), -1, 28))
        x = x + self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        scanned = nn.scan(
            _Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        x, _ = scanned(self.width, name="layers")(x, None)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class Recurrent(nn.Module):
    """A recurrent cell over a sequence; its last output, or all of them."""

    cell: Callable[..., nn.RNNCellBase]
    width: int
    outputs: int
    vocabulary: int = 0  # of tokens; 0 for sequences of numbers
    every: bool = False  # an output at each place

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        del train
        embed = nn.Embed(self.vocabulary, self.width) if self.vocabulary else nn.Dense(self.width)
        x = embed(x)
        outputs: Any = nn.RNN(self.cell(self.width))(x)
        return nn.Dense(self.outputs)(outputs if self.every else outputs[:, -1])


class VAE(nn.Module):
    """A variational autoencoder with dense layers."""

    width: int = 512
    latent: int = 16

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        x = x.reshape(len(x), -1)
        hidden = nn.relu(nn.Dense(self.width)(x))
        mean, log_variance = jnp.split(nn.Dense(2 * self.latent)(hidden), 2, axis=-1)
        # The test, at the mean, has no noise.
        noise = jax.random.normal(self.make_rng("latent"), mean.shape) if train else 0.0
        hidden = nn.relu(nn.Dense(self.width)(mean + jnp.exp(log_variance / 2) * noise))
        return nn.Dense(x.shape[-1])(hidden), mean, log_variance


class Mixer(nn.Module):
    """MLP-Mixer over patches of an image."""

    width: int = 128
    layers: int = 2

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        del train
        x = nn.Conv(self.width, (4, 4), (4, 4))(x[..., None])
        x = x.reshape(len(x), -1, self.width)
        for _ in range(self.layers):
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(64)(y)))
            x = x + y.swapaxes(1, 2)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class _NnxBlock(nnx.Module):
    """One layer of a transformer, in nnx."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class NnxTransformer(nnx.Module):
    """A transformer over pairs of rows of an image, in nnx."""

    def __init__(self, pairs: int, width: int, rngs: nnx.Rngs):
        self.embed = nnx.Linear(28, width, rngs=rngs)
        self.position = nnx.Param(jax.random.normal(rngs.params(), (1, pairs, width)) * 0.02)
        self.blocks = nnx.List([_NnxBlock(width, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):  # noqa: D102
        x = self.embed(x.reshape(len(x), -1, 28)) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))
