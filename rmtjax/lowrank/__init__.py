"""Low rank while training: regularisers of spectra, kernels in singular vectors, tensor trains.

In come kernels, parameter trees, or updates of an optax chain. `shrink_tail` and `tail_sum` shrink
what a rank rule calls noise. `to_spectral` and `to_trains` replace kernels by their parts, in the
kernel's place of a tree. Out come trees that unmodified linen and nnx modules run, that train on,
and that checkpoints hold.
"""

from rmtjax.lowrank._bonds import (
    Bond as Bond,
    bond_entropies as bond_entropies,
    bond_spectra as bond_spectra,
)
from rmtjax.lowrank._modes import (
    balanced_modes as balanced_modes,
    operator_modes as operator_modes,
    state_modes as state_modes,
    train_size as train_size,
)
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
from rmtjax.lowrank._tensor_train import (
    tensor_train as tensor_train,
    to_trains as to_trains,
    TrainFit as TrainFit,
    Trains as Trains,
)
from rmtjax.lowrank._train import TensorTrain as TensorTrain

__all__ = [
    "Bond",
    "PrunedValues",
    "ShrinkState",
    "SpectralFactors",
    "TensorTrain",
    "TrainFit",
    "Trains",
    "balanced_modes",
    "bond_entropies",
    "bond_spectra",
    "hoyer",
    "hoyer_square",
    "operator_modes",
    "orthogonality",
    "prox_tail",
    "prune_values",
    "shrink_tail",
    "state_modes",
    "tail_sum",
    "tensor_train",
    "to_factors",
    "to_spectral",
    "to_trains",
    "train_size",
]
