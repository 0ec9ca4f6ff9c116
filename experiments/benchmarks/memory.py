"""How much memory it takes to see and to cut a kernel, in copies of the kernel.

Each number is that of a process of its own: by how much its peak has grown over that after the same
on a kernel of 256 x 256, when all was loaded, and the kernel itself was made. What it takes to
compile for another shape is in it: some 30 MiB.
"""

import multiprocessing
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

import rmtjax
from experiments.benchmarks import timing


@dataclass(frozen=True)
class Config:
    """Measures peaks of memory."""

    shapes: tuple[tuple[int, int], ...] = ((2048, 2048), (3000, 3000), (16384, 1024), (5000, 5000))
    """Shapes of kernels."""
    rank: int = 32
    """Directions that are kept."""
    json: Path | None = None
    """File to write."""


def ways(rank: int) -> dict[str, Callable[[np.ndarray], Any]]:
    """Returns the ways to decompose a kernel that are compared."""
    rule = rmtjax.ranks.fixed(rank)

    def truncate(kernel):
        params = {"kernel": kernel}
        return jax.block_until_ready(rmtjax.truncate(params, rmtjax.plan(params, rule=rule)))

    long = lambda kernel: kernel if kernel.shape[0] >= kernel.shape[1] else kernel.T
    svd = jax.jit(lambda kernel: jax.numpy.linalg.svd(kernel, full_matrices=False))
    return {
        "rmtjax.analyze": lambda kernel: rmtjax.analyze({"kernel": kernel}),
        "rmtjax.truncate": truncate,
        "np.linalg.eigvalsh(W.T @ W)": lambda w: np.linalg.eigvalsh(long(w).T @ long(w)),
        "jnp.linalg.svd": lambda kernel: jax.block_until_ready(svd(kernel)),
    }


def _peak() -> float:
    """MiB that this process has held at once."""
    status = Path("/proc/self/status")
    if status.exists():  # what `getrusage` tells begins with the peak of the parent
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes, on a Mac


def grown(name: str, shape: tuple[int, int], rank: int) -> float:
    """MiB by which the peak of this process grows."""
    way, rng = ways(rank)[name], np.random.default_rng(0)
    way(rng.standard_normal((256, 256), np.float32))
    kernel = rng.standard_normal(shape, np.float32)
    before = _peak()
    way(kernel)
    return _peak() - before


def main() -> None:
    """Prints a row for each shape."""
    config = tyro.cli(Config, description=__doc__)
    rows = []
    for shape in config.shapes:
        size = 4 * shape[0] * shape[1] / 2**20
        row: dict[str, Any] = {"shape": "x".join(map(str, shape)), "MiB": size}
        for name in ways(config.rank):
            # A new interpreter for each: a peak does not come down again.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row[name] = pool.apply(grown, (name, shape, config.rank)) / size
        rows.append(row)
    timing.show("peak of memory, in kernels", rows, config.json)


if __name__ == "__main__":
    main()
