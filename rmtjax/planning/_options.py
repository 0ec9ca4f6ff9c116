"""The options of a plan as one value, which checks itself."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rmtjax._names import matcher
from rmtjax._types import Axes, BulkFit, check_type, is_patterns, Where
from rmtjax.moments import Moments
from rmtjax.noise import check_rule, equalizes, ranks, Shrink
from rmtjax.planning._budget import Budget, to_budget


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError unless a number is an integer of at least `least`."""
    if isinstance(value, jax.Array):
        return  # it may be traced, as those that `optax.inject_hyperparams` injects
    is_integer = np.ndim(value) == 0 and np.asarray(value).dtype.kind in "iu"
    if not is_integer or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")


def check_share(name: str, value: Any, meaning: str, *, below_one: bool = False) -> None:
    """Raises ValueError unless a number is in [0, 1]. Arrays may be traced and are not checked."""
    if isinstance(value, jax.Array):
        return
    end, is_number = ")" if below_one else "]", np.asarray(value).dtype.kind in "biuf"
    if not is_number or not (0 <= value < 1 or (value == 1 and not below_one)):
        raise ValueError(f"`{name}` must be in [0, 1{end}, got {value}: the share of {meaning}.")


def to_number(name: str, value: Any, dtype: Any) -> Array:
    """Returns one number as an array without axes; raises ValueError for several."""
    if jnp.size(value) != 1:
        raise ValueError(
            f"`{name}` must be one number, got an array of shape {jnp.shape(value)}: give its mean."
        )
    return jnp.asarray(value, dtype).reshape(())


@dataclass(frozen=True)
class PlanOptions:
    """All that decides a plan besides the tree. Wrong values raise an error when it is made.

    `rmtjax.plan` explains each field; `analyze`, `analyze_file`, `compress_file`, `nnx.plan` and
    the command line take the same ones.
    """

    rule: ranks.RankRule = ranks.bema()  # noqa: RUF009 - frozen. Counts the signal directions of a spectrum
    keep: float = 0.0  # share of the other directions that stay, in [0, 1]
    shrink: Shrink | None = None  # changes the singular values that stay
    where: Where | None = None  # chooses leaves; None: those that Flax's layers multiply by
    axes: Axes | None = None  # names rows and columns; None: guessed from names and shapes
    fits: Mapping[str, BulkFit] | None = None  # noise levels in the place of new fits, by path
    min_rank: int = 1  # no kernel goes below
    multiple: int = 8  # ranks are rounded up to it, so that few shapes are compiled
    min_size: int = 50  # a shorter short side has too few eigenvalues for a law
    exact_below: int = 4096  # from this short side on, spectra are estimated in O(n^2)
    batch: int | Mapping[str, int] | None = None  # rows for which products are timed
    moments: Moments | None = None  # what the data feed to kernels: cuts are by output
    budget: Budget | float | None = None  # a size to reach, in the place of the rule's ranks

    def __post_init__(self):
        object.__setattr__(self, "budget", to_budget(self.budget))
        self._check_cut()
        self._check_trees()
        self._check_moments()
        self._check_budget()
        self._check_counts()

    def _check_cut(self) -> None:
        """Raises an error for what decides on ranks and values."""
        check_rule(self.rule, plans=True)
        check_share("keep", self.keep, "the directions that are not signal and stay all the same")
        if self.shrink is not None and not callable(self.shrink):
            raise TypeError(
                f"`shrink` must be a function such as `shrinkage.frobenius`, got {self.shrink!r}."
            )
        if self.shrink is not None and self.keep > 0:
            raise ValueError(
                f"`keep` must be 0 with `shrink`, got {self.keep}: what it keeps, `shrink` removes."
            )

    def _check_trees(self) -> None:
        """Raises an error for what belongs to leaves, or to paths."""
        where: Any = self.where if is_patterns(self.where) else ()
        for pattern in [where] if isinstance(where, str | re.Pattern) else where:
            try:
                matcher(pattern)
            except re.error as error:
                words = "`where` must be a regular expression after 're:', got"
                raise ValueError(f"{words} {pattern!r}: {error}.") from error
        if not (self.axes is None or callable(self.axes)):
            check_type("axes", self.axes, Mapping, "Or give a function `axes(path, leaf)`.")
        if self.fits is not None:
            of_state = "Those of an optimizer's state are `rmtjax.noise_levels(opt_state)`."
            check_type("fits", self.fits, Mapping, of_state)
            for path, fit in self.fits.items():
                check_type(f"fits[{path!r}]", fit, BulkFit, "Those of a plan are `plan.fits`.")

    def _check_moments(self) -> None:
        """Raises an error for other moments, or for options that do not go with them."""
        if self.moments is not None:
            of = "Collect them with `rmtjax.linen.moments` or `rmtjax.nnx.moments`."
            check_type("moments", self.moments, Moments, of)
            if self.shrink is not None:
                raise ValueError(
                    "`shrink` must be None with `moments`: it changes singular values of the "
                    f"weights, and cuts by output have none. Got {self.shrink!r}."
                )

    def _check_budget(self) -> None:
        """Raises ValueError for options that do not go with a budget, or that it needs."""
        if self.budget is not None and (self.shrink is not None or self.keep > 0):
            name = "keep" if self.keep > 0 else "shrink"
            raise ValueError(f"`{name}` must be left out with `budget`, which decides what stays.")
        if self.budget is not None and equalizes(self.rule):
            raise ValueError(
                "`budget` must be left out with a rule that equalizes: it compares squares of "
                f"kernels as they are. Got {self.rule!r}."
            )
        # Under a budget a rule only reports its noise levels, which these do not have.
        if self.budget is not None and isinstance(
            self.rule, ranks.energy | ranks.fixed | ranks.size
        ):
            raise ValueError(
                "`rule` must be left out with `budget`, which decides the ranks: "
                f"{self.rule!r} would have no say. Give one of the two."
            )
        if self.budget_is_time and self.batch is None:
            raise ValueError(
                "`batch` must be given with a budget of milliseconds, got None: the rows that "
                "each kernel multiplies in one call."
            )

    def _check_counts(self) -> None:
        """Raises an error for numbers that are no counts."""
        for name in ("min_rank", "multiple", "min_size", "exact_below"):
            check_count(name, getattr(self, name))
        for path, rows in self.batch.items() if isinstance(self.batch, Mapping) else ():
            check_count(f"batch[{path!r}]", rows)
        if not (self.batch is None or isinstance(self.batch, Mapping)):
            check_count("batch", self.batch)

    @property
    def budget_is_time(self) -> bool:
        """Returns True for a budget of milliseconds."""
        return isinstance(self.budget, Budget) and self.budget.milliseconds is not None
