"""Small models of the structure of Flax's own examples, and made data that they can learn.

Not their code: what matters here is which layers they are made of, and how these are lifted,
shared and normalized. Most kernels have a short side of 64, above the least that is fitted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

WIDTH, VOCABULARY, CLASSES, BATCH, LENGTH = 64, 96, 10, 16, 8


class MLP(nn.Module):
    """The smallest of all."""

    @nn.compact
    def __call__(self, x, train: bool):
        del train
        for _ in range(2):
            x = nn.relu(nn.Dense(WIDTH)(x))
        return nn.Dense(CLASSES)(x)


class CNN(nn.Module):
    """`mnist`: convolutions and pooling, then dense layers."""

    @nn.compact
    def __call__(self, x, train: bool):
        del train
        for features in (16, WIDTH):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(WIDTH)(x)))


class Residual(nn.Module):
    """Two convolutions, and a projection where the shortcut has another shape."""

    strides: int
    train: bool

    @nn.compact
    def __call__(self, x):
        norm = lambda **options: nn.BatchNorm(not self.train, momentum=0.9, **options)
        conv = lambda size, strides, **options: nn.Conv(
            WIDTH, (size, size), strides, use_bias=False, **options
        )
        y = nn.relu(norm()(conv(3, self.strides)(x)))
        y = norm(scale_init=nn.initializers.zeros)(conv(3, 1)(y))
        if x.shape != y.shape:
            x = norm(name="norm_shortcut")(conv(1, self.strides, name="conv_shortcut")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """`imagenet`: a stem, residual blocks, a mean over the positions, and a head."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(WIDTH, (3, 3), use_bias=False, name="conv_stem")(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        for strides in (1, 2):
            x = Residual(strides, train)(x)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class Block(nn.Module):
    """A step of the scan over the layers of a transformer."""

    train: bool

    @nn.compact
    def __call__(self, x, mask):
        drop = nn.Dropout(0.1, deterministic=not self.train)
        attend = nn.MultiHeadDotProductAttention(4, name="attention")
        x = x + drop(attend(nn.LayerNorm()(x), mask=mask))
        hidden = nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))
        return x + drop(nn.Dense(WIDTH)(hidden)), None


def positions():
    """Waves of several lengths, which tell where a token stands."""
    angles = np.arange(LENGTH)[:, None] / 100 ** (np.arange(0, WIDTH, 2) / WIDTH)[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], -1, dtype=np.float32)[None]


class Transformer(nn.Module):
    """`lm1b`: a causal language model that reads out by its own embedding."""

    @nn.compact
    def __call__(self, tokens, train: bool):
        embed = nn.Embed(VOCABULARY, WIDTH)
        lifted = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x, _ = lifted(train)(embed(tokens) + positions(), nn.make_causal_mask(tokens))
        return embed.attend(nn.LayerNorm()(x) / np.sqrt(WIDTH))


class TextClassifier(nn.Module):
    """`sst2`: a bidirectional LSTM, attention over its outputs, and a small MLP."""

    @nn.compact
    def __call__(self, tokens, train: bool):
        x = nn.Dropout(0.1, deterministic=not train)(nn.Embed(VOCABULARY, WIDTH)(tokens))
        lengths = jnp.sum(tokens > 0, -1)  # 0 is no word
        there, back = (nn.RNN(nn.OptimizedLSTMCell(WIDTH)) for _ in range(2))
        x: Any = nn.Bidirectional(there, back)(x, seq_lengths=lengths)
        scores = nn.Dense(1)(nn.tanh(nn.Dense(WIDTH, use_bias=False)(x)))
        x = jnp.sum(nn.softmax(scores, -2, where=tokens[..., None] > 0) * x, -2)
        return nn.Dense(2)(nn.tanh(nn.Dense(WIDTH)(x)))


