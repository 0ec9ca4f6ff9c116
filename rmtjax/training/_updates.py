"""Updates of kernels by path, and the steps at which a transform rewrites them."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PyTree

from rmtjax.planning import leaves_by_path


def is_due(
    step: Int[Array, ""], every: Int[ArrayLike, ""], start: Int[ArrayLike, ""]
) -> Bool[Array, ""]:
    """Returns True at the steps `start`, `start + every`, ...; 0 as `start` stands for `every`."""
    return jnp.asarray((step > 0) & (step >= start) & ((step - start) % every == 0))


def is_placeholder(params: PyTree) -> bool:
    """Returns True for the tree with which `optax.tree.map_params` asks for a state."""
    # It stands for any tree. optax maps a state by the structure that `init` returns for it, so
    # that a dictionary without kernels would not fit. The type is private; `optax.masked` uses it.
    return type(params).__name__ == "_ParamsPlaceholder"


def moving_kernels(updates: PyTree, params: PyTree, find, known: Mapping[str, Any]):
    """Returns what `find(params)` has for each kernel that has an update, and these updates."""
    if params is None:
        raise ValueError(
            "`params` must be given to `update`: pruning depends on where the updates land. Call "
            "`optimizer.update(updates, state, params)`."
        )
    kernels = find(params)
    by_path = leaves_by_path(updates, lambda path, _: path in kernels)
    kernels = {path: kernel for path, kernel in kernels.items() if path in by_path}
    unknown = min(kernels.keys() - known.keys(), default=None)
    if unknown is not None:
        raise ValueError(
            f"`params` has the kernel {unknown!r}, which is not in the state. Call "
            "`optimizer.init(params)` again, or choose the same kernels as before by `where`."
        )
    return kernels, {path: by_path[path] for path in kernels}
