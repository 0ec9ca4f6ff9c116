"""The Marchenko-Pastur bulk of a spectrum: its noise level, its edge and how well it fits."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rmtjax import marchenko_pastur, tracy_widom
from rmtjax._typing import BulkFit, Spectrum


def window(size: int, trim: float) -> slice:
    """The ranks between the trimmed ends, at least one."""
    first = int(trim * size)
    return slice(first, max(int((1 - trim) * size), first + 1))


def noise_threshold(ratio: Float[Array, ""], size: int, level: float) -> Float[Array, ""]:
    r"""Value that the largest eigenvalue of unit noise exceeds with probability `level`.

    $(1+\sqrt\gamma)^2 + t\, n^{-2/3} \gamma^{-1/6} (1+\sqrt\gamma)^{4/3}$ with $t$ the
    $1 - level$ quantile of the Tracy-Widom law and $n = p / \gamma$ (Johnstone, 2001).
    """
    root = 1 + jnp.sqrt(ratio)
    scale = (size / ratio) ** (-2 / 3) * ratio ** (-1 / 6) * root ** (4 / 3)
    return root**2 + tracy_widom.ppf(1 - level).astype(ratio.dtype) * scale


def ks_distance(spectrum: Spectrum, variance: Float[Array, ""], trim: float) -> Float[Array, ""]:
    r"""Largest gap between the distribution functions of ESD and law, inside the window.

    Both sides of each step count:
    $\max_i |F(\lambda_{(i)}) - (i + 1/2) / p| + 1 / (2 p)$, $\lambda_{(i)}$ ascending.
    """
    size = spectrum.eigenvalues.shape[0]
    inner = window(size, trim)
    positions = (jnp.arange(size, dtype=spectrum.ratio.dtype) + 0.5) / size
    safe = jnp.where(variance > 0, variance, 1.0)  # no law without a variance
    law = marchenko_pastur.cdf(spectrum.eigenvalues[::-1][inner], spectrum.ratio, safe)
    distance = jnp.max(jnp.abs(law - positions[inner])) + 0.5 / size
    return jnp.where(variance > 0, distance, jnp.where(jnp.isnan(variance), jnp.nan, 1.0))


def bulk_fit(
    spectrum: Spectrum,
    variance: Float[Array, ""],
    threshold: Float[Array, ""],
    trim: float,
) -> BulkFit:
    """The fit that belongs to a noise level and a cut, however they were found."""
    _, edge = marchenko_pastur.support(spectrum.ratio)
    return BulkFit(
        variance=variance,
        edge=variance * edge,
        threshold=threshold,
        distance=ks_distance(spectrum, variance, trim),
        num_spikes=count_above(spectrum, threshold),
    )


def count_above(spectrum: Spectrum, threshold: Float[Array, ""]):
    """Number of eigenvalues above a threshold; 0 where either is NaN."""
    return jnp.sum(spectrum.eigenvalues > threshold, axis=-1, dtype=jnp.int32)


def check_trim(trim: float) -> None:
    """Refuses a share that leaves nothing in the middle."""
    if not 0 <= trim < 0.5:
        raise ValueError(
            f"`trim` must be in [0, 0.5), got {trim}: it is the share of the eigenvalues "
            "left out at each end. The papers use 0.2 or 0.25."
        )


def check_level(level: float) -> None:
    """Refuses what is no probability, or so near to 0 or 1 that float32 takes it for them."""
    if not 1e-6 <= level <= 1 - 1e-6:
        raise ValueError(
            f"`level` must be in (0, 1), from 1e-6 to 1 - 1e-6, got {level}: it is the probability "
            "that noise alone gives a spike, 0.1 by default; a small level is a high threshold."
        )


def above_rounding(spectrum: Spectrum, variance: Float[Array, ""]):
    """Whether a noise level is more than what rounding leaves of exact zeros."""
    size = spectrum.eigenvalues.shape[-1]
    unit = size * jnp.finfo(spectrum.eigenvalues.dtype).eps
    return variance > unit**2 * spectrum.eigenvalues[..., 0]


def fit_bema(spectrum: Spectrum, *, trim: float = 0.25, level: float = 0.1) -> BulkFit:
    r"""Fits the Marchenko-Pastur law to the bulk by eigenvalue matching (BEMA).

    The middle eigenvalues, ascending, are matched with the quantiles
    $q_i = F^{-1}((i + 1/2) / p)$ of the law of unit variance, and a spike is what stands
    above the Tracy-Widom threshold:

    $\sigma^2 = \sum_i q_i \lambda_{(i)} / \sum_i q_i^2, \quad
    T = \sigma^2 [(1+\sqrt\gamma)^2 + t\, n^{-2/3} \gamma^{-1/6} (1+\sqrt\gamma)^{4/3}]$.

    Args:
      spectrum: From `rmtjax.spectrum`.
      trim: Share of the eigenvalues left out at each end, in [0, 0.5).
      level: Probability that noise alone gives a spike, in (0, 1), at least 1e-6: a small
        level is a high threshold. $t$ is the Tracy-Widom quantile at 1 - level.

    Returns:
      `BulkFit(variance, edge, threshold, distance, num_spikes)`. The count means
      something only if `distance` is small; pure noise stays under `5 / p`.

    Raises:
      ValueError: `trim` or `level` is out of range.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> planted = noise.at[:, 0].add(5.0)  # one direction of signal
      >>> fit = rmtjax.fit_bema(rmtjax.spectrum(planted))
      >>> print(f"{fit.variance:.1f}, {fit.edge:.1f}, {fit.num_spikes}")
      1.0, 2.9, 1

    Where this departs from the authors' code: midpoint quantiles (theirs, at $i/p$, bias
    the variance upward), the exponent 4/3 (theirs is $(\cdot)^4 / 3$) and both sides of
    each step in the distance.

    References:
      Ke, Ma and Lin, J. Am. Stat. Assoc. 118 (2023) 374-392,
      https://arxiv.org/abs/2006.00436. Johnstone, Ann. Statist. 29 (2001) 295-327.
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
    size = spectrum.eigenvalues.shape[0]
    inner = window(size, trim)
    positions = (jnp.arange(size, dtype=spectrum.ratio.dtype) + 0.5) / size
    quantiles = marchenko_pastur.ppf(positions[inner], spectrum.ratio)
    matched = spectrum.eigenvalues[::-1][inner]
    variance = jnp.sum(quantiles * matched) / jnp.sum(quantiles**2)
    threshold = variance * noise_threshold(spectrum.ratio, size, level)
    return bulk_fit(spectrum, variance, threshold, trim)
