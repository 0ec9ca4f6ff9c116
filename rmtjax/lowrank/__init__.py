"""Low rank while training: regularisers of spectra, and kernels in singular vectors.

In come kernels, parameter trees, or updates of an optax chain. `shrink_tail` and `tail_sum` shrink
what a rank rule calls noise. `to_spectral` replaces kernels by their parts, in the place of the
kernel in a tree. Out come trees that unmodified linen and nnx modules run, that train on,
and that checkpoints hold.
"""

from rmtjax.lowrank._penalties import (
    hoyer as hoyer,
    hoyer_square as hoyer_square,
    orthogonality as orthogonality,
)
from rmtjax.lowrank._prune_values import (
    prune_values as prune_values,
    PrunedValues as PrunedValues,
)
from rmtjax.lowrank._shrink_tail import shrink_tail as shrink_tail, ShrinkState as ShrinkState
from rmtjax.lowrank._spectral import (
    SpectralFactors as SpectralFactors,
    to_factors as to_factors,
    to_spectral as to_spectral,
)
from rmtjax.lowrank._tail import prox_tail as prox_tail, tail_sum as tail_sum

__all__ = [
    "PrunedValues",
    "ShrinkState",
    "SpectralFactors",
    "hoyer",
    "hoyer_square",
    "orthogonality",
    "prox_tail",
    "prune_values",
    "shrink_tail",
    "tail_sum",
    "to_factors",
    "to_spectral",
]
