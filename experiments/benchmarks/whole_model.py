"""A report of a whole model, beside a loop that finds its eigenvalues alone.

The model is the sentence encoder of `experiments.minilm`. The loop is what one would write by
hand, `np.linalg.eigvalsh(W.T @ W)` for each kernel; a report fits the noise of each besides, and
decides its rank. All columns are then the norms, ranks and exponents of those spectra.
WeightWatcher, where asked for, runs once, in an environment that is made for it and removed: it
pins NumPy 1. NumPy's own threads are used as they are; `OPENBLAS_NUM_THREADS=1` sets one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from safetensors.numpy import load_file

import rmtjax
from experiments.benchmarks import apart, timing
from experiments.minilm import weights


@dataclass(frozen=True)
class Config:
    """Times the analysis of a model."""

    rounds: int = 7
    """Turns of each."""
    weightwatcher: bool = False
    """Whether WeightWatcher is installed and run, too: minutes, and gigabytes with some builds of
    PyTorch."""
    torch: str = "torch"
    """The requirement that PyTorch is installed by."""
    json: Path | None = None
    """File to write."""


def loop(kernels: Iterable[np.ndarray]) -> list[np.ndarray]:
    """All eigenvalues, in float32, without any fit."""
    squares = (w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T for w in kernels)
    return [np.linalg.eigvalsh(square) for square in squares]


def main() -> None:
    """Prints both times and their ratio."""
    config = tyro.cli(Config, description=__doc__)
    tensors = load_file(weights.find_folder() / "model.safetensors")
    kernels = {name: w for name, w in tensors.items() if w.ndim == 2 and min(w.shape) >= 50}
    model = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    found = rmtjax.analyze(model).plan
    alternatives = {
        "numpy": lambda: loop(kernels.values()),
        "ours": lambda: rmtjax.analyze(model).rows,
        "columns": lambda: rmtjax.Report(found).metrics,  # of the spectra that are there
    }
    times = timing.in_turns(alternatives, config.rounds)
    row = {
        "kernels": len(kernels),
        "numpy eigvalsh, ms": timing.spread(times["numpy"]),
        "rmtjax.analyze, ms": timing.spread(times["ours"]),
        "ratio": float(np.median(times["ours"] / times["numpy"])),
        "all columns, ms": timing.spread(times["columns"]),
    }
    if config.weightwatcher:
        needed = config.torch, "weightwatcher"
        seconds = apart.run_apart("weightwatcher_rival.py", needed, kernels)["seconds"]
        row |= {"WeightWatcher, ms": 1e3 * seconds}
        row |= {"its ratio": seconds / float(np.median(times["ours"]))}
    timing.show("a report of a sentence encoder", [row], config.json)


if __name__ == "__main__":
    main()
