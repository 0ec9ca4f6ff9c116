"""LocalDrop with keep rates that are learnt (2103.00719), in turns with the weights.

Each unit has a keep rate, theta. A network is trained by two stages in alternation:

- weights: gradient steps with masks that keep a unit with its rate, and at some steps the proximal
  step of the tail sums, whose strength is multiplied by what the rates contribute to Reg;
- rates: with the weights fixed, a step of the loss plus lambda Reg, clipped to a range. The loss is
  that of the expected masks, where each unit is multiplied by its rate.

Reg is a product of norms of the rates and of tail sums of singular values, `regularizer`. The norms
of weights in the paper's bound are left to weight decay, which every arm has. A convolution drops
blocks of positions, with a rate for each channel, as in DropBlock.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import rmtjax
from experiments.neighbours import allocation, sizes, trainer
from experiments.neighbours.allocation import FIRST, REST
from experiments.neighbours.low_rank import period
from experiments.neighbours.sizes import Thin
from experiments.neighbours.tensors import replaced
from experiments.neighbours.trainer import Program, Setting, start, Training
from rmtjax import lowrank

Rates = dict[str, jax.Array]
# What drops units, and the kernel that they feed, by track.
PLACES = {
    "a": {f"Dropout_{i}": f"Dense_{i + 1}/kernel" for i in range(3)},
    "b": {"Dropout_0": "Dense_0/kernel"},
    "c": {"Conv_0": "Conv_1/kernel", "Conv_1": "Dense_0/kernel", "Dropout_0": "Dense_1/kernel"},
}
BLOCK = 3  # positions on a side
TURNS = 40  # steps of the rates in a phase
LEAST = 0.1  # of a rate
RATES = "keep_rates"  # their place in a tree of parameters
OF_RATES = optax.adam(0.05)


class Held(NamedTuple):
    """The network that is trained, and the keep rates of its units by what drops them."""

    params: Any
    rates: Rates


def rates_norm(rates: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the product over layers of |theta| / sqrt(n), which is 1 if all rates are 1."""
    roots = [jnp.sqrt(jnp.mean(jnp.square(one))) for one in rates.values()]
    return jnp.prod(jnp.stack(roots))


def regularizer(rates: Mapping[str, jax.Array], kernels, cuts) -> jax.Array:
    """Returns Reg: `rates_norm` times the sum over kernels of T_h(W) / min(m, n).

    Args:
      rates: Of each layer.
      kernels: By path, seen as (all other axes, last axis).
      cuts: h by path.
    """
    flat = {path: kernel.reshape(-1, kernel.shape[-1]) for path, kernel in kernels.items()}
    tails = [lowrank.tail_sum(k, cuts[p]) / min(k.shape) for p, k in flat.items()]
    return rates_norm(rates) * sum(tails)


def mask(key: jax.Array, rate: jax.Array, shape: tuple[int, ...], blocks: bool) -> jax.Array:
    """Returns 1 with the probability of a unit's rate, else 0.

    With blocks, the shape is (batch, height, width, channels). A position away from the borders is
    then out if one of the nine seeds around it is, so that each of them is rarer.
    """
    rate = jnp.broadcast_to(rate, shape)
    if not blocks:
        return jax.random.bernoulli(key, rate).astype(jnp.float32)
    seeds = jax.random.bernoulli(key, 1 - rate ** (1 / BLOCK**2)).astype(jnp.float32)
    return 1 - nn.max_pool(seeds, (BLOCK, BLOCK), padding="SAME")


def _changed(rates: Rates, change):
    """Returns an interceptor: `change(output, rate, number, blocks)` where units are dropped."""
    numbers = {name: i for i, name in enumerate(sorted(rates))}

    def intercept(next_fun, args, kwargs, context):
        output, name = next_fun(*args, **kwargs), "/".join(context.module.path)
        if context.method_name != "__call__" or name not in rates:
            return output
        blocks = isinstance(context.module, nn.Conv)
        rate = rates[name].reshape((1,) * (output.ndim - 1) + (-1,))
        return change(output, rate, numbers[name], blocks)

    return intercept


def _masked(key, output, rate, number, blocks):
    return output * mask(jax.random.fold_in(key, number), rate, output.shape, blocks)


def _masked_and_scaled(key, output, rate, number, blocks):
    return _masked(key, output, rate, number, blocks) / rate


def expected(output, rate, number, blocks):
    """Returns units times their rates."""
    del number, blocks
    return output * rate


