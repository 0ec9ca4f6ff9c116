"""The kernels of a parameter tree, seen as matrices, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rmtjax._axes import check_axes, KernelAxes, matrix_shape
from rmtjax._types import Axes, Where

NAMES = ("kernel", "embedding")
# Flax's attention projects to (heads, head_dim) with these, and back with "out".
HEAD_PROJECTIONS = ("query", "key", "value")
# The layers of `rmtjax.nnx` that stand for one, and are no kernels each by itself.
FACTORS = ("left_factor", "right_factor")


def is_kernel(path: str, leaf: Any) -> bool:
    """Chooses what Flax's layers multiply by: leaves named `kernel` or `embedding`."""
    del leaf
    *_, parent, name = ("", *path.split("/"))
    return name in NAMES and parent not in FACTORS


def guess_axes(path: str, leaf: Any) -> KernelAxes | None:
    """The axes of a kernel of Flax's layers, from its path and shape.

    - `Dense` (in, out), `Embed` (vocabulary, features): as they are.
    - `Conv` (*window, in, out), known by its name, and the `out` projection of attention
      (heads, head_dim, out): all axes but the last are inputs.
    - The `query`, `key` and `value` projections (in, heads, head_dim): all but the first
      are outputs.

    Nothing else in a parameter tree tells a stack of kernels, as `nn.scan` makes it, from a
    convolution: `rmtjax.linen.kernel_axes` asks the module instead.

    Returns:
      None where the leaf has fewer than two axes, or more and none of these names.
    """
    ndim = jnp.ndim(leaf)
    parent = path.split("/")[-2] if "/" in path else ""
    if ndim == 3 and parent in HEAD_PROJECTIONS:
        return KernelAxes((0,), (1, 2))
    if ndim == 2 or (ndim > 2 and "conv" in parent.lower()) or (ndim == 3 and parent == "out"):
        return KernelAxes(tuple(range(ndim - 1)), (ndim - 1,))
    return None


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's place as a string, "Dense_0/kernel".

    The box around a leaf has no name of its own: `nn.Partitioned` and `nnx.Variable` hold it
    as their attribute `value`.
    """
    boxed = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
    return jax.tree_util.keystr(path[: len(path) - boxed], simple=True, separator="/")


def check_tree(params: PyTree) -> None:
    """Refuses what JAX takes for a tree: a model of nnx, which runs by its layers, and a matrix."""
    if isinstance(params, jax.Array | np.ndarray):
        raise TypeError(
            f"`params` must be a tree of parameters, got an array of shape {params.shape}: give "
            '`{"kernel": array}`, or call `rmtjax.spectrum`, `fit_bema`, `truncate_matrix` and '
            "`factorize_matrix`."
        )
    if any(kind.__module__.startswith("flax.nnx") for kind in type(params).__mro__) and callable(
        getattr(params, "set_attributes", None)
    ):
        raise TypeError(
            f"`params` must be a tree of parameters, got the model {type(params).__name__}: call "
            "the function of this name in `rmtjax.nnx`, or give `rmtjax.nnx.params(model)`."
        )


def find_kernels(
    params: PyTree, where: Where | None = None, axes: Axes | None = None, is_leaf=None
) -> dict[str, tuple[Any, KernelAxes | None]]:
    """Path, leaf and axes of each chosen leaf, in the order of the tree.

    Args:
      params: Nested dictionaries of arrays.
      where: Chooses leaves; by default those named `kernel` or `embedding`, and those
        that `axes` names by path.
      axes: Names the axes of a chosen leaf; where it has None for a leaf with two
        axes or more, the leaf is no matrix. By default, and for the paths that a
        dictionary does not have, `guess_axes`.
      is_leaf: As in `jax.tree.map`.
    """
    check_tree(params)
    found = {}
    by_path = axes if isinstance(axes, Mapping) else {}
    name_axes = axes if callable(axes) else guess_axes
    for key, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf):
        path = path_name(key)
        if where(path, leaf) if where else path in by_path or is_kernel(path, leaf):
            if is_leaf and is_leaf(leaf):
                named = None
            elif path in by_path and not callable(axes):
                named = by_path[path]
            else:
                named = name_axes(path, leaf)
            if named is not None:
                named = KernelAxes(*map(tuple, named))  # lists would not be hashable
                check_axes(path, named, jnp.ndim(leaf))
            if path in found:
                raise ValueError(f"two leaves have the path {path!r}: rename one of them.")
            found[path] = (leaf, named)
    return found


def map_kernels(fn, params: PyTree, paths, is_leaf=None) -> PyTree:
    """Applies `fn(path, leaf)` to the leaves at `paths`; the others stay the same objects."""

    def visit(key, leaf):
        path = path_name(key)
        return fn(path, leaf) if path in paths else leaf

    return jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_leaf)


def unmatrixable(leaf: Any, axes: KernelAxes | None, min_size: int) -> str | None:
    """Why a leaf has no spectrum to fit, known from its shape and dtype alone."""
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"not floating ({dtype})"
    if jnp.finfo(dtype).bits < 16:
        return f"too few bits ({dtype})"
    if axes is None:
        hint = ", unless `axes` says how it is one" if len(shape) > 2 else ""
        return f"no matrix (shape {shape}){hint}"
    if 0 in shape:
        return f"empty (shape {shape})"
    _, rows, columns = matrix_shape(shape, axes)
    if min(rows, columns) < min_size:
        return f"short side {min(rows, columns)} under {min_size}"
    return None
