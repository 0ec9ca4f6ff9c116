"""Replicas as one tree with a leading axis, checked against the tree from which they started."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rmtjax._axes import native
from rmtjax._sharding import beside
from rmtjax.planning import path_name


def check_arrays(name: str, tree: PyTree) -> None:
    """Raises TypeError for a leaf without values, or without a shape."""
    for key, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.ShapeDtypeStruct) or not (
            hasattr(leaf, "shape") or isinstance(leaf, bool | int | float | complex)
        ):
            raise TypeError(
                f"`{name}` must be a tree of arrays, got {leaf!r} at {path_name(key)!r}. For "
                "shapes alone, call `jax.eval_shape(rmtjax.merge_replicas, ...)`."
            )


def _check_structure(name: str, tree: PyTree, start: PyTree) -> None:
    found, wanted = jax.tree.structure(tree), jax.tree.structure(start)
    if found != wanted:
        raise ValueError(f"`{name}` must have the structure of `start`, {wanted}, got {found}.")


def _check_list(trees: list, start: PyTree) -> None:
    if len(trees) < 2:
        raise ValueError(
            f"`replicas` must be at least 2 trees, got {len(trees)}: one replica has no other to "
            "agree with."
        )
    shapes = [(path_name(key), np.shape(leaf)) for key, leaf in _leaves(start)]
    for index, tree in enumerate(trees):
        name = f"replicas[{index}]"
        _check_structure(name, tree, start)
        check_arrays(name, tree)
        for (path, shape), (_, leaf) in zip(shapes, _leaves(tree), strict=True):
            if np.shape(leaf) != shape:
                raise ValueError(
                    f"`{name}` must have the shapes of `start`, got {np.shape(leaf)} in the place "
                    f"of {shape} at {path!r}."
                )


def _check_axis(replicas: PyTree, start: PyTree) -> None:
    check_arrays("replicas", replicas)
    count = None
    for (key, leaf), (_, one) in zip(_leaves(replicas), _leaves(start), strict=True):
        shape, wanted = np.shape(leaf), np.shape(one)
        count = (shape or (0,))[0] if count is None else count
        if shape != (count, *wanted):
            raise ValueError(
                f"`replicas` must have a leading axis before the shapes of `start`, got {shape} "
                f"for {wanted} at {path_name(key)!r}, and {count} replicas in the first leaf. Give "
                "`start` first, then the replicas as one tree or as a list of trees."
            )
        if count < 2:
            raise ValueError(
                f"`replicas` must have a leading axis of at least 2, got {shape} at "
                f"{path_name(key)!r}: one replica has no other to agree with."
            )


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def stack_replicas(start: PyTree, replicas: Any) -> PyTree:
    """Returns replicas as one tree of JAX arrays with a leading axis.

    A list or tuple is one of replicas, unless it has the structure of `start` itself.
    """
    same = jax.tree.structure(replicas) == jax.tree.structure(start)
    if isinstance(replicas, list | tuple) and not same:
        trees = list(replicas)
        _check_list(trees, start)
        gather = lambda one, *leaves: jnp.stack([beside(leaf, one) for leaf in leaves])
        return jax.tree.map(gather, start, *trees)
    _check_structure("replicas", replicas, start)
    _check_axis(replicas, start)
    return jax.tree.map(lambda leaf: jnp.asarray(native(leaf)), replicas)
