"""Trains a run: one compiled program an epoch, for one network or for replicas."""

from collections.abc import Callable
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmtjax
from experiments.agreement import cells
from experiments.agreement.arms import Arm, RULES
from experiments.agreement.cells import Cell, Run
from experiments.study.runs import percent
from experiments.study.tasks import Images
from experiments.tasks.problems import Network

CHUNK = 2_500  # images classified at once
KEY = jax.random.key(0)  # networks take one and use none


def _loss(network: Network, params: Any, x, y) -> jax.Array:
    """The cross-entropy of labels, or of probabilities of classes."""
    logits, _ = network.apply((params, {}), x, True, KEY)
    if y.ndim == 2:
        return optax.softmax_cross_entropy(logits, y).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def join(start: Any, replicas: Any, rest: Any, arm: Arm, axes: Any) -> Any:
    """Returns one network of replicas: of their changes the agreed part, and some of the rest.

    Args:
      start: What all of them started from.
      replicas: A tree with a leading axis.
      rest: Share that is kept of what is not agreed on; 1 gives the mean.
      arm: In a chain the changes add up; of replicas their mean is taken.
      axes: What makes the kernels matrices.
    """
    mean = jax.tree.map(lambda leaf: leaf.mean(0), replicas)
    if arm.merge == "agreement":
        agreed = rmtjax.merge_replicas(start, replicas, axes=axes).params
        mean = jax.tree.map(lambda one, other: one + rest * (other - one), agreed, mean)
    factor = 2 if arm.chain else 1
    return jax.tree.map(lambda old, new: old + factor * (new - old), start, mean)


def make_train(network: Network, optimizer, arm: Arm, scan: bool) -> Callable:
    """Returns `train(params, opt_state, split, order)`, which makes the steps of an order."""
    gradient = RULES[arm.rule].make(arm.value)

    def step(carry, index, split):
        params, opt_state = carry
        batch = split.images[index], split.labels[index]
        slope = gradient(partial(_loss, network), params, *batch)
        updates, opt_state = optimizer.update(slope, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    single = jax.jit(step)

    def train(params, opt_state, split, order):
        carry = params, opt_state
        if scan:
            return jax.lax.scan(lambda c, i: (step(c, i, split), None), carry, order)[0]
        for index in order:
            carry = single(carry, index, split)
        return carry

    return train


def _in_turn(train: Callable) -> Callable:
    """Returns what trains replicas one after the other, where a `vmap` would be slow."""

    def trained(params, opt_states, split, order):
        pick = lambda i: jax.tree.map(itemgetter(i), opt_states)
        found = [train(params, pick(i), split, order[i]) for i in range(len(order))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    return trained


def make_epoch(network: Network, optimizer, arm: Arm, scan: bool = True) -> Callable:
    """Returns `epoch(params, opt_states, split, order, rest)`: the network and states after it.

    States have a leading axis: each replica keeps its own. The order is (replicas, steps, batch).
    Without `scan` steps are compiled one by one: XLA's convolutions are slow in a loop.
    """
    train = make_train(network, optimizer, arm, scan)
    merge = partial(join, arm=arm, axes=network.axes)
    merge = merge if scan else jax.jit(merge)
    together = jax.vmap(train, (None, 0, None, 0)) if scan else _in_turn(train)

    def epoch(params, opt_states, split, order, rest):
        if arm.replicas > 1:
            replicas, opt_states = together(params, opt_states, split, order)
            return merge(params, replicas, rest), opt_states
        state, order = jax.tree.map(itemgetter(0), opt_states), order[0]
        if arm.chain:
            half = len(order) // 2
            middle, state = train(params, state, split, order[:half])
            end, state = train(middle, state, split, order[half:])
            second = jax.tree.map(lambda old, mid, new: old + new - mid, params, middle, end)
            halves = jax.tree.map(lambda *leaves: jnp.stack(leaves), middle, second)
            params = merge(params, halves, rest)
        else:
            params, state = train(params, state, split, order)
        return params, jax.tree.map(lambda leaf: leaf[None], state)

    return jax.jit(epoch) if scan else epoch


def num_steps(cell: Cell, arm: Arm, images: int) -> tuple[int, int]:
    """Returns the steps of a replica in an epoch, and the images in a step."""
    parts = RULES[arm.rule].parts
    batch = -(-cell.batch // parts) * parts
    steps = images // (arm.replicas * batch)
    return steps - steps % 2 if arm.chain else steps, batch


@lru_cache(maxsize=8)
def _compiled(cell: Cell, arm: Arm, images: int):
    """Returns an optimizer and its epoch, compiled once for all seeds."""
    steps, _ = num_steps(cell, arm, images)
    optimizer = optax.chain(
        RULES[arm.rule].before(), cells.OPTIMIZERS[cell.optimizer](cell.epochs * steps)
    )
    network = cells.network(cell.network)
    return optimizer, make_epoch(network, optimizer, arm, cell.network != "CNN")


@partial(jax.jit, static_argnums=0)
def _predict(apply: Callable, params: Any, images: jax.Array) -> jax.Array:
    return jnp.argmax(apply((params, {}), images, False, KEY)[0], axis=-1)


def predict(network: Network, params: Any, images: jax.Array) -> np.ndarray:
    """Returns the class that a network gives each image."""
    chunks = (images[first : first + CHUNK] for first in range(0, len(images), CHUNK))
    return np.concatenate([_predict(network.apply, params, chunk) for chunk in chunks])


def look(network: Network, params: Any, images: Images, train: bool) -> dict[str, Any]:
    """Returns accuracies in %, and the share of the wrong labels that were learnt."""
    right = lambda split: predict(network, params, split.images) == np.asarray(split.labels)
    seen = {"test": percent(right(images.test)), "validation": percent(right(images.validation))}
    if train:
        given = right(images.train)
        false = np.asarray(images.train.labels) != images.true_labels
        seen |= {"given": percent(given), "wrong": percent(given[false])}
    return seen


def perform(run: Run, images: Images, every: int = 2) -> dict[str, Any]:
    """Returns the record of a run, which is looked at every few epochs and at the end.

    `best` is the look that the test images would choose, `stopped` the one that the clean
    validation images choose.
    """
    cell, arm = run.cell, run.arm
    network, size = cells.network(cell.network), images.train.labels.size
    (steps, batch), history = num_steps(cell, arm, size), []
    optimizer, epoch = _compiled(cell, arm, size)
    params, _ = network.init(jax.random.key(run.seed))
    # Not `rmtjax.replicate`: a single network has a leading axis of one.
    states = jax.tree.map(lambda leaf: jnp.stack([leaf] * arm.replicas), optimizer.init(params))
    rng = np.random.default_rng([run.seed, 3])
    for number in range(1, cell.epochs + 1):
        order = rng.permutation(size)[: arm.replicas * steps * batch]
        order = order.reshape(arm.replicas, steps, batch)
        # In the first epoch replicas differ because training moves, not because of noise.
        rest = 1.0 if number == 1 else arm.rest * (1 - number / cell.epochs)
        params, states = epoch(params, states, images.train, order, rest)
        last = number == cell.epochs
        if last or not (run.tuning or number % every):
            train = last or number % (5 * every) == 0
            history.append({"epoch": number, **look(network, params, images, train)})
    pick = lambda name: max(history, key=lambda seen: seen[name] or 0)
    return {
        "final": history[-1],
        "best": pick("test"),
        "stopped": pick("validation"),
        "history": {name: [s.get(name) for s in history] for name in ("epoch", "test", "wrong")},
    }
