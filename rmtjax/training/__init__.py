"""Pruning while training, for optax.

Two transforms go last in a chain: `prune_spectrum` truncates kernels to their signal, and
`prune_entries` sets small entries to zero. `metrics` and `noise_levels` read their state.
`transfer_opt_state` carries the state of an optimizer over to factorized kernels. `penalty` is a
term of a loss, and `sparsity` makes masks of entries.
"""

from rmtjax.training import sparsity as sparsity
from rmtjax.training._metrics import (
    metrics as metrics,
    noise_levels as noise_levels,
    register_state as register_state,
)
from rmtjax.training._penalty import penalty as penalty
from rmtjax.training._prune_entries import (
    prune_entries as prune_entries,
    PruneEntriesState as PruneEntriesState,
)
from rmtjax.training._prune_spectrum import (
    prune_spectrum as prune_spectrum,
    PruneState as PruneState,
)
from rmtjax.training._pruning_step import (
    frobenius_norm as frobenius_norm,
    is_due as is_due,
    is_placeholder as is_placeholder,
    map_alike as map_alike,
    moving_kernels as moving_kernels,
)
from rmtjax.training._transfer import transfer_opt_state as transfer_opt_state
