"""How many spikes are found where rows and columns of the noise have scales of their own.

A table of log-normal scales and planted directions, for the kernel as it is and equalized, and the
rate of false alarms of equalized noise. `python -m experiments.equalize` prints both.
"""

import functools
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

import rmtjax
from experiments import output


@dataclass(frozen=True)
class Config:
    """Compares the fit of kernels as they are with that of equalized ones."""

    draws: int = 20
    """Matrices for each row of the table."""
    noise: int = 500
    """Matrices for each rate of false alarms."""
    shape: tuple[int, int] = (200, 400)
    """Of the matrices of the table."""
    small: tuple[int, int] = (100, 200)
    """Of those of the rates."""
    scales: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Standard deviations of the logarithms of the scales."""
    planted: tuple[int, ...] = (0, 8)
    """Directions of signal: singular values of 2 to 5 times the root of the longer side."""
    seed: int = 0
    """Of all draws."""


def draw(
    rng: np.random.Generator, shape: tuple[int, int], sigma: float, planted: int, columns: bool
) -> np.ndarray:
    """Returns noise with log-normal scales, of unit median, and directions of signal."""
    rows = np.exp(sigma * rng.standard_normal((shape[0], 1)))
    across = np.exp(sigma * rng.standard_normal((1, shape[1]))) if columns else 1.0
    left, right = (np.linalg.qr(rng.standard_normal((side, planted))).Q for side in shape)
    strengths = max(shape) ** 0.5 * np.linspace(2, 5, planted)
    noise = rows * across * rng.standard_normal(shape)
    return (noise + (left * strengths) @ right.T).astype(np.float32)


@functools.partial(jax.jit, static_argnames="way")
def judge(matrices: jax.Array, *, way: str) -> tuple[jax.Array, ...]:
    """Returns spikes and verdict of each matrix, as it is or with equalized rows."""
    rule = rmtjax.ranks.bema()

    def one(matrix):
        sides: Any = way
        even = matrix if way == "as it is" else rmtjax.equalize(matrix, sides=sides).matrix
        spectrum = rmtjax.spectrum(even)
        fit = rule.fit(spectrum)
        return fit.num_spikes, rule.accepts(spectrum, fit)

    return jax.lax.map(one, matrices)


def judge_all(matrices: jax.Array, way: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `judge` does, on the host."""
    counts, accepted = judge(matrices, way=way)
    return np.asarray(counts), np.asarray(accepted)


def plan_for(matrices: jax.Array, level: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Returns spikes and verdict of each matrix of a stack, as a plan finds them."""
    rule = rmtjax.ranks.bema(level=level, equalize=True)
    axes = {"kernel": rmtjax.KernelAxes((1,), (2,), (0,))}
    row: Any = rmtjax.plan({"kernel": matrices}, rule=rule, axes=axes)["kernel"]
    eigenvalues, ratio = row.spectrum
    each = lambda values, fit: rule.accepts(rmtjax.Spectrum(values, jnp.asarray(ratio)), fit)
    fits = jax.tree.map(jnp.asarray, row.fit)
    return row.fit.num_spikes, np.asarray(jax.vmap(each)(jnp.asarray(eigenvalues), fits))


def spikes(config: Config) -> Table:
    """Returns the table of spikes: their median and range, and the share of accepted fits."""
    ways = ("as it is", "rows", "both")
    table = Table("scales", "sigma", "planted", *ways, box=None, title="spikes (range), accepted")
    for columns in (False, True):
        for sigma in config.scales:
            for planted in config.planted:
                rng = np.random.default_rng([config.seed, planted, int(100 * sigma), columns])
                make = lambda: draw(rng, config.shape, sigma, planted, columns)  # noqa: B023
                matrices = jnp.stack([make() for _ in range(config.draws)])
                cells = []
                for way in ways:
                    counts, accepted = (
                        plan_for(matrices) if way == "both" else judge_all(matrices, way)
                    )
                    middle, low, high = np.median(counts), counts.min(), counts.max()
                    cells.append(f"{middle:g} ({low}-{high}) {accepted.mean():.2f}")
                names = "rows and columns" if columns else "rows"
                table.add_row(names, f"{sigma:g}", str(planted), *cells)
    return table


def alarms(config: Config) -> Table:
    """Returns the shares of equalized noise with a spike, with standard errors in 0.001."""
    levels = (0.01, 0.1)
    heads = (f"level {level:g}" for level in levels)
    table = Table("scales", "sigma", "refused", *heads, box=None, title="noise alone, equalized")
    for columns in (False, True):
        for sigma in (0.0, *config.scales):
            rng = np.random.default_rng([config.seed, int(100 * sigma), columns])
            make = lambda: draw(rng, config.small, sigma, 0, columns)  # noqa: B023
            matrices = jnp.stack([make() for _ in range(config.noise)])
            cells, refused = [], 0.0
            for level in levels:
                counts, accepted = plan_for(matrices, level)
                rate, refused = np.mean(counts > 0), 1 - accepted.mean()
                error = 1000 * (rate * (1 - rate) / config.noise) ** 0.5
                cells.append(f"{rate:.3f}({error:.0f})")
            names = "rows and columns" if columns else "rows"
            table.add_row(names, f"{sigma:g}", f"{refused:.3f}", *cells)
    return table


def main(arguments: list[str] | None = None) -> int:
    """Reads the options and prints the tables."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = tyro.cli(Config, args=arguments, description=__doc__)
    console = output.console()
    for make in (spikes, alarms):
        console.print(make(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
