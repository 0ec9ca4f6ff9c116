"""Part c: clean labels, and networks of equal stored size.

A run trains two networks from equal starts, one plain and one pruned in its chain. The
second decides the size; the first is cut to that size by the rivals. All are then trained
on. A narrower dense network of the same size is trained as long, in the same two phases, with
and without dropout, and so is the whole one with dropout. Early stopping takes the plain
network at the epoch that validation images choose. Each phase has a cosine of its own, and
each arm the same number of steps.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
from rich.table import Table

import rmtjax
from experiments import training
from experiments.study.arms import ARMS, carried_ranks, count_parameters, plan_by_ranks, RMT
from experiments.study.options import check_positive, check_shares, DatasetName, Options
from experiments.study.outcomes import EARLY_STOPPING, Outcome, PLAIN, summarise, tasks
from experiments.study.recipes import Recipe, train
from experiments.study.runs import accuracies, fitted
from experiments.study.tables import summary_table
from experiments.study.tasks import Images, Task

REFERENCES = (PLAIN, "RMT")
NARROWER = "narrower, equal size"


@dataclass(frozen=True)
class Config(Options):
    """Compares networks of equal stored size, trained on clean labels."""

    datasets: tuple[DatasetName, ...] = ("mnist", "fashion_mnist")
    """Images to classify."""
    images: int = 10_000
    """Training images."""
    validation: int = 1_000
    """Training images held out in all arms, for early stopping."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the images, the weights and the order of the batches."""
    weight_decays: tuple[float, ...] = (0.0, 5e-4)
    """Of all arms: it decides what a cut costs."""
    dropouts: tuple[float, ...] = (0.2, 0.5)
    """An arm each; the narrower network gets the first of them too."""
    widths: tuple[int, ...] = (512, 512)
    """Of the hidden layers."""
    epochs: int = 20
    """Of the first phase, which ends with the cut."""
    fine_tune_epochs: int = 10
    """Of the second phase."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 0.05
    """Of SGD, at the start of each phase; down to 0 by a cosine."""
    momentum: float = 0.9
    """Of SGD; starts anew in each phase."""
    prune_start: int = 5
    """Epoch after which the first pruning comes, then after each of the first phase."""

    def __post_init__(self):
        names = ("images", "widths", "epochs", "fine_tune_epochs", "batch_size", "prune_start")
        check_positive(self, *names, "validation")
        check_shares(self, "dropouts")


@dataclass(frozen=True)
class Run:
    """All arms of a seed: they share the first phase, and the size that RMT finds."""

    arm: str
    seed: int
    task: Task
    module: training.MLP
    recipe: Recipe  # of the first phase
    prune_start: int
    second: Recipe
    dropouts: tuple[float, ...] = ()


def plan_runs(config: Config, find: Callable) -> list[Run]:
    """A run for each data set, weight decay and seed."""
    del find
    recipe = lambda epochs, decay: Recipe(
        epochs,
        config.batch_size,
        config.learning_rate,
        config.momentum,
        "cosine",
        decay,
    )
    return [
        Run(
            "all",
            seed,
            Task(dataset, config.images, config.validation, 0.0),
            training.MLP(config.widths),
            recipe(config.epochs, decay),
            config.prune_start,
            recipe(config.fine_tune_epochs, decay),
            config.dropouts,
        )
        for dataset in config.datasets
        for decay in config.weight_decays
        for seed in config.seeds
    ]


def stored_size(params: Any, plan: rmtjax.Plan, ranks: dict[str, int]) -> int:
    """Stored parameters after factorizing kernels to these ranks, where that is smaller."""
    size = count_parameters(params)
    for path, rank in ranks.items():
        rows, columns = plan[path].shape
        size -= max(0, rows * columns - rank * (rows + columns))
    return size


def ranks_of_size(params: Any, make_rule: Callable, knobs: list, size: int) -> dict[str, int]:
    """The ranks by the largest knob of a rule with which the network is no larger.

    Args:
      params: The dense network.
      make_rule: From a knob to a rule, whose ranks grow with the knob.
      knobs: To choose from, ascending.
      size: Stored parameters that are allowed.
    """
    plan = rmtjax.plan(params, multiple=1)
    spectra = {path: row.spectrum for path, row in plan.items() if row.spectrum is not None}
    ranks = lambda knob: {path: int(make_rule(knob)(s)) for path, s in spectra.items()}
    found = bisect.bisect_right(knobs, size, key=lambda k: stored_size(params, plan, ranks(k)))
    return ranks(knobs[max(found - 1, 0)])


def narrower(module: training.MLP, image: jax.Array, size: int) -> training.MLP:
    """The widest network of equal hidden layers that is no larger."""
    of_width = lambda width: module.clone(widths=(width,) * len(module.widths))

    def parameters(width: int) -> int:
        return count_parameters(jax.eval_shape(of_width(width).init, jax.random.key(0), image))

    widths = range(1, max(module.widths) + 1)
    return of_width(max(bisect.bisect_right(widths, size, key=parameters), 1))


def factorized(params: Any, ranks: dict[str, int]) -> Any:
    """The tree with kernels of these ranks as two factors, where that is smaller."""
    return rmtjax.factorize(params, plan_by_ranks(params, ranks))


def phase(run: Run, module: nn.Module, params: Any, recipe: Recipe, first: int, images: Images):
    """Trains for a phase: parameters, ranks carried by the chain, accuracies by epoch."""
    seen, ranks = [], {}
    for epoch in train(module, params, recipe, images.train, run.seed, first):
        params, ranks = epoch.params, carried_ranks(epoch.opt_state)
        seen.append(accuracies(module, params, images))
    return params, ranks, seen


def with_dropout(run: Run, narrow: training.MLP) -> dict[str, training.MLP]:
    """The networks that are never cut, and get a dropout, by arm."""
    arms = {f"dropout {share:g}": run.module.clone(dropout=share) for share in run.dropouts}
    for share in run.dropouts[:1]:
        arms[f"{NARROWER}, dropout {share:g}"] = narrow.clone(dropout=share)
    return arms


def cut_networks(run: Run, images: Images) -> dict[str, tuple[training.MLP, Any, dict, list]]:
    """Module, parameters, ranks and accuracies of each arm after the first phase."""
    module, recipe = run.module, run.recipe
    start = lambda module: module.init(jax.random.key(run.seed), images.test.images[:1])["params"]
    pruning = replace(recipe, pruning=ARMS["RMT"], start=run.prune_start)
    dense, _, seen = phase(run, module, start(module), recipe, 0, images)
    pruned, ranks, pruned_seen = phase(run, module, start(module), pruning, 0, images)
    thin = factorized(pruned, ranks)
    size = count_parameters(thin)
    narrow = narrower(module, images.test.images[:1], size)
    by_rule = lambda rule: {
        path: row.rank
        for path, row in rmtjax.plan(dense, rule=rule, multiple=1).items()
        if row.rank is not None
    }
    shares = [share / 1000 for share in range(1, 1001)]
    cuts = {
        "RMT, once": by_rule(RMT),
        "Gavish-Donoho, once": by_rule(rmtjax.ranks.gavish_donoho()),
        "energy, equal size": ranks_of_size(dense, rmtjax.ranks.energy, shares, size),
        "fixed rank, equal size": ranks_of_size(
            dense, rmtjax.ranks.fixed, [*range(1, max(run.module.widths) + 1)], size
        ),
    }
    whole = {NARROWER: narrow, **with_dropout(run, narrow)}
    return {
        PLAIN: (module, dense, {}, seen),
        "RMT": (module, thin, ranks, pruned_seen),
        **{
            arm: (own, *phase(run, own, start(own), recipe, 0, images))
            for arm, own in whole.items()
        },
        **{arm: (module, factorized(dense, own), own, seen) for arm, own in cuts.items()},
    }


def perform(run: Run, images: Images) -> dict[str, Any]:
    """The record of a run: each arm before and after the second phase."""
    networks = {}
    for arm, (module, params, ranks, seen) in cut_networks(run, images).items():
        before = accuracies(module, params, images)["test"]
        tuned, _, more = phase(run, module, params, run.second, run.recipe.epochs, images)
        networks[arm] = {
            "before": before,
            **accuracies(module, tuned, images),
            **fitted(module, tuned, images),
            "ranks": ranks,
            "widths": list(module.widths),
            "parameters": count_parameters(tuned),
            "history": [epoch["test"] for epoch in (*seen, *more)],
        }
        if arm == PLAIN:
            stopped = max((*seen, *more), key=lambda epoch: epoch["validation"])
            networks[EARLY_STOPPING] = networks[PLAIN] | {
                "before": None,
                "test": stopped["test"],
                "given": None,
            }
    return {"networks": networks}


def network_outcomes(records: list[dict[str, Any]]) -> list[Outcome]:
    """An outcome for each network; `best` is the accuracy before the second phase."""
    return [
        Outcome(
            Task(**record["settings"]["task"]),
            arm,
            record["settings"]["seed"],
            best=found["before"],
            **{name: found[name] for name in ("test", "wrong", "given", "parameters", "ranks")},
        )
        for record in records
        for arm, found in record["networks"].items()
    ]


def by_decay(records: list[dict[str, Any]]) -> dict[float, list[dict[str, Any]]]:
    """The records by weight decay."""
    found: dict[float, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["settings"]["recipe"]["weight_decay"], []).append(record)
    return found


def tables(records: list[dict[str, Any]]) -> list[Table]:
    """A table for each data set and weight decay."""
    shown = []
    for decay, own in by_decay(records).items():
        found = network_outcomes(own)
        for task in tasks(found):
            title = f"{task.title()}, weight decay {decay:g}"
            summaries = summarise(found, task, REFERENCES)
            shown.append(summary_table(title, summaries, REFERENCES, best="before %"))
    return shown
