r"""Published estimators of the noise of a matrix, which the library's own is compared with.

All are written from the papers' formulas in float64, take the eigenvalues
$\lambda_k = s_k^2 / n$, descending, with any leading axes, and the shape of the matrix,
$p$ and $n$ its shorter and longer side, $\gamma = p / n$. The variance is that of an entry
of the noise; what is above the threshold is a spike. The Tracy-Widom quantile is the
library's, whose test computes the law anew.
"""

import functools
from typing import NamedTuple

import numpy as np
import scipy.integrate
import scipy.optimize
from jaxtyping import Float

import rmtjax

Eigenvalues = Float[np.ndarray, "*draws p"]
PerDraw = Float[np.ndarray, "*draws"]
Shape = tuple[int, int]


class Estimate(NamedTuple):
    """The estimate of the noise in a spectrum."""

    variance: PerDraw
    threshold: PerDraw

    def spikes(self, eigenvalues: Eigenvalues) -> np.ndarray:
        """Number of eigenvalues above the threshold."""
        return (eigenvalues > self.threshold[..., None]).sum(axis=-1)


def aspect_ratio(shape: Shape) -> float:
    r"""$\gamma = p / n$."""
    return min(shape) / max(shape)


@functools.cache
def _law(ratio: float) -> tuple[np.ndarray, np.ndarray]:
    r"""Points of the Marchenko-Pastur law of unit variance, and its distribution function there.

    By quadrature over the angle of $x = 1 + \gamma - 2 \sqrt\gamma \cos\theta$, in which
    the density is smooth. Between the points a straight line is exact to 1e-7.
    """
    angle, root = np.linspace(0, np.pi, 20_001), ratio**0.5
    points = (1 - root) ** 2 + 4 * root * np.sin(angle / 2) ** 2
    safe = np.where(points > 0, points, 1.0)  # 0 at an angle of 0 and a ratio of 1 only
    density = np.where(points > 0, np.sin(angle) ** 2 / safe, 1.0) * 2 / np.pi
    return points, scipy.integrate.cumulative_simpson(density, x=angle, initial=0)


def quantiles(probabilities: np.ndarray, ratio: float) -> np.ndarray:
    """Quantiles of the Marchenko-Pastur law of unit variance."""
    points, distribution = _law(ratio)
    return np.interp(probabilities, distribution, points)


def _window(size: int, trim: float) -> np.ndarray:
    """Ranks, ascending from 0, between the trimmed ends."""
    return np.arange(int(trim * size), int((1 - trim) * size))


def _match(eigenvalues: Eigenvalues, shape: Shape, trim: float, shift: float) -> PerDraw:
    r"""$\sigma^2 = \sum q_i \lambda_{(i)} / \sum q_i^2$ with $q_i = F^{-1}((i + shift) / p)$."""
    size = min(shape)
    inner = _window(size, trim)
    q = quantiles((inner + shift) / size, aspect_ratio(shape))
    return eigenvalues[..., ::-1][..., inner] @ q / (q @ q)


def published_bema(
    eigenvalues: Eigenvalues, shape: Shape, *, trim: float = 0.25, level: float = 0.1
) -> Estimate:
    r"""BEMA0, all ranks matched with the quantiles at $(i + 1/2) / p$.

    $T = \sigma^2 [(1+\sqrt\gamma)^2 + t\, n^{-2/3} \gamma^{-1/6} (1+\sqrt\gamma)^{4/3}]$ with
    $t$ the $1 - level$ quantile of the Tracy-Widom law.

    References:
      Ke, Ma and Lin, J. Am. Stat. Assoc. 118 (2023) 374-392,
      https://arxiv.org/abs/2006.00436. Here with midpoints, where the paper has $i / p$.
    """
    ratio, root = aspect_ratio(shape), 1 + aspect_ratio(shape) ** 0.5
    quantile = float(rmtjax.tracy_widom.ppf(1 - level))
    scale = max(shape) ** (-2 / 3) * ratio ** (-1 / 6) * root ** (4 / 3)
    variance = _match(eigenvalues, shape, trim, 0.5)
    return Estimate(variance, variance * (root**2 + quantile * scale))


def authors_bema(
    eigenvalues: Eigenvalues, shape: Shape, *, trim: float = 0.25, level: float = 0.1
) -> Estimate:
    r"""BEMA as in the code of RMT pruning: $i / p$, and the power 4/3 taken for $(\cdot)^4 / 3$.

    References:
      Berlyand, Sandier, Shmalo and Zhang, https://arxiv.org/abs/2310.03165, and the code
      published with it.
    """
    ratio, root = aspect_ratio(shape), 1 + aspect_ratio(shape) ** 0.5
    quantile = float(rmtjax.tracy_widom.ppf(1 - level))
    scale = max(shape) ** (-2 / 3) * ratio ** (-1 / 6) * root**4 / 3
    variance = _match(eigenvalues, shape, trim, 0.0)
    return Estimate(variance, variance * (root**2 + quantile * scale))


