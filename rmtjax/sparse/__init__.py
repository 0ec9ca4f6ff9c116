"""Kernels with few entries or few bits: masks, projections, and optax transforms that keep to them.

`sparsity` makes masks of the entries that stay, by magnitude, by the noise level of each kernel or
at random, and `patterns` those of N entries in M. `projections` finds the nearest kernel of few
bits or of low rank.

`prune_entries` goes last in an optax chain and removes entries for good. `drop_and_grow` wraps an
optimizer and moves a fixed number of entries about. `admm` goes first in a chain and pulls kernels
towards a projection.
"""

from rmtjax.sparse import patterns as patterns, projections as projections, sparsity as sparsity
from rmtjax.sparse._admm import admm as admm, AdmmState as AdmmState
from rmtjax.sparse._drop_and_grow import (
    drop_and_grow as drop_and_grow,
    DropAndGrowState as DropAndGrowState,
    SparseState as SparseState,
)
from rmtjax.sparse._prune_entries import (
    prune_entries as prune_entries,
    PruneEntriesState as PruneEntriesState,
)
