"""The merge of replicas beside estimators that know more than it does, on matrices that are made.

The signal S is known, so that errors are. The same noise is in the mean of the replicas whatever
their number k, as if the same data were dealt to k replicas. Run
`python -m experiments.agreement.oracle --help`.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from rich.table import Table

import rmtjax
from experiments import measure, output

RESULTS = Path(__file__).parents[1] / "results" / "agreement_oracle.json"
COMMAND = "python -m experiments.agreement.oracle"
COUNTS = (2, 3, 4, 8, 16)
SHAPES = ((300, 300), (400, 100), (100, 400))
# Singular values of S, in units of the least that stands out of the noise in the mean.
SIGNALS = {
    "10 directions": lambda sides: np.geomspace(8, 0.5, 10),
    "all directions": lambda sides: 8 / np.arange(1, min(sides) + 1),
    "none": lambda sides: np.zeros(1),
}
NOISES = ("white", "rows", "columns")
RIVALS = ("oracle", "known noise", "soft")


@dataclass(frozen=True)
class Config:
    """Makes matrices of signal and noise, and measures how near estimators come to the signal.

    What is in the file is not run again.
    """

    seeds: int = 20
    """Draws of each kind."""
    file: Path = RESULTS
    """Results, read and written."""
    show_only: bool = False
    """Print the tables of the file."""


class Case(NamedTuple):
    """One kind of matrices."""

    signal: str
    noise: str
    shape: tuple[int, int]
    correlation: float = 0.0  # of the noise of two replicas
    strength: float = 1.0  # times the values of the signal
    counts: tuple[int, ...] = COUNTS  # of replicas

    @property
    def key(self) -> str:
        """The name in the results."""
        rows, columns = self.shape
        kind = f"{self.signal} / {self.noise} / {rows} x {columns}"
        return f"{kind} / {self.correlation:g} / {self.strength:.3g}"


SQUARE = SHAPES[0]
TALL = SHAPES[1]  # of it the folds are also made with the values of the oracle
KINDS = [Case(*kind) for kind in itertools.product([*SIGNALS][:2], NOISES, SHAPES)]
KINDS += [Case("none", noise, SQUARE) for noise in NOISES]
LEAKS = [
    Case(signal, "white", SQUARE, correlation)
    for signal, correlation in itertools.product(SIGNALS, (0.0, 0.1, 0.3))
]
SPLITS = [case for case in KINDS if case.shape == TALL]
# As many times the data as there are replicas: the noise of each replica is the same.
GROWING = [Case("10 directions", "white", SQUARE, 0.0, k**0.5, (k,)) for k in COUNTS]


def signal(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Returns S, with random directions."""
    values = case.strength * np.prod(case.shape) ** 0.25 * SIGNALS[case.signal](case.shape)
    u, v = (np.linalg.qr(rng.standard_normal((side, values.size)))[0] for side in case.shape)
    return (u * values) @ v.T


def coloured(case: Case, white: np.ndarray) -> np.ndarray:
    """Returns noise of mean variance 1: a hundredfold from row to row, or AR(1) along the rows."""
    rows, columns = case.shape
    if case.noise == "rows":
        variances = np.geomspace(0.1, 10, rows)
        return white * np.sqrt(variances / variances.mean())[:, None]
    if case.noise == "columns":
        apart = np.abs(np.subtract.outer(np.arange(columns), np.arange(columns)))
        return white @ np.linalg.cholesky(0.8**apart).T
    return white


