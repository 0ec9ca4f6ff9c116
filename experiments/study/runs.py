"""A run: one network trained on one task, and looked at after each epoch."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import rmtjax
from experiments.study.arms import carried_ranks, count_parameters, plan_by_ranks, RMT
from experiments.study.recipes import Recipe, train
from experiments.study.tasks import Images, Task

LOOK_EVERY = 5  # epochs between two looks at the training images
CHUNK = 2_000  # images classified at once


@dataclass(frozen=True)
class Run:
    """All settings of a run; equal ones give equal records."""

    arm: str
    seed: int
    task: Task
    module: nn.Module
    recipe: Recipe
    cuts: tuple[int, ...] = ()  # epochs after which a copy is cut to its spikes, once


@partial(jax.jit, static_argnums=0)
def _predict(module: nn.Module, params: Any, images: jax.Array) -> jax.Array:
    return jnp.argmax(rmtjax.linen.apply(module, {"params": params}, images), axis=-1)


def predict(module: nn.Module, params: Any, images: jax.Array) -> np.ndarray:
    """The class that a network gives each image."""
    chunks = (images[first : first + CHUNK] for first in range(0, len(images), CHUNK))
    return np.concatenate([_predict(module, params, chunk) for chunk in chunks])


def percent(hits: np.ndarray) -> float | None:
    """Share of True in %; None of nothing."""
    return round(100 * float(np.mean(hits)), 2) if hits.size else None


def accuracies(module: nn.Module, params: Any, images: Images) -> dict[str, Any]:
    """Accuracy in % on test and validation images, and the number of classes never predicted."""
    predicted = predict(module, params, images.test.images)
    found = {
        "test": percent(predicted == np.asarray(images.test.labels)),
        "never": int(np.setdiff1d(images.test.labels, predicted).size),
    }
    if images.validation.labels.size:
        held_out = predict(module, params, images.validation.images)
        found["validation"] = percent(held_out == np.asarray(images.validation.labels))
    return found


def fitted(module: nn.Module, params: Any, images: Images) -> dict[str, Any]:
    """Returns the shares of training images that are classified right, by kind, in %.

    `given`: as their label says, right or wrong; `true`: rightly; `wrong`: as their label
    says, of those whose label is wrong. The last is what has been learnt by heart.
    """
    predicted = predict(module, params, images.train.images)
    given, true = np.asarray(images.train.labels), images.true_labels
    return {
        "given": percent(predicted == given),
        "true": percent(predicted == true),
        "wrong": percent((predicted == given)[given != true]),
    }


def cut(module: nn.Module, params: Any, images: Images, epoch: int) -> dict[str, Any]:
    """Returns the network that a cut to its spikes would leave now."""
    plan = rmtjax.plan(params, rule=RMT, multiple=1)
    lower = rmtjax.truncate(params, plan)
    measured = {path: row for path, row in plan.items() if row.rank is not None}
    return {
        "epoch": epoch,
        **accuracies(module, lower, images),
        **fitted(module, lower, images),
        "ranks": {path: row.rank for path, row in measured.items()},
        "refused": {p: row.reason for p, row in measured.items() if row.action == "keep"},
        "parameters": count_parameters(rmtjax.factorize(params, plan)),
    }


def columns(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The history in few characters: a list for each quantity."""
    looks = [seen for seen in history if "given" in seen]
    # Classes are seldom missed: then there is nothing to tell.
    told = [
        key for key in ("test", "validation", "never") if any(seen.get(key) for seen in history)
    ]
    return {
        **{key: [seen[key] for seen in history] for key in told},
        "looks": {key: [seen[key] for seen in looks] for key in ("epoch", "given", "wrong")},
        "ranks": {path: [seen["ranks"][path] for seen in history] for path in history[0]["ranks"]},
    }


def watch(run: Run, images: Images) -> tuple[dict[str, Any], Any]:
    """Trains a network and looks at it after each epoch, right after a pruning.

    Returns:
      A record as plain data, and the parameters at the end. In the record `final` is the
      last epoch, `best` the one that the test set would choose, `stopped` the one that the
      clean validation images choose: that of early stopping, at no cost of its own.
    """
    module, recipe = run.module, run.recipe
    params = module.init(jax.random.key(run.seed), images.test.images[:1])["params"]
    history, once, ranks = [], [], {}
    for epoch in train(module, params, recipe, images.train, run.seed):
        number, params, ranks = epoch.number, epoch.params, carried_ranks(epoch.opt_state)
        seen = {"epoch": number, "loss": round(epoch.loss, 3), "ranks": ranks}
        seen |= accuracies(module, params, images)
        better = all(seen.get("validation", 0) > past.get("validation", 0) for past in history)
        if better or number % LOOK_EVERY == 0 or number == recipe.epochs:
            seen |= fitted(module, params, images)
        if number in run.cuts:
            once.append(cut(module, params, images, number))
        history.append(seen)
    stopped = max(history, key=lambda seen: seen.get("validation", 0))
    best = max(history, key=lambda seen: seen["test"])
    record = {
        "final": history[-1],
        "best": {key: best[key] for key in ("epoch", "test")},
        "stopped": stopped if images.validation.labels.size else None,
        "once": once,
        "parameters": count_parameters(rmtjax.factorize(params, plan_by_ranks(params, ranks))),
        "history": columns(history),
    }
    return record, params
