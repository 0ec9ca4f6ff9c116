"""Trains a run: one compiled program an epoch, for one network or for replicas."""

from collections.abc import Callable, Iterator
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


def _loss(network: Network, squares: bool, params: Any, x, y) -> jax.Array:
    """The cross-entropy of labels, or of probabilities of classes; or the mean square."""
    logits, _ = network.apply((params, {}), x, True, KEY)
    if squares:
        return jnp.square(logits - y).mean()
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


def make_train(network: Network, optimizer, arm: Arm, scan: bool, squares: bool) -> Callable:
    """Returns `train(params, opt_state, split, order)`, which makes the steps of an order."""
    gradient = RULES[arm.rule].make(arm.value)

    def step(carry, index, split):
        params, opt_state = carry
        batch = split.images[index], split.labels[index]
        slope = gradient(partial(_loss, network, squares), params, *batch)
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


def make_epoch(
    network: Network, optimizer, arm: Arm, scan: bool = True, squares: bool = False
) -> Callable:
    """Returns `epoch(params, opt_states, split, order, rest)`: the network and states after it.

    States have a leading axis: each replica keeps its own. The order is (replicas, steps, batch).
    Without `scan` steps are compiled one by one: XLA's convolutions are slow in a loop. The loss
    may be the mean square in place of the cross-entropy.
    """
    train = make_train(network, optimizer, arm, scan, squares)
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
    squares = cell.target_noise > 0
    return optimizer, make_epoch(network, optimizer, arm, cell.network != "CNN", squares)


@partial(jax.jit, static_argnums=0)
def _call(apply: Callable, params: Any, images: jax.Array) -> jax.Array:
    return apply((params, {}), images, False, KEY)[0]


def outputs(network: Network, params: Any, images: jax.Array) -> np.ndarray:
    """Returns the outputs of a network for each image."""
    chunks = (images[first : first + CHUNK] for first in range(0, len(images), CHUNK))
    return np.concatenate([_call(network.apply, params, chunk) for chunk in chunks])


def explained(found: np.ndarray, labels: Any) -> float:
    """Returns the share in % of the variance of right targets that outputs explain."""
    targets = np.eye(10)[np.asarray(labels)]
    rest = np.square(targets - found).sum() / np.square(targets - targets.mean(0)).sum()
    return round(100 * float(1 - rest), 2)


def look(network: Network, params: Any, images: Images, train: bool) -> dict[str, Any]:
    """Returns accuracies in %, and the share of the wrong labels that were learnt.

    Of a regression it is the share of the variance that is explained, and of the noise.
    """
    find = partial(outputs, network, params)
    squares = images.train.labels.ndim == 2
    right = lambda split: find(split.images).argmax(-1) == np.asarray(split.labels)
    score = lambda split: (
        explained(find(split.images), split.labels) if squares else percent(right(split))
    )
    seen = {"test": score(images.test), "validation": score(images.validation)}
    if train and squares:
        targets = np.eye(10)[images.true_labels]
        noise = np.asarray(images.train.labels) - targets
        learnt = np.vdot(find(images.train.images) - targets, noise) / np.vdot(noise, noise)
        seen |= {"given": None, "wrong": round(100 * float(learnt), 2)}
    elif train:
        given = right(images.train)
        false = np.asarray(images.train.labels) != images.true_labels
        seen |= {"given": percent(given), "wrong": percent(given[false])}
    return seen


def deal(rng: np.random.Generator, arm: Arm, size: int, steps: int, batch: int) -> Iterator:
    """Yields the images of each period, (replicas, steps, batch).

    A period has whole epochs, each of them in an order of its own, or half an epoch.
    """
    turns, each = max(1, round(arm.period)), steps * batch
    divide = lambda: rng.permutation(size)[: arm.replicas * each].reshape(arm.replicas, each)
    parts = divide()
    while True:
        orders = [parts, *(rng.permuted(parts, axis=1) for _ in range(turns - 1))]
        order = np.concatenate(orders, axis=1).reshape(arm.replicas, turns * steps, batch)
        pieces = 2 if arm.period < 1 else 1
        yield from np.split(order[:, : order.shape[1] // pieces * pieces], pieces, axis=1)
        parts = rng.permuted(parts, axis=1) if arm.fixed else divide()


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
    dealt = deal(np.random.default_rng([run.seed, 3]), arm, size, steps, batch)
    for period in range(1, round(cell.epochs / arm.period) + 1):
        number = period * arm.period
        # In the first period replicas differ because training moves, not because of noise.
        rest = 1.0 if period == 1 else arm.rest * (1 - number / cell.epochs)
        params, states = epoch(params, states, images.train, next(dealt), rest)
        last = number == cell.epochs
        if last or not (run.tuning or number % max(every, arm.period)):
            train = last or number % (5 * every) == 0
            history.append({"epoch": number, **look(network, params, images, train)})
    pick = lambda name: max(history, key=lambda seen: seen[name] or 0)
    return {
        "final": history[-1],
        "best": pick("test"),
        "stopped": pick("validation"),
        "history": {name: [s.get(name) for s in history] for name in ("epoch", "test", "wrong")},
    }
