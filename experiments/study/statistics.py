"""Paired differences between arms, seed by seed, with their intervals."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.stats

LEVEL = 0.95
RESAMPLES = 9_999


class Difference(NamedTuple):
    """Mean of the paired differences.

    Attributes:
      mean: Over the seeds that both arms have.
      low: Lower end of the interval; None with fewer than two seeds.
      high: Upper end.
      seeds: Their number.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def paired_difference(
    values: Mapping[int, float], others: Mapping[int, float]
) -> Difference | None:
    """Difference of two arms over the seeds that both have, with a bootstrap interval.

    The interval is that of percentiles over resampled seeds, which are drawn from a fixed
    seed. With few seeds it is too narrow: three or five cannot tell more of the tails than
    their own range. Read it as the range in which the mean moves, were a seed left out.

    Args:
      values: Of an arm, by seed.
      others: Of the arm that it is compared with.

    Returns:
      None where the arms share no seed.

    Examples:
      >>> print(paired_difference({0: 90.0, 1: 92.0, 2: 91.0}, {0: 70.0, 1: 71.0, 2: 70.0}))
      +20.67 [+20.00, +21.00]
    """
    shared = sorted(values.keys() & others.keys())
    if not shared:
        return None
    differences = np.array([values[seed] - others[seed] for seed in shared])
    mean = float(differences.mean())
    if len(shared) < 2:
        return Difference(mean, None, None, 1)
    low, high = scipy.stats.bootstrap(
        (differences,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Difference(mean, float(low), float(high), len(shared))
