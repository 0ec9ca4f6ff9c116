"""The tree functions for models of `flax.nnx`.

`params` gives the parameters of a model as a tree, with `rmtjax.Factors` where a layer is thin,
and `replace` gives a copy of the model with the parameters of such a tree, and thin layers where
it has factors. The other functions are those of the same names for trees, between these two:
they leave the given model as it was, and a new one shares the arrays that do not change. A model
made thin is a model like any: it splits, compiles and trains; what `rmtjax.checkpoint` saves of it
is `params`, not its state. Kernels are those of Flax's own layers and of those told by
`rmtjax.register_layer`.
"""

from rmtjax.nnx._verbs import (
    analyze as analyze,
    factorize as factorize,
    kernel_axes as kernel_axes,
    merge as merge,
    params as params,
    plan as plan,
    replace as replace,
    truncate as truncate,
)

__all__ = ["analyze", "factorize", "kernel_axes", "merge", "params", "plan", "replace", "truncate"]
