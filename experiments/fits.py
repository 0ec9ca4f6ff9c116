"""How well the noise of a matrix is found, beside rivals.

Three tables of random matrices whose noise is known: of the variance found, of the rate of
false alarms, and of the test of the fit. Set `OPENBLAS_NUM_THREADS=1`: the draws share the
cores better than the threads of one small matrix do.
"""

import dataclasses
import functools
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.table import Table

import rmtjax
from experiments import ensembles, measure, output, rivals

Row = dict[str, Any]
Shapes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Bias:
    """Variance found over the true one: mean ± deviation of a draw, and spikes found."""

    draws: int = 60
    """Matrices for each row."""
    shapes: Shapes = ((256, 1024), (512, 1024), (1024, 1024), (512, 784))
    """Of the matrices."""
    planted: tuple[float, ...] = (0.0, 0.01, 0.03, 0.06, 0.1)
    """Shares of the ranks that are signal, 1.5 to 4 times as strong as can be detected."""


@dataclass(frozen=True)
class Calibration:
    """P(noise alone gives a spike) by rule and level; in brackets the error in 0.001."""

    draws: int = 2000
    """Matrices for each row."""
    shapes: Shapes = (
        *((50, 50), (50, 100), (50, 400), (100, 100)),
        *((100, 400), (200, 200), (300, 383), (128, 1024)),
    )
    """Of the matrices."""
    levels: tuple[float, ...] = (0.1, 0.5, 0.9)
    """What P should be; of t(5) only far larger matrices could have it."""


@dataclass(frozen=True)
class FitTest:
    """P(the test refuses the fit) by test and size; in brackets the error in 0.001."""

    draws: int = 400
    """Matrices for each row and size."""
    sizes: tuple[int, ...] = (50, 100, 200, 500)
    """Shorter sides; the longer are twice as long."""


@dataclass(frozen=True)
class Config:
    """Compares fits of the noise on random matrices."""

    table: Literal["all", "bias", "calibration", "fit_test"] = "all"
    """Which to make."""
    bias: Bias = Bias()
    calibration: Calibration = Calibration()
    fit_test: FitTest = FitTest()
    seed: int = 0
    """Of all draws."""
    out: Path | None = None
    """JSON file for the rows and all that they depend on."""

    def __post_init__(self):
        for name in TABLES:
            draws = getattr(self, name).draws
            if draws < 1:
                raise ValueError(f"`{name}.draws` must be at least 1, got {draws}.")


@functools.partial(jax.jit, static_argnames="rule")
def _fits(values: jax.Array, ratio: jax.Array, rule: rmtjax.ranks.RankRule):
    def one(eigenvalues):
        spectrum = rmtjax.Spectrum(eigenvalues, ratio)
        fit = rule.fit(spectrum)
        return fit.variance, rule(spectrum, fit), rule.accepts(spectrum, fit)

    return jax.vmap(one)(values)


