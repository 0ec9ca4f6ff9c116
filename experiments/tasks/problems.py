"""The tasks: each a network, its data, its loss, and what is measured on the test set."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import rmtjax
from experiments import data
from experiments.tasks import models

Arrays = tuple[np.ndarray, np.ndarray]
Variables = tuple[Any, Any]  # parameters, and what else the network holds


class Data(NamedTuple):
    """Inputs and targets."""

    train: Arrays
    test: Arrays


class Network(NamedTuple):
    """A network as functions.

    Attributes:
      init: Makes its variables from a key.
      apply: `apply(variables, x, train, key)` returns outputs, and what else it holds.
      axes: What makes its kernels matrices.
    """

    init: Callable[[jax.Array], Variables]
    apply: Callable[..., tuple[Any, Any]]
    axes: Any


@dataclass(frozen=True)
class Task:
    """A task: the data, the loss and the schedule.

    Attributes:
      name: Of the network.
      learns: What it learns from.
      load: Reads the data.
      build: Makes the network for an example of the inputs.
      loss: The loss of outputs and targets.
      epochs, batch: How long it trains, and on how many examples in a step.
      sgd: Learning rate of SGD with momentum 0.9.
      in_points: Whether the measure is the accuracy in points; else it is the loss.
    """

    name: str
    learns: str
    load: Callable[[], Data]
    build: Callable[[Any], Network]
    loss: Callable[[Any, Any], jax.Array]
    epochs: int = 15
    batch: int = 64
    sgd: float = 0.05
    in_points: bool = field(default=True)


def from_linen(module: nn.Module) -> Callable[[Any], Network]:
    """Returns what builds the functions of a module of linen."""

    def build(example) -> Network:
        def init(key):
            keys = {"params": key, "latent": key}
            variables = dict(module.init(keys, example, train=False))
            return variables.pop("params"), variables

        def apply(variables, x, train, key):
            params, rest = variables
            outputs, changed = module.apply(
                {"params": params, **rest}, x, train=train, rngs={"latent": key}, mutable=[*rest]
            )
            return outputs, dict(changed)

        variables = jax.eval_shape(lambda: module.init(jax.random.key(0), example, train=False))
        return Network(
            init, apply, rmtjax.linen.kernel_axes(module, variables, example, train=False)
        )

    return build


def from_nnx(make: Callable[[nnx.Rngs], nnx.Module]) -> Callable[[Any], Network]:
    """Returns what builds the functions of a model of nnx."""

    def build(example) -> Network:
        del example
        model = make(nnx.Rngs(0))
        graph, _ = nnx.split(model, nnx.Param)

        def init(key):
            _, params = nnx.split(make(nnx.Rngs(key)), nnx.Param)
            return nnx.as_pure(params), {}

        def apply(variables, x, train, key):
            del train, key
            return nnx.merge(graph, variables[0])(x), {}  # pyright: ignore[reportCallIssue]

        return Network(init, apply, rmtjax.nnx.kernel_axes(model))

    return build


@cache
def images(name: str, train: int, test: int = 5000, side: int = 28) -> Data:
    """Returns images with values in [0, 1], of 28 x 28 or averaged to 14 x 14."""
    loaded, step = data.load(name, download=False), 28 // side

    def first(arrays, labels, count):
        x = arrays[:count].astype(np.float32) / 255
        x = x.reshape(len(x), side, step, side, step).mean((2, 4))
        return x, labels[:count].astype(np.int32)

    return Data(
        first(loaded.train_images, loaded.train_labels, train),
        first(loaded.test_images, loaded.test_labels, test),
    )


def pixels(name: str, train: int) -> Data:
    """Returns images that are their own targets."""
    (x, _), (y, _) = images(name, train, side=14)
    return Data((x, x), (y, y))


@cache
def text(length: int = 32, train: int = 2000, test: int = 1000) -> Data:
    """Returns pieces of Python's own help texts, and the same moved by one letter."""
    letters = np.frombuffer("".join(topics[name] for name in sorted(topics)).encode(), np.uint8)
    known = np.unique(letters)
    codes = np.searchsorted(known, letters).astype(np.int32)[: (train + test) * length + 1]
    x, y = (codes[i : i + (train + test) * length].reshape(-1, length) for i in (0, 1))
    return Data((x[:train], y[:train]), (x[train:], y[train:]))


