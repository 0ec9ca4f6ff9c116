"""The state of `prune_spectrum`: what it holds of each kernel by path, and of the loss."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int, PyTree

from rmtjax._types import BulkFit
from rmtjax.training._pruning_step import KernelState


class PruneState(NamedTuple):
    """State of `prune_spectrum`, of arrays.

    Attributes:
      step: Number of updates seen.
      fits: Path to the noise level that is carried, as `rmtjax.noise_levels` returns it.
      ranks: Path to the rank after the last pruning; full before.
      signal: Path to the number of signal directions at the last pruning step; 0 before.
      removed: Path to the share of the squares that it has removed, in [0, 1).
      refused: Path to the share beyond the rank that is left: it fades, or was not allowed to go.
      floors: Path to the eigenvalue down to which directions must stay, since a cut was held back;
        -1 if all must, NaN if the threshold decides.
      costs: Path to what the cut was predicted to add to the loss; NaN without `value_fn`.
      norms: Path to the norm that the last step lands on; NaN if it did not cut.
      previous: Path to the rank before the last step.
      landed: Path to whether the last cut was found in the parameters.
      reference: The parameters one period ago, for `value_fn`; None without `max_rise`.
      fall: By how much `value_fn` fell over the period before the last step; NaN before.
      curvatures: Path to the moments of gradients by which kernels fade; None without `fade`.
    """

    step: Int[Array, ""]
    fits: dict[str, BulkFit]
    ranks: dict[str, Int[Array, ""]]
    signal: dict[str, Int[Array, ""]]
    removed: dict[str, Float[Array, ""]]
    refused: dict[str, Float[Array, ""]]
    floors: dict[str, Float[Array, "..."]]
    costs: dict[str, Float[Array, ""]]
    norms: dict[str, Float[Array, ""]]
    previous: dict[str, Int[Array, ""]]
    landed: dict[str, Bool[Array, ""]]
    reference: PyTree = None
    fall: PyTree = None
    curvatures: PyTree = None


# The fields of a state that have an entry for each kernel, in the order of `KernelState`.
FIELDS = PruneState._fields[1 : 1 + len(KernelState._fields)]
