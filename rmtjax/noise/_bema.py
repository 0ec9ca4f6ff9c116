"""The Marchenko-Pastur bulk of a spectrum: its noise level, its edge and how well it fits."""

import operator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from rmtjax._types import BulkFit, Spectrum
from rmtjax.laws import bulk_law, check_level, marchenko_pastur, noise_threshold

# Where the law does not fit, the count of spikes may creep up one by one.
_MOST_TURNS = 50
# Fewest ranks of a truncated spectrum that a noise level may be taken from.
_FEWEST_RANKS = 10


def check_trim(trim: float) -> None:
    """Refuses a share that leaves nothing in the middle."""
    if not 0 <= trim < 0.5:
        raise ValueError(
            f"`trim` must be in [0, 0.5), got {trim}: it is the share of the eigenvalues "
            "left out at each end. The papers use 0.2 or 0.25."
        )


def count_above(spectrum: Spectrum, threshold: Float[Array, ""]):
    """Number of eigenvalues above a threshold; 0 where either is NaN."""
    return jnp.sum(spectrum.eigenvalues > threshold, axis=-1, dtype=jnp.int32)


def above_rounding(spectrum: Spectrum, variance: Float[Array, ""]):
    """Whether a noise level is more than what rounding leaves of exact zeros."""
    size = spectrum.eigenvalues.shape[-1]
    unit = size * jnp.finfo(spectrum.eigenvalues.dtype).eps
    return variance > unit**2 * spectrum.eigenvalues[..., 0]


def _populated(size: int, rank) -> Bool[Array, " p"]:
    """Which ranks, ascending, a truncation to `rank` has left."""
    return jnp.arange(size) >= size - (size if rank is None else rank)


def _positions(spectrum: Spectrum, spikes: Int[Array, ""]) -> Float[Array, " p"]:
    """Midpoints (i + 1/2) / (p - K) of the noise ranks, ascending; above 1 for the spikes."""
    size = spectrum.eigenvalues.shape[0]
    return (jnp.arange(size, dtype=spectrum.ratio.dtype) + 0.5) / (size - spikes)


def ks_distance(spectrum: Spectrum, scale: Float[Array, ""], spikes: Int[Array, ""], rank=None):
    r"""Largest gap between the distribution functions of bulk and law, over the noise ranks.

    Both sides of each step count: with m noise ranks
    $\max_i |F(\lambda_{(i)}) - (i + 1/2) / m| + 1 / (2 m)$, $\lambda_{(i)}$ ascending.
    """
    size = spectrum.eigenvalues.shape[0]
    ratio, unit = bulk_law(spectrum.ratio, size, spikes)
    safe = jnp.where(scale > 0, scale, 1.0)  # no law without a variance
    law = marchenko_pastur.cdf(spectrum.eigenvalues[::-1], ratio, safe * unit)
    noise = _populated(size, rank) & (jnp.arange(size) < size - spikes)
    gaps = jnp.where(noise, jnp.abs(law - _positions(spectrum, spikes)), 0)
    distance = jnp.max(gaps) + 0.5 / (size - spikes)
    return jnp.where(scale > 0, distance, jnp.where(jnp.isnan(scale), jnp.nan, 1.0))


def match(spectrum: Spectrum, spikes: Int[Array, ""], trim: float, rank=None) -> Float[Array, ""]:
    """Slope of the middle noise ranks on the quantiles of unit noise: the scale of the bulk.

    NaN where a truncation to `rank` has left too few of them.
    """
    size = spectrum.eigenvalues.shape[0]
    ratio, unit = bulk_law(spectrum.ratio, size, spikes)
    # In NumPy, since the product of float32 may round to the other side of an integer.
    first = np.floor(trim * np.arange(size + 1)).astype(np.int32)
    last = np.maximum(np.floor((1 - trim) * np.arange(size + 1)).astype(np.int32), first + 1)
    ranks, noise = jnp.arange(size), size - spikes
    inside = (ranks >= jnp.asarray(first)[noise]) & (ranks < jnp.asarray(last)[noise])
    inside &= _populated(size, rank)
    positions = jnp.where(inside, _positions(spectrum, spikes), 0.5)
    quantiles = marchenko_pastur.noise_quantiles(positions, ratio, unit, noise)
    quantiles = jnp.where(inside, quantiles, 0)
    slope = jnp.sum(quantiles * spectrum.eigenvalues[::-1]) / jnp.sum(quantiles**2)
    fewest = 1 if rank is None else jnp.where(jnp.asarray(rank) < size, _FEWEST_RANKS, 1)
    return jnp.where(jnp.sum(inside) >= fewest, slope, jnp.nan)