def authors_error(eigenvalues: Eigenvalues, shape: Shape, *, trim: float = 0.25) -> PerDraw:
    r"""The fit error of the code of RMT pruning, which refuses where it is 0.1 or more.

    $\max_j |F(\lambda_{(j)}) - (trim + (1 - 2\, trim) j / m)|$ over the $m$ ranks of the window,
    with their $F$, which falls to 0 beyond the edge.

    References:
      Shmalo, Jenkins and Krupchytskyi, https://arxiv.org/abs/2303.08986, and the code
      published with it.
    """
    inner = _window(min(shape), trim)
    points, distribution = _law(aspect_ratio(shape))
    scaled = eigenvalues / _match(eigenvalues, shape, trim, 0.0)[..., None]
    law = np.interp(scaled[..., ::-1][..., inner], points, distribution, right=0.0)
    positions = trim + (1 - 2 * trim) * np.arange(inner.size) / inner.size
    return np.abs(law - positions).max(axis=-1)


def gavish_donoho(eigenvalues: Eigenvalues, shape: Shape) -> Estimate:
    r"""Optimal hard threshold with the noise from the median, $s > \omega(\gamma)\, median(s)$.

    $\omega = c / \sqrt{F^{-1}(1/2)}$ with
    $c^2 = 2 (\gamma + 1) + 8 \gamma / (\gamma + 1 + \sqrt{\gamma^2 + 14 \gamma + 1})$.

    References:
      Gavish and Donoho, IEEE Trans. Inf. Theory 60 (2014) 5040-5053,
      https://arxiv.org/abs/1305.5870.
    """
    ratio = aspect_ratio(shape)
    root = (ratio**2 + 14 * ratio + 1) ** 0.5
    cut = 2 * (ratio + 1) + 8 * ratio / (ratio + 1 + root)
    middle = np.median(np.sqrt(eigenvalues), axis=-1) ** 2
    variance = middle / quantiles(np.array(0.5), ratio)
    return Estimate(variance, variance * cut)


@functools.cache
def evbmf_cut(ratio: float) -> float:
    r"""The least $x = \lambda / \sigma^2$ that empirical variational Bayes keeps.

    $(1 + \tau)(1 + \gamma / \tau)$ with $\tau$ the zero of $\phi(\tau) + \phi(\tau / \gamma)$,
    $\phi(z) = \log(1 + z) / z - 1/2$; about $2.5129 \sqrt\gamma$.
    """
    phi = lambda z: np.log1p(z) / z - 0.5
    balance = lambda tau: phi(tau) + phi(tau / ratio)
    tau = scipy.optimize.root_scalar(balance, bracket=(1e-3 * ratio, 3.0)).root
    return (1 + tau) * (1 + ratio / tau)


def evbmf_gain(x: np.ndarray, ratio: float) -> np.ndarray:
    r"""Returns how far a value $x = \lambda / \sigma^2$ lowers the free energy, over $n / 2$.

    $\psi_1(x) = \log(1 + \tau) + \gamma \log(1 + \tau / \gamma) - \tau$ with
    $\tau = (x - 1 - \gamma + \sqrt{(x - 1 - \gamma)^2 - 4 \gamma}) / 2$ where x is above
    `evbmf_cut`, 0 elsewhere; never positive.
    """
    cut = evbmf_cut(ratio)
    centred = np.maximum(x, cut) - 1 - ratio
    tau = (centred + np.sqrt(centred**2 - 4 * ratio)) / 2
    gain = np.log1p(tau) + ratio * np.log1p(tau / ratio) - tau
    return np.where(x > cut, gain, 0.0)


def evbmf(eigenvalues: Eigenvalues, shape: Shape) -> Estimate:
    r"""Empirical variational Bayes matrix factorization, in its global analytic solution.

    The variance minimises the free energy
    $\log \sigma^2 + \frac1p \sum_k [\lambda_k / \sigma^2 + \psi_1(\lambda_k / \sigma^2)]$, up to
    constants, between the bounds of the second paper.

    References:
      Nakajima, Sugiyama, Babacan and Tomioka, J. Mach. Learn. Res. 14 (2013) 1-37,
      https://jmlr.org/papers/v14/nakajima13a.html. Nakajima, Tomioka, Sugiyama and Babacan,
      J. Mach. Learn. Res. 16 (2015) 3757-3811, https://jmlr.org/papers/v16/nakajima15a.html.
    """
    ratio, size = aspect_ratio(shape), min(shape)
    most = int(np.ceil(size / (1 + ratio))) - 1  # components that can be kept at all

    def energy(variance, values):
        x = values / np.expand_dims(variance, -1)
        return np.log(variance) + np.mean(x + evbmf_gain(x, ratio), axis=-1)

    def minimize(values):
        lower = max(values[most] / evbmf_cut(ratio), values[most:].mean())
        # Several minima: the best of a grid, then the one beside it.
        grid = np.geomspace(lower, max(values.mean(), lower), 200)
        best = int(np.argmin(energy(grid, values)))
        around = grid[max(best - 1, 0)], grid[min(best + 1, grid.size - 1)]
        found = scipy.optimize.minimize_scalar(energy, bounds=around, args=(values,))
        return found.x

    variance = np.vectorize(minimize, signature="(p)->()")(eigenvalues)
    return Estimate(variance, variance * evbmf_cut(ratio))
