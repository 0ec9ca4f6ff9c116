"""Trains one phase of a run: one compiled program for all seeds and all tuned numbers."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmtjax
from experiments.neighbours import tracks
from experiments.neighbours.tracks import Track

CHUNK = 1000  # samples that are judged at once
Hyper = Mapping[str, float]


class Setting(NamedTuple):
    """One run of an arm.

    Attributes:
      track: The task.
      level: Stored parameters that are allowed, over those of the dense network.
      seed: Of weights and batches.
      hyper: Tuned numbers by name: `rate`, `decay`, `dropout`, and those of the arm.
    """

    track: Track
    level: float
    seed: int
    hyper: Hyper

    @property
    def module(self) -> nn.Module:
        """The dense network, with the dropout of the run."""
        return self.track.module.clone(dropout=self.hyper["dropout"])


class Training(NamedTuple):
    """Where a run stands.

    Attributes:
      params: The network.
      state: Of the last phase's optimizer.
      seconds: Of training so far, without compiling.
      phases: Number of phases so far; each has its own order of the samples.
    """

    params: Any
    state: Any = None
    seconds: float = 0.0
    phases: int = 0


def adam(hyper: Hyper, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of every phase: Adam with a cosine over the phase, and decay."""
    rate = optax.cosine_decay_schedule(hyper["rate"], steps)
    return optax.chain(optax.scale_by_adam(), _decayed(hyper), optax.scale_by_learning_rate(rate))