def fit_all(
    values: np.ndarray, shape: rivals.Shape, level: float = 0.1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The variance, the spikes and the verdict of the library's rule, of every spectrum."""
    arrays = (jnp.asarray(x, jnp.float32) for x in (values, rivals.aspect_ratio(shape)))
    return jax.tree.map(np.asarray, _fits(*arrays, rmtjax.ranks.bema(level=level)))


def bias(config: Bias, seed: int) -> Iterator[Row]:
    """A row for each shape, share planted and estimator."""
    methods = {
        "published": rivals.published_bema,
        "authors": rivals.authors_bema,
        "Gavish-Donoho": rivals.gavish_donoho,
        "EVBMF": rivals.evbmf,
    }
    for shape in config.shapes:
        for part in config.planted:
            sample = functools.partial(ensembles.planted, share=part)
            values = ensembles.spectra(sample, shape, config.draws, seed)
            variance, spikes, _ = fit_all(values, shape)
            found = {"rmtjax": (variance, spikes)}
            for method, estimate in methods.items():
                noise = estimate(values, shape)
                found[method] = noise.variance, noise.spikes(values)
            for method, (variance, spikes) in found.items():
                yield {
                    "shape": "x".join(map(str, shape)),
                    "planted": round(part * min(shape)),
                    "method": method,
                    "mean": round(float(variance.mean()), 5),
                    "deviation": round(float(variance.std()), 5),
                    "spikes": round(float(spikes.mean()), 3),
                }


def rate(hits: np.ndarray) -> Row:
    """A share of the draws, and its standard error."""
    share = float(hits.mean())
    error = (share * (1 - share) / hits.size) ** 0.5
    return {"share": round(share, 5), "error": round(error, 5)}


def calibration(config: Calibration, seed: int) -> Iterator[Row]:
    """A row for each law of the entries, shape, level and rule."""
    for entries, sample in ensembles.ENTRIES.items():
        for shape in config.shapes:
            values = ensembles.spectra(sample, shape, config.draws, seed)
            for level in config.levels:
                spikes = {
                    "rmtjax": fit_all(values, shape, level)[1],
                    "published": rivals.published_bema(values, shape, level=level).spikes(values),
                    "authors": rivals.authors_bema(values, shape, level=level).spikes(values),
                }
                row = {"entries": entries, "shape": "x".join(map(str, shape))}
                for method, count in spikes.items():
                    yield {**row, "rule": f"{method} {level:g}", **rate(count > 0)}


def fit_test(config: FitTest, seed: int) -> Iterator[Row]:
    """A row for each kind of kernel, size and test."""
    for kernel, sample in ensembles.KERNELS.items():
        for size in config.sizes:
            shape = size, 2 * size
            values = ensembles.spectra(sample, shape, config.draws, seed)
            refused = {
                "rmtjax": ~fit_all(values, shape)[2],
                "authors": rivals.authors_error(values, shape) >= 0.1,
            }
            for method, hits in refused.items():
                yield {"kernel": kernel, "test": f"{method} {size}", **rate(hits)}


TABLES: dict[str, Callable[..., Iterator[Row]]] = {
    "bias": bias,
    "calibration": calibration,
    "fit_test": fit_test,
}
# What heads the rows and the columns, and what a cell says.
RATE = lambda row: f"{row['share']:.3f}({1000 * row['error']:.0f})"
LAYOUT: dict[str, tuple[tuple[str, ...], str, Callable[[Row], str]]] = {
    "bias": (
        ("shape", "planted"),
        "method",
        lambda row: f"{row['mean']:.4f} ± {row['deviation']:.4f} {row['spikes']:6.1f}",
    ),
    "calibration": (("entries", "shape"), "rule", RATE),
    "fit_test": (("kernel",), "test", RATE),
}


def to_table(name: str, rows: list[Row]) -> Table:
    """The rows, with what they compare side by side."""
    index, across, cell = LAYOUT[name]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        cells.setdefault(tuple(str(row[key]) for key in index), {})[row[across]] = cell(row)
    table = Table(*index, box=None, title=name, title_justify="left")
    for heading in dict.fromkeys(row[across] for row in rows):
        table.add_column(heading, justify="right")
    for key, line in cells.items():
        table.add_row(*key, *line.values())
    return table


def run(config: Config) -> dict[str, Any]:
    """Makes the tables that were asked for and prints each from its rows."""
    console = output.console()
    names = list(TABLES) if config.table == "all" else [config.table]
    rows, seconds = {}, {}
    for name in names:
        begin = time.perf_counter()
        part = getattr(config, name)
        with console.status(name):
            rows[name] = list(TABLES[name](part, config.seed))
        seconds[name] = round(time.perf_counter() - begin, 1)
        console.print(to_table(name, rows[name]))
        console.print(type(part).__doc__, f"{part.draws:,} draws a row.\n", style="dim")
    return {"seconds": seconds, "rows": rows}


def save(path: Path, **found: Any) -> None:
    """Writes all that was found, and what it depends on, whole or not at all."""
    with output.replacing(path) as whole:
        text = json.dumps({**found, "environment": measure.environment()}, indent=1, default=str)
        whole.write_text(text + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Reads the options, prints the tables and writes them where that was asked for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = tyro.cli(Config, args=arguments, description=__doc__)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)  # or it fails at the very end
    found = run(config)
    if config.out is not None:
        command = shlex.join(["python", "experiments/fits.py", *arguments])
        save(config.out, command=command, config=dataclasses.asdict(config), **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
