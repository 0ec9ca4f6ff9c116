"""The rows of a plan: a kernel is kept, truncated or factorized, each with its reason."""

import enum
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from rmtjax._axes import factored_axes, FactoredKernel, Factors, kernel_shape, KernelAxes
from rmtjax._text import first_lines, html_table, no_such_path, printable, SCREEN
from rmtjax._types import BulkFit, Spectrum
from rmtjax.noise import Shrink
from rmtjax.planning._cost import add_costs, Cost
from rmtjax.spectra import OutputLosses

# How the reason of a tensor begins that has a row, and is no kernel.
UNNAMED = "kept: not a kernel by its name"


def _brief_row(self: Any) -> str:
    """Returns a row as text, without the arrays that it holds."""
    rank = "" if self.rank is None else f", rank={self.rank}"
    return f"{type(self).__name__}({self.reason!r}, shape={self.shape}{rank})"


@dataclass(frozen=True, repr=False)
class Kept:
    """A kernel that stays as it is; its fields are those of `Truncated`.

    A leaf that is not a matrix has no `axes`. Without a spectrum there is no `rank` and no `fit`.

    Examples:
      >>> import jax, rmtjax
      >>> row = rmtjax.plan({"kernel": jax.random.normal(jax.random.key(0), (80, 60))})["kernel"]
      >>> isinstance(row, rmtjax.Kept), row.reason
      (True, 'kept: no signal stands out of the noise')
    """

    reason: str
    shape: tuple[int, ...]
    axes: KernelAxes | None = None
    rank: int | None = None
    fit: BulkFit | None = field(default=None, compare=False)
    spectrum: Spectrum | None = field(default=None, compare=False)
    cost: Cost | None = None
    loss: OutputLosses | None = field(default=None, compare=False)
    equalized: bool = False
    action = "keep"
    shrink = None
    __repr__ = _brief_row


@dataclass(frozen=True, repr=False)
class _Lowered:
    """A kernel whose rank goes down: the fields that `Truncated` explains."""

    reason: str
    shape: tuple[int, ...]
    axes: KernelAxes
    rank: int
    fit: BulkFit = field(compare=False)
    spectrum: Spectrum | None = field(default=None, compare=False)
    shrink: Shrink | None = None
    cost: Cost | None = None
    loss: OutputLosses | None = field(default=None, compare=False)
    equalized: bool = False
    __repr__ = _brief_row


class Truncated(_Lowered):
    """A kernel whose rank goes down in place: factors would not be smaller, or not faster.

    Attributes:
      reason: Why it is kept, truncated or factorized.
      shape: Shape of the dense kernel.
      axes: What makes it a matrix.
      rank: Rank after the plan.
      fit: The noise as NumPy numbers, for a stack an array with an entry for each matrix.
      spectrum: The spectrum as NumPy arrays; None if not computed, and after loading from a file.
      shrink: Changes the singular values that stay; None leaves them.
      cost: Parameters, multiply-adds and milliseconds, before and after the plan.
      loss: What a cut by output takes, for each rank from 0: `outputs`, the mean over the data of
        the squared change of the outputs, `weighted`, the same with the weights of the moments, and
        `squares` of the entries. None without moments, and after loading from a file.
      equalized: Whether the spectrum, the noise and the cut are those of the kernel over the scales
        of its noise in rows and columns, as `rmtjax.equalize` finds them.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> row = rmtjax.plan(params, rule=rmtjax.ranks.fixed(50))["kernel"]
      >>> isinstance(row, rmtjax.Truncated), row.rank
      (True, 56)
    """

    action = "truncate"


class Factorized(_Lowered):
    """A kernel that two thinner factors replace; its fields are those of `Truncated`.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> row = rmtjax.plan(params, rule=rmtjax.ranks.fixed(8))["kernel"]
      >>> isinstance(row, rmtjax.Factorized), row.rank
      (True, 8)
    """

    action = "factorize"


LayerPlan = Kept | Truncated | Factorized


