"""The networks of the tracks. Their dropout and width are fields, so that arms can change them."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

SLOPE = 25.0  # of the surrogate derivative, as the authors of 2211.10725 have it


class MLP(nn.Module):
    """Three hidden layers with ReLU."""

    width: int = 256
    dropout: float = 0.0
    outputs: int = 10

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        for _ in range(3):
            x = nn.relu(nn.Dense(self.width)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.outputs)(x)


class CNN(nn.Module):
    """Two convolutions with pooling, and two dense layers."""

    width: int = 256
    dropout: float = 0.0
    channels: tuple[int, int] = (16, 32)

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        x = x[..., None]
        for features in self.channels:
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(10)(x)


class ThinCNN(nn.Module):
    """Three convolutions, of which two pool, and a dense layer of some width."""

    width: int = 64
    dropout: float = 0.0
    channels: tuple[int, int, int] = (16, 32, 64)

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        x = x[..., None]
        for i, features in enumerate(self.channels):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2)) if i < 2 else x
        x = nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(10)(x)


class Block(nn.Module):
    """A block of a transformer: attention and two dense layers, each after a norm."""

    width: int
    heads: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = x + drop(nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x)))
        hidden = nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))
        return x + drop(nn.Dense(self.width)(hidden))


class ViT(nn.Module):
    """A vision transformer: pieces of 2 x 2 pixels, blocks, and a mean over the pieces."""

    width: int = 64
    dropout: float = 0.0
    depth: int = 3
    heads: int = 4

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        n, h, w = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2).transpose(0, 1, 3, 2, 4).reshape(n, -1, 4)
        x = nn.Dense(self.width)(x)
        x = x + self.param("places", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(self.depth):
            x = Block(self.width, self.heads, self.dropout)(x, train)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


class LeNet5(nn.Module):
    """LeNet5 as in 2205.13571: 430,500 weights in four layers, and biases."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        del train
        x = x[..., None]
        for features in (20, 50):
            x = nn.relu(nn.Conv(features, (5, 5), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(500)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class JointLSTM(nn.RNNCellBase):
    """An LSTM cell whose four gates are side by side in one kernel of inputs and one of states.

    z = x W_x + h W_h + b; c = f c + i g; h = o tanh(c), with sigmoids for i, f and o.
    """

    features: int
    num_gates = 4

    def setup(self):  # noqa: D102
        self.of_inputs = nn.Dense(4 * self.features)
        self.of_state = nn.Dense(4 * self.features, use_bias=False)

    def __call__(self, carry, inputs):  # noqa: D102
        c, h = carry
        gates = self.of_inputs(inputs) + self.of_state(h)
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        # A forget gate that begins open, as in Flax, lets gradients pass.
        c = nn.sigmoid(f + 1) * c + nn.sigmoid(i) * jnp.tanh(g)
        h = nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):  # noqa: D102
        del rng
        zeros = jnp.zeros((*input_shape[:-1], self.features))
        return zeros, zeros

    @property
    def num_feature_axes(self) -> int:
        """The axes of a sample's features."""
        return 1


class JointGRU(nn.RNNCellBase):
    """A GRU cell whose three gates are side by side in one kernel of inputs and one of states."""

    features: int
    num_gates = 3

    def setup(self):  # noqa: D102
        self.of_inputs = nn.Dense(3 * self.features)
        self.of_state = nn.Dense(3 * self.features, use_bias=False)

    def __call__(self, h, inputs):  # noqa: D102
        (r, z, n), (hr, hz, hn) = (
            jnp.split(part, 3, axis=-1) for part in (self.of_inputs(inputs), self.of_state(h))
        )
        update = nn.sigmoid(z + hz)
        h = (1 - update) * jnp.tanh(n + nn.sigmoid(r + hr) * hn) + update * h
        return h, h

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):  # noqa: D102
        del rng
        return jnp.zeros((*input_shape[:-1], self.features))

    @property
    def num_feature_axes(self) -> int:
        """The axes of a sample's features."""
        return 1


class Letters(nn.Module):
    """A recurrent network that tells the next letter at each place of a text."""

    vocabulary: int
    width: int = 96
    dropout: float = 0.0
    cell: Callable[..., nn.RNNCellBase] = JointLSTM

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        x = jax.nn.one_hot(x, self.vocabulary)
        hidden = nn.RNN(self.cell(self.width, name="cell"))(x)
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return nn.Dense(self.vocabulary)(hidden)


@jax.custom_jvp
def spike(potential):
    """Returns 1 above 0 and 0 elsewhere; its derivative is that of a fast sigmoid."""
    return (potential > 0).astype(potential.dtype)


@spike.defjvp
def _spike_jvp(primals, tangents):
    (potential,), (moved,) = primals, tangents
    return spike(potential), moved / jnp.square(1 + SLOPE * jnp.abs(potential))


class Spiking(nn.Module):
    """The network of `MLP`, with leaky integrate-and-fire neurons in place of ReLU.

    U <- beta U + W x - S, and S = 1 where U > 1, else 0: reset by subtraction, over some steps with
    a constant input. The outputs do not spike; their mean potential is the logit.
    """

    width: int = 256
    dropout: float = 0.0
    outputs: int = 10
    steps: int = 6

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        layers = [nn.Dense(self.width, name=f"Dense_{i}") for i in range(3)]
        layers.append(nn.Dense(self.outputs, name="Dense_3"))
        leaks = [
            self.param(f"leak_{i}", nn.initializers.constant(0.9), (layer.features,))
            for i, layer in enumerate(layers)
        ]
        leaks = [jnp.clip(leak, 0, 1)[None] for leak in leaks]
        # Dropout has one mask for all steps, so that a neuron is out for a whole sample.
        shape = (len(x), self.width)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        masks = [drop(jnp.ones(shape)) for _ in layers[:-1]]
        potentials = [jnp.zeros((len(x), layer.features)) for layer in layers]
        spikes = [jnp.zeros_like(potential) for potential in potentials]
        first, total = layers[0](x), 0.0  # the input is constant
        for _ in range(self.steps):
            signal = first
            for i, layer in enumerate(layers):
                current = signal if i == 0 else layer(signal)
                potentials[i] = leaks[i] * potentials[i] + current - spikes[i]
                if i < len(layers) - 1:
                    spikes[i] = spike(potentials[i] - 1)
                    signal = spikes[i] * masks[i]
            total += potentials[-1]
        return total / self.steps