class VAE(nn.Module):
    """`vae`: an encoder to a normal distribution, and a decoder of what is drawn from it."""

    @nn.compact
    def __call__(self, x, train: bool):
        del train
        hidden = nn.relu(nn.Dense(WIDTH, name="encoder")(x))
        mean, log_variance = (nn.Dense(20, name=name)(hidden) for name in ("mean", "log_variance"))
        noise = jnp.asarray(nn.initializers.normal(1.0)(self.make_rng("latent"), mean.shape))
        latent = mean + jnp.exp(log_variance / 2) * noise
        hidden = nn.relu(nn.Dense(WIDTH, name="decoder")(latent))
        return nn.Dense(x.shape[-1], name="output")(hidden), mean, log_variance


class NnxCNN(nnx.Module):
    """`CNN`, in nnx, with a normalization and dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.second = nnx.Conv(16, WIDTH, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.hidden = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        pool = lambda x: nnx.avg_pool(x, (2, 2), strides=(2, 2))
        x = pool(nnx.relu(self.norm(self.second(pool(nnx.relu(self.first(x)))))))
        return self.head(self.dropout(nnx.relu(self.hidden(x.reshape(len(x), -1)))))


class NnxTransformer(nnx.Module):
    """One layer of `Transformer`, in nnx."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.norms = nnx.Sequential(*(nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(3)))
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, tokens):
        first, second, last = self.norms.layers
        x = self.embed(tokens) + positions()
        x = x + self.dropout(self.attention(first(x), mask=nnx.make_causal_mask(tokens)))
        x = x + self.dropout(self.down(nnx.gelu(self.up(second(x)))))
        return self.embed.attend(last(x) / np.sqrt(WIDTH))


class Case(NamedTuple):
    """A model and what it is to learn.

    Attributes:
      make: Makes the module of linen, or the model of nnx.
      inputs: What it is called with.
      loss: Of its outputs.
      where: The kernels that are cut while training, of many: each takes time to compile.
    """

    make: Callable[..., Any]
    inputs: Any
    loss: Callable[[Any], Any]
    where: Callable[[str, Any], bool] | None = None


RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, CLASSES, BATCH)
# The next token is 7 further; a text is about what its first token is about.
TOKENS = (1 + (RNG.integers(0, VOCABULARY, (BATCH, 1)) + 7 * np.arange(LENGTH)) % 95).astype("i4")


def images(*shape):
    """One picture for each class, and noise."""
    pictures = RNG.normal(size=(CLASSES, *shape))
    return (pictures[LABELS] + 0.3 * RNG.normal(size=(BATCH, *shape))).astype("f4")


def classify(labels):
    return lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def next_token(logits):
    return classify(TOKENS[:, 1:])(logits[:, :-1])


VECTORS = images(WIDTH)


def reconstruct(outputs):
    """The bound on the evidence, with a normal distribution of the data."""
    decoded, mean, log_variance = outputs
    divergence = (mean**2 + jnp.exp(log_variance) - log_variance - 1).sum(-1) / 2
    return (((decoded - VECTORS) ** 2).sum(-1) / 2 + divergence).mean()


def some(*names):
    """Chooses kernels by parts of their paths."""
    return lambda path, _: any(name in path for name in names)


PICTURES = images(8, 8, 1)
LINEN = {
    "MLP": Case(MLP, VECTORS, classify(LABELS)),
    "CNN": Case(CNN, PICTURES, classify(LABELS)),
    "ResNet": Case(ResNet, images(8, 8, 3), classify(LABELS), some("0/Conv_1", "shortcut")),
    "Transformer": Case(Transformer, TOKENS, next_token, some("embedding", "Dense_0")),
    "TextClassifier": Case(
        TextClassifier,
        TOKENS,
        classify(TOKENS[:, 0] % 2),
        some("embedding", "Cell_0/ig/kernel", "Cell_0/hg/kernel"),
    ),
    "VAE": Case(VAE, VECTORS, reconstruct),
}
NNX = {
    "CNN": Case(NnxCNN, PICTURES, classify(LABELS)),
    "Transformer": Case(NnxTransformer, TOKENS, next_token, some("up", "query")),
}
