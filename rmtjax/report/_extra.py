"""Numbers of a kernel that its spectrum does not have: of its shuffled entries, and of blocks."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmtjax._axes import KernelAxes, MatrixView
from rmtjax._sharding import fetch
from rmtjax._types import BulkFit, no_fit, Spectrum
from rmtjax.laws import shuffled_threshold
from rmtjax.noise import metrics_of_each
from rmtjax.planning import check_count, Findings, PlanOptions
from rmtjax.spectra import blocks_of, spectra

_STACK = KernelAxes((1,), (2,), (0,))


class ExtraMetrics(NamedTuple):
    r"""Holds numbers of the shuffled entries of a kernel, and of blocks of one aspect ratio.

    `rmtjax.analyze` computes them with `randomized=` and `aspect=`. They are None for kernels that
    are factorized or not finite. A stack has the mean of its members.

    Attributes:
      shuffled_spikes: Mean number of eigenvalues above the threshold in a random order of the
        entries less their mean. The variance is known, so the threshold is that of the law.
      shuffled_rate: Share of the orders with such a spike. For normal entries it is the `level`
        of the rule, or 0.01 if the rule has none.
      shuffled_top: Mean of the largest eigenvalue over the threshold.
      pooled_alpha: As `alpha`, of the pooled spectrum of the blocks.
      pooled_alpha_error: Its standard error. Blocks of one kernel are taken as independent.
      pooled_hill: As `hill`.
      pooled_hill_error: Its standard error.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> report = rmtjax.analyze(params, randomized=2)
      >>> print(report.table("path", "shuffled_spikes", "shuffled_rate"))
      path    shuffled_spikes  shuffled_rate
      kernel  0                0
    """

    shuffled_spikes: float | None = None
    shuffled_rate: float | None = None
    shuffled_top: float | None = None
    pooled_alpha: float | None = None
    pooled_alpha_error: float | None = None
    pooled_hill: float | None = None
    pooled_hill_error: float | None = None


class SpectralChange(NamedTuple):
    r"""Holds what has changed in the spectrum of a kernel between two reports.

    Numbers are None where a kernel has no finite spectrum in both, or another shape. A stack has
    the numbers of all its matrices together.

    Attributes:
      spectrum_change: $(\sum_k (s'_k - s_k)^2 / \sum_k s_k^2)^{1/2}$ for the singular values in
        their order. It is at most $\|W' - W\| / \|W\|$ in Frobenius norms (Mirsky), and 0 if the
        kernel was only rotated.
      norm_change: $\|W'\| / \|W\| - 1$.
      spikes_change: Number of spikes, new less old.
      distance_change: Kolmogorov distance from the law, new less old.
      stable_rank_change: Stable rank, new less old.
      alpha_change: Exponent of the tail, new less old.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
      >>> report = rmtjax.compare_reports(rmtjax.analyze(params), rmtjax.analyze(doubled))
      >>> print(report.table("path", "spectrum_change", "norm_change"))
      path    spectrum_change  norm_change
      kernel  1                1
    """

    spectrum_change: float | None = None
    norm_change: float | None = None
    spikes_change: float | None = None
    distance_change: float | None = None
    stable_rank_change: float | None = None
    alpha_change: float | None = None


def _matrices(view: MatrixView) -> Iterator[np.ndarray]:
    """Yields each matrix of a kernel, over its largest entry: no number here has a scale."""
    for matrix in fetch(view.matrices()):
        lifted = matrix.astype(np.promote_types(matrix.dtype, np.float32))
        yield lifted / (np.abs(lifted).max() or 1)


def _eigenvalues(stack: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns the eigenvalues of each matrix of a stack, descending, and their aspect ratio."""
    values = spectra({"": MatrixView("", stack, _STACK)})[""]
    (eigenvalues, ratio), *_, exponent = values
    return np.ldexp(np.asarray(eigenvalues, np.float64), 2 * exponent[:, None]), float(ratio[0])


def _shuffled(matrix: np.ndarray, rng: np.random.Generator, draws: int, level: float) -> np.ndarray:
    """Returns the numbers of spikes, whether there are any, and the largest over the threshold."""
    # A mean that is not 0 would be a spike of every order.
    centred = matrix - matrix.mean(dtype=np.float64).astype(matrix.dtype)
    variance = np.mean(np.square(centred, dtype=np.float64))
    stack = np.stack([rng.permutation(centred.ravel()).reshape(matrix.shape) for _ in range(draws)])
    eigenvalues, ratio = _eigenvalues(stack)
    unit = float(shuffled_threshold(jnp.float32(ratio), min(matrix.shape), level))
    counts = np.sum(eigenvalues > variance * unit, axis=1)
    tops = eigenvalues[:, 0] / (variance * unit or np.nan)
    return np.array([counts.mean(), np.mean(counts > 0), tops.mean()])


def _pooled(matrix: np.ndarray, aspect: float) -> np.ndarray:
    """Returns the exponents of the pooled spectrum of blocks, with errors."""
    rows, columns = matrix.shape
    blocks = np.stack([matrix[block] for block in blocks_of(rows, columns, aspect)])
    eigenvalues, ratio = _eigenvalues(blocks)
    pooled: Any = np.sort(eigenvalues.ravel())[::-1].astype(np.float32)
    nothing: BulkFit = jax.tree.map(np.asarray, no_fit((), np.float32))
    spectrum = Spectrum(pooled, np.float32(ratio))  # pyright: ignore[reportArgumentType]
    (found,) = metrics_of_each([spectrum], [nothing], [0])
    return np.array([found.alpha, found.alpha_error, found.hill, found.hill_error])


@dataclass(frozen=True)
class Extra:
    """Says which of the `ExtraMetrics` are wanted; the fields are arguments of `rmtjax.analyze`."""

    randomized: int = 0
    aspect: float | None = None
    seed: int = 0

    def __post_init__(self):
        check_count("randomized", self.randomized, 0)
        check_count("seed", self.seed, 0)
        if self.aspect is not None and not 0 < self.aspect <= 1:
            raise ValueError(f"`aspect` must be in (0, 1], an aspect ratio, got {self.aspect}.")

    def _of_kernel(self, view: MatrixView, level: float) -> dict[str, float | None]:
        rng = np.random.default_rng([self.seed, zlib.crc32(view.path.encode())])
        unknown = [np.full(3, np.nan), np.full(4, np.nan)]
        rows = []
        for matrix in _matrices(view):
            shuffled, pooled = unknown
            if self.randomized:
                shuffled = _shuffled(matrix, rng, self.randomized, level)
            if self.aspect is not None:
                pooled = _pooled(matrix, self.aspect)
            rows.append(np.concatenate([shuffled, pooled]))
        means = np.mean(rows, axis=0).tolist()
        known = [number if np.isfinite(number) else None for number in means]
        return ExtraMetrics(*known)._asdict()

    def of(self, found: Findings, options: PlanOptions) -> dict[str, dict[str, float | None]]:
        """Returns the extra metrics of the kernels that were measured, by path and name."""
        if not self.randomized and self.aspect is None:
            return {}
        level = getattr(options.rule, "level", 0.01)
        extras = {}
        for path, row in found.measured.items():
            view = found.kernels[path]
            if isinstance(view, MatrixView) and not view.is_factored and row.finite.all():
                extras[path] = self._of_kernel(view, level)
        return extras