def _repulsion(spectrum: Spectrum, variance: Float[Array, ""], spikes: Int[Array, ""]):
    r"""What the spikes have pushed the bulk down by, as a share of its mean.

    A direction of strength $\ell$ (in $\sigma \sqrt n$) shows at
    $\lambda / \sigma^2 = \ell^2 + 1 + \gamma + \gamma / \ell^2$. The first three terms are
    its own and those of its row and column; the last one is taken from the bulk.
    """
    size = spectrum.eigenvalues.shape[0]
    ratio, unit = bulk_law(spectrum.ratio, size, spikes)
    excess = spectrum.eigenvalues / (variance * unit) - 1 - ratio  # l^2 + ratio / l^2
    spike, floor = jnp.arange(size) < spikes, 2 * jnp.sqrt(ratio)  # at the detection limit
    # The root has no derivative at 0: any value beyond will do for what is thrown away.
    beyond = spike & (excess > floor)
    safe = jnp.where(beyond, excess, 3 * floor)
    taken = jnp.where(spike, floor / 2, 0)
    taken = jnp.where(beyond, 2 * ratio / (safe + jnp.sqrt(safe**2 - 4 * ratio)), taken)
    return jnp.sum(taken) / (size - spikes)


def _noise_level(spectrum: Spectrum, scale: Float[Array, ""], spikes: Int[Array, ""]):
    """The variance of an entry of the noise whose bulk, pushed down by spikes, has `scale`."""

    def again(_, variance):
        # At most half of the ranks are spikes, and each takes less than the mean of one.
        return scale / jnp.maximum(1 - _repulsion(spectrum, variance, spikes), 0.1)

    return lax.fori_loop(0, 20, again, scale)  # a contraction by about K / p a turn


