"""What it costs to cut a kernel to its signal, beside `jnp.linalg.svd` of it.

The kernel is noise with planted directions, from a little above the detection limit to twenty
times that. `rmtjax.truncate` is given their number by a plan; the decomposition is that which a
program without this library would call. Both take turns.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import rmtjax
from experiments.benchmarks import timing


@dataclass(frozen=True)
class Config:
    """Times the truncation of kernels beside their decomposition."""

    sizes: tuple[int, ...] = (512, 1000, 2000, 3000)
    """Sides of square kernels."""
    ranks: tuple[int, ...] = (10, 40)
    """Planted directions, all kept."""
    rounds: int = 3
    """Turns of each."""
    json: Path | None = None
    """File to write."""


def planted(size: int, rank: int) -> jax.Array:
    """Unit noise with singular values from 1.1 to 20 times the edge of the bulk planted in it."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for _ in range(2))
    values = 2 * np.sqrt(size) * np.geomspace(20, 1.1, rank)
    return jnp.asarray(rng.normal(size=(size, size)) + (u * values) @ v.T, jnp.float32)


def compare(size: int, rank: int, rounds: int) -> dict[str, object]:
    """A row: both times, their ratio, and how far the results are apart."""
    kernel = planted(size, rank)
    decompose = jax.jit(lambda a: jnp.linalg.svd(a, full_matrices=False))
    params = {"kernel": kernel}
    plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(rank), multiple=1)
    truncate = lambda: rmtjax.truncate(params, plan)["kernel"]
    times = timing.in_turns({"svd": lambda: decompose(kernel), "ours": truncate}, rounds)
    u, s, vt = decompose(kernel)
    exact = (u[:, :rank] * s[None, :rank]) @ vt[:rank]
    apart = jnp.linalg.norm(truncate() - exact) / jnp.linalg.norm(exact)
    return {
        "side": size,
        "rank": rank,
        "jnp.linalg.svd, ms": timing.spread(times["svd"]),
        "rmtjax.truncate, ms": timing.spread(times["ours"]),
        "ratio": float(np.median(times["svd"] / times["ours"])),
        "relative difference": float(apart),
    }


def main() -> None:
    """Prints a row for each kernel."""
    config = tyro.cli(Config, description=__doc__)
    rows = [compare(size, rank, config.rounds) for size in config.sizes for rank in config.ranks]
    timing.show("truncation to planted directions", rows, config.json)


if __name__ == "__main__":
    main()
