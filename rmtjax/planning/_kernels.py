"""Finds the kernels of a parameter tree, and the axes that make each of them a matrix."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rmtjax._axes import factored_axes, is_factors, KernelAxes, KernelLeaf, MatrixView
from rmtjax._names import (
    check_takes_leaf,
    guess_axes,
    in_factor_layer,
    is_kernel,
    is_untold,
    matcher,
    Neighbours,
)
from rmtjax._types import Axes, is_patterns, Pattern, Where

# Objects that JAX takes for trees of parameters, with a hint. The rooms that know them register
# them: this room does not import Flax.
_CONTAINERS: dict[type, str] = {}
_FEW = 5  # names of tensors in an error


def register_container(kind: type, hint: str) -> None:
    """Registers a type that is not a parameter tree, and what to do with its objects instead."""
    _CONTAINERS[kind] = hint


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the place of a leaf as a string, "Dense_0/kernel", also of a key such as a tuple."""
    # `nn.Partitioned` and `nnx.Variable` hold a leaf as their attribute `value`. The box has no
    # name in the model, so the path leaves it out.
    boxed = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
    names = (_key_name(key) for key in path[: len(path) - boxed])
    return "/".join(names)


def _key_name(key: Any) -> str:
    """Returns the name of one key. `flax.traverse_util.flatten_dict` makes keys that are tuples."""
    parts = getattr(key, "key", None)
    if type(parts) is tuple and all(type(part) is str for part in parts):
        return "/".join(parts)
    return jax.tree_util.keystr((key,), simple=True)


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


def is_abstract(params: PyTree) -> bool:
    """Returns True for a tree of shapes without values."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))


def check_concrete(params: PyTree) -> None:
    """Raises TypeError for a tree of shapes without values."""
    for key, leaf in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"the tree must have arrays with values, got {leaf} at {path_name(key)!r}. For "
                "shapes alone, call the function by `jax.eval_shape`."
            )


def check_values(kernels: Mapping[str, KernelLeaf]) -> None:
    """Raises TypeError for a kernel without values, or whose values are not known yet."""
    remedies = {
        jax.ShapeDtypeStruct: "a spectrum needs values",
        jax.core.Tracer: "make the plan outside `jit`, `grad` and `vmap`, as ranks become shapes",
    }
    for path, kernel in kernels.items():
        for leaf in jax.tree.leaves(kernel.leaf):
            for kind, remedy in remedies.items():
                if isinstance(leaf, kind):
                    name = type(leaf).__name__
                    words = f"got {name} of shape {kernel.shape} at {path!r}: {remedy}."
                    raise TypeError(f"`params` must have arrays with values, {words}")


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
                "`where` must be a function `where(path, leaf)`, a glob, a list of globs or a tree "
                f"of booleans, got {value!r} at {path!r}."
            )
    return lambda path, leaf: bool(chosen[path])


def check_matches(pattern: Pattern, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError for a pattern that matches no path, with the paths that there are."""
    if not leaves or any(map(matcher(pattern), leaves)):
        return
    text = pattern if isinstance(pattern, str) else pattern.pattern
    cause = f"{text!r} matches no tensor, of {_names(leaves)}."
    if text is pattern and not text.startswith("re:"):
        cause += " A glob must match the complete name, and '*' stands for anything: "
        cause += f"'*{text.strip('*./^$')}*' finds it anywhere. A regular expression needs 're:'."
    raise ValueError(cause)


def _listed(where: Any) -> Sequence[Pattern]:
    return [where] if isinstance(where, str | re.Pattern) else where


def check_patterns(where: Where | None, params: PyTree) -> None:
    """Raises ValueError for a pattern that matches no path of a whole tree."""
    leaves = last_leaves(params) if is_patterns(where) else {}
    # Thin layers have other paths than those that they replace.
    if not any(is_factors(leaf) or in_factor_layer(path) for path, leaf in leaves.items()):
        for pattern in _listed(where) if leaves else ():
            check_matches(pattern, leaves)


def _from_patterns(patterns: Sequence[Pattern]):
    """Returns the choice of the leaves that one of some patterns matches."""
    tests = [matcher(pattern) for pattern in patterns]
    # A complete name chooses any leaf. Other patterns do not choose biases and scales.
    able = lambda path, leaf: path in patterns or is_kernel(path, leaf) or is_untold(path, leaf)
    return lambda path, leaf: able(path, leaf) and any(matches(path) for matches in tests)


def to_predicate(where: Where | None, params: PyTree) -> Callable[[str, Any], bool] | None:
    """Returns the function `where(path, leaf)` that any form of `where` stands for."""
    if where is None:
        return None
    if callable(where):
        check_takes_leaf(where)
        return lambda path, leaf: bool(where(path, leaf))
    if is_patterns(where):
        return _from_patterns(_listed(where))
    return _from_mask(where, params)


def _to_axes(path: str, named: Any) -> KernelAxes:
    """Returns the axes of a kernel; raises TypeError for what does not name them."""
    is_list = lambda part: isinstance(part, tuple | list)
    if not (is_list(named) and len(named) in (2, 3) and all(map(is_list, named))):
        words = "`axes` must have `rmtjax.KernelAxes` such as `KernelAxes((0,), (1,))`, got"
        raise TypeError(f"{words} {named!r} for {path!r}.")
    return KernelAxes(*map(tuple, named))  # lists would not be hashable


