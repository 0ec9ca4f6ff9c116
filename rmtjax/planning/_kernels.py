"""Finds the kernels of a parameter tree, and the axes that make each of them a matrix."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rmtjax._axes import factored_axes, is_factors, kernel_shape, KernelAxes, KernelLeaf, MatrixView
from rmtjax._types import Axes, Where

NAMES = ("kernel", "embedding")
# Flax's attention projects to (heads, head_dim) with these, and back with "out".
HEAD_PROJECTIONS = ("query", "key", "value")
# Objects that JAX takes for trees of parameters, with a hint, and names of layers that hold one
# factor of a kernel. The rooms that know them register them: this room does not import Flax.
_CONTAINERS: dict[type, str] = {}
_FACTOR_LAYERS: set[str] = set()


def register_container(kind: type, hint: str) -> None:
    """Registers a type that is not a parameter tree, and what to do with its objects instead."""
    _CONTAINERS[kind] = hint


def register_factor_layers(*names: str) -> None:
    """Registers names of layers that hold one factor of a kernel each, and no kernel."""
    _FACTOR_LAYERS.update(names)


def in_factor_layer(path: str) -> bool:
    """Returns True for a leaf in a layer that holds one factor of a kernel."""
    return not _FACTOR_LAYERS.isdisjoint(path.split("/"))


def is_kernel(path: str, leaf: Any) -> bool:
    """Returns True for what Flax's layers multiply by: leaves named `kernel` or `embedding`."""
    del leaf
    return path.split("/")[-1] in NAMES and not in_factor_layer(path)


def guess_axes(path: str, leaf: Any) -> KernelAxes | None:
    """Guesses the axes of a kernel of one of Flax's layers from its path and shape.

    - `Dense` (in, out), `Embed` (vocabulary, features): as they are.
    - `Conv` (*window, in, out), known by its name, and the `out` projection of attention
      (heads, head_dim, out): all axes but the last are inputs.
    - The `query`, `key` and `value` projections (in, heads, head_dim): all but the first
      are outputs.
    - Other names with more axes than two, and leaves with fewer: None.
    """
    ndim = len(kernel_shape(leaf))
    parent = path.split("/")[-2] if "/" in path else ""
    if ndim == 3 and parent in HEAD_PROJECTIONS:
        return KernelAxes((0,), (1, 2))
    if ndim == 2 or (ndim > 2 and "conv" in parent.lower()) or (ndim == 3 and parent == "out"):
        return KernelAxes(tuple(range(ndim - 1)), (ndim - 1,))
    return None


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the place of a leaf as a string, "Dense_0/kernel"."""
    # `nn.Partitioned` and `nnx.Variable` hold a leaf as their attribute `value`. The box has no
    # name in the model, so the path leaves it out.
    boxed = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
    return jax.tree_util.keystr(path[: len(path) - boxed], simple=True, separator="/")


def leaves_by_path(
    params: PyTree, chosen: Callable[[str, Any], bool] = lambda path, leaf: True
) -> dict[str, Any]:
    """Returns the chosen leaves by their paths, `Factors` as one leaf."""
    leaves: dict[str, Any] = {}
    for key, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_factors):
        path = path_name(key)
        if not chosen(path, leaf):
            continue
        if path in leaves:
            raise ValueError(f"two leaves have the path {path!r}: rename one of them.")
        leaves[path] = leaf
    return leaves


def check_container(params: PyTree) -> None:
    """Raises TypeError for a model, which JAX would take for a tree."""
    for kind, hint in _CONTAINERS.items():
        if isinstance(params, kind):
            name = type(params).__name__
            raise TypeError(f"`params` must be a tree of parameters, got the model {name}: {hint}")


def check_tree(params: PyTree) -> None:
    """Raises TypeError for a model, and for one array, which has functions of its own."""
    check_container(params)
    if isinstance(params, jax.Array | np.ndarray):
        raise TypeError(
            f"`params` must be a tree of parameters, got an array of shape {params.shape}: give "
            '`{"kernel": array}`, or call functions of arrays such as `rmtjax.spectrum`.'
        )


def _from_mask(mask: PyTree, params: PyTree) -> Callable[[str, Any], bool]:
    """Returns the choice of a tree of booleans with the structure of `params`, or a prefix."""
    spread = lambda chosen, tree: jax.tree.map(lambda _: chosen, tree, is_leaf=is_factors)
    try:
        chosen = leaves_by_path(jax.tree.map(spread, mask, params))
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`where` must be a tree of booleans with the structure of `params`, or a prefix of it; "
            f"got another structure ({error})."
        ) from error
    for path, value in chosen.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(
                "`where` must be a function `where(path, leaf)`, a regular expression or a tree of "
                f"booleans, got {value!r} at {path!r}."
            )
    return lambda path, leaf: bool(chosen[path])


def to_predicate(where: Where | None, params: PyTree) -> Callable[[str, Any], bool] | None:
    """Returns the function `where(path, leaf)` that any form of `where` stands for."""
    if where is None:
        return None
    if callable(where):
        return lambda path, leaf: bool(where(path, leaf))
    if isinstance(where, str | re.Pattern):
        pattern = re.compile(where)
        return lambda path, leaf: pattern.search(path) is not None
    return _from_mask(where, params)


def _view(path: str, leaf: Any, axes: Axes | None) -> KernelLeaf:
    """Returns a chosen leaf as a matrix, or as it is if nothing makes it one."""
    if is_factors(leaf):
        return MatrixView(path, leaf, factored_axes(leaf))
    # The table of `rmtjax.linen.kernel_axes` is both a mapping and a function. As a function it
    # also knows leaves that have been stacked since.
    if callable(axes):
        named = axes(path, leaf)
    else:
        named = axes[path] if axes and path in axes else guess_axes(path, leaf)
    if named is None:
        return KernelLeaf(path, leaf)
    return MatrixView(path, leaf, KernelAxes(*map(tuple, named)))  # lists would not be hashable


def find_kernels(
    params: PyTree, where: Where | None = None, axes: Axes | None = None
) -> dict[str, KernelLeaf]:
    """Returns the kernels of a tree by path, in its order: a `MatrixView` for each matrix.

    By default, `where` chooses the leaves named `kernel` or `embedding`, and those that `axes`
    names by path. Without `axes`, and for paths that a dictionary does not have, axes are guessed.
    """
    check_container(params)
    by_path = axes if isinstance(axes, Mapping) else {}
    default = lambda path, leaf: path in by_path or is_kernel(path, leaf)
    leaves = leaves_by_path(params, to_predicate(where, params) or default)
    return {path: _view(path, leaf, axes) for path, leaf in leaves.items()}


def map_kernels(change: Callable[[str, Any], Any], params: PyTree, paths) -> PyTree:
    """Applies `change(path, leaf)` to the leaves at `paths`; the others stay the same objects."""

    def visit(key, leaf):
        path = path_name(key)
        return change(path, leaf) if path in paths else leaf

    return jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_factors)


def obstacle(kernel: KernelLeaf, min_size: int) -> str | None:
    """Returns why a kernel has no spectrum to fit, from its shape and dtype; None if it has."""
    shape, dtype = kernel.shape, kernel.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"not floating ({dtype})"
    if jnp.finfo(dtype).bits < 16:
        return f"too few bits ({dtype})"
    if not isinstance(kernel, MatrixView):
        hint = ", unless `axes` says how it is one" if len(shape) > 2 else ""
        return f"no matrix (shape {shape}){hint}"
    if 0 in shape:
        return f"empty (shape {shape})"
    if kernel.short < min_size:
        return f"short side {kernel.short} under {min_size}"
    return None
