"""What a report of a square kernel costs, by its size: decomposed and estimated.

The kernel is noise with twenty planted directions, the weakest 5 % above the edge. The exponents
are slopes of the logarithm of the median time on that of the size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import rmtjax
from experiments.benchmarks import timing


@dataclass(frozen=True)
class Config:
    """Times `rmtjax.analyze` of one kernel after another."""

    exact: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    """Sizes that are decomposed; each doubling costs eight times as much."""
    estimated: tuple[int, ...] = (4096, 8192, 16384)
    """Sizes of which the spectrum is estimated, from 2,900 on."""
    rounds: int = 1
    """Turns of each."""
    json: Path | None = None
    """File to write."""


def planted(size: int) -> np.ndarray:
    """Unit noise with values from 1.025 to 10 times the edge: eigenvalues 5 % above and more."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((size, 20), np.float32))[0] for _ in range(2))
    # A value l sqrt(n) shows at (l + 1 / l) sqrt(n), 2 sqrt(n) being the edge.
    shown = 2 * np.geomspace(10, 1.025, 20)
    values = (shown + np.sqrt(shown**2 - 4)) / 2 * size**0.5
    return rng.standard_normal((size, size), np.float32) + ((u * values) @ v.T).astype(np.float32)


def exponent(rows: list[dict[str, Any]], how: str) -> float:
    """The slope over all sizes from 1,024 on: below, what does not grow counts for more."""
    points = np.array([(row["side"], row["seconds"]) for row in rows if row["how"] == how], float)
    sides, seconds = np.log(points[points[:, 0] >= 1024]).T
    return float(np.polyfit(sides, seconds, 1)[0]) if len(sides) > 1 else float("nan")


def measure(size: int, how: str, rounds: int) -> dict[str, Any]:
    """A row: the time, and what was found."""
    params = {"kernel": planted(size)}
    exact_below = size + 1 if how == "exact" else 1
    reports = []  # each of which has the same row
    report = lambda: reports.append(rmtjax.analyze(params, exact_below=exact_below))
    times = timing.in_turns({how: report}, rounds)[how]
    (row,) = reports[-1].rows
    return {
        "side": size,
        "how": how,
        "seconds": float(np.median(times)),
        "spikes": row.spikes,
        "threshold": row.threshold,
        "distance": row.distance,
    }


def main() -> None:
    """Prints a row for each size, and the exponents."""
    config = tyro.cli(Config, description=__doc__)
    jobs = [(n, "exact") for n in config.exact] + [(n, "estimated") for n in config.estimated]
    rows = [measure(*job, config.rounds) for job in jobs]
    for how in dict.fromkeys(how for _, how in jobs):
        print(f"{how}: time grows with the power {exponent(rows, how):.2f} of the side")
    timing.show("a report of one kernel", rows, config.json)


if __name__ == "__main__":
    main()
