"""Training and evaluation of a small network on images that lie on the device."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmtjax
from experiments.data import Dataset

# The initialisation of the published runs (PyTorch's): uniform, of variance 1 / (3 inputs).
_initial = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class MLP(nn.Module):
    """Dense layers with ReLU between them; the logits are linear."""

    widths: tuple[int, ...]  # of the hidden layers
    classes: int = 10

    @nn.compact
    def __call__(self, images):
        """Logits of images of any shape; bytes are scaled to [0, 1]."""
        hidden = images.reshape(images.shape[0], -1).astype(jnp.float32) / 255
        for width in self.widths:
            hidden = nn.relu(nn.Dense(width, kernel_init=_initial)(hidden))
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


def batches(key: jax.Array, size: int, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """An epoch's shuffled indices and their weights; the last batch is padded with 0."""
    steps = -(-size // batch_size)
    order = jnp.resize(jax.random.permutation(key, size), (steps * batch_size,))
    weights = jnp.arange(steps * batch_size) < size
    shape = (steps, batch_size)
    return order.reshape(shape), weights.reshape(shape).astype(jnp.float32)


def losses(module: nn.Module, params, images, labels):
    """Cross-entropy and correctness of each image."""
    logits = rmtjax.linen.apply(module, {"params": params}, images)
    correct = jnp.argmax(logits, axis=-1) == labels
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), correct


def make_epoch(module: nn.Module, optimizer: optax.GradientTransformation) -> Callable:
    """A compiled epoch: `(params, opt_state, split, order, weights)` to the new pair, loss."""

    def epoch(params, opt_state, split: Split, order, weights):
        def step(carry, batch):
            params, opt_state = carry
            index, weight = batch
            images, labels = split.images[index], split.labels[index]

            def mean_loss(params):
                loss, _ = losses(module, params, images, labels)
                return jnp.sum(weight * loss) / jnp.sum(weight)

            loss, grads = jax.value_and_grad(mean_loss)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        carry, history = jax.lax.scan(step, (params, opt_state), (order, weights))
        return *carry, history.mean()

    return jax.jit(epoch, donate_argnums=(0, 1))


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
