"""Low rank while training: regularisers of the spectrum whose cut is a rank rule.

In come kernels, or updates of an optax chain. Out come the tail sum of singular values, its
proximal step, and `shrink_tail`, which takes that step in a chain.
"""

from rmtjax.lowrank._shrink_tail import shrink_tail as shrink_tail, ShrinkState as ShrinkState
from rmtjax.lowrank._tail import prox_tail as prox_tail, tail_sum as tail_sum

__all__ = ["ShrinkState", "prox_tail", "shrink_tail", "tail_sum"]
