"""Which directions count as signal: the threshold of the signal-to-noise files in use, and ours.

Tools for fine-tuning choose kernels by files that Spectrum (arXiv 2406.06623) writes. Run
`python -m experiments.signal_to_noise --help`.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

import rmtjax
from experiments import output


@dataclass(frozen=True)
class Config:
    """Random kernels with a known number of directions of signal."""

    shapes: tuple[tuple[int, int], ...] = ((512, 512), (512, 1024), (512, 2048))
    """Of the kernels."""
    planted: tuple[int, ...] = (0, 8)
    """Directions of signal, twice as strong as can be detected."""
    kernels: int = 20
    """Of each shape."""
    seed: int = 0


class Found(NamedTuple):
    """Counts of one shape, as means over its kernels."""

    shape: tuple[int, int]
    planted: int
    threshold: float  # theirs over the true edge
    share: float  # of the directions above their threshold
    named: float  # of the kernels with a direction above it
    ours: float  # directions of signal by `rmtjax.analyze`
    selected: float  # share of the kernels that `most_signal` may name


def spectrum_threshold(values: np.ndarray, shape: tuple[int, int]) -> float:
    r"""The threshold of Spectrum, from singular values: $\hat\sigma (1 + \sqrt{p / n})$.

    $\hat\sigma$ is the interquartile range of the singular values over 1.349, as if they were
    normal. Signal is the sum of the values above it, and noise that of the others.
    """
    low, high = np.quantile(values, (0.25, 0.75))
    return (high - low) / 1.349 * (1 + np.sqrt(min(shape) / max(shape)))


def draw(config: Config, shape: tuple[int, int], planted: int) -> np.ndarray:
    """Kernels of unit noise, with orthogonal directions of signal."""
    rng = np.random.default_rng(config.seed)
    noise = rng.standard_normal((config.kernels, *shape))
    if not planted:
        return noise.astype(np.float32)
    u, v = (np.linalg.qr(rng.standard_normal((side, planted)))[0] for side in shape)
    strength = 2 * (shape[0] * shape[1]) ** 0.25  # twice the least that stands out
    return (noise + strength * u @ v.T).astype(np.float32)


def measure(config: Config, shape: tuple[int, int], planted: int) -> Found:
    """Both verdicts on the same kernels."""
    kernels = draw(config, shape, planted)
    values = np.linalg.svd(kernels.astype(np.float64), compute_uv=False)
    edge = np.sqrt(shape[0]) + np.sqrt(shape[1])
    cuts = np.array([spectrum_threshold(one, shape) for one in values])
    above = (values > cuts[:, None]).mean(axis=1)
    params = {f"{place}": {"kernel": jnp.asarray(one)} for place, one in enumerate(kernels)}
    report = rmtjax.analyze(params)
    counts = [row.spikes or 0 for row in report.rows]
    selected = len(rmtjax.most_signal(report, top=1.0)) / len(params)
    means = float((cuts / edge).mean()), float(above.mean()), float((above > 0).mean())
    return Found(shape, planted, *means, float(np.mean(counts)), selected)


def run(config: Config) -> Iterator[Found]:
    """A row for each shape and number of directions."""
    for planted in config.planted:
        for shape in config.shapes:
            yield measure(config, shape, planted)


def to_table(rows: list[Found]) -> Table:
    """The rows of both."""
    names = ("kernel", "signal", "threshold / edge", "called signal", "kernels named")
    table = Table(*names, "rmtjax: directions", "kernels named", box=None)
    for row in rows:
        table.add_row(
            f"{row.shape[0]}x{row.shape[1]}",
            f"{row.planted}",
            f"{row.threshold:.3f}",
            f"{row.share:.1%}",
            f"{row.named:.0%}",
            f"{row.ours:.2f}",
            f"{row.selected:.0%}",
        )
    return table


def main(arguments: list[str] | None = None) -> int:
    """Reads the options and prints the table."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    output.console().print(to_table(list(run(config))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
