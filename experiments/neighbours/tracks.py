"""The tracks: a network, its data, the kernels that arms may make smaller, and the sizes."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import rmtjax
from experiments import data
from experiments.neighbours import mnist1d, networks

Arrays = tuple[np.ndarray, np.ndarray]
LETTERS = 40  # of the text's alphabet; rarer ones are one letter
PERIOD = 32  # letters of a sequence


class Splits(NamedTuple):
    """Inputs and labels."""

    train: Arrays
    validation: Arrays
    test: Arrays


@dataclass(frozen=True)
class Track:
    """A task with a network.

    Attributes:
      name: Its letter.
      task: What is learnt, by which network.
      module: The dense network; its fields `width` and `dropout` may change.
      load: Reads the data.
      kernels: Paths of the kernels that arms make smaller. All others stay.
      positions: How often a kernel multiplies for one sample; once if not named.
      levels: Stored parameters over those of the dense network, or those of `kernels` alone.
      steps: Gradient steps of a run, over all of its phases.
      batch: Samples in a step.
      scan: Whether steps run in one compiled loop. XLA's convolutions are slow in loops.
      of_kernels: Whether levels count the entries of `kernels` alone.
      tuned_at: The level of the trials.
      reference: The arm that others are compared with.
      feeds: Layers whose outputs go to one other layer only, with that layer. Between them all
        channels are treated alike, so that they may change places.
    """

    name: str
    task: str
    module: nn.Module
    load: Callable[[], Splits]
    kernels: tuple[str, ...]
    levels: tuple[float, ...]
    steps: int
    batch: int
    positions: tuple[tuple[str, int], ...] = ()
    scan: bool = True
    of_kernels: bool = False
    tuned_at: float = 0.1
    reference: str = "truncated SVD"
    feeds: tuple[tuple[str, str], ...] = ()

    def short(self) -> "Track":
        """Returns the track with a small network, few samples and few steps."""
        small: dict[str, Any] = {"width": 64} | ({"channels": (4, 64)} if self.name == "c" else {})
        small = {} if self.of_kernels else small  # these are small
        return replace(self, module=self.module.clone(**small), steps=20, load=_Few(self.load))


@dataclass(frozen=True)
class _Few:
    """Loads some samples of a data set."""

    load: Callable[[], Splits]

    def __call__(self) -> Splits:
        return Splits(*((x[:200], y[:200]) for x, y in self.load()))


def _cut(x: np.ndarray, y: np.ndarray, train: int, validation: int) -> Splits:
    """Returns parts that follow one another; the rest is for the test."""
    ends = 0, train, train + validation, len(x)
    parts = [slice(*pair) for pair in itertools.pairwise(ends)]
    return Splits(*((x[part], y[part]) for part in parts))


def curves() -> Splits:
    """Returns MNIST-1D: 4,000, 2,000 and 8,000 samples."""
    return _cut(*mnist1d.generate(14_000), 4_000, 2_000)


@cache
def text() -> Splits:
    """Returns pieces of Python's help texts, and the same moved by one letter.

    Training, validation and test are consecutive parts of the text.
    """
    letters = "".join(topics[name] for name in sorted(topics)).lower().encode()
    codes = np.frombuffer(letters, np.uint8)
    known = np.argsort(-np.bincount(codes, minlength=256), kind="stable")
    table = np.full(256, LETTERS - 1, np.int32)
    table[known[: LETTERS - 1]] = np.arange(LETTERS - 1)
    codes = table[codes]
    size = (len(codes) - 1) // PERIOD * PERIOD
    x, y = (codes[i : i + size].reshape(-1, PERIOD) for i in (0, 1))
    return _cut(x, y, len(x) * 7 // 10, len(x) // 10)


@cache
def garments() -> Splits:
    """Returns Fashion-MNIST averaged to 14 x 14: 8,000, 2,000 and 10,000 images."""
    found = data.load("fashion_mnist", download=False)
    x = np.concatenate([found.train_images[:10_000], found.test_images])
    y = np.concatenate([found.train_labels[:10_000], found.test_labels]).astype(np.int32)
    x = (x.reshape(-1, 14, 2, 14, 2).mean((2, 4)) / 255).astype(np.float32)
    validation = min(2_000, len(x) // 10)
    return _cut(x, y, len(x) - len(found.test_images) - validation, validation)


_HEADS = "query", "key", "value", "out"
_IN_BLOCK = *(f"MultiHeadDotProductAttention_0/{name}" for name in _HEADS), "Dense_0", "Dense_1"
_BLOCKS = [f"Block_{i}" for i in range(networks.ViT.depth)]
SPARSE: dict[str, Any] = {
    "of_kernels": True,
    "tuned_at": 0.4,
    "reference": "magnitude",
}

TRACKS = {
    track.name: track
    for track in (
        Track(
            "a", "MNIST-1D, MLP 40-256-256-256-10", networks.MLP(), curves,
            tuple(f"Dense_{i}/kernel" for i in range(3)), (0.05, 0.1, 0.25), 1500, 100,
        ),
        Track(
            "b", "letters of Python's help texts, LSTM of 96 units", networks.Letters(LETTERS),
            text, ("cell/of_inputs/kernel", "cell/of_state/kernel"), (0.1, 0.25), 600, 16,
        ),
        Track(
            "c", "Fashion-MNIST 14 x 14, CNN of two convolutions", networks.CNN(), garments,
            ("Conv_1/kernel", "Dense_0/kernel"), (0.1, 0.25), 500, 64,
            (("Conv_0/kernel", 196), ("Conv_1/kernel", 49)), scan=False,
        ),
        Track(
            "d", "Fashion-MNIST 14 x 14, transformer of three blocks", networks.ViT(), garments,
            tuple(f"{block}/{layer}/kernel" for block in _BLOCKS for layer in _IN_BLOCK),
            (0.5, 0.4, 0.3), 700, 64,
            tuple((f"{block}/{layer}/kernel", 49) for block in _BLOCKS for layer in _IN_BLOCK),
            feeds=tuple((f"{block}/Dense_0", f"{block}/Dense_1") for block in _BLOCKS), **SPARSE,
        ),
        Track(
            "e", "Fashion-MNIST 14 x 14, CNN of three convolutions", networks.ThinCNN(), garments,
            ("Conv_1/kernel", "Conv_2/kernel", "Dense_0/kernel"), (0.5, 0.4, 0.3), 1500, 64,
            (("Conv_0/kernel", 196), ("Conv_1/kernel", 49), ("Conv_2/kernel", 9)), scan=False,
            feeds=(("Conv_0", "Conv_1"), ("Conv_1", "Conv_2")), **SPARSE,
        ),
    )
}  # fmt: skip


class Dense(NamedTuple):
    """The dense network of a track.

    Attributes:
      shapes: Its parameters, as shapes.
      axes: What makes its kernels matrices, by path.
    """

    shapes: Any
    axes: Any


@cache
def dense(module: nn.Module, track: Track) -> Dense:
    """Returns shapes and axes of a module, for the inputs of a track."""
    example = jnp.asarray(track.load().train[0][:2])
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), example, False))
    axes = rmtjax.linen.kernel_axes(module, variables, example, False)
    return Dense(variables["params"], axes)


def initial(module: nn.Module, track: Track, seed: int) -> Any:
    """Returns the parameters that a seed draws."""
    example = jnp.asarray(track.load().train[0][:2])
    init = jax.jit(lambda key: module.init(key, example, False)["params"])
    return init(jax.random.fold_in(jax.random.key(seed), 0))
