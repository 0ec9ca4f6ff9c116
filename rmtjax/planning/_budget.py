r"""A size to reach: one allocation of ranks over all kernels.

Each kernel may stay whole or become factors of a rank. The allocation minimizes the sum over
kernels of the share of energy that each loses, of its outputs or of its squared entries, for a
total size. With gradients, shares count by what they do to the outputs of the model.

Along the lower convex hull of each kernel's (size, loss), steps are taken in the order of loss per
number saved. This is optimal at each size that a step reaches (Everett, 1963).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rmtjax._axes import KernelLeaf, MatrixView
from rmtjax.planning._cost import count, hindrance

NANOSECONDS = 1e6  # in a millisecond: times count in them, so that all sizes are integers


def beyond(share: float) -> str:
    """Returns what to say of a share above 1, which may be a number of percent without its sign."""
    return f"{share:g} % is {share / 100:g}" if 2 <= share <= 100 else "that is more than the whole"


@dataclass(frozen=True)
class Budget:
    """A size that a plan must reach; exactly one of its fields is given.

    Attributes:
      share: Share of the parameters of the chosen kernels, in (0, 1]. `plan(params, budget=0.75)`
        means `Budget(share=0.75)`.
      parameters: Numbers in the chosen kernels.
      multiply_adds: Of the chosen kernels, for the rows of `batch`, or for one row each.
      milliseconds: Of one call of each of the chosen kernels with the rows of `batch`, which must
        be given: products are timed on the default device. Kernels without rows stay as they are.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> rmtjax.plan(params, budget=rmtjax.Budget(parameters=3000))["kernel"].rank
      16
    """

    share: float | None = None
    parameters: int | None = None
    multiply_adds: int | None = None
    milliseconds: float | None = None

    def __post_init__(self):
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"`Budget` must have one of {(*vars(self),)}, got {given or 'none'}.")
        ((name, value),) = given.items()
        whole = name in ("parameters", "multiply_adds")
        kinds = (int, np.integer) if whole else (int, float, np.floating, np.integer)
        valid = isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < np.inf
        if not valid:
            raise ValueError(f"`{name}` of a `Budget` must be a number above 0, got {value!r}.")
        if name == "share" and not value <= 1:
            words = f"`budget` must be in (0, 1], got {value}: the share that stays"
            raise ValueError(f"{words}; {beyond(float(value))}.")

    def tell(self, size: int) -> str:
        """Returns a size in words."""
        if self.milliseconds is not None:
            return f"{size / NANOSECONDS:.4g} ms"
        return f"{size:,} {self.field.replace('_', '-')}"

    @property
    def field(self) -> str:
        """The field of `Cost` that the budget bounds."""
        return "multiply_adds" if self.multiply_adds is not None else "parameters"

    def limit(self, whole: int) -> int:
        """Returns the largest size allowed, of a tree with this size; of time, nanoseconds."""
        if self.share is not None:
            return int(self.share * whole + 1e-9)
        if self.milliseconds is not None:
            return int(min(self.milliseconds, 1e12) * NANOSECONDS)
        return int(self.parameters or self.multiply_adds or 0)


def to_budget(value: Any) -> Budget | None:
    """Returns the budget that a share stands for; raises ValueError or TypeError for others."""
    if value is None or isinstance(value, Budget):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating):
        raise TypeError(
            "`budget` must be a share in (0, 1], such as 0.75 for 75 %, or a `rmtjax.Budget`, got "
            f"{value!r}."
        )
    return Budget(share=float(value))


class Choices(NamedTuple):
    """Lists what may become of a kernel, the smallest first and the kernel as it is at the end.

    Attributes:
      ranks: Ranks of factors, in steps; None for the kernel as it is.
      sizes: Size of each, ascending.
      losses: Share of energy that each loses, times the weight of the kernel; descending to 0.
    """

    ranks: tuple[int | None, ...]
    sizes: np.ndarray
    losses: np.ndarray


def ranks_of(view: MatrixView, multiple: int, least: int) -> list[int]:
    """Returns the ranks, in steps of a multiple, of factors that may replace a kernel."""
    first = -(-least // multiple) * multiple
    return [rank for rank in range(first, view.full_rank, multiple) if not hindrance(view, rank)]


def choices_of(
    view: MatrixView,
    losses: np.ndarray,
    budget: Budget,
    rows: int,
    ranks: Sequence[int],
    times: Mapping[int | None, int] | None = None,
) -> Choices:
    """Returns the choices of a kernel: factors of each rank that are smaller than it is.

    Args:
      view: The kernel.
      losses: The share of energy that is lost at each rank, from 0 to the full rank.
      budget: Tells which size counts.
      rows: The rows that the kernel multiplies.
      ranks: Of its factors, ascending.
      times: Nanoseconds by rank, for a budget of time.
    """
    size = lambda rank: count(view, rows, rank)[budget.field == "multiply_adds"]
    if times is not None:
        size, ranks = times.__getitem__, [rank for rank in ranks if rank in times]
    whole = size(view.rank)
    kept = [rank for rank in ranks if size(rank) < whole]
    sizes = np.array([*map(size, kept), whole], np.int64)
    return Choices((*kept, None), sizes, np.append(losses[kept], 0.0))


def _hull(choices: Choices) -> list[int]:
    """Returns the choices on the lower convex hull, from the kernel as it is to the smallest."""
    hull: list[int] = []
    slope = lambda a, b: (
        (choices.losses[b] - choices.losses[a]) / (choices.sizes[a] - choices.sizes[b])
    )
    for place in range(len(choices.sizes) - 1, -1, -1):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], place):
            hull.pop()
        hull.append(place)
    return hull


class Path(NamedTuple):
    """The steps of an allocation, the cheapest first.

    Attributes:
      steps: The kernel and the choice that each step goes to.
      sizes: The size of all kernels before the first step and after each.
      losses: The mean share of energy that is lost, likewise.
    """

    steps: tuple[tuple[str, int], ...]
    sizes: np.ndarray
    losses: np.ndarray


def path_of(choices: Mapping[str, Choices], fixed: int) -> Path:
    """Returns the steps of all kernels in the order of loss per number saved.

    Args:
      choices: Of each kernel that may be cut.
      fixed: The size of the kernels that may not.
    """
    steps = []
    for path, one in choices.items():
        hull = _hull(one)
        for before, after in itertools.pairwise(hull):
            saved = int(one.sizes[before] - one.sizes[after])
            lost = one.losses[after] - one.losses[before]
            steps.append((lost / saved, path, after, saved, lost))
    # Slopes along a hull never fall, so sorting keeps the steps of a kernel in order.
    steps.sort(key=lambda step: step[0])
    whole = fixed + sum(int(one.sizes[-1]) for one in choices.values())
    sizes = whole - np.cumsum([0, *(step[3] for step in steps)])
    losses = np.cumsum([0.0, *(step[4] for step in steps)]) / max(len(choices), 1)
    return Path(tuple(step[1:3] for step in steps), sizes, losses)


def _fill(choices: Mapping[str, Choices], taken: dict[str, int], room: int) -> None:
    """Raises ranks as long as there is room, where a number gains most."""
    while True:
        gains = []
        for path, one in choices.items():
            place = taken[path]
            if place + 1 < len(one.sizes) and one.sizes[place + 1] - one.sizes[place] <= room:
                cost = int(one.sizes[place + 1] - one.sizes[place])
                gain = one.losses[place] - one.losses[place + 1]
                gains.append((gain / cost, path, cost))
        if not gains:
            return
        _, path, cost = max(gains)
        taken[path], room = taken[path] + 1, room - cost


def allocate(choices: Mapping[str, Choices], fixed: int, limit: int) -> dict[str, int | None]:
    """Returns the rank of factors for each kernel, None for one that stays as it is.

    The size is at most `limit`, and less than a step of a rank below it.

    Args:
      choices: Of each kernel that may be cut.
      fixed: The size of the kernels that may not.
      limit: At least the size of the smallest choices.
    """
    path = path_of(choices, fixed)
    taken = {name: len(one.sizes) - 1 for name, one in choices.items()}
    for (name, place), before in zip(path.steps, path.sizes, strict=False):
        if before <= limit:
            break
        # The last step may go less far: to the largest choice that fits.
        one = choices[name]
        most = limit - (before - one.sizes[taken[name]])
        fits = np.searchsorted(one.sizes, most, side="right") - 1
        taken[name] = max(place, min(int(fits), taken[name]))
    size = fixed + sum(int(choices[name].sizes[place]) for name, place in taken.items())
    _fill(choices, taken, limit - size)
    return {name: choices[name].ranks[place] for name, place in taken.items()}


def size_of(kernel: KernelLeaf, budget: Budget, rows: int) -> int:
    """Returns the size of a kernel as it is."""
    return count(kernel, rows, kernel.rank)[budget.field == "multiply_adds"]


def check_reach(
    budget: Budget, limit: int, able: Mapping[str, Choices], fixed: Mapping[str, int]
) -> None:
    """Raises ValueError for a budget below the smallest plan, with the largest kernel in it."""
    smallest = {path: int(one.sizes[0]) for path, one in able.items()}
    least = sum(smallest.values()) + sum(fixed.values())
    if least <= limit:
        return
    sizes = {**smallest, **fixed}
    path = max(sizes, key=lambda path: sizes[path])
    why = "which cannot be cut" if path in fixed else "at its smallest"
    raise ValueError(
        f"`budget` allows {budget.tell(limit)}, and the smallest plan has {budget.tell(least)}: "
        f"of these, {budget.tell(sizes[path])} are in {path!r}, {why}, and "
        f"{budget.tell(sum(fixed.values()))} in all kernels that cannot be cut. Allow more, lower "
        "`min_rank`, `multiple` or `min_size`, or choose other kernels with `where`."
    )