def _view(path: str, leaf: Any, axes: Axes | None, tree: Neighbours) -> KernelLeaf:
    """Returns a chosen leaf as a matrix, or as it is if nothing makes it one."""
    if is_factors(leaf):
        return MatrixView(path, leaf, factored_axes(leaf))
    # The table of `rmtjax.linen.kernel_axes` is both a mapping and a function. As a function it
    # also knows leaves that have been stacked since.
    if callable(axes):
        named = axes(path, leaf)
    else:
        named = axes[path] if axes and path in axes else guess_axes(path, leaf, tree)
    if named is None:
        return KernelLeaf(path, leaf)
    return MatrixView(path, leaf, _to_axes(path, named))


def find_kernels(
    params: PyTree, where: Where | None = None, axes: Axes | None = None
) -> dict[str, KernelLeaf]:
    """Returns the kernels of a tree by path, in its order: a `MatrixView` for each matrix.

    By default, `where` chooses the leaves that `is_kernel` knows by name, and those that `axes`
    names by path. Without `axes`, and for paths that a dictionary does not have, `guess_axes` finds
    the axes.
    """
    check_container(params)
    by_path = axes if isinstance(axes, Mapping) else {}
    default = lambda path, leaf: path in by_path or is_kernel(path, leaf)
    chosen = to_predicate(where, params) or default
    leaves = last_leaves(params)
    tree = Neighbours(leaves)
    kernels = leaves_by_path(params, chosen)
    return {path: _view(path, leaf, axes, tree) for path, leaf in kernels.items()}


def last_leaves(params: PyTree) -> dict[str, Any]:
    """Returns leaves by their paths; of several with one path, which are no kernels, the last."""
    pairs = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_factors)
    return {path_name(key): leaf for key, leaf in pairs}


def unchosen(params: PyTree, kernels: Mapping[str, Any]) -> dict[str, KernelLeaf]:
    """Returns the leaves that may be kernels, and that nothing has chosen."""
    leaves = last_leaves(params)
    return {p: KernelLeaf(p, a) for p, a in leaves.items() if p not in kernels and is_untold(p, a)}


def _names(leaves: Mapping[str, Any]) -> str:
    """Returns how many leaves there are, and the first of their paths, kernels before others."""
    known = sorted(leaves, key=lambda path: not is_kernel(path, leaves[path]))
    some = ", ".join(map(repr, known[:_FEW])) or "none"
    return f"{len(known)} such as {some}{', ...' if len(known) > _FEW else ''}"


def nothing_chosen(leaves: Mapping[str, Any], where: Where | None = None) -> str:
    """Returns what to say of leaves among which no kernel is chosen, with what has chosen."""
    who = ""
    if not leaves:
        return "there are no tensors, and so no kernels."
    if callable(where):
        who = "by the function `where` "
    elif is_patterns(where):
        who = f"by `where={where!r}` "
    elif where is not None:
        who = "by the mask `where` "
    return f"no tensor is chosen {who}as a kernel, of {_names(leaves)}: change `where`."


def check_chosen(kernels: Mapping[str, Any], params: PyTree, where: Where | None = None) -> None:
    """Raises ValueError if no kernel is chosen in a tree that has leaves."""
    leaves = last_leaves(params)
    if leaves and not kernels:
        raise ValueError(nothing_chosen(leaves, where))


def warn_if_idle(
    name: str, found: Any, params: PyTree, where: Where | None, axes: Any = None, least: int = 1
) -> None:
    """Warns if a transform has found no kernel to change, with the cause.

    Raises ValueError for a pattern that matches no path, as a plan does.

    Args:
      name: Its name.
      found: The kernels that it can change, by path.
      params: The tree.
      where, axes: Its options.
      least: The smallest short side that it changes.
    """
    # What `optax.masked` and `optax.partition` hide is an empty tuple. A pattern may match it.
    hides = lambda node: isinstance(node, tuple) and not node
    if not any(map(hides, jax.tree.leaves(params, is_leaf=hides))):
        check_patterns(where, params)
    if found:
        return
    kernels, leaves = find_kernels(params, where, axes), last_leaves(params)
    if not leaves:
        return  # as in a group of `optax.partition` without members
    if any(is_factors(leaf) or in_factor_layer(path) for path, leaf in leaves.items()):
        return  # its kernels were made thin, and training goes on in the factors
    cause = nothing_chosen(leaves, where)
    if kernels:
        causes = {path: obstacle(kernel, least) for path, kernel in kernels.items()}
        cause = "; ".join(f"{path!r}: {why}" for path, why in list(causes.items())[:3]) + "."
    warnings.warn(f"`{name}` will never change a kernel. {cause}", stacklevel=3)


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
        hint = ", unless `axes` says how it is one" if len(shape) > 1 else ""
        return f"no matrix (shape {shape}){hint}"
    if 0 in shape:
        return f"empty (shape {shape})"
    if kernel.short < min_size:
        return f"short side {kernel.short} under {min_size}"
    return None
