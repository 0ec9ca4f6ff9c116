"""Models of any Flax API with factored kernels: what linen and nnx share.

In comes a layer, an einsum or a function of parameters. Out come the axes of its kernels, and
products with the two factors in place of products with the dense kernel. The moments of what each
kernel is multiplied with come out too. Convolutions are rewritten where a branch would slow them
down. This room does not import Flax.
"""

from rmtjax.models._convolutions import fast_convolutions as fast_convolutions
from rmtjax.models._einsum import einsum_axes as einsum_axes, split_einsum as split_einsum
from rmtjax.models._jaxpr_interpreter import evaluate as evaluate
from rmtjax.models._moments import collect as collect
from rmtjax.models._registry import (
    check_names as check_names,
    register_layer as register_layer,
    registered as registered,
)
