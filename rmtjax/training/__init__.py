"""Optax."""

from rmtjax.training import sparsity as sparsity
from rmtjax.training._metrics import metrics as metrics
from rmtjax.training._penalty import penalty as penalty
from rmtjax.training._prune_entries import (
    prune_entries as prune_entries,
    PruneEntriesState as PruneEntriesState,
)
from rmtjax.training._prune_spectrum import (
    prune_spectrum as prune_spectrum,
    PruneState as PruneState,
)
from rmtjax.training._transfer import transfer as transfer
