"""Part b elsewhere: other shares of redrawn labels, other images, and all of them.

With three arms of `memorisation` that have nothing to tune, and as it is done there.
"""

from dataclasses import dataclass

from experiments.study import memorisation
from experiments.study.arms import ARMS
from experiments.study.memorisation import Cell
from experiments.study.options import check_choices, check_positive, check_shares, DatasetName
from experiments.study.outcomes import PLAIN
from experiments.study.tasks import Task

plan_runs, perform, tables = memorisation.plan_runs, memorisation.perform, memorisation.tables


@dataclass(frozen=True)
class Config(memorisation.Config):
    """Repeats `memorisation` with other labels and other images."""

    noises: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6)
    """Shares of the labels redrawn."""
    datasets: tuple[DatasetName, ...] = ("fashion_mnist",)
    """Further images, of whose labels the share `label_noise` is redrawn."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run of each arm for each."""
    arms: tuple[str, ...] = (PLAIN, "fixed rank 10", "RMT")
    """What is compared; early stopping and the single cuts come with `nothing`."""
    full_epochs: int = 20
    """Epochs on all images of `dataset`; 0 leaves this task out."""
    full_prune_start: int = 1
    """Epoch of the first pruning there, after about as many steps as in the others."""

    def __post_init__(self):
        super().__post_init__()
        check_shares(self, "noises")
        check_positive(self, "full_prune_start")
        check_choices(self, "arms", (PLAIN, *ARMS))

    def cells(self) -> list[Cell]:
        """All tasks: the shares, the further images, and all images."""
        task = lambda dataset, noise: Task(dataset, self.images, self.validation, noise)
        found = [task(self.dataset, noise) for noise in self.noises]
        found += [task(dataset, self.label_noise) for dataset in self.datasets]
        small = [Cell(one, self.epochs, self.prune_start) for one in found]
        if not self.full_epochs:
            return small
        full = Task(self.dataset, None, self.validation, self.label_noise)
        return [*small, Cell(full, self.full_epochs, self.full_prune_start)]
