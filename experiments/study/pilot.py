"""Part f: the setting in which truncation was first seen to stop memorisation.

A deeper network with three times the initial variance and centred inputs, on the task
of `memorisation`. Noise that is louder hides more: fewer spikes are found, and less
is learnt by heart.
"""

from dataclasses import dataclass

from experiments.study import memorisation
from experiments.study.outcomes import PLAIN

plan_runs, perform, tables = memorisation.plan_runs, memorisation.perform, memorisation.tables


@dataclass(frozen=True)
class Config(memorisation.Config):
    """Repeats `memorisation` in the setting of the pilot."""

    widths: tuple[int, ...] = (512, 512, 512)
    """Of the hidden layers."""
    initial_variance: float = 1.0
    """Of an entry of a kernel, times its inputs."""
    centred: bool = True
    """Whether the inputs are in [-1, 1] and not in [0, 1]."""
    arms: tuple[str, ...] = (PLAIN, "fixed rank 10", "RMT", "RMT, floor 10")
    """What is compared; early stopping and the single cuts come with `nothing`."""
