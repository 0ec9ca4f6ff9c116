r"""Second moments of the inputs of kernels: what the data feed to each of them.

In come the rows $x$ that a kernel is multiplied with. Out come sums over them, which can be added,
saved and compared: the number of rows, their mean, and $C = \frac1N \sum x x^T$. `Moments` holds
them by the path of the kernel. Kernels with the same inputs share one matrix. This room knows
neither models nor trees: `rmtjax.linen.moments` and `rmtjax.nnx.moments` collect the rows.
"""

from rmtjax.moments._moment import (
    Moment as Moment,
    sums_of_lookups as sums_of_lookups,
    sums_of_rows as sums_of_rows,
)
from rmtjax.moments._moments import Moments as Moments
from rmtjax.moments._second import Second as Second, shrink as shrink

__all__ = ["Moment", "Moments", "Second"]
