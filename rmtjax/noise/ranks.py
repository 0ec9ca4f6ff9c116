"""Rank rules: they count how many directions of a matrix are signal.

Each rule is a frozen value. It can be called, hashed, printed and compared:

- `rule.fit(spectrum, rank=None)` estimates the noise. If the matrix was truncated, `rank` is
  its rank. The fit is NaN if too few ranks are left.
- `rule.accepts(spectrum, fit)` is True if the count can be trusted.
- `rule.needs_noise` is True if the count depends on a noise level.
- `rule(spectrum, fit=None)` counts the signal directions. It uses the noise level of `fit` if
  one is given, so a level can be reused after the matrix has been truncated.

All methods are pure functions of the `Spectrum` of one matrix. They work under `jit` and `vmap`.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from rmtjax._modes import in_usual_modes
from rmtjax._types import BulkFit, size_of, Spectrum
from rmtjax.laws import check_level, check_significance, critical_distance, marchenko_pastur
from rmtjax.noise._bema import above_rounding, bulk_fit, check_trim, count_above, fit_bema

__all__ = ["RankRule", "bema", "energy", "fixed", "gavish_donoho", "size"]

Rank = Int[ArrayLike, ""] | None


@runtime_checkable
class RankRule(Protocol):
    """Describes a rank rule: a noise fit, a verdict on it, and a count of signal directions.

    Examples:
      >>> import rmtjax
      >>> isinstance(rmtjax.ranks.bema(), rmtjax.ranks.RankRule)
      True
    """

    @property
    def needs_noise(self) -> bool:
        """Returns True if the count depends on a noise level."""
        ...

    def fit(self, spectrum: Spectrum, rank: Rank = None) -> BulkFit:
        """Estimates the noise."""
        ...

    def accepts(self, spectrum: Spectrum, fit: BulkFit) -> Bool[Array, ""]:
        """Returns True if the count can be trusted."""
        ...

    def __call__(self, spectrum: Spectrum, fit: BulkFit | None = None) -> Int[Array, ""]:
        """Counts the signal directions."""
        ...


def check_rule(rule: object, *, plans: bool = False) -> None:
    """Raises TypeError if `rule` is not a rank rule.

    Raises ValueError for one that equalizes, except in `plans`: a spectrum alone has no rows.
    """
    # A class has the same methods as its instances, so the protocol alone would accept it.
    if isinstance(rule, type) or not isinstance(rule, RankRule):
        raise TypeError(
            "`rule` must be a rank rule such as `rmtjax.ranks.bema()` or "
            f"`rmtjax.ranks.fixed(16)`, got {rule!r} ({type(rule).__name__})."
        )
    if getattr(rule, "equalize", False) and not plans:
        raise ValueError(
            "`rule` must have `equalize=False` outside of plans and reports, which alone have the "
            f"kernels to equalize, got {rule!r}."
        )


class _AboveThreshold:
    """Shares the count of rules that need a noise level."""

    needs_noise = True

    def __call__(self: RankRule, spectrum: Spectrum, fit: BulkFit | None = None) -> Int[Array, ""]:
        """Counts the eigenvalues above the threshold of `fit`."""
        fit = self.fit(spectrum) if fit is None else fit
        return count_above(spectrum, fit.threshold)


@dataclass(frozen=True)
class bema(_AboveThreshold):  # noqa: N801 - rules are called like functions, `ranks.bema()`
    r"""Counts the spikes above the Tracy-Widom threshold of a Marchenko-Pastur bulk.

    `rmtjax.fit_bema` fits the bulk. The rule accepts the fit if the Kolmogorov-Smirnov distance
    of the noise ranks is at most $(0.4 \log p + c) / p + d$. Pure noise exceeds the first term
    with probability `significance`. That was simulated at the default `trim` and levels of 0.01
    and 0.1, for p = 10 to 800. The tolerance $d$ allows for the departure of a trained bulk from
    the law. Kernels trained on MNIST stay under 0.01 with SGD and under 0.02 with Adam. The rule
    also rejects a fit with spikes in half of the ranks, because the rest is then a minority.

    With `equalize`, plans and reports first divide each kernel by the scales that its noise has in
    rows and columns, as `rmtjax.equalize` does. The rule judges what is left, and the kernel is
    cut there and scaled back. Its singular values are then weighted by the noise around them.

    Attributes:
      trim: Share of the noise eigenvalues left out at each end of the fit, in [0, 0.5).
      level: Probability that noise alone gives a spike, in (0, 1).
      significance: Probability that pure noise is rejected at a tolerance of 0, in [0.001, 0.5].
      tolerance: $d$, in [0, 1]. With 1, every finite spectrum with a minority of spikes passes.
      equalize: True equalizes each kernel. "advise" judges kernels as they are. The reason of a
        refused one then tells if it fits after equalizing rows, columns or both. A spectrum that
        the rule itself is called with is never changed.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> int(rmtjax.ranks.bema(level=0.05)(rmtjax.spectrum(noise.at[:, 0].add(5.0))))
      1
    """

    trim: float = 0.25
    # At 0.1, one kernel of pure noise in ten has a false spike and is cut to it.
    level: float = 0.01
    significance: float = 0.01
    tolerance: float = 0.015
    equalize: bool | Literal["advise"] = False

    def __post_init__(self):
        check_trim(self.trim)
        check_level(self.level)
        check_significance(self.significance)
        if not 0 <= self.tolerance <= 1:
            raise ValueError(f"`tolerance` must be in [0, 1], got {self.tolerance}.")
        if not (isinstance(self.equalize, bool) or self.equalize == "advise"):
            raise ValueError(f'`equalize` must be a bool or "advise", got {self.equalize!r}.')

    def __repr__(self) -> str:
        # Files and results hold rules by their text, from before there was `equalize`.
        shown = {name: value for name, value in vars(self).items() if name != "equalize"}
        shown |= {"equalize": self.equalize} if self.equalize else {}
        return f"bema({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def fit(self, spectrum: Spectrum, rank: Rank = None) -> BulkFit:
        """Fits the bulk by eigenvalue matching."""
        return fit_bema(spectrum, trim=self.trim, level=self.level, rank=rank)

    def accepts(self, spectrum: Spectrum, fit: BulkFit) -> Bool[Array, ""]:
        """Returns True if the law fits. A spectrum that is not finite or has no noise fails."""
        size = size_of(spectrum)
        close = fit.distance <= critical_distance(size, self.significance) + self.tolerance
        # Below 10 ranks, one or two true spikes can already be a half.
        few = (fit.num_spikes < size // 2) | (size < 10)
        return close & few & above_rounding(spectrum, fit.variance)


@dataclass(frozen=True)
class gavish_donoho(_AboveThreshold):  # noqa: N801
    r"""Counts the singular values above the optimal hard threshold in white noise.

    The threshold is $s > c(\gamma) \sqrt{n} \sigma$ with
    $c(\gamma)^2 = 2 (\gamma + 1) + 8 \gamma / (\gamma + 1 + \sqrt{\gamma^2 + 14 \gamma + 1})$.
    Here $\sigma^2$ is the median eigenvalue over the median of the Marchenko-Pastur law. For a
    square matrix the threshold is 2.858 times the median singular value. It minimises the
    expected Frobenius error of the truncated matrix and is 15 to 20 % above the edge. Directions
    in between can be detected, but keeping them adds more error than it removes.

    The median assumes that less than about half of the directions are signal. Every finite
    spectrum is accepted.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> int(rmtjax.ranks.gavish_donoho()(rmtjax.spectrum(noise.at[:, 0].add(5.0))))
      1

    References:
      Gavish and Donoho, IEEE Trans. Inf. Theory 60 (2014) 5040-5053,
      https://arxiv.org/abs/1305.5870.
    """

    @in_usual_modes
    def fit(self, spectrum: Spectrum, rank: Rank = None) -> BulkFit:
        """Takes the noise level from the median eigenvalue and the threshold from its formula."""
        ratio = spectrum.ratio
        size = size_of(spectrum)
        median = jnp.mean(spectrum.eigenvalues[jnp.asarray([(size - 1) // 2, size // 2])])
        variance = median / marchenko_pastur.ppf(jnp.asarray(0.5, ratio.dtype), ratio)
        if rank is not None:  # The median of a truncated spectrum must be a value that was kept.
            variance = jnp.where(2 * jnp.asarray(rank) > size + 1, variance, jnp.nan)
        root = jnp.sqrt(ratio**2 + 14 * ratio + 1)
        threshold = variance * (2 * (ratio + 1) + 8 * ratio / (ratio + 1 + root))
        spikes = count_above(spectrum, threshold)
        return bulk_fit(spectrum, variance, threshold, variance, spikes, rank)

    def accepts(self, spectrum: Spectrum, fit: BulkFit) -> Bool[Array, ""]:
        """Returns True if the noise level is finite and larger than rounding errors."""
        return jnp.isfinite(fit.variance) & above_rounding(spectrum, fit.variance)


class _WithoutNoise:
    """Shares the fit and the verdict of rules that need no noise level."""

    needs_noise = False

    def fit(self, spectrum: Spectrum, rank: Rank = None) -> BulkFit:
        """Fits the bulk by BEMA. The count does not use this fit."""
        return fit_bema(spectrum, rank=rank)

    def accepts(self, spectrum: Spectrum, fit: BulkFit) -> Bool[Array, ""]:
        """Returns True if the spectrum is finite."""
        del fit
        return jnp.isfinite(spectrum.eigenvalues).all()


@dataclass(frozen=True)
class energy(_WithoutNoise):  # noqa: N801
    r"""Counts the fewest directions that hold a share of the energy.

    This is the smallest $r$ with $\sum_{k \le r} s_k^2 \ge share \cdot \sum_k s_k^2$. On a
    truncated matrix the rule takes a share of the share. Under `prune_spectrum` the rank
    therefore falls at every pruning step.

    Attributes:
      share: Share of the sum of squares, in (0, 1].

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> int(rmtjax.ranks.energy(0.8)(rmtjax.spectrum(jnp.diag(jnp.array([3.0, 1.0, 0.1])))))
      1
    """

    share: float

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` must be in (0, 1], such as 0.99, got {self.share}.")

    def __call__(self, spectrum: Spectrum, fit: BulkFit | None = None) -> Int[Array, ""]:
        """Counts the directions that hold the share."""
        del fit
        held = jnp.cumsum(spectrum.eigenvalues)
        # Compare with the last partial sum, not with a sum of its own: the two may differ by
        # rounding, and then no entry would reach a share of 1.
        missing = jnp.sum(held < self.share * held[-1], dtype=jnp.int32)
        return jnp.where(held[-1] > 0, jnp.minimum(missing + 1, held.shape[0]), 0)


@dataclass(frozen=True)
class fixed(_WithoutNoise):  # noqa: N801
    """Returns a rank chosen by hand, or the number of directions if that is smaller.

    Attributes:
      rank: Number of directions, at least 1.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> int(rmtjax.ranks.fixed(16)(rmtjax.spectrum(jnp.ones((20, 30)))))
      16
    """

    rank: int

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"`rank` must be an integer of at least 1, got {self.rank!r}.")

    def __call__(self, spectrum: Spectrum, fit: BulkFit | None = None) -> Int[Array, ""]:
        """Returns the rank."""
        del fit
        # No number that int32 does not hold. A rank may also be traced.
        most = spectrum.eigenvalues.shape[-1]
        rank = min(self.rank, most) if isinstance(self.rank, int) else self.rank
        return jnp.minimum(rank, size_of(spectrum)).astype(jnp.int32)


@dataclass(frozen=True)
class size(_WithoutNoise):  # noqa: N801
    r"""Returns the rank at which factors have a share of the numbers of the kernel.

    Factors of rank r of a kernel of m inputs and n outputs have $r (m + n)$ numbers, so the rank
    is $share \cdot m n / (m + n)$, which is $share \cdot p / (1 + \gamma)$. It is rounded down to a
    multiple, so that a plan that rounds up to the same one keeps to the share. It is never below
    that multiple, or the rank without rounding if that is smaller, or 1.

    Attributes:
      share: Numbers of the factors over those of the kernel, in (0, 1).
      multiple: Ranks are multiples of it; by default the 8 of `rmtjax.plan`.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> int(rmtjax.ranks.size(0.5)(rmtjax.spectrum(jnp.ones((64, 64)))))
      16
    """

    share: float
    multiple: int = 8

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"`share` must be in (0, 1), such as 0.5, got {self.share}.")
        whole = isinstance(self.multiple, int) and not isinstance(self.multiple, bool)
        if not whole or self.multiple < 1:
            raise ValueError(f"`multiple` must be an integer of at least 1, got {self.multiple!r}.")

    def __call__(self, spectrum: Spectrum, fit: BulkFit | None = None) -> Int[Array, ""]:
        """Returns the rank."""
        del fit
        exact = self.share * size_of(spectrum) / (1 + spectrum.ratio)
        # In float32 a rank of 32 may come out as 31.999998.
        exact = jnp.floor(exact.astype(jnp.float32) + 1e-3).astype(jnp.int32)
        rounded = exact // self.multiple * self.multiple
        return jnp.maximum(jnp.maximum(rounded, jnp.minimum(exact, self.multiple)), 1)
