"""What it costs to sum over the inputs of a dense layer, beside the layer itself.

The sums are those that `rmtjax.linen.moments` adds to each call: the second moment of the inputs,
and what its shrinkage needs. The layer has as many outputs as inputs, and float32. Both take turns.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.benchmarks import timing
from rmtjax.moments import sums_of_rows


@dataclass(frozen=True)
class Config:
    """Times the sums over the inputs of dense layers beside their products."""

    widths: tuple[int, ...] = (128, 256, 512, 1024)
    """Inputs, and outputs, of the layers."""
    rows: int = 8192
    """Of the inputs."""
    rounds: int = 9
    """Turns of each."""
    json: Path | None = None
    """File to write."""


def compare(width: int, count: int, rounds: int) -> dict[str, object]:
    """A row: both times, their ratio, and how far the sums are from float64."""
    draw = np.random.default_rng(0)
    inputs = jnp.asarray(draw.normal(size=(count, width)), jnp.float32)
    kernel = jnp.asarray(draw.normal(size=(width, width)), jnp.float32)
    multiply, add = jax.jit(jnp.matmul), jax.jit(sums_of_rows)
    calls = {"layer": lambda: multiply(inputs, kernel), "sums": lambda: add(inputs[None])}
    times = timing.in_turns(calls, rounds)
    wide = np.asarray(inputs, np.float64)
    exact = wide.T @ wide
    apart = np.abs(np.asarray(add(inputs[None]).second[0]) - exact).max() / exact.max()
    return {
        "width": width,
        "layer, ms": timing.spread(times["layer"]),
        "sums, ms": timing.spread(times["sums"]),
        "ratio": float(np.median(times["sums"] / times["layer"])),
        "relative difference": float(apart),
    }


def main() -> None:
    """Prints a row for each width."""
    config = tyro.cli(Config, description=__doc__)
    rows = [compare(width, config.rows, config.rounds) for width in config.widths]
    timing.show("sums over the inputs of a dense layer", rows, config.json)


if __name__ == "__main__":
    main()
