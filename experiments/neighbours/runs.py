"""The runs of a track: trials of every arm at one level, then all levels and seeds."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import rmtjax
from experiments.neighbours import arms, sizes, tracks, trainer
from experiments.neighbours.allocation import TUNING_SEED
from experiments.neighbours.arms import Arm
from experiments.neighbours.tracks import Track
from experiments.neighbours.trainer import Setting

BATCHES = 1, 128  # of which the latency is measured
ROUNDS = 30
Find = Callable[[Any], dict[str, Any] | None]


@dataclass(frozen=True)
class Run:
    """One training: what a record of the file is found by.

    Attributes:
      track: Its letter.
      arm: Its name.
      level: Stored parameters that are allowed; 1 for arms of full size.
      seed: Of weights and batches.
      trial: Which numbers.
      tuning: Whether it is one of the trials.
      short: Whether the network is small and trains for a few steps.
    """

    track: str
    arm: str
    level: float
    seed: int
    trial: int
    tuning: bool
    short: bool


def track_of(run: Run) -> Track:
    """Returns the track of a run."""
    track = tracks.TRACKS[run.track]
    return track.short() if run.short else track


def best_trial(found: list[dict[str, Any]]) -> int:
    """Returns the trial of the best accuracy on validation; of equal ones the first."""
    best = max(found, key=lambda record: (record["validation"], -record["settings"]["trial"]))
    return best["settings"]["trial"]


def plan_runs(
    letter: str, chosen: list[Arm], seeds: list[int], trials: int, short: bool, find: Find
) -> Iterator[Run]:
    """Yields the runs that a file lacks; those of seeds once an arm's trials are there.

    All arms get a seed before the next seed begins, so that a stopped bench can be compared.
    """
    track = tracks.TRACKS[letter]

    def of(arm: Arm, level: float, seed: int, trial: int, tuning: bool) -> Run:
        return Run(letter, arm.name, level, seed, trial, tuning, short)

    def trials_of(arm: Arm) -> list[Run]:
        level = arm.tuned_at(track)
        return [of(arm, level, TUNING_SEED, trial, True) for trial in range(trials)]

    for arm in chosen:
        yield from (run for run in trials_of(arm) if find(run) is None)
    for seed in seeds:
        for arm in chosen:
            found = [record for run in trials_of(arm) if (record := find(run))]
            best = best_trial(found)
            planned = [of(arm, level, seed, best, False) for level in arm.levels_of(track)]
            yield from (run for run in planned if find(run) is None)


def _call(module: nn.Module):
    return jax.jit(lambda p, x: rmtjax.linen.apply(module, {"params": p}, x, False))


def latencies(track: Track, thin: sizes.Thin, batch: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Returns median milliseconds of a forward pass, of the network and of the dense one.

    Both take turns, so that other work on the machine meets both.
    """
    x = jnp.resize(
        trainer.on_device(track, "test")[0][:batch], (batch, *track.load().test[0].shape[1:])
    )
    networks = {
        "thin": (_call(thin.module or track.module), thin.training.params),
        "dense": (_call(track.module), tracks.initial(track.module, track, 0)),
    }
    times: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(rounds + 3):
        for name, (call, params) in networks.items():
            begin = time.perf_counter()
            for _ in range(5):
                call(params, x).block_until_ready()
            if turn >= 3:  # compiled and warm
                times[name].append((time.perf_counter() - begin) / 5)
    return {name: 1e3 * float(np.median(values)) for name, values in times.items()}


def perform(run: Run) -> dict[str, Any]:
    """Returns the record of a run. The test set is looked at in runs of seeds only."""
    track = track_of(run)
    arm = next(arm for arm in arms.ALL if arm.name == run.arm)
    hyper = arm.draw(run.trial)
    thin = arm.run(Setting(track, run.level, run.seed, hyper))
    judge = lambda part: trainer.accuracy(
        thin.module or track.module, thin.training.params, track, part
    )
    found: dict[str, Any] = {
        "hyper": dict(hyper),
        "validation": round(judge("validation"), 3),
        "train_seconds": round(thin.training.seconds, 2),
        **sizes.size_of(thin, track)._asdict(),
    }
    if run.tuning:
        return found
    found |= {"test": round(judge("test"), 3), "train": round(judge("train"), 3)}
    if run.seed == 0:
        rounds = 2 if run.short else ROUNDS
        found["milliseconds"] = {str(b): latencies(track, thin, b, rounds) for b in BATCHES}
    return found