def loss(module: nn.Module, held: Held, x, y, change) -> jax.Array:
    """Returns the mean loss of a batch, with units changed by `change` where they are dropped."""
    with nn.intercept_methods(_changed(held.rates, change)):
        logits = rmtjax.linen.apply(module, {"params": held.params}, x, False)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def step_of_rates(module, held: Held, state, batch, cuts, price) -> tuple[Rates, Any]:
    """Returns the rates after a step with fixed weights, clipped, and the state of their Adam."""
    leaves = sizes.leaves_by_path(held.params)
    kernels, (x, y) = {path: leaves[path] for path in cuts}, batch

    def objective(rates):
        rest = price * regularizer(rates, kernels, cuts)
        return loss(module, held._replace(rates=rates), x, y, expected) + rest

    updates, state = OF_RATES.update(jax.grad(objective)(held.rates), state)
    moved = optax.apply_updates(held.rates, updates)
    return jax.tree.map(lambda rate: jnp.clip(rate, LEAST, 1), moved), state


@lru_cache(maxsize=64)
def _alternating(module: nn.Module, kernels: tuple[str, ...], steps: int) -> Program:
    every = max(1, steps // TURNS)

    def chain(hyper, strength):
        shrink = lowrank.shrink_tail(
            **period(steps), strength=lambda _: strength, where=lambda path, leaf: path in kernels
        )
        return optax.chain(trainer.adam(hyper, steps), shrink)

    def begin(held, hyper, extra):
        del extra
        optimizer = chain(hyper, hyper["strength"])
        return optimizer.init(held.params), OF_RATES.init(held.rates), jnp.zeros((), jnp.int32)

    def advance(carry, inputs, data, hyper, extra):
        del extra
        (held, (state, of_rates, count)), (index, key) = carry, inputs
        batch = data[0][index], data[1][index]
        of_weights = lambda p: loss(module, held._replace(params=p), *batch, partial(_masked, key))
        optimizer = chain(hyper, hyper["strength"] * rates_norm(held.rates))
        updates, state = optimizer.update(jax.grad(of_weights)(held.params), state, held.params)
        held = held._replace(params=optax.apply_updates(held.params, updates))
        cuts = optax.tree.get(state, "ranks")
        turn = lambda: step_of_rates(module, held, of_rates, batch, cuts, hyper["price"])
        stay = lambda: (held.rates, of_rates)
        rates, of_rates = jax.lax.cond(count % every == every - 1, turn, stay)
        return held._replace(rates=rates), (state, of_rates, count + 1)

    return Program(begin, advance)


@lru_cache(maxsize=64)
def _with_fixed_rates(module: nn.Module, steps: int) -> Program:
    def begin(params, hyper, extra):
        del extra
        return trainer.adam(hyper, steps).init(params)

    def advance(carry, inputs, data, hyper, extra):
        (params, state), (index, key) = carry, inputs
        change = partial(_masked_and_scaled, key)
        of_weights = lambda p: loss(module, Held(p, extra), data[0][index], data[1][index], change)
        gradient = jax.grad(of_weights)(params)
        updates, state = trainer.adam(hyper, steps).update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return Program(begin, advance)


def fold(held: Held, places: Mapping[str, str]) -> Any:
    """Returns parameters that need no rates: each is in the kernel that its unit feeds."""
    leaves, found = sizes.leaves_by_path(held.params), {}
    for name, path in places.items():
        kernel, rate = leaves[path], held.rates[name]
        # Inputs are the second to last axis; those of several positions follow one another.
        parts = kernel.reshape(-1, rate.size, kernel.shape[-1]) * rate[None, :, None]
        found[path] = parts.reshape(kernel.shape)
    return replaced(held.params, found)


def initial_rates(setting: Setting, params) -> Rates:
    """Returns the rates before training: those of the dropout that all arms have."""
    leaves, places = sizes.leaves_by_path(params), PLACES[setting.track.name]
    bias = lambda name: leaves[f"{name}/bias"].size
    inputs = lambda name: leaves[places[name]].shape[-2]
    count = lambda name: bias(name) if name.startswith("Conv") else inputs(name)
    return {name: jnp.full(count(name), 1 - setting.hyper["dropout"]) for name in places}


def learnt(setting: Setting) -> Training:
    """Returns the network after the first phase with rates folded in; they are in its tree too."""
    before, track = start(setting), setting.track
    steps = trainer.steps_of(track, FIRST)
    held = before._replace(params=Held(before.params, initial_rates(setting, before.params)))
    program = _alternating(track.module.clone(dropout=0.0), track.kernels, steps)
    after = trainer.loop(setting, held, program, steps)
    folded = fold(after.params, PLACES[track.name])
    return after._replace(params={**folded, RATES: after.params.rates})


def local_drop_rates(setting: Setting) -> Thin:
    """Learns keep rates while values under the edge shrink; then a budget, with these rates."""
    training = allocation.first(setting, learnt)
    rates = training.params[RATES]
    only = {name: part for name, part in training.params.items() if name != RATES}
    ranked = allocation.kept(setting, learnt, allocation.by_budget)
    cut = allocation.factorize(setting, training._replace(params=only), ranked)
    steps = trainer.steps_of(setting.track, REST)
    program = _with_fixed_rates(setting.track.module.clone(dropout=0.0), steps)
    return Thin(trainer.loop(setting, cut, program, steps, rates))
