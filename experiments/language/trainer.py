"""Trains the model, dense or thin, and measures its perplexity."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

import rmtjax
from experiments.language import text
from experiments.language.model import loss, Model, Sizes

BATCH = 16
PEAK, AGAIN = 3e-3, 1e-3  # learning rates: of the training, and of a fine-tuning


def loss_of(module: Model, params: Any, windows: Any) -> Any:
    """The mean surprise of a model on windows."""
    logits = rmtjax.linen.apply(module, {"params": params}, windows[:, :-1])
    return loss(logits, windows[:, 1:])


def train(
    sizes: Sizes,
    params: Any,
    source: Any,
    steps: int,
    seed: int,
    *,
    peak: float,
    tell: Callable[[str], None] = lambda words: None,
) -> Any:
    """The parameters after some steps of AdamW on random windows, with a cosine schedule."""
    module = Model(sizes)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05)
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, windows):
        value, gradient = jax.value_and_grad(partial(loss_of, module))(params, windows)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.tree.map(jax.numpy.array, params)  # the first ones are not given away
    state = optimizer.init(params)
    batches = text.draw(source, steps * BATCH, sizes.length, seed)
    for place, windows in enumerate(batches.reshape(steps, BATCH, -1)):
        params, state, value = step(params, state, windows)
        if place % 20 == 0:
            tell(f"step {place} of {steps}, loss {float(value):.3f}")
    return params


def start(sizes: Sizes, seed: int) -> Any:
    """Random parameters."""
    tokens = np.zeros((1, sizes.length), np.int32)
    return Model(sizes).init(jax.random.key(seed), tokens)["params"]


def perplexity_on(sizes: Sizes, windows: np.ndarray) -> Callable[[Any], float]:
    """A function that measures parameters, thin ones multiplied out: one program for all."""
    run = jax.jit(partial(loss_of, Model(sizes)))
    parts = np.split(windows, range(BATCH, len(windows), BATCH))

    def measure(params: Any) -> float:
        dense = rmtjax.merge(params)
        sums = sum(len(part) * float(run(dense, part)) for part in parts)
        return float(np.exp(sums / len(windows)))

    return measure
