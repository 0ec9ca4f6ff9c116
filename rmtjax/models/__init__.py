"""What linen and nnx share."""

from rmtjax.models._einsum import einsum_axes as einsum_axes, split_einsum as split_einsum
from rmtjax.models._factored_eval import evaluate as evaluate
from rmtjax.models._registry import (
    check_names as check_names,
    register_layer as register_layer,
    registered as registered,
)
