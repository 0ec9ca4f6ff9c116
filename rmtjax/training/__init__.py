"""Pruning while training, for optax.

`prune_spectrum` goes last in a chain and truncates kernels to their signal. `metrics` and
`noise_levels` read its state. `transfer_opt_state` carries the state of an optimizer over to
factorized kernels, and `penalty` is a term of a loss. Other rooms share its steps that are due.
"""

from rmtjax.training._metrics import (
    metrics as metrics,
    noise_levels as noise_levels,
    on_true_scale as on_true_scale,
    register_state as register_state,
)
from rmtjax.training._penalty import penalty as penalty
from rmtjax.training._prune_spectrum import prune_spectrum as prune_spectrum
from rmtjax.training._prune_state import (
    by_field as by_field,
    is_placeholder as is_placeholder,
    PruneState as PruneState,
    root_mean_square as root_mean_square,
)
from rmtjax.training._pruning_step import (
    is_due as is_due,
    map_alike as map_alike,
    moving_kernels as moving_kernels,
)
from rmtjax.training._transfer import transfer_opt_state as transfer_opt_state
