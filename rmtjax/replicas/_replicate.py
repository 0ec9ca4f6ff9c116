"""Makes replicas of a tree, and deals samples to them, for a training loop that merges them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int, PyTree

from rmtjax._axes import native
from rmtjax._modes import in_usual_modes
from rmtjax.planning import check_count, is_abstract


def _check_replicas(k: Any) -> None:
    """Raises an error unless the number of replicas is a Python integer of at least 2."""
    if isinstance(k, jax.Array):
        raise TypeError(f"`k` must be a Python integer, since it is a shape, got {k!r}.")
    check_count("k", k, 2)


@in_usual_modes
def replicate(tree: PyTree, k: int) -> PyTree:
    """Returns k replicas of a tree as one tree whose arrays have a leading axis of k.

    Give it whatever one network trains with: parameters, the state of the optimizer, a `TrainState`
    of Flax or an `nnx.State`. Random keys with a dtype of their own, from `jax.random.key`, are
    split. All else is the same in each replica.

    Replicas must not share their draws: a dropout mask in common would look like agreement. Keys
    of the older form, from `jax.random.PRNGKey`, cannot be told from numbers. Split these yourself.

    Args:
      tree: Any tree of arrays and numbers. `None` stays.
      k: Number of replicas, at least 2.

    Returns:
      A tree of the same structure. Its leaves have the shape (k, ...) and their dtype.

    Raises:
      ValueError, TypeError: `k` is not an integer of at least 2.

    Examples:
      >>> import jax, rmtjax
      >>> tree = {"kernel": jax.numpy.ones((3, 4)), "dropout": jax.random.key(0)}
      >>> replicas = rmtjax.replicate(tree, 2)
      >>> replicas["kernel"].shape, replicas["dropout"].shape
      ((2, 3, 4), (2,))
      >>> bool(replicas["dropout"][0] == replicas["dropout"][1])
      False
    """
    _check_replicas(k)
    if is_abstract(tree):
        return jax.eval_shape(lambda tree: replicate(tree, k), tree)

    def copy(leaf):
        leaf = jnp.asarray(native(leaf))
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(leaf[None], (k, *leaf.shape))
        keys = jax.vmap(lambda key: jax.random.split(key, k))(leaf.reshape(-1))
        return jnp.moveaxis(keys, 1, 0).reshape(k, *leaf.shape)

    return jax.tree.map(copy, tree)


def deal(key: ArrayLike, size: int, k: int) -> Int[Array, "k samples"]:
    """Deals the indices of samples to k replicas: a random order, cut into k equal parts.

    No sample is in two parts. Deal once for each period between two merges, with a new key, so that
    all replicas see all samples in the course of training. Within a period a part may be trained on
    several times, in other orders.

    Args:
      key: Of `jax.random`. It decides on the order.
      size: Number of samples, at least k.
      k: Number of replicas, at least 2.

    Returns:
      Indices in [0, size), of shape (k, size // k), the order of the last axis random. The
      `size % k` samples that are left over are others with each key.

    Raises:
      ValueError, TypeError: `k` or `size` is out of range, or `key` is not a key.

    Examples:
      >>> import jax, rmtjax
      >>> parts = rmtjax.deal(jax.random.key(0), 1001, 2)
      >>> parts.shape, len(set(parts.ravel().tolist()))
      ((2, 500), 1000)
    """
    _check_replicas(k)
    if np.ndim(size) or not isinstance(size, int | np.integer) or size < k:
        raise ValueError(f"`size` must be an integer of at least `k`, {k} samples, got {size!r}.")
    if not hasattr(key, "dtype"):
        raise TypeError(f"`key` must be a key, as of `jax.random.key(0)`, got {key!r}.")
    share = int(size) // k
    return jax.random.permutation(key, int(size))[: share * k].reshape(k, share)
