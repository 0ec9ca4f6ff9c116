"""Training and evaluation of a small network on images that lie on the device."""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rmtjax
from experiments.data import Dataset

# The initialisation of the published runs (PyTorch's): uniform, of variance 1 / (3 inputs).
_initial = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class MLP(nn.Module):
    """Dense layers with ReLU between them; the logits are linear.

    Dropout acts on the hidden layers, and only where `apply` is given a key for it.
    """

    widths: tuple[int, ...]  # of the hidden layers
    classes: int = 10
    dropout: float = 0.0
    relu_logits: bool = False  # the mistake of the first papers' code, to study it
    initial_variance: float = 1 / 3  # of an entry of a kernel, times its inputs
    centred: bool = False

    @nn.compact
    def __call__(self, images):
        """Logits of images of any shape; bytes are scaled to [0, 1], or [-1, 1] if centred."""
        initial = nn.initializers.variance_scaling(self.initial_variance, "fan_in", "uniform")
        dropout = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        hidden = images.reshape(images.shape[0], -1).astype(jnp.float32) / 255
        hidden = 2 * hidden - 1 if self.centred else hidden
        for width in self.widths:
            hidden = dropout(nn.relu(nn.Dense(width, kernel_init=initial)(hidden)))
        logits = nn.Dense(self.classes, kernel_init=initial)(hidden)
        return nn.relu(logits) if self.relu_logits else logits


class CNN(nn.Module):
    """Convolutions of 3x3, each halved by max pooling, then a dense layer; linear logits.

    The first convolution has a stride of 2, so that the costly ones see few pixels.
    """

    channels: tuple[int, ...] = (32, 64)
    width: int = 256  # of the dense hidden layer
    classes: int = 10

    @nn.compact
    def __call__(self, images):
        """Logits of images (batch, 28, 28); bytes are scaled to [0, 1]."""
        hidden = images[..., None].astype(jnp.float32) / 255
        for depth, channels in enumerate(self.channels):
            strides = 1 if depth else 2
            hidden = nn.Conv(channels, (3, 3), strides, kernel_init=_initial)(hidden)
            hidden = nn.max_pool(nn.relu(hidden), (2, 2), (2, 2))
        hidden = nn.relu(
            nn.Dense(self.width, kernel_init=_initial)(hidden.reshape(len(hidden), -1))
        )
        return nn.Dense(self.classes, kernel_init=_initial)(hidden)


class Split(NamedTuple):
    """Images and labels on the device."""

    images: jax.Array
    labels: jax.Array


def to_device(dataset: Dataset, label_noise: float, seed: int) -> tuple[Split, Split]:
    """Training and test data, a share of the training labels redrawn at random."""
    labels = dataset.train_labels.astype(np.int32)
    generator = np.random.default_rng(seed)
    redrawn = generator.random(labels.size) < label_noise
    labels = np.where(redrawn, generator.integers(0, 10, labels.size, np.int32), labels)
    train = Split(jnp.asarray(dataset.train_images), jnp.asarray(labels))
    test = Split(jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels, jnp.int32))
    return train, test


def on_devices(count: int, tree: Any, axis: int | None = None) -> Any:
    """A tree whole on each of the first devices, or with its arrays divided along an axis."""
    mesh = Mesh(np.array(jax.devices()[:count]), "data")
    spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "data")
    return jax.device_put(tree, NamedSharding(mesh, spec))


def batches(key: jax.Array, size: int, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """An epoch's shuffled indices and their weights; the last batch is padded with 0."""
    steps = -(-size // batch_size)
    order = jnp.resize(jax.random.permutation(key, size), (steps * batch_size,))
    weights = jnp.arange(steps * batch_size) < size
    shape = (steps, batch_size)
    return order.reshape(shape), weights.reshape(shape).astype(jnp.float32)


def losses(module: nn.Module, params, images, labels, key: jax.Array | None = None):
    """Cross-entropy and correctness of each image; with dropout if there is a key for it."""
    rngs = None if key is None else {"dropout": key}
    logits = rmtjax.linen.apply(module, {"params": params}, images, rngs=rngs)
    correct = jnp.argmax(logits, axis=-1) == labels
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), correct


def make_epoch(
    module: nn.Module, optimizer: optax.GradientTransformation, *, scan: bool = True
) -> Callable:
    """A compiled epoch: `(params, opt_state, split, order, weights)` to the new pair, loss.

    A key may follow: it is what modules with dropout need. Without `scan` the steps are
    compiled one by one: XLA runs a convolution in a loop on a CPU several times slower.
    """

    def step(carry, batch, split: Split):
        params, opt_state = carry
        index, weight, key = batch
        images, labels = split.images[index], split.labels[index]

        def mean_loss(params):
            loss, _ = losses(module, params, images, labels, key)
            return jnp.sum(weight * loss) / jnp.sum(weight)

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    single = jax.jit(step, donate_argnums=0)

    def epoch(params, opt_state, split: Split, order, weights, key=None):
        keys = None if key is None else jax.random.split(key, len(order))
        carry, batches = (params, opt_state), (order, weights, keys)
        if scan:
            carry, history = jax.lax.scan(partial(step, split=split), carry, batches)
            return *carry, history.mean()
        history = []
        for index in range(len(order)):
            carry, loss = single(carry, jax.tree.map(itemgetter(index), batches), split)
            history.append(loss)
        return *carry, jnp.stack(history).mean()

    return jax.jit(epoch, donate_argnums=(0, 1)) if scan else epoch


@partial(jax.jit, static_argnums=(0,))
def _accuracy(module: nn.Module, params: Any, split: Split):
    _, correct = losses(module, params, split.images, split.labels)
    return 100 * correct.mean()


def accuracy(module: nn.Module, params: Any, split: Split) -> float:
    """Share of images classified rightly, in %; all of them count."""
    return float(_accuracy(module, params, split))


@jax.jit
def _truncate(kernel, rank):
    return rmtjax.truncate_matrix(kernel, rank)


def truncate_at(params: Any, path: str, rank: int) -> Any:
    """The tree with one kernel truncated to a rank, which may be 0."""

    def visit(key, leaf):
        here = jax.tree_util.keystr(key, simple=True, separator="/")
        return _truncate(leaf, rank) if here == path else leaf

    return jax.tree_util.tree_map_with_path(visit, params)
