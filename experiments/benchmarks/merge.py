"""What it costs to merge replicas of a kernel, beside singular value decompositions of it.

Each replica's change is unit noise with a few directions in common. `rmtjax.merge_replicas` is
called as a user calls it on the host, and within a compiled program. All alternatives take turns.
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
    """Times the merge of replicas of one kernel beside its decomposition."""

    shapes: tuple[tuple[int, int], ...] = ((1000, 1000), (784, 512), (4096, 256))
    """Rows and columns of kernels."""
    replicas: int = 4
    """Number of replicas."""
    rounds: int = 5
    """Turns of each."""
    json: Path | None = None
    """File to write."""


def planted(count: int, shape: tuple[int, int], rank: int = 5) -> jax.Array:
    """Changes of replicas: noise, and directions in common from 1.5 to 10 times its edge."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(side, rank)))[0] for side in shape)
    edge = np.sqrt(shape[0]) + np.sqrt(shape[1])
    signal = (u * (edge * np.geomspace(10, 1.5, rank))) @ v.T
    return jnp.asarray(rng.normal(size=(count, *shape)) + signal, jnp.float32)


def reference(changes: np.ndarray) -> np.ndarray:
    """The agreed change by decompositions in float64."""
    changes = changes.astype(np.float64)
    agreed = np.zeros(changes.shape[1:])
    for change in changes:
        others = (changes.sum(axis=0) - change) / (len(changes) - 1)
        u, _, vt = np.linalg.svd(others, full_matrices=False)
        r = np.einsum("nm,nm->m", u, change @ vt.T)
        agreed += (u * np.maximum(r, 0)) @ vt / len(changes)
    return agreed


def compare(shape: tuple[int, int], count: int, rounds: int) -> dict[str, object]:
    """A row: ratios of the shortest times, since what else the machine does only adds to them."""
    changes = planted(count, shape)
    start, replicas = {"kernel": jnp.zeros(shape)}, {"kernel": changes}
    merge = lambda: rmtjax.merge_replicas(start, replicas).params["kernel"]
    compiled = jax.jit(lambda *trees: rmtjax.merge_replicas(*trees).params["kernel"])
    svd = jax.jit(lambda matrix: jnp.linalg.svd(matrix, full_matrices=False))
    matrix = np.asarray(changes[0])
    alternatives = {
        "np": lambda: np.linalg.svd(matrix, full_matrices=False),
        "jnp": lambda: svd(matrix),
        "merge": merge,
        "compiled": lambda: compiled(start, replicas),
    }
    times = timing.in_turns(alternatives, rounds)
    least = {name: float(seconds.min()) for name, seconds in times.items()}
    wanted = reference(np.asarray(changes))
    apart = np.linalg.norm(merge() - wanted) / np.linalg.norm(wanted)
    return {
        "kernel": f"{shape[0]} x {shape[1]}",
        "replicas": count,
        **{f"{name}, ms": 1e3 * seconds for name, seconds in least.items()},
        "merge / np.linalg.svd": least["merge"] / least["np"],
        "merge / jnp.linalg.svd": least["merge"] / least["jnp"],
        "compiled / jnp.linalg.svd": least["compiled"] / least["jnp"],
        "relative difference": float(apart),
    }


def main() -> None:
    """Prints a row for each kernel."""
    config = tyro.cli(Config, description=__doc__)
    rows = [compare(shape, config.replicas, config.rounds) for shape in config.shapes]
    timing.show("a merge of replicas", rows, config.json)


if __name__ == "__main__":
    main()
