"""Trains a task with and without pruning, and measures what is left after it."""

from typing import NamedTuple

import jax
import numpy as np
import optax

import rmtjax
from experiments.tasks.problems import Arrays, Data, Network, Task

# What `size` asks for: 45 % of the numbers of each kernel.
RULE = rmtjax.ranks.size(0.45, multiple=4)
JUDGES = 512  # training samples whose loss judges what `size` cuts; of a batch it says too little
ARMS = "never cut", "value_fn", "max_removed", "size"
OPTIMIZERS = ("SGD", "AdamW")


class Outcome(NamedTuple):
    """The outcome of one run.

    Attributes:
      test: Accuracy in points, or the loss, of the network that training has made.
      thin: The same of its factorized kernels.
      stored: Parameters of the factorized network over those of the dense one.
      worst: The worst test value of the last quarter of the epochs.
      ranks: Path to the rank of each kernel that was cut.
    """

    test: float
    thin: float
    stored: float
    worst: float
    ranks: dict[str, int]


def _chain(task: Task, network: Network, optimizer: str, arm: str, every: int):
    """Returns the optimizer: the recipe has one look an epoch, and nothing is tuned."""
    rate = lambda peak: optax.cosine_decay_schedule(peak, task.epochs * every)
    base = (
        optax.sgd(rate(task.sgd), momentum=0.9)
        if optimizer == "SGD"
        else optax.adamw(rate(1e-3), weight_decay=1e-2)
    )
    # Half an epoch follows the last look, in which training and BatchNorm adapt to the cut.
    if arm == "never cut":
        return base
    if arm == "size":
        start = task.epochs * 2 // 5 * every + every // 2  # what a cut costs can heal until the end
        options = {"start": start, "rule": RULE, "fade": 0.6}
    else:
        options = {"start": every // 2, "settled": 0.2}
    return optax.chain(base, rmtjax.prune_spectrum(every, axes=network.axes, **options))


def _make_step(task: Task, network: Network, chain, arm: str, samples: Arrays):
    """Returns a compiled step: `step(carry, x, y, key)` returns the carry after it."""
    guarded, fixed = arm in ("value_fn", "size"), arm == "size"

    @jax.jit
    def step(carry, x, y, key):
        params, rest, opt_state = carry

        def loss(params, x=x, y=y):
            outputs, changed = network.apply((params, rest), x, True, key)
            return task.loss(outputs, y), changed

        gradient, changed = jax.grad(loss, has_aux=True)(params)
        judges = samples if fixed else (x, y)
        extra = {"value_fn": lambda params: loss(params, *judges)[0]} if guarded else {}
        updates, opt_state = chain.update(gradient, opt_state, params, **extra)
        return optax.apply_updates(params, updates), changed, opt_state

    return step


def _make_score(task: Task, network: Network):
    """Returns what measures a network on the test set."""

    @jax.jit
    def score(params, rest, x, y):
        outputs, _ = network.apply((params, rest), x, False, jax.random.key(0))
        hits = 100 * (outputs.argmax(-1) == y).mean() if task.in_points else task.loss(outputs, y)
        return hits

    return lambda params, rest, data: float(np.mean([
        score(params, rest, *part)
        for part in zip(*(np.array_split(array, 4) for array in data.test), strict=True)
    ]))  # fmt: skip


def run(task: Task, data: Data, network: Network, optimizer: str, arm: str, seeds) -> list[Outcome]:
    """Trains once for each seed."""
    every = len(data.train[0]) // task.batch
    chain = _chain(task, network, optimizer, arm, every)
    samples = data.train[0][:JUDGES], data.train[1][:JUDGES]
    step = _make_step(task, network, chain, arm, samples)
    score = _make_score(task, network)
    return [_train(task, data, network, chain, step, score, arm, seed) for seed in seeds]


def _train(task: Task, data: Data, network: Network, chain, step, score, arm, seed) -> Outcome:
    """Trains one network. Steps are called one by one: in a loop XLA's convolutions are slow."""
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    params, rest = network.init(key)
    carry, tests, (x, y) = (params, rest, chain.init(params)), [], data.train
    for epoch in range(task.epochs):
        order = rng.permutation(len(x))
        for batch in order[: len(x) // task.batch * task.batch].reshape(-1, task.batch):
            key, of_step = jax.random.split(key)
            carry = step(carry, x[batch], y[batch], of_step)
        if epoch >= task.epochs * 3 // 4:
            tests.append(score(*carry[:2], data))
    params, rest, opt_state = carry
    # As a user would: all kernels, by the noise levels that training has carried.
    fits = None if arm == "never cut" else rmtjax.noise_levels(opt_state)
    options = {"rule": RULE, "multiple": RULE.multiple} if arm == "size" else {}
    plan = rmtjax.plan(params, fits=fits, axes=network.axes, **options)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    stored = size(rmtjax.factorize(params, plan)) / size(params)
    thin = score(rmtjax.truncate(params, plan), rest, data)
    worst = (min if task.in_points else max)(tests)
    ranks = {path: int(row.rank or 0) for path, row in plan.items() if row.action != "keep"}
    return Outcome(tests[-1], thin, stored, worst, ranks)
