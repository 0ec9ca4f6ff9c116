"""Kernels with few entries: masks, and optax transforms that keep to them.

`sparsity` makes masks of the entries that stay, by magnitude or by the noise level of each kernel.
`prune_entries` goes last in an optax chain, sets small entries to zero and keeps them there.
"""

from rmtjax.sparse import sparsity as sparsity
from rmtjax.sparse._prune_entries import (
    prune_entries as prune_entries,
    PruneEntriesState as PruneEntriesState,
)
