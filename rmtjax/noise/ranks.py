"""Rank rules: how many directions of a matrix are signal.

Each rule is a frozen value that can be called, hashed, printed and compared:

- `rule.fit(spectrum, rank=None)` estimates the noise; `rank` is that which the matrix was
  truncated to, if it was: what is left of the fit is NaN where too little is left;
- `rule.accepts(spectrum, fit)` says whether the rule may be believed;
- `rule.needs_noise` says whether the count depends on a noise level at all;
- `rule(spectrum, fit=None)` counts the signal directions, by the noise level of `fit`
  where one is given: so that a level found once can be used again on a spectrum that has
  been truncated since.

All are pure and work under `jit` and `vmap`, on the `Spectrum` of one matrix.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from rmtjax._types import BulkFit, Spectrum
from rmtjax.laws import check_level, check_significance, critical_distance, marchenko_pastur
from rmtjax.noise._bema import above_rounding, bulk_fit, check_trim, count_above, fit_bema

Rank = Int[ArrayLike, ""] | None


@runtime_checkable
class RankRule(Protocol):
    """What a rank rule is: see the head of this module."""

    @property
    def needs_noise(self) -> bool:
        """Whether the count depends on a noise level."""
        ...

    def fit(self, spectrum: Spectrum, rank: Rank = None) -> BulkFit:
        """Estimates the noise."""
        ...

    def accepts(self, spectrum: Spectrum, fit: BulkFit) -> Bool[Array, ""]:
        """Whether the count may be believed."""
        ...

    def __call__(self, spectrum: Spectrum, fit: BulkFit | None = None) -> Int[Array, ""]:
        """Number of signal directions."""
        ...


def check_rule(rule: object) -> None:
    """Refuses what is no rank rule, such as its name, a number, or the class itself.

    Args:
      rule: What was given as `rule`.

    Raises:
      TypeError: It is no rank rule.

    Examples:
      >>> import rmtjax
      >>> rmtjax.ranks.check_rule(rmtjax.ranks.fixed(16))
    """
    if isinstance(rule, type) or not isinstance(rule, RankRule):
        raise TypeError(
            f"`rule` must be a rank rule such as `rmtjax.ranks.bema()` or "
            f"`rmtjax.ranks.fixed(16)`, got {rule!r}."
        )


def kept_rank(
    num_signal: Int[ArrayLike, ""],
    size: Int[ArrayLike, ""],
    keep: ArrayLike = 0.0,
    min_rank: Int[ArrayLike, ""] = 1,
) -> Int[Array, ""]:
    r"""$r = K + \lfloor keep \cdot (p - K) \rfloor$, at least `min_rank`.

    All $K$ signal directions and the largest part of the rest, as in the papers.
    """
    # The thousandth of a rank forgives rounding: 0.7 * 10 is 7, not 6.
    share = jnp.asarray(keep, jnp.float32)  # a bfloat16 cannot count to 1,000
    rest = jnp.floor(share * jnp.subtract(size, num_signal) + 1e-3).astype(jnp.int32)
    return jnp.clip(num_signal + rest, jnp.minimum(min_rank, size), size)


@dataclass(frozen=True)
class bema:  # noqa: N801 - called like a function, as everything in this module
    r"""Spikes above the Tracy-Widom threshold of a Marchenko-Pastur bulk.

    The bulk is fitted by `rmtjax.fit_bema`. The rule refuses where the law does not fit:
    where the Kolmogorov distance of the noise ranks is above $(0.4 \log p + c) / p + d$. Pure
    noise exceeds the first term with a probability of `significance`, at any size (simulated at
    the default `trim` and `level`, p = 10 to 800); $d$ is what a trained bulk may depart from
    the law besides. Bulks of kernels trained on MNIST stay under 0.01 with SGD and under 0.02
    with Adam. It refuses too where half of the ranks are spikes: a law of the minority is no
    bulk.

    Attributes:
      trim: Share of the noise eigenvalues left out at each end of the fit, in [0, 0.5).
      level: Probability that noise alone gives a spike, in (0, 1).
      significance: Probability that pure noise is refused at a tolerance of 0, in [0.001, 0.5].
      tolerance: $d$, in [0, 1]; 1 opens the gate to all that is finite and has a minority of
        spikes.

    References:
      Ke, Ma and Lin, J. Am. Stat. Assoc. 118 (2023) 374-392,
      https://arxiv.org/abs/2006.00436.
    """

    needs_noise = True
    trim: float = 0.25
    level: float = 0.1
    significance: float = 0.01
    tolerance: float = 0.015

    def __post_init__(self):
        check_trim(self.trim)
        check_level(self.level)
        check_significance(self.significance)
        if not 0 <= self.tolerance <= 1:
            raise ValueError(
                f"`tolerance` must be in [0, 1], got {self.tolerance}: it is the distance from "
                "the law that is allowed besides that of pure noise; 1 opens the gate."
            )

    def fit(self, spectrum: Spectrum, rank: Rank = None) -> BulkFit:
        """Fits the bulk by eigenvalue matching."""
        return fit_bema(spectrum, trim=self.trim, level=self.level, rank=rank)

    def accepts(self, spectrum: Spectrum, fit: BulkFit) -> Bool[Array, ""]:
        """Whether the law fits; False for a spectrum that is not finite, or has no noise."""
        size = spectrum.eigenvalues.shape[-1]
        limit = critical_distance(size, self.significance)
        few = (fit.num_spikes < size // 2) | (size < 10)  # of so few a half may be one
        fits = (fit.distance <= limit + self.tolerance) & few
        return fits & above_rounding(spectrum, fit.variance)

    def __call__(self, spectrum: Spectrum, fit: BulkFit | None = None) -> Int[Array, ""]:
        """Number of eigenvalues above the threshold of `fit`."""
        fit = self.fit(spectrum) if fit is None else fit
        return count_above(spectrum, fit.threshold)


@dataclass(frozen=True)
class gavish_donoho:  # noqa: N801
    r"""The optimal hard threshold for singular values in white noise.

    The cut is $s > c(\gamma) \sqrt{n} \sigma$ with
    $c(\gamma)^2 = 2 (\gamma + 1) + 8 \gamma / (\gamma + 1 + \sqrt{\gamma^2 + 14 \gamma + 1})$
    and $\sigma^2$ the median eigenvalue over that of the Marchenko-Pastur law; for a
    square matrix $s > 2.858$ times the median singular value. It minimises the expected
    Frobenius error of the truncated matrix and lies 15 to 20 % above the edge: directions
    in between can be detected, but cost more error than they give back.

    The median assumes that less than about half of the directions are signal. There is no
    gate: what is finite is accepted.

    References:
      Gavish and Donoho, IEEE Trans. Inf. Theory 60 (2014) 5040-5053,
      https://arxiv.org/abs/1305.5870.
    """

    needs_noise = True

    def fit(self, spectrum: Spectrum, rank: Rank = None) -> BulkFit:
        """Noise level from the median eigenvalue, threshold by the closed form."""
        ratio = spectrum.ratio
        median = jnp.median(spectrum.eigenvalues)
        variance = median / marchenko_pastur.ppf(jnp.asarray(0.5, ratio.dtype), ratio)
        if rank is not None:  # a median needs both halves
            size = spectrum.eigenvalues.shape[-1]
            variance = jnp.where(2 * jnp.asarray(rank) > size + 1, variance, jnp.nan)
        root = jnp.sqrt(ratio**2 + 14 * ratio + 1)
        cut = 2 * (ratio + 1) + 8 * ratio / (ratio + 1 + root)
        threshold = variance * cut
        spikes = count_above(spectrum, threshold)
        return bulk_fit(spectrum, variance, threshold, variance, spikes, rank)

    def accepts(self, spectrum: Spectrum, fit: BulkFit) -> Bool[Array, ""]:
        """Whether the noise level is finite and more than rounding."""
        return jnp.isfinite(fit.variance) & above_rounding(spectrum, fit.variance)

    def __call__(self, spectrum: Spectrum, fit: BulkFit | None = None) -> Int[Array, ""]:
        """Number of eigenvalues above the threshold of `fit`."""
        fit = self.fit(spectrum) if fit is None else fit
        return count_above(spectrum, fit.threshold)


class _WithoutNoise:
    """What rules share that ask nothing of the noise: BEMA's fit, as a diagnostic only."""

    needs_noise = False

    def fit(self, spectrum: Spectrum, rank: Rank = None) -> BulkFit:
        """BEMA's fit, which this rule reports and does not use."""
        return fit_bema(spectrum, rank=rank)

    def accepts(self, spectrum: Spectrum, fit: BulkFit) -> Bool[Array, ""]:
        """Whether the spectrum is finite."""
        del fit
        return jnp.isfinite(spectrum.eigenvalues).all()


