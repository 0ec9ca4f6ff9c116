"""The arms that prune while training: a line each."""

from dataclasses import dataclass
from typing import Any

import jax
import optax

import rmtjax
from rmtjax import ranks


@dataclass(frozen=True)
class Pruning:
    """A rank rule and the options of `rmtjax.prune_spectrum` that it is used with."""

    rule: ranks.RankRule
    options: tuple[tuple[str, Any], ...] = ()

    def transform(self, every: int, start: int) -> optax.GradientTransformation:
        """The transform to end a chain with; one that settles finds its own time to start."""
        options = dict(self.options)
        start = every if "settled" in options else start
        # The committed results were made before cuts were guarded.
        return rmtjax.prune_spectrum(every, start=start, rule=self.rule, max_removed=1.0, **options)


def by(rule: ranks.RankRule, **options: Any) -> Pruning:
    """Pruning by a rule, with options of `prune_spectrum`."""
    return Pruning(rule, tuple(sorted(options.items())))


# The committed results were made at this level, which was then the default of `bema`. Another
# level is another study: `results.check_same_study` would not mix the two.
RMT = ranks.bema(level=0.1)

# A rule of energy takes a share of the share each time, so that without a floor its rank
# would fall to 1. With one, the others say what the floor does and what the rule does.
ARMS: dict[str, Pruning] = {
    "fixed rank 10": by(ranks.fixed(10)),
    "fixed rank 25": by(ranks.fixed(25)),
    "energy 0.9, floor 10": by(ranks.energy(0.9), min_rank=10),
    "Gavish-Donoho": by(ranks.gavish_donoho()),
    "RMT": by(RMT),
    "RMT, floor 10": by(RMT, min_rank=10),
    "RMT, settled": by(RMT, settled=0.2),
    # Of the ranks that are no signal these leave nearly a half; the second fits them anew.
    "RMT, keep 0.45": by(RMT, keep=0.45),
    "RMT, keep 0.45, refit": by(RMT, keep=0.45, noise="refit"),
}


def carried_ranks(opt_state: Any) -> dict[str, int]:
    """Rank of each kernel after the last pruning, by path; empty where nothing prunes."""
    return {path: int(rank) for path, rank in optax.tree.get(opt_state, "ranks", {}).items()}


def plan_by_ranks(params: Any, found: dict[str, int]) -> rmtjax.Plan:
    """The plan that gives each kernel its rank: what pruning has left of it."""
    rows = {}
    for path, rank in found.items():
        only = lambda name, leaf, path=path: name == path
        rows |= rmtjax.plan(params, rule=ranks.fixed(rank), where=only, multiple=1)
    return rmtjax.Plan(rows)


def count_parameters(params: Any) -> int:
    """Stored numbers: kernels or their factors, and biases."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