@cache
def teacher(inputs: int = 64, train: int = 4000, test: int = 1000) -> Data:
    """Returns outputs of a network that was drawn, with 10 % of noise on the training targets."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(train + test, inputs)).astype(np.float32)
    hidden = np.tanh(x @ rng.normal(size=(inputs, 12)) / np.sqrt(inputs) * 2)
    y = hidden @ rng.normal(size=(12, 4)) / np.sqrt(12)
    noise = 0.1 * y.std() * rng.normal(size=y.shape)
    noise[train:] = 0
    y = (y + noise).astype(np.float32)
    return Data((x[:train], y[:train]), (x[train:], y[train:]))


def cross_entropy(logits, labels) -> jax.Array:
    """The mean over all places."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(outputs, targets) -> jax.Array:
    """The mean over all numbers."""
    return jnp.square(outputs - targets).mean()


def evidence_bound(outputs, x) -> jax.Array:
    """The negative bound on the evidence of images, in nats."""
    logits, mean, log_variance = outputs
    reconstruction = optax.sigmoid_binary_cross_entropy(logits, x.reshape(len(x), -1)).sum(-1)
    divergence = (mean**2 + jnp.exp(log_variance) - log_variance - 1).sum(-1) / 2
    return (reconstruction + divergence).mean()


LETTERS = 128  # more than the text has
TASKS = (
    Task(
        "MLP", "MNIST",
        lambda: images("mnist", 5000), from_linen(models.MLP((800, 800, 10))), cross_entropy,
    ),
    Task(
        "CNN", "Fashion-MNIST, 14 x 14",
        lambda: images("fashion_mnist", 3000, side=14), from_linen(models.CNN()), cross_entropy,
        epochs=20,
    ),
    Task(
        "ResNet, BatchNorm", "Fashion-MNIST, 14 x 14",
        lambda: images("fashion_mnist", 2000, side=14), from_linen(models.ResNet()), cross_entropy,
    ),
    Task(
        "transformer, scanned", "pairs of rows of MNIST, 14 x 14",
        lambda: images("mnist", 2000, side=14), from_linen(models.ScannedTransformer()),
        cross_entropy, epochs=20,
    ),
    Task(
        "transformer, nnx", "pairs of rows of MNIST, 14 x 14",
        lambda: images("mnist", 1300, side=14),
        from_nnx(lambda rngs: models.NnxTransformer(7, 128, rngs)), cross_entropy, epochs=25,
    ),
    Task(
        "LSTM", "rows of Fashion-MNIST, 14 x 14",
        lambda: images("fashion_mnist", 3000, side=14),
        from_linen(models.Recurrent(nn.OptimizedLSTMCell, 128, 10)), cross_entropy,
    ),
    Task(
        "GRU", "letters of a text", text,
        from_linen(models.Recurrent(nn.GRUCell, 128, LETTERS, LETTERS, every=True)), cross_entropy,
        epochs=30, sgd=0.5, in_points=False,
    ),
    Task(
        "VAE", "MNIST, 14 x 14", lambda: pixels("mnist", 5000), from_linen(models.VAE()),
        evidence_bound, epochs=30, sgd=0.001, in_points=False,
    ),
    Task(
        "MLP-Mixer", "Fashion-MNIST", lambda: images("fashion_mnist", 1500),
        from_linen(models.Mixer()), cross_entropy,
    ),
    Task(
        "regression MLP", "a drawn network", teacher, from_linen(models.MLP((256, 256, 4))),
        squared_error, epochs=60, in_points=False,
    ),
)  # fmt: skip
