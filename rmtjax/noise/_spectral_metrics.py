"""The numbers that people read off a spectrum: norms, ranks, tails, and signal-to-noise."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr, logsumexp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rmtjax._sharding import beside_accelerator
from rmtjax._types import BulkFit, check_type, Count, in_range, no_fit, Scalar, Spectrum
from rmtjax.laws import bulk_law, marchenko_pastur, noise_above
from rmtjax.noise._bema import check_one, fit_bema
from rmtjax.noise._power_law import (
    against_exponential,
    against_lognormal,
    best_tail,
    logs_of,
    tail_of,
)


class SpectralMetrics(NamedTuple):
    r"""Holds numbers of one spectrum; `docs/columns.md` has their formulas and their limits.

    Norms and exponents are those of the singular values $s_k$ and of $s_k^2$. A number that does
    not exist is NaN, and a count is then 0.

    Attributes:
      spectral_norm: $s_1$.
      frobenius_norm: $(\sum_k s_k^2)^{1/2}$.
      stable_rank: $\sum_k s_k^2 / s_1^2$.
      effective_rank: $\exp(-\sum_k q_k \ln q_k)$ for $q_k = s_k / \sum_j s_j$.
      numerical_rank: Number of $s_k$ above $n \epsilon s_1$, for the rounding unit of the dtype.
      condition: $s_1 / s_r$ for the rank r that is kept.
      mp_softrank: Edge of the bulk over the largest eigenvalue, $\lambda_+ / \lambda_1$.
      snr: Energy above the threshold over the energy below it.
      snr_noise: The same, as expected of pure noise of the shape of the bulk.
      alpha: Exponent of the power law in the tail, by maximum likelihood.
      alpha_error: Standard error of `alpha`, $1.2 (\alpha - 1) / \sqrt k$. The factor is for the
        choice of the start, which makes the estimates spread more.
      alpha_tail: Number k of eigenvalues in the tail.
      alpha_start: $x_{min}$, the smallest eigenvalue $s^2 / n$ of the tail.
      alpha_distance: Kolmogorov distance between the tail and its power law.
      lognormal_ratio: Vuong's normalised likelihood ratio of power law and log-normal. It is at
        most 0, because a power law is a limit of log-normals.
      lognormal_p: Its two-sided p-value.
      exponential_ratio: The same for an exponential tail; a positive one favours the power law.
      exponential_p: Its two-sided p-value.
      hill: Exponent of a tail that has a fixed share of the eigenvalues.
      hill_error: Standard error of `hill`, $(\alpha - 1) / \sqrt k$.
      hill_tail: Number of eigenvalues in that tail.
      alpha_weighted: $\alpha \log_{10} s_1^2$.
      log_alpha_norm: $\log_{10} \sum_k s_k^{2 \alpha}$.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> metrics = rmtjax.metrics_of(rmtjax.spectrum(noise))
      >>> metrics._fields[:3], int(metrics.numerical_rank)
      (('spectral_norm', 'frobenius_norm', 'stable_rank'), 200)
    """

    spectral_norm: Float[Array, "*batch"]
    frobenius_norm: Float[Array, "*batch"]
    stable_rank: Float[Array, "*batch"]
    effective_rank: Float[Array, "*batch"]
    numerical_rank: Int[Array, "*batch"]
    condition: Float[Array, "*batch"]
    mp_softrank: Float[Array, "*batch"]
    snr: Float[Array, "*batch"]
    snr_noise: Float[Array, "*batch"]
    alpha: Float[Array, "*batch"]
    alpha_error: Float[Array, "*batch"]
    alpha_tail: Int[Array, "*batch"]
    alpha_start: Float[Array, "*batch"]
    alpha_distance: Float[Array, "*batch"]
    lognormal_ratio: Float[Array, "*batch"]
    lognormal_p: Float[Array, "*batch"]
    exponential_ratio: Float[Array, "*batch"]
    exponential_p: Float[Array, "*batch"]
    hill: Float[Array, "*batch"]
    hill_error: Float[Array, "*batch"]
    hill_tail: Int[Array, "*batch"]
    alpha_weighted: Float[Array, "*batch"]
    log_alpha_norm: Float[Array, "*batch"]


def _ranks(spectrum: Spectrum, longer: Scalar, count: Count, rank: Count) -> dict[str, Array]:
    """Returns norms, ranks and the condition."""
    eigenvalues = spectrum.eigenvalues
    top, total = eigenvalues[0], jnp.sum(eigenvalues)
    values = jnp.sqrt(eigenvalues)
    last = jnp.where(rank > 0, eigenvalues[rank - 1], jnp.nan)
    return {
        "spectral_norm": jnp.sqrt(longer * top),
        "frobenius_norm": jnp.sqrt(longer * total),
        "stable_rank": total / top,
        "effective_rank": jnp.exp(jnp.sum(entr(values / jnp.sum(values)))),
        "numerical_rank": count,
        "condition": jnp.sqrt(top / last),
    }


def _signal(spectrum: Spectrum, size: Count, fit: BulkFit) -> dict[str, Array]:
    """Returns what the fit of the bulk says about the energy of the spectrum."""
    eigenvalues, threshold = spectrum.eigenvalues, fit.threshold
    energy = lambda chosen: jnp.sum(jnp.where(chosen, eigenvalues, 0))
    # One minus the energy below would lose digits where nearly all is above.
    snr = energy(eigenvalues > threshold) / energy(eigenvalues <= threshold)
    # Of factors, all directions may be spikes.
    spikes = jnp.minimum(fit.num_spikes, size - 1)
    ratio, _ = bulk_law(spectrum.ratio, size, spikes)
    cut = threshold / fit.edge * marchenko_pastur.support(ratio)[1]
    share = noise_above(ratio, size - spikes, cut)
    return {
        "mp_softrank": fit.edge / eigenvalues[0],
        "snr": jnp.where(jnp.isfinite(threshold), snr, jnp.nan),
        "snr_noise": share / (1 - share),
    }


def _hill(spectrum: Spectrum, count: Count, share: ArrayLike) -> dict[str, Array]:
    """Returns the exponent of a tail that has a share of the eigenvalues."""
    logs = logs_of(spectrum.eigenvalues, count)
    # The smallest tail has the median for a share of one half, also of an odd number.
    hill = tail_of(logs, count - jnp.floor((1 - share) * count).astype(jnp.int32))
    size = jnp.where(jnp.isfinite(hill.alpha), hill.size, 0)
    return {"hill": hill.alpha, "hill_error": hill.error, "hill_tail": size}


def _tails(spectrum: Spectrum, longer: Scalar, count: Count) -> dict[str, Array]:
    """Returns the exponent of a power law, and how well other tails do."""
    eigenvalues = spectrum.eigenvalues
    logs = logs_of(eigenvalues, count)
    tail = best_tail(logs, count)
    known = tail.size > 0
    verdicts = {}
    for name, against in (("lognormal", against_lognormal), ("exponential", against_exponential)):
        ratio, p = (jnp.where(known, number, jnp.nan) for number in against(logs, tail.size))
        verdicts |= {f"{name}_ratio": ratio, f"{name}_p": p}
    # Of s^2, as WeightWatcher has them: they depend on the scale of the kernel.
    squares = jnp.log(longer) + jnp.log(jnp.where(eigenvalues > 0, eigenvalues, 1))
    powers = jnp.where(jnp.arange(squares.shape[0]) < count, tail.alpha * squares, -jnp.inf)
    return verdicts | {
        "alpha": tail.alpha,
        "alpha_error": tail.error,
        "alpha_tail": tail.size,
        "alpha_start": jnp.where(known, eigenvalues[tail.size - 1], jnp.nan),
        "alpha_distance": tail.distance,
        "alpha_weighted": tail.alpha * squares[0] / np.log(10),
        "log_alpha_norm": jnp.where(known, logsumexp(powers) / np.log(10), jnp.nan),
    }


def some_metrics(
    spectrum: Spectrum,
    size: Count,
    fit: BulkFit,
    rank: Count,
    share: ArrayLike = 0.5,
    names: Collection[str] = SpectralMetrics._fields,
) -> dict[str, Array]:
    """Returns metrics of `size` eigenvalues, which zeros may follow, by name.

    Only those are computed that come with the names: a program is no larger than it must be.
    """
    finite = jnp.isfinite(spectrum.eigenvalues).all()
    # Rounding can leave eigenvalues of a singular matrix just below 0.
    eigenvalues = jnp.where(finite, jnp.maximum(spectrum.eigenvalues, 0), 0)
    longer = size / spectrum.ratio
    floor = (longer * jnp.finfo(eigenvalues.dtype).eps) ** 2 * eigenvalues[0]
    count = jnp.sum(eigenvalues > floor, dtype=jnp.int32)
    known = Spectrum(eigenvalues, spectrum.ratio)
    parts: dict[tuple[str, ...], Callable[[], dict[str, Array]]] = {
        SpectralMetrics._fields[:6]: lambda: _ranks(known, longer, count, rank),
        SpectralMetrics._fields[6:9]: lambda: _signal(known, size, fit),
        ("hill", "hill_error", "hill_tail"): lambda: _hill(known, count, share),
        (*SpectralMetrics._fields[9:18], *SpectralMetrics._fields[21:]): lambda: _tails(
            known, longer, count
        ),
    }
    numbers: dict[str, Array] = {}
    for part, compute in parts.items():
        numbers |= compute() if {*part} & {*names} else {}
    unknown = lambda value: value if value.dtype == jnp.int32 else jnp.where(finite, value, jnp.nan)
    return jax.tree.map(unknown, {name: numbers[name] for name in numbers if name in names})


def _metrics(
    spectrum: Spectrum, size: Count, fit: BulkFit, rank: Count, share: Scalar
) -> SpectralMetrics:
    """Returns all metrics of `size` eigenvalues, which zeros may follow."""
    return SpectralMetrics(**some_metrics(spectrum, size, fit, rank, share))


_of_one = jax.jit(_metrics)
_of_many = jax.jit(jax.vmap(_metrics, (0, 0, 0, 0, None)))


def _on_scale(metrics: SpectralMetrics, exponent: int) -> SpectralMetrics:
    """Returns the metrics of a matrix that was divided by a power of two, on its own scale."""
    if not exponent:
        return metrics
    moved = {"spectral_norm": exponent, "frobenius_norm": exponent, "alpha_start": 2 * exponent}
    known: Any = {n: np.ldexp(np.float64(getattr(metrics, n)), p) for n, p in moved.items()}
    shift = 2 * exponent * np.log10(2) * np.float64(metrics.alpha)
    known |= {n: getattr(metrics, n) + shift for n in ("alpha_weighted", "log_alpha_norm")}
    return metrics._replace(**known)


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"`share` must be in (0, 1], got {share}: the share of Hill's tail.")


def metrics_of(
    spectrum: Spectrum,
    fit: BulkFit | None = None,
    *,
    rank: Int[ArrayLike, ""] | None = None,
    share: float = 0.5,
) -> SpectralMetrics:
    r"""Returns norms, ranks, exponents of the tail and signal-to-noise of a spectrum.

    The exponent of $k$ eigenvalues from $x_{min}$ on is
    $\alpha = 1 + k / \sum_i \ln(\lambda_i / x_{min})$. The start $x_{min}$ of the tail is the
    eigenvalue with the least Kolmogorov distance between tail and power law. Vuong's test compares
    the power law with a log-normal and an exponential of the same tail.

    Args:
      spectrum: The spectrum of one matrix, from `rmtjax.spectrum`. Works under `jit` and `vmap`.
      fit: The noise; by default that of `rmtjax.fit_bema`. Softrank and signal-to-noise need it.
      rank: Rank for `condition`, in [0, p]; by default the number of spikes.
      share: Share of the eigenvalues that the tail of `hill` has, in (0, 1].

    Returns:
      `SpectralMetrics`, of arrays. All but the counts are NaN for a spectrum that is not finite.

    Raises:
      TypeError, ValueError: `spectrum` or `fit` is of another type or shape; `share` is out of
        range.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> metrics = rmtjax.metrics_of(rmtjax.spectrum(noise.at[:, 0].add(5.0)))
      >>> print(f"{metrics.stable_rank:.1f}, {metrics.condition:.1f}, {metrics.snr:.3f}")
      15.0, 1.0, 0.071
      >>> print(f"{metrics.hill:.2f} +- {metrics.hill_error:.2f}")
      2.65 +- 0.17

    References:
      Clauset, Shalizi and Newman, SIAM Review 51 (2009) 661-703, https://arxiv.org/abs/0706.1062.
      Vuong, Econometrica 57 (1989) 307-333. Hill, Ann. Statist. 3 (1975) 1163-1174. del Castillo
      and Puig, J. Am. Stat. Assoc. 94 (1999) 529-532, for the log-normal. Roy and Vetterli, EUSIPCO
      (2007) 606-610, for the effective rank. Martin and Mahoney, JMLR 22 (2021) 165,
      https://arxiv.org/abs/1810.01075, for softrank and weighted exponents.
    """
    check_one(spectrum)
    _check_share(share)
    given = no_fit((), np.float32) if fit is None else fit
    check_type("fit", given, BulkFit, "Compute it by `rmtjax.fit_bema(spectrum)`.")
    spectrum, given, exponent = in_range(spectrum, given)
    fit = fit_bema(spectrum) if fit is None else given
    size = jnp.asarray(spectrum.eigenvalues.shape[0], jnp.int32)
    rank = fit.num_spikes if rank is None else jnp.asarray(rank, jnp.int32)
    return _on_scale(_of_one(spectrum, size, fit, rank, share), exponent)


def metrics_of_each(
    spectra: Sequence[Spectrum], fits: Sequence[BulkFit], ranks: Sequence[int]
) -> list[SpectralMetrics]:
    """Returns the metrics of spectra of different sizes, as NumPy numbers.

    Zeros fill each spectrum up to a power of two, so that few programs are compiled.
    """
    scaled = [in_range(*pair) for pair in zip(spectra, fits, strict=True)]
    spectra, fits = [one[0] for one in scaled], [one[1] for one in scaled]
    groups: dict[tuple, list[int]] = {}
    for i, spectrum in enumerate(spectra):
        size = spectrum.eigenvalues.shape[0]
        padded = max(64, 2 ** (size - 1).bit_length())
        groups.setdefault((padded, spectrum.eigenvalues.dtype), []).append(i)
    found: dict[int, SpectralMetrics] = {}
    for (padded, _), members in groups.items():
        stacked = _of_group(padded, [(spectra[i], fits[i], ranks[i]) for i in members])
        for place, i in enumerate(members):
            found[i] = jax.tree.map(lambda array, place=place: array[place], stacked)
    return [_on_scale(found[i], exponent) for i, (*_, exponent) in enumerate(scaled)]


def _of_group(padded: int, members: Sequence[tuple[Any, ...]]) -> SpectralMetrics:
    """Returns the metrics of spectra of one padded size and dtype, stacked."""
    stack = lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves])
    fill: Any = lambda array: np.pad(array, (0, padded - len(array)))
    spectra = [s._replace(eigenvalues=fill(s.eigenvalues)) for s, _, _ in members]
    sizes = np.array([len(s.eigenvalues) for s, _, _ in members], np.int32)
    ranks = np.array([rank for _, _, rank in members], np.int32)
    fits = [fit for _, fit, _ in members]
    with beside_accelerator():  # a loop with many small steps, which an accelerator is slow at
        stacked = jax.tree.map(stack, *spectra), sizes, jax.tree.map(stack, *fits), ranks
        return jax.device_get(_of_many(*stacked, 0.5))