def replicas(case: Case, mean: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns replicas with a given mean, as Gaussian noise has them around it."""
    white = rng.standard_normal((count, *case.shape))
    white -= white.mean(axis=0)
    # Noise of variance v and of the correlation c has v (1 + (k - 1) c) / k = 1 in the mean, and
    # v (1 - c) of its own in each replica.
    own = count * (1 - case.correlation) / (1 + (count - 1) * case.correlation)
    return mean + np.sqrt(own) * np.stack([coloured(case, one) for one in white])


def best_soft(s: np.ndarray, overlaps: np.ndarray) -> np.ndarray:
    """Returns values less the threshold that has the least error, and not below 0."""
    thresholds = [s[0]]
    for count in range(1, s.size + 1):
        # With so many values above it, the error is a parabola in the threshold.
        least = np.mean(s[:count] - overlaps[:count])
        lower = s[count] if count < s.size else 0.0
        thresholds.append(np.clip(least, lower, s[count - 1]))
    left = np.maximum(s - np.array(thresholds)[:, None], 0)
    return left[np.argmin(np.sum(left**2 - 2 * left * overlaps, axis=1))]


def rivals(case: Case, mean: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    r"""Returns errors of $\sum_m t_m u_m v_m^T$ with the singular vectors of the mean.

    The oracle has $t_m = u_m^T S v_m$, which is the least error of all t. Optimal shrinkage knows
    the variance of the noise, and soft thresholding the best threshold.
    """
    u, s, vt = np.linalg.svd(mean, full_matrices=False)
    overlaps = np.einsum("nm,nk,mk->m", u, truth, vt, optimize=True)
    short, long = sorted(case.shape)
    shrunk = rmtjax.shrinkage.frobenius(s / np.sqrt(long), short / long)
    values = {
        "oracle": overlaps,
        "known noise": np.sqrt(long) * np.asarray(shrunk, np.float64),
        "soft": best_soft(s, overlaps),
    }
    square = np.sum(truth**2)
    error = lambda t: np.sqrt(max(square + np.sum(t**2 - 2 * t * overlaps), 0))
    return {name: error(t) for name, t in values.items()}


def merged(changes: np.ndarray) -> np.ndarray:
    """Returns what the library keeps of changes."""
    start = {"kernel": np.zeros(changes.shape[1:], np.float32)}
    found = rmtjax.merge_replicas(start, {"kernel": changes.astype(np.float32)})
    return np.asarray(found.params["kernel"], np.float64)


def known_folds(changes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    r"""Returns the mean of folds whose values are $u_m^T S v_m$, and not those of a replica."""
    kept, total = np.zeros_like(truth), changes.sum(axis=0)
    for change in changes:
        u, _, vt = np.linalg.svd(total - change, full_matrices=False)
        kept += (u * np.einsum("nm,nk,mk->m", u, truth, vt, optimize=True)) @ vt
    return kept / len(changes)


def errors(case: Case, seed: int) -> dict[str, float]:
    """Returns the norm of S and that of the errors of all estimators, of one draw."""
    rng = np.random.default_rng(seed)
    truth = signal(case, rng)
    mean = truth + coloured(case, rng.standard_normal(case.shape))
    found = {"signal": np.linalg.norm(truth), "mean": np.linalg.norm(mean - truth)}
    found |= rivals(case, mean, truth)
    for count in case.counts:
        changes = replicas(case, mean, count, rng)
        found[f"k = {count}"] = np.linalg.norm(merged(changes) - truth)
        if case in SPLITS:
            found[f"known, k = {count}"] = np.linalg.norm(known_folds(changes, truth) - truth)
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def load(file: Path) -> dict[str, Any]:
    """Reads results: how they were made, the seconds that it took, and the errors as `runs`."""
    if file.exists():
        return json.loads(file.read_text())
    return {"command": COMMAND, "seconds": 0.0, "runs": {}}


def run(config: Config, content: dict[str, Any]) -> None:
    """Runs what is missing, and writes each kind of matrices."""
    content["environment"] = measure.environment()
    for case in dict.fromkeys(KINDS + LEAKS + GROWING):
        if len(content["runs"].get(case.key, {"signal": []})["signal"]) >= config.seeds:
            continue
        begun = time.monotonic()
        found = [errors(case, seed) for seed in range(config.seeds)]
        rows = {name: [one[name] for one in found] for name in found[0]}
        content["runs"][case.key] = rows
        content["seconds"] += time.monotonic() - begun
        with output.replacing(config.file) as partial:
            partial.write_text(json.dumps(content) + "\n")


def cell(values: np.ndarray) -> str:
    """Returns the mean, and its standard error in units of the third digit."""
    error = values.std(ddof=1) / values.size**0.5 if values.size > 1 else 0.0
    return f"{values.mean():.3f}({1e3 * error:.0f})"


def cells(case: Case, found: dict[str, list[float]], names: list[str]) -> list[str]:
    """Returns errors over that of the mean, which itself is over the norm of S."""
    arrays = {name: np.array(values) for name, values in found.items()}
    row = [cell(arrays[name] / arrays["mean"]) for name in names]
    if names[0] == "mean":
        row[0] = "-" if case.signal == "none" else cell(arrays["mean"] / arrays["signal"])
    return row


def make_table(runs: dict[str, Any], cases: list[Case], heads: dict, names: list[str]) -> Table:
    """Returns a row for each of the cases that there are; `heads` tell what they are."""
    table = Table(*heads, *names, box=None, pad_edge=False)
    for case in cases:
        if case.key in runs:
            first = [tell(case) for tell in heads.values()]
            table.add_row(*first, *cells(case, runs[case.key], names))
    return table


def tables(runs: dict[str, Any]) -> Iterator[Table]:
    """Yields all kinds of matrices, the leak, more data with more replicas, and folds."""
    kind = {"signal": lambda case: case.signal, "noise": lambda case: case.noise}
    shape = {"kernel": lambda case: f"{case.shape[0]} x {case.shape[1]}"}
    merges = [f"k = {count}" for count in COUNTS]
    rivals = ["mean", *RIVALS]
    yield make_table(runs, KINDS, kind | shape, rivals + merges)
    leak = {"signal": kind["signal"], "correlation": lambda case: f"{case.correlation:g}"}
    yield make_table(runs, LEAKS, leak, rivals + merges)
    folds = [f"{name}k = {count}" for count in (2, 4, 16) for name in ("known, ", "")]
    yield make_table(runs, SPLITS, kind, ["oracle", *folds])
    # Of each a column of its own: the merge of as many replicas as there are.
    growing = Table("replicas", *rivals, "merge", box=None, pad_edge=False)
    for case in GROWING:
        if case.key in runs:
            (count,) = case.counts
            growing.add_row(str(count), *cells(case, runs[case.key], [*rivals, f"k = {count}"]))
    yield growing


def main(arguments: list[str] | None = None) -> int:
    """Reads the options, runs what is missing, and prints the tables."""
    config = tyro.cli(Config, args=arguments, prog=COMMAND, description=__doc__)
    content = load(config.file)
    if not config.show_only:
        run(config, content)
    console = output.console()
    for table in tables(content["runs"]):
        console.print(table)
        console.print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