@dataclass(frozen=True)
class energy(_WithoutNoise):  # noqa: N801
    r"""The fewest directions that hold a share of the energy.

    The smallest $r$ with $\sum_{k \le r} s_k^2 \ge share \cdot \sum_k s_k^2$. Applied
    again to what it has truncated, it takes a share of the share: under `prune_spectrum`
    the rank goes on falling.

    Attributes:
      share: In (0, 1].
    """

    share: float

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"`share` must be in (0, 1], got {self.share}.")

    def __call__(self, spectrum: Spectrum, fit: BulkFit | None = None) -> Int[Array, ""]:
        """Number of directions that hold the share."""
        del fit
        held = jnp.cumsum(spectrum.eigenvalues)
        # At least the last entry reaches a share of 1, whatever the rounding.
        missing = jnp.sum(held < self.share * held[-1], dtype=jnp.int32)
        return jnp.where(held[-1] > 0, jnp.minimum(missing + 1, held.shape[0]), 0)


@dataclass(frozen=True)
class fixed(_WithoutNoise):  # noqa: N801
    """A rank chosen by hand, or all directions where there are fewer.

    Attributes:
      rank: At least 1.
    """

    rank: int

    def __post_init__(self):
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"`rank` must be an integer of at least 1, got {self.rank!r}.")

    def __call__(self, spectrum: Spectrum, fit: BulkFit | None = None) -> Int[Array, ""]:
        """The rank."""
        del fit
        return jnp.asarray(min(self.rank, spectrum.eigenvalues.shape[-1]), jnp.int32)
