"""Models of `flax.nnx`: their parameters as trees, and the functions of `rmtjax` for models.

`params` returns the parameters of a model as a tree, with `rmtjax.Factors`, or a kernel in parts of
`rmtjax.lowrank`, for each thin layer. `replace` copies a model with the parameters of such a tree.
The other functions apply those of the same names in `rmtjax` to this tree. No function changes the
given model. A new model shares the arrays that do not change. A thin model splits, compiles and
trains like any other. Kernels are those of Flax's layers and of layers that
`rmtjax.register_layer` has registered.
"""

from rmtjax.nnx._moments import moments as moments
from rmtjax.nnx._plans import (
    analyze as analyze,
    factorize as factorize,
    merge as merge,
    plan as plan,
    truncate as truncate,
)
from rmtjax.nnx._trees import kernel_axes as kernel_axes, params as params, replace as replace

__all__ = [
    "analyze",
    "factorize",
    "kernel_axes",
    "merge",
    "moments",
    "params",
    "plan",
    "replace",
    "truncate",
]
