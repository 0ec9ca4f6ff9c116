"""What it costs to sum over the inputs of kernels, beside a forward pass of their model.

The sums are those that `rmtjax.linen.moments` adds to each call: the second moments of the inputs,
and what their shrinkage needs. The first table has a dense layer alone, with as many outputs as
inputs. The second has whole models. All is in float32.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import rmtjax
from experiments.benchmarks import timing
from rmtjax.moments import sums_of_rows

TOKENS = 64  # of a sequence


@dataclass(frozen=True)
class Config:
    """Times the sums over the inputs of layers and models beside their products."""

    widths: tuple[int, ...] = (128, 256, 512, 1024)
    """Inputs, and outputs, of the layers."""
    rows: int = 8192
    """Of the inputs of a dense layer."""
    tokens: int = 2048
    """Of a batch of the models."""
    rounds: int = 9
    """Turns of each."""
    json: Path | None = None
    """File to write, of the layers."""
    models_json: Path | None = None
    """File to write, of the models."""


class Dense(nn.Module):
    """Layers of one width with ReLU between them, and ten logits."""

    width: int
    depth: int = 3

    @nn.compact
    def __call__(self, x):
        """Returns logits of rows."""
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


class Transformer(nn.Module):
    """Blocks of attention and of two dense layers, of which the inner is four times as wide."""

    width: int
    depth: int = 2

    @nn.compact
    def __call__(self, x):
        """Returns sequences of the same shape."""
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=self.width // 32)(y, y)
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(y)
        return x


def seconds_of_sums(module: nn.Module, variables: Any, batch: jax.Array, rounds: int) -> np.ndarray:
    """Returns the seconds between batches, from when the program is compiled."""
    begins: list[float] = []

    def batches() -> Iterator[jax.Array]:
        for _ in range(rounds + 4):
            begins.append(time.perf_counter())
            yield batch

    rmtjax.linen.moments(module, variables, batches())
    # The state of a batch is read when the next one has begun.
    return np.diff(begins)[3:]


def compare_model(
    module: nn.Module, width: int, batch: jax.Array, rounds: int
) -> dict[str, object]:
    """Returns a row: a forward pass, the same with the sums, and the ratio of the sums to it."""
    variables = module.init(jax.random.key(0), batch)
    forward = jax.jit(module.apply)
    before = timing.in_turns({"": lambda: forward(variables, batch)}, rounds)[""]
    both = seconds_of_sums(module, variables, batch, rounds)
    after = timing.in_turns({"": lambda: forward(variables, batch)}, rounds)[""]
    alone = np.concatenate([before, after])
    return {
        "model": type(module).__name__,
        "width": width,
        "forward, ms": timing.spread(alone),
        "and sums, ms": timing.spread(both),
        "sums / forward": float(np.median(both) / np.median(alone) - 1),
    }


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
    draw = np.random.default_rng(0)
    models = []
    for width in config.widths:
        flat = jnp.asarray(draw.normal(size=(config.tokens, width)), jnp.float32)
        sequences = flat.reshape(-1, TOKENS, width)
        models.append(compare_model(Dense(width), width, flat, config.rounds))
        models.append(compare_model(Transformer(width), width, sequences, config.rounds))
    timing.show("sums over the inputs of all kernels of a model", models, config.models_json)


if __name__ == "__main__":
    main()