def _decayed(hyper: Hyper) -> optax.GradientTransformation:
    """Returns decoupled weight decay; unlike optax's it may be traced. Only kernels decay."""

    def update(updates, state, params=None):
        assert params is not None  # `fit` gives them
        decay = lambda u, p: u + hyper["decay"] * p if p.ndim > 1 else u
        return jax.tree.map(decay, updates, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


@dataclass(frozen=True)
class Phase:
    """A phase of training.

    Attributes:
      share: Of the steps of a run.
      chain: `chain(hyper, steps, extra)` returns the optimizer; by default Adam alone.
      penalty: `penalty(params, hyper)` is added to the loss.
      guarded: Whether the optimizer asks for the loss of the batch.
    """

    share: float
    chain: Callable[..., Any] = lambda hyper, steps, extra: adam(hyper, steps)
    penalty: Callable[..., Any] | None = None
    guarded: bool = False


def cross_entropy(module: nn.Module, params, x, y, key) -> jax.Array:
    """Returns the mean loss of a batch, with the dropout that a key draws."""
    logits = rmtjax.linen.apply(module, {"params": params}, x, True, rngs={"dropout": key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


class Program(NamedTuple):
    """The functions of a phase: `init(params, hyper, extra)`, and `step` of a carry."""

    init: Callable
    step: Callable


@lru_cache(maxsize=256)
def _program(module: nn.Module, phase: Phase, steps: int) -> Program:
    make = partial(phase.chain, steps=steps)

    def init(params, hyper, extra):
        return make(hyper, extra=extra).init(params)

    def step(carry, inputs, data, hyper, extra):
        params, state = carry
        index, key = inputs
        loss = partial(cross_entropy, module, x=data[0][index], y=data[1][index], key=key)
        total = lambda p: loss(p) + (phase.penalty(p, hyper) if phase.penalty else 0)
        gradient = jax.grad(total)(params)
        more = {"value_fn": loss} if phase.guarded else {}
        updates, state = make(hyper, extra=extra).update(gradient, state, params, **more)
        return optax.apply_updates(params, updates), state

    return Program(init, step)


@lru_cache(maxsize=256)
def _looped(program: Program):
    """Returns all steps of a phase as one program."""

    def run(params, order, keys, data, hyper, extra):
        step = lambda carry, inputs: (program.step(carry, inputs, data, hyper, extra), None)
        carry = params, program.init(params, hyper, extra)
        return jax.lax.scan(step, carry, (order, keys))[0]

    return jax.jit(run)


@lru_cache(maxsize=256)
def _single(program: Program):
    return jax.jit(program.init), jax.jit(program.step)


_compiled: dict[Any, Any] = {}


def _compile(function, *args):
    """Returns a compiled program, made once for arguments of one shape."""
    kind = lambda leaf: (np.shape(leaf), np.result_type(leaf)) if not _is_key(leaf) else "key"
    leaves, tree = jax.tree.flatten(args)
    shapes = function, tree, tuple(map(kind, leaves)), tuple(np.shape(leaf) for leaf in leaves)
    if shapes not in _compiled:
        _compiled[shapes] = function.lower(*args).compile()
    return _compiled[shapes]


def _is_key(leaf) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@lru_cache(maxsize=8)
def on_device(track: Track, part: str) -> tuple[jax.Array, jax.Array]:
    """Returns inputs and labels of a part of the data."""
    x, y = getattr(track.load(), part)
    return jnp.asarray(x), jnp.asarray(y)


def orders(track: Track, seed: int, phase: int, steps: int) -> np.ndarray:
    """Returns the samples of each step (steps, batch): epochs in random orders."""
    rng, size = np.random.default_rng([seed, phase]), len(track.load().train[0])
    batch = min(track.batch, size)
    each = size // batch
    epochs = [rng.permutation(size)[: each * batch] for _ in range(-(-steps // each))]
    return np.concatenate(epochs).reshape(-1, batch)[:steps].astype(np.int32)


def loop(
    setting: Setting, before: Training, program: Program, steps: int, extra: Any = None
) -> Training:
    """Runs the steps of a program.

    Args:
      setting: The run.
      before: Where it stands.
      program: One for all seeds and tuned numbers, so that it is compiled once.
      steps: Their number.
      extra: Arrays that the program needs.
    """
    track = setting.track
    order = jnp.asarray(orders(track, setting.seed, before.phases, steps))
    key = jax.random.fold_in(jax.random.key(setting.seed), 1 + before.phases)
    keys, data = jax.random.split(key, steps), on_device(track, "train")
    numbers = {name: jnp.float32(value) for name, value in setting.hyper.items()}
    if track.scan:
        run = _compile(_looped(program), before.params, order, keys, data, numbers, extra)
        begin = time.perf_counter()
        carry = jax.block_until_ready(run(before.params, order, keys, data, numbers, extra))
    else:
        init, step = _single(program)
        carry = before.params, init(before.params, numbers, extra)
        one = _compile(step, carry, (order[0], keys[0]), data, numbers, extra)
        each = list(zip(order, keys, strict=True))
        begin = time.perf_counter()
        for inputs in each:
            carry = one(carry, inputs, data, numbers, extra)
        jax.block_until_ready(carry)
    seconds = time.perf_counter() - begin
    return Training(*carry, before.seconds + seconds, before.phases + 1)


def steps_of(track: Track, share: float) -> int:
    """Returns the steps of a phase."""
    return max(1, round(share * track.steps))


def fit(
    setting: Setting, before: Training, phase: Phase, module: nn.Module | None = None, extra=None
) -> Training:
    """Trains for the steps of a phase.

    Args:
      setting: The run.
      before: Where it stands.
      phase: What to do.
      module: The network, if it is not that of the track.
      extra: Arrays that the phase's chain needs.
    """
    steps = steps_of(setting.track, phase.share)
    return loop(setting, before, _program(module or setting.module, phase, steps), steps, extra)


def start(setting: Setting, module: nn.Module | None = None) -> Training:
    """Returns the network of a seed before training."""
    return Training(tracks.initial(module or setting.module, setting.track, setting.seed))


@lru_cache(maxsize=512)
def _pretrained(track: Track, seed: int, hyper: tuple, share: float) -> Training:
    setting = Setting(track, 1.0, seed, dict(hyper))
    return fit(setting, start(setting), Phase(share))._replace(state=None)


def pretrained(setting: Setting, share: float) -> Training:
    """Returns the dense network after a share of the steps: one for all arms that begin so."""
    hyper = tuple((name, setting.hyper[name]) for name in ("rate", "decay", "dropout"))
    return _pretrained(setting.track, setting.seed, hyper, share)


@partial(jax.jit, static_argnums=0)
def _hits(module: nn.Module, params, x, y):
    logits = rmtjax.linen.apply(module, {"params": params}, x, False)
    return (logits.argmax(-1) == y).mean()


def accuracy(module: nn.Module, params, track: Track, part: str) -> float:
    """Returns the accuracy of a network in %, on a part of the data."""
    x, y = on_device(track, part)
    firsts = range(0, len(x), CHUNK)
    hits = [(_hits(module, params, x[i : i + CHUNK], y[i : i + CHUNK])) for i in firsts]
    weights = [len(x[i : i + CHUNK]) for i in firsts]
    return float(100 * np.average([float(hit) for hit in hits], weights=weights))
