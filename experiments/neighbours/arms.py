"""The arms: what each is called, where it comes from, and the numbers that are tuned for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.neighbours import (
    dynamical,
    few_entries,
    grouped,
    local_drop,
    low_rank,
    spiking,
    tensors,
)
from experiments.neighbours.sizes import Thin
from experiments.neighbours.tracks import Track
from experiments.neighbours.trainer import Hyper, Setting

# Tuned for every arm: rate, weight decay, dropout. The trials are the same for all of them, so that
# arms which begin with dense training share it. Decay is decoupled: a step takes rate times decay.
SHARED = "rate", "decay", "dropout"
TRIALS = (
    (2e-3, 0.5, 0.2),
    (4e-3, 0.1, 0.2),
    (2e-3, 0.1, 0.0),
    (1e-2, 0.1, 0.2),
)
OURS, NEIGHBOUR, CONTROL, WHOLE = "ours", "neighbour", "control", "full size"


@dataclass(frozen=True)
class Arm:
    """A way to make a network of a given size.

    Attributes:
      name: In tables.
      kind: Whether the library offers it, a neighbour does, or it is a control.
      source: Of the method.
      run: Trains it.
      knobs: Its numbers that are tuned, beside those that all have.
      tracks: Letters of the tracks that it runs on.
      fixed: Numbers that are not tuned.
      levels: Those that it can have, if not all of a track.
    """

    name: str
    kind: str
    source: str
    run: Callable[[Setting], Thin]
    knobs: tuple[tuple[str, tuple[float, ...]], ...] = ()
    tracks: str = "abc"
    fixed: tuple[tuple[str, float], ...] = ()
    levels: tuple[float, ...] = ()

    @property
    def is_full_size(self) -> bool:
        """Returns True if it has all parameters, at every level."""
        return self.kind == WHOLE

    def levels_of(self, track: Track) -> tuple[float, ...]:
        """Returns the levels of an arm on a track."""
        return (1.0,) if self.is_full_size else self.levels or track.levels

    def tuned_at(self, track: Track) -> float:
        """Returns the level of its trials."""
        levels = self.levels_of(track)
        return track.tuned_at if track.tuned_at in levels else levels[0]

    def draw(self, trial: int) -> Hyper:
        """Returns the numbers of a trial: the shared ones, and a draw of those of the arm."""
        rng = np.random.default_rng([trial, 1])
        own = {name: float(rng.choice(values)) for name, values in self.knobs}
        return dict(zip(SHARED, TRIALS[trial], strict=True)) | own | dict(self.fixed)


_RHO = (("rho", (1e-3, 1e-2, 1e-1)),)
_SER = (("strength", (0.5, 1.0, 2.0)), ("restore", (0.1, 0.3)))
_HALF: dict[str, Any] = {"tracks": "de", "levels": (0.5,)}
EVERY = "abcde"
NO_DECAY, NO_DROPOUT = ("decay", 0.0), ("dropout", 0.0)
ALL = (
    Arm("RMT, guarded", OURS, "2303.08986", low_rank.rmt_guard, (("rise", (0.003, 0.01, 0.03)),)),
    Arm("RMT budget", OURS, "this library", low_rank.budget),
    Arm("RMT budget, outputs", OURS, "this library", low_rank.outputs),
    Arm("RMT edge", OURS, "2310.03165", low_rank.edge),
    Arm("size, faded", OURS, "this library", low_rank.faded, (("fade", (0.3, 0.6, 0.8)),)),
    Arm(
        "SVD training", OURS, "2004.09031", low_rank.svd_training,
        (("hoyer", (0.003, 0.01, 0.03, 0.1)), ("orthogonality", (0.1, 1.0))),
    ),
    Arm(
        "LocalDrop", OURS, "2103.00719", low_rank.local_drop, (("strength", (0.02, 0.05, 0.1)),)
    ),
    Arm("operator (MPO)", OURS, "2211.14657", tensors.operator),
    Arm("state (MPS)", OURS, "2006.05442", tensors.state),
    Arm("ADMM, bits", OURS, "2111.14836", few_entries.few_bits, _RHO),
    Arm("ADMM, rank", OURS, "2111.14836", low_rank.admm_rank, _RHO),
    Arm("SET", OURS, "2101.09048", few_entries.random_growth, (("drop", (0.1, 0.3, 0.5)),)),
    Arm("RigL", OURS, "1911.11134", few_entries.gradient_growth, (("drop", (0.1, 0.3, 0.5)),)),
    Arm("magnitude", OURS, "1710.01878", few_entries.magnitude, tracks=EVERY),
    Arm("edge budget", OURS, "2606.02608", few_entries.edge_budget, _SER[:1], tracks=EVERY),
    Arm("SER", OURS, "2606.02608", few_entries.reallocated, _SER, tracks=EVERY),
    Arm("magnitude, SER", OURS, "2606.02608", few_entries.hybrid, _SER, tracks=EVERY),
    Arm("2:4", OURS, "2104.08378", grouped.n_of_m((2, 4)), **_HALF),
    Arm("2:4, order as given", OURS, "2104.08378", grouped.n_of_m((2, 4), permuted=False), **_HALF),
    Arm("2:4, SER", OURS, "2606.02608", grouped.n_of_m((2, 4), True), _SER[1:], **_HALF),
    Arm("8:16", OURS, "2606.02608", grouped.n_of_m((8, 16)), **_HALF),
    Arm("8:16, SER", OURS, "2606.02608", grouped.n_of_m((8, 16), True), _SER[1:], **_HALF),
    Arm("block terms", NEIGHBOUR, "2010.04963", tensors.block_terms),
    Arm("tensorized", NEIGHBOUR, "2211.14657", tensors.operator_from_scratch, tracks="ac"),
    Arm("tensorized, joint", NEIGHBOUR, "2010.04196", tensors.joint_gates, tracks="b"),
    Arm("tensorized, per gate", NEIGHBOUR, "2010.04196", tensors.single_gates, tracks="b"),
    Arm(
        "dynamical low rank", NEIGHBOUR, "2205.13571", dynamical.dynamical,
        (("flow", (0.01, 0.02, 0.04)),),
    ),
    Arm(
        "LocalDrop, rates", NEIGHBOUR, "2103.00719", local_drop.local_drop_rates,
        (("strength", (0.02, 0.05, 0.1)), ("price", (0.03, 0.1, 0.3))),
    ),
    Arm("spiking, pruned", NEIGHBOUR, "2211.10725", spiking.pruned, tracks="a"),
    Arm("truncated SVD", CONTROL, "classic", low_rank.truncated_svd),
    Arm("Gavish-Donoho", CONTROL, "1305.5870", low_rank.gavish_donoho),
    Arm("low rank from scratch", CONTROL, "classic", low_rank.from_scratch),
    Arm("narrow", CONTROL, "classic", low_rank.narrow),
    Arm("dense", WHOLE, "classic", low_rank.whole, fixed=(NO_DECAY, NO_DROPOUT), tracks=EVERY),
    Arm("dropout", WHOLE, "classic", low_rank.whole, fixed=(NO_DECAY, ("dropout", 0.2))),
    Arm("weight decay", WHOLE, "classic", low_rank.whole, fixed=(NO_DROPOUT,), tracks=EVERY),
    Arm("spiking", WHOLE, "2211.10725", spiking.whole, tracks="a"),
)  # fmt: skip


def on_track(name: str) -> list[Arm]:
    """Returns the arms of a track."""
    return [arm for arm in ALL if name in arm.tracks]
