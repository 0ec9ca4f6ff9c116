"""What factors save in a forward pass, against what their multiply-adds would let them save.

One `flax.linen.Dense` without bias, dense and factorized, by `rmtjax.linen.apply`; both take
turns, of several calls each. The ideal speed-up of an n x n kernel at rank r is n^2 / (2 n r). Who
waits for each call need not hand it over to another thread, as JAX does on CPU by itself:
`--dispatch asynchronous` shows what that costs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import rmtjax
from experiments.benchmarks import timing


@dataclass(frozen=True)
class Config:
    """Times a dense layer and its factors."""

    widths: tuple[int, ...] = (512, 1024, 2048)
    """Inputs and outputs of the layer."""
    shares: tuple[int, ...] = (4, 8, 16, 32)
    """The ranks are the width divided by these."""
    batches: tuple[int, ...] = (1, 128)
    """Rows of the input."""
    rounds: int = 40
    """Turns of each."""
    calls: int = 10
    """Calls in a turn."""
    dispatch: Literal["synchronous", "asynchronous"] = "synchronous"
    """Whether a call is computed in the thread that waits for it."""
    json: Path | None = None
    """File to write."""


def compare(width: int, rank: int, batch: int, config: Config) -> dict[str, object]:
    """A row: both times, and the speed-up as a share of the ideal one."""
    layer = nn.Dense(width, use_bias=False)
    inputs = jax.random.normal(jax.random.key(0), (batch, width))
    params = layer.init(jax.random.key(1), inputs)["params"]
    thin = {"kernel": rmtjax.factorize_matrix(jnp.asarray(params["kernel"]), rank)}
    run = jax.jit(lambda params, x: rmtjax.linen.apply(layer, {"params": params}, x))
    alternatives = {"dense": lambda: run(params, inputs), "thin": lambda: run(thin, inputs)}
    times = timing.in_turns(alternatives, config.rounds, config.calls)
    ratio, ideal = float(np.median(times["dense"] / times["thin"])), width / (2 * rank)
    return {
        "width": width,
        "rank": rank,
        "batch": batch,
        "dense, ms": timing.spread(times["dense"]),
        "factors, ms": timing.spread(times["thin"]),
        "speed-up": ratio,
        "ideal": ideal,
        "share": ratio / ideal,
    }


def main() -> None:
    """Prints a row for each width, rank and batch."""
    config = tyro.cli(Config, description=__doc__)
    jax.config.update("jax_cpu_enable_async_dispatch", config.dispatch == "asynchronous")
    rows = [
        compare(width, width // share, batch, config)
        for width in config.widths
        for batch in config.batches
        for share in config.shares
    ]
    timing.show("latency of factors", rows, config.json)


if __name__ == "__main__":
    main()
