"""One fit of a spectrum, beside the way that the papers' code takes to it.

The published fit searches each quantile of the Marchenko-Pastur law by itself: a root search whose
every step integrates the density anew. `rmtjax.fit_bema` inverts the law for all of them at once,
and does it again after each turn in which it has taken spikes out.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import scipy.integrate
import scipy.optimize
import tyro

import rmtjax
from experiments.benchmarks import timing


@dataclass(frozen=True)
class Config:
    """Times a fit given the eigenvalues."""

    sizes: tuple[int, ...] = (500, 1000, 2000)
    """Numbers of eigenvalues, half of which are matched with quantiles."""
    ratio: float = 0.5
    """Aspect ratio."""
    rounds: int = 3
    """Turns of each."""
    json: Path | None = None
    """File to write."""


def published_variance(eigenvalues: np.ndarray, ratio: float, trim: float = 0.25) -> float:
    """The slope of the middle eigenvalues on quantiles that are searched one by one."""
    lower, upper = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    density = lambda x: ((upper - x) * (x - lower)) ** 0.5 / (2 * np.pi * ratio * x)
    below = lambda x: scipy.integrate.quad(density, lower, x)[0]
    size = len(eigenvalues)
    ranks = np.arange(int(trim * size), int((1 - trim) * size))
    search = lambda q: scipy.optimize.brentq(lambda x: below(x) - q, lower, upper)
    quantiles = np.array([search((rank + 0.5) / size) for rank in ranks])
    return float(quantiles @ eigenvalues[::-1][ranks] / (quantiles @ quantiles))


def compare(size: int, config: Config) -> dict[str, object]:
    """A row: both times, their ratio, and both variances of unit noise."""
    noise = jax.random.normal(jax.random.key(0), (size, round(size / config.ratio)))
    spectrum = jax.block_until_ready(rmtjax.spectrum(noise))
    eigenvalues = np.asarray(spectrum.eigenvalues, np.float64)
    published = lambda: published_variance(eigenvalues, float(spectrum.ratio))
    alternatives = {"published": published, "ours": lambda: rmtjax.fit_bema(spectrum)}
    times = timing.in_turns(alternatives, config.rounds)
    return {
        "eigenvalues": size,
        "quantiles": size // 2,
        "published, ms": timing.spread(times["published"]),
        "rmtjax.fit_bema, ms": timing.spread(times["ours"]),
        "ratio": float(np.median(times["published"] / times["ours"])),
        "variance, published": published(),
        "variance, ours": float(rmtjax.fit_bema(spectrum).variance),
    }


def main() -> None:
    """Prints a row for each number of eigenvalues."""
    config = tyro.cli(Config, description=__doc__)
    rows = [compare(size, config) for size in config.sizes]
    timing.show("one fit, given the eigenvalues", rows, config.json)


if __name__ == "__main__":
    main()
