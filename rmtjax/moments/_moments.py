"""The moments of all kernels of a model by path, as one value that is added, saved and used."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from rmtjax._axes import KernelAxes
from rmtjax.moments._moment import Moment
from rmtjax.moments._second import Second, second_moment, shrink, trace

# Weights of outputs are inverted, so each is at least this share of their mean.
_LEAST = 0.05

Shrinkage = float | Literal["ledoit_wolf"]


def _check_shrinkage(value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    if not number and value != "ledoit_wolf":
        raise ValueError(
            f"`shrinkage` must be in [0, 1] or 'ledoit_wolf', got {value!r}: 0 is none."
        )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["groups", "gradients", "transposed"],
    meta_fields=["names", "centred", "shrinkage", "axes"],
)
@dataclass(frozen=True, eq=False)
class Moments(Mapping[str, Moment]):
    """Holds the moments of the inputs of kernels: a read-only mapping from path to `Moment`.

    `a + b` are the moments of the rows of both. A tree of arrays: it passes through `jit`, and
    `rmtjax.checkpoint.save_moments` writes it to a file.

    Attributes:
      groups: The sums by the name of a group. Kernels with the same inputs share one.
      gradients: The sums over the gradients of the outputs of each kernel by path; empty if they
        were not collected.
      names: Pairs of the path of a kernel and the name of its group.
      centred: Whether a cut takes the mean of the inputs off, and corrects the bias by it.
      shrinkage: Intensity of the shrinkage towards a multiple of the identity, in [0, 1];
        "ledoit_wolf" estimates it from the number and the spread of the rows.
      axes: Pairs of the path of a kernel and the axes along which it met the rows; empty if they
        are not known.
      transposed: The sums over the rows that the transpose of a kernel is multiplied with, by path,
        of kernels that the model uses both ways, such as the table of a tied output layer.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax
      >>> module, x = nn.Dense(3), jnp.eye(4)
      >>> variables = module.init(jax.random.key(0), x)
      >>> moments = rmtjax.linen.moments(module, variables, [x, x])
      >>> int((moments + moments)["kernel"].rows[0])
      16
    """

    groups: dict[str, Any]  # of `Moment`
    gradients: dict[str, Any]  # of `Moment`
    names: tuple[tuple[str, str], ...]
    centred: bool = False
    shrinkage: Shrinkage = "ledoit_wolf"
    axes: tuple[tuple[str, KernelAxes], ...] = ()
    transposed: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `Moment`

    def __post_init__(self):
        _check_shrinkage(self.shrinkage)

    def __getitem__(self, path: str) -> Moment:
        return self.groups[dict(self.names)[path]]

    def __iter__(self) -> Iterator[str]:
        return (path for path, _ in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __add__(self, other: "Moments") -> "Moments":
        """Returns the moments of the rows of both, with the options of the first."""
        if not isinstance(other, Moments):
            return NotImplemented
        known = set(self.axes) ^ set(other.axes) if self.axes and other.axes else set()
        known |= {(path,) for path in self.transposed.keys() ^ other.transposed.keys()}
        if self.names != other.names or known:
            strays = min(set(self.names) ^ set(other.names) or known)
            raise ValueError(
                f"`+` needs moments of one model: {strays[0]!r} has other inputs, or none, in one "
                "of them. Collect both with the same model, `where` and `axes`."
            )
        add = lambda ours, theirs: {name: moment + theirs[name] for name, moment in ours.items()}
        if self.gradients.keys() != other.gradients.keys():
            raise ValueError(
                "`+` needs moments that both have gradients, or both none: collect both with a "
                "`key`, or both without."
            )
        parts = ("groups", "gradients", "transposed")
        sums: Any = {part: add(getattr(self, part), getattr(other, part)) for part in parts}
        return dataclasses.replace(self, **sums)

    def of(self, paths: Collection[str]) -> "Moments":
        """Returns the moments of some kernels; those without moments are passed over."""
        names = tuple((path, group) for path, group in self.names if path in paths)
        groups = {group: self.groups[group] for _, group in names}
        some = lambda sums: {path: one for path, one in sums.items() if path in paths}
        axes = tuple((path, axes) for path, axes in self.axes if path in paths)
        changes: Any = {"groups": groups, "names": names, "axes": axes}
        changes |= {"gradients": some(self.gradients), "transposed": some(self.transposed)}
        return dataclasses.replace(self, **changes)

    def with_options(
        self, *, centred: bool | None = None, shrinkage: Shrinkage | None = None
    ) -> "Moments":
        """Returns the same moments with other options; None leaves an option as it is."""
        changes: Any = {"centred": centred, "shrinkage": shrinkage}
        given = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(self, **given)

    def weighs(self, path: str) -> bool:
        """Returns whether gradients say how much the outputs of a kernel count.

        They do not if they vanish, as behind a `stop_gradient`. All outputs then count alike.
        """
        return path in self.gradients and bool(np.any(np.asarray(self.gradients[path].second)))

    def second(self, path: str, *, centred: bool = True) -> Second:
        """Returns the second moments of a kernel's inputs as a cut uses them.

        Without `centred` they are raw, as for a kernel without a bias to correct.
        """
        moment = self[path]
        if not np.all(np.asarray(moment.rows) > 0):
            raise ValueError(
                f"`moments` has no rows for {path!r}: give batches in which its layer is called."
            )
        shrinkage = None if isinstance(self.shrinkage, str) else self.shrinkage
        both = self.transposed.get(path)
        centred = centred and self.centred and both is None
        second = second_moment(moment, centred=centred, shrinkage=shrinkage)
        if both is not None:
            other = second_moment(both, centred=False, shrinkage=shrinkage)
            return second._replace(transposed=other)
        if not self.weighs(path):
            return second
        weights = second_moment(self.gradients[path], centred=False, shrinkage=None)
        found = shrink(weights, least=_LEAST)
        size, level = found.shape[-1], trace(found)
        # Members of a stack whose outputs change nothing count less than the others.
        floor = np.where(level > 0, 0, _LEAST * np.min(level, where=level > 0, initial=np.inf))
        return second._replace(weights=found + floor[:, None, None] / size * np.eye(size))