def _cut(spectrum: Spectrum, spikes: Int[Array, ""], rank, trim: float, level: float):
    """The scale of the bulk besides a number of spikes, and the threshold of one more."""
    size = spectrum.eigenvalues.shape[0]
    scale = match(spectrum, spikes, trim, rank)
    ratio, unit = bulk_law(spectrum.ratio, size, spikes)
    return scale, scale * unit * noise_threshold(ratio, size - spikes, level)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _settle(spectrum: Spectrum, rank, trim: float, level: float):
    """Takes spikes out until none is found besides them: their number, and the cut of it."""
    size = spectrum.eigenvalues.shape[0]

    def more(turn):
        found, spikes, turns, *_ = turn
        return (found > spikes) & (turns < _MOST_TURNS)

    def again(turn):
        spikes, _, turns, *_ = turn
        scale, threshold = _cut(spectrum, spikes, rank, trim, level)
        found = jnp.minimum(count_above(spectrum, threshold), size // 2)
        return jnp.maximum(found, spikes), spikes, turns + 1, scale, threshold

    none, unknown = jnp.zeros((), jnp.int32), jnp.full_like(spectrum.ratio, jnp.nan)
    turn = lax.while_loop(more, again, (none, none - 1, none, unknown, unknown))
    _, spikes, _, scale, threshold = turn
    return spikes, scale, threshold


@_settle.defjvp
def _settle_jvp(trim, level, primals, tangents):
    """That of the last cut: a loop has no derivative of its own, nor a count."""
    spectrum, rank = primals
    spikes, *values = _settle(spectrum, rank, trim, level)
    last = lambda spectrum: _cut(spectrum, spikes, rank, trim, level)
    _, slopes = jax.jvp(last, (spectrum,), (tangents[0],))
    return (spikes, *values), (np.zeros(jnp.shape(spikes), jax.dtypes.float0), *slopes)


@partial(jax.jit, static_argnames=("trim", "level"))
def _fit(spectrum: Spectrum, rank, *, trim: float, level: float) -> BulkFit:
    spikes, scale, threshold = _settle(spectrum, rank, trim, level)
    variance = _noise_level(spectrum, scale, spikes)
    return bulk_fit(spectrum, variance, threshold, scale, spikes, rank)


def bulk_fit(
    spectrum: Spectrum,
    variance: Float[Array, ""],
    threshold: Float[Array, ""],
    scale: Float[Array, ""],
    spikes: Int[Array, ""],
    rank=None,
) -> BulkFit:
    """The fit that belongs to a noise level and a cut, however they were found."""
    ratio, unit = bulk_law(spectrum.ratio, spectrum.eigenvalues.shape[0], spikes)
    return BulkFit(
        variance=variance,
        edge=scale * marchenko_pastur.support(ratio, unit)[1],
        threshold=threshold,
        distance=ks_distance(spectrum, scale, spikes, rank),
        num_spikes=count_above(spectrum, threshold),
    )


def _check_rank(rank, spectrum: Spectrum) -> None:
    """Refuses a wrong rank; one that is traced is not looked at."""
    if rank is None or isinstance(rank, jax.Array):
        return
    size = spectrum.eigenvalues.shape[-1]
    if not 0 <= operator.index(rank) <= size:
        raise ValueError(
            f"`rank` must be an integer in [0, {size}] or None, got {rank}: the rank that the "
            "matrix was truncated to."
        )


def fit_bema(
    spectrum: Spectrum,
    *,
    trim: float = 0.25,
    level: float = 0.01,
    rank: Int[ArrayLike, ""] | None = None,
) -> BulkFit:
    r"""Fits the Marchenko-Pastur law to the bulk by eigenvalue matching (BEMA).

    With $K$ spikes, the middle ones of the $m = p - K$ noise eigenvalues, ascending, are
    matched with the quantiles $q_i = F^{-1}((i + 1/2) / m)$ of the law of
    $m \times (n - K)$ unit noise, and a spike is what stands above its Tracy-Widom threshold:

    $s = \sum_i q_i \lambda_{(i)} / \sum_i q_i^2, \quad
    T = s [(1+\sqrt\gamma)^2 + t\, n^{-2/3} \gamma^{-1/6} (1+\sqrt\gamma)^{4/3}]$,

    $\gamma$ and $n$ those of what is left of the noise. Both have their terms of second order,
    so that `level` holds to about 0.02 down to $p = 50$. $K$ starts at 0 and grows until it
    is the number of eigenvalues above $T$. The variance is $s$, and what the spikes have
    pushed the bulk down by: $\sigma^2 = s / (1 - \frac{1}{m} \sum_k \gamma / \ell_k^2)$ with
    $\ell_k$ the strength of spike $k$ before the noise pushed it up.

    Args:
      spectrum: From `rmtjax.spectrum`.
      trim: Share of the noise eigenvalues left out at each end, in [0, 0.5).
      level: Probability that noise alone gives a spike, in (0, 1), at least 1e-6: a small
        level is a high threshold. $t$ is the Tracy-Widom quantile at 1 - level.
      rank: Rank that the matrix was truncated to, in [0, p]; None if it was not. Only the
        ranks that are still populated are matched then, at their old positions.

    Returns:
      `BulkFit(variance, edge, threshold, distance, num_spikes)`. The count means
      something only if `distance` is small; pure noise stays under `5 / p`. All but the
      count are NaN where a truncation has left fewer than 10 ranks to match.

    Raises:
      ValueError: `trim`, `level` or `rank` is out of range.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> planted = noise.at[:, 0].add(5.0)  # one direction of signal
      >>> fit = rmtjax.fit_bema(rmtjax.spectrum(planted))
      >>> print(f"{fit.variance:.1f}, {fit.edge:.1f}, {fit.num_spikes}")
      1.0, 2.9, 1

    Where this departs from the paper: it matches all ranks, spikes among them, which biases
    the variance by 7 to 13 % with a tenth of the ranks planted (here by less than 1 %, if
    they are half above the detection limit: what hides in the bulk counts as noise), and
    places them at $i / p$. Its authors' followers have the exponent $(\cdot)^4 / 3$.

    References:
      Ke, Ma and Lin, J. Am. Stat. Assoc. 118 (2023) 374-392,
      https://arxiv.org/abs/2006.00436. Johnstone, Ann. Statist. 29 (2001) 295-327. Ma,
      Bernoulli 18 (2012) 322-359. Dumitriu and Edelman, J. Math. Phys. 47 (2006) 063302. What
      spikes take from the bulk: Kritchman and Nadler, Chemometr. Intell. Lab. 94 (2008) 19-32.
    """
    check_trim(trim)
    check_level(level)
    if not isinstance(spectrum, Spectrum):
        raise TypeError(
            f"`spectrum` must be a Spectrum, got {type(spectrum).__name__}. Of a matrix it is "
            "`rmtjax.spectrum(matrix)`."
        )
    if spectrum.eigenvalues.ndim != 1:
        raise ValueError(
            "`spectrum` must be that of one matrix, got eigenvalues of shape "
            f"{spectrum.eigenvalues.shape}. Use `jax.vmap` for several."
        )
    _check_rank(rank, spectrum)
    return _fit(spectrum, rank, trim=trim, level=level)
