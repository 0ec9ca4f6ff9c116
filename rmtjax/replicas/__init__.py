"""Keeps what replicas of a network, trained on disjoint data, agree on.

`merge_replicas` makes one tree of several that started from one point: what each of them has
learnt by heart differs, and what the data support is common. Singular vectors of the change come
from some replicas and singular values from another, so that noise has no say in its own size.

`agree` does the same in an optax chain, with the halves of an epoch. `replicate` and `deal` are for
loops that train replicas side by side. `average_params` averages the networks of many steps, once
training has stalled.
"""

from rmtjax.replicas._agree import agree as agree, AgreeState as AgreeState
from rmtjax.replicas._average import (
    average_params as average_params,
    averaged as averaged,
    AverageState as AverageState,
)
from rmtjax.replicas._merge import merge_replicas as merge_replicas, Merged as Merged
from rmtjax.replicas._replicate import deal as deal, replicate as replicate