class Plan(dict[str, LayerPlan]):
    """A dictionary from the path of each kernel to `Kept`, `Truncated` or `Factorized`.

    `print` shows the reason of each kernel. A notebook shows the first twenty. Plans are equal if
    they do the same for the same reasons: `==` does not compare spectra, noise and losses.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(16))
      >>> plan["kernel"]
      Factorized('factorized: rank 16 of 60, as asked by the rule', shape=(80, 60), rank=16)
      >>> plan.cost.parameters, plan.cost.parameters_after
      (4800, 2240)
    """

    @property
    def fits(self) -> dict[str, BulkFit]:
        """The noise levels by path. A plan that is made after a cut must be given these.

        Kernels that were equalized have none: a level of theirs holds on no other scale.
        """
        rows = {path: row for path, row in self.items() if not row.equalized}
        return {path: row.fit for path, row in rows.items() if row.fit is not None}

    @property
    def changes(self) -> dict[str, Truncated | Factorized]:
        """The rows of the kernels that do not stay as they are."""
        return {path: row for path, row in self.items() if not isinstance(row, Kept)}

    @property
    def cost(self) -> Cost:
        """The sum of the costs of all rows that have one."""
        return add_costs(row.cost for row in self.values() if row.cost is not None)

    def in_place(self) -> "Plan":
        """Returns the plan in which every kernel keeps its shape."""
        return Plan({path: in_place(row) for path, row in self.items()})

    def __missing__(self, path: Any) -> NoReturn:
        raise no_such_path(path, self)

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{path:<{width}}  {row.reason}" for path, row in self.items())

    @property
    def _title(self) -> str:
        counts = Counter(type(row).__name__.lower() for row in self.values())
        words = ", ".join(f"{number} {word}" for word, number in sorted(counts.items()))
        title, cost = f"Plan of {len(self)} kernels", self.cost
        title += f": {words}" if words else ""
        shown = f"; {cost.parameters_after:,} of {cost.parameters:,} parameters stay"
        return title + shown if cost.parameters else title

    def __repr__(self) -> str:
        return "\n".join([self._title, *first_lines(str(self).splitlines())])

    def _repr_html_(self) -> str:
        number = lambda row: "-" if row.rank is None else str(row.rank)
        shape = lambda row: "x".join(map(str, row.shape))
        rows = [[printable(p), shape(r), number(r), r.reason] for p, r in self.items()][:SCREEN]
        table = html_table(("path", "shape", "rank", "reason"), rows)
        more = f" Here are the first {SCREEN}." if len(self) > SCREEN else ""
        return f"<p>{self._title}.{more}</p>\n{table}"


class Hold(enum.IntEnum):
    """Says by a number why training has left a kernel alone at its last pruning step."""

    NONE = 0
    LAW = 1
    NOTHING = 2
    UNSETTLED = 3
    SQUARES = 4
    LEARNING = 5
    LOSS = 6
    WAITING = 7

    @property
    def words(self) -> str:
        """The reason, with a remedy."""
        return {
            Hold.NONE: "its last cut was held back",
            Hold.LAW: "the law did not fit; train longer, or use a rule such as `ranks.size`",
            Hold.NOTHING: "nothing stood out of the noise; train longer",
            Hold.UNSETTLED: "its signal had not settled; train longer, or raise `settled`",
            Hold.SQUARES: "the cut takes too many squares; give `value_fn`, or raise `max_removed`",
            Hold.LEARNING: "the network still learnt fast; train longer",
            Hold.LOSS: "the loss would have risen; train longer, raise `max_rise`, or cut less",
            Hold.WAITING: "it was cut before and waits for its next turn",
        }[self]


def left_alone(fit: BulkFit) -> str:
    """Returns why training has left a kernel alone, from a noise level whose threshold is -1."""
    code = int(np.max(fit.num_spikes))
    known = code in list(Hold)
    return f"pruning left it alone while training: {Hold(code if known else 0).words}"


def in_place(row: LayerPlan, cause: str | None = None) -> LayerPlan:
    """Returns the row of a kernel that may not change its shape, for a cause in words."""
    if not isinstance(row, Factorized):
        return row
    words = row.reason.partition(": ")[2]
    reason = f"truncated: {cause} ({words})" if cause else f"truncated: {words}"
    cost = row.cost and Cost(*row.cost[:3], *row.cost[:3])
    return Truncated(**{**vars(row), "reason": reason, "cost": cost})


def check_plan(plan: Any) -> None:
    """Raises TypeError if `plan` is not a `Plan`."""
    if not isinstance(plan, Plan):
        raise TypeError(
            "`plan` must be a `rmtjax.Plan`, such as `rmtjax.plan(params)` or `report.plan`, got "
            f"{type(plan).__name__}."
        )


def _mismatch(leaf: Any, row: LayerPlan, applied: bool) -> str | None:
    """Returns what makes a leaf a different one than the row was made for, or None."""
    if kernel_shape(leaf) != row.shape:
        return f"has shape {kernel_shape(leaf)}"
    if isinstance(leaf, FactoredKernel) and not isinstance(row, Kept):
        return f"is held as {type(leaf).__name__}"
    if isinstance(row, Kept) or not isinstance(leaf, Factors):
        return None
    if factored_axes(leaf) != row.axes:
        return "is factorized along other axes"
    rank = leaf.left.shape[-1]
    # Factors of a higher rank may be cut. After the plan they have just the rank of their row.
    if rank < row.rank or (applied and isinstance(row, Factorized) and rank > row.rank):
        return f"is factorized with rank {rank}, and not {row.rank},"
    return None


def check_plan_fits(
    plan: Any,
    leaves: Mapping[str, Any],
    rows: Mapping[str, LayerPlan] | None = None,
    *,
    applied: bool = False,
) -> None:
    """Raises ValueError unless a plan was made for a tree with these leaves, given by path.

    Only `rows` must fit, by default those of the kernels that the plan changes. If it is `applied`,
    the leaves are those of the tree that it makes.
    """
    check_plan(plan)
    for path, row in (plan.changes if rows is None else rows).items():
        difference = _mismatch(leaves[path], row, applied) if path in leaves else "is not there"
        if difference:
            raise ValueError(
                f"`plan` is for another tree: it has {path!r} of shape {row.shape}, which "
                f"{difference} in this one. Make the plan from this tree with `rmtjax.plan`."
            )
