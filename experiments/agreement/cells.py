"""The tasks, the networks, and which arms train on which of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import rmtjax
from experiments import training
from experiments.agreement import arms
from experiments.agreement.arms import Arm
from experiments.study import tasks
from experiments.tasks import models, problems

TUNING_SEED = 100  # that of the study
SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Cell:
    """A task: images, a share of wrong labels, a network and its optimizer.

    Attributes:
      name: In the tables and for the command line.
      dataset, images, noise: As in the study; `images` None takes all.
      asymmetric: Whether a wrong label is the class after the right one, and not any.
      network: A key of `NETWORKS`.
      optimizer: A key of `OPTIMIZERS`.
      epochs, batch: How long it trains, and on how many images in a step.
      pixel_noise: Deviation of what is added to the pixels of training images, over the brightest.
      target_noise: Deviation of what is added to the targets of a regression: 1 for the class, else
        0. Above 0, the loss is the mean square, and no label is redrawn.
    """

    name: str
    dataset: str = "mnist"
    images: int | None = 10_000
    noise: float = 0.4
    asymmetric: bool = False
    network: str = "784-512-512-10"
    optimizer: str = "SGD"
    epochs: int = 60
    batch: int = 128
    pixel_noise: float = 0.0
    target_noise: float = 0.0

    def task(self) -> tasks.Task:
        """Returns the task of the study with the same images; its labels may be others."""
        return tasks.Task(self.dataset, self.images, 1000, self.noise)


@dataclass(frozen=True)
class Run:
    """All settings of a run."""

    cell: Cell
    arm: Arm
    seed: int
    tuning: bool = False


def load(cell: Cell, seed: int, source: str = "auto") -> tasks.Images:
    """Returns the images of a run, with the noise of the cell."""
    if not (cell.asymmetric or cell.pixel_noise or cell.target_noise):
        return tasks.load(cell.task(), seed, source)
    images = tasks.load(replace(cell.task(), label_noise=0.0), seed, source)
    pixels, labels = np.asarray(images.train.images), images.true_labels.astype(np.int32)
    rng = np.random.default_rng([seed, 2])
    if cell.pixel_noise:
        noisy = pixels + 255 * cell.pixel_noise * rng.normal(size=pixels.shape)
        pixels = np.clip(np.round(noisy), 0, 255).astype(np.uint8)
    if cell.target_noise:
        targets = np.eye(10)[labels]
        labels = (targets + cell.target_noise * rng.normal(size=targets.shape)).astype(np.float32)
    elif cell.asymmetric:
        labels = (labels + (rng.random(len(labels)) < cell.noise)) % 10
    train = images.train._replace(images=jnp.asarray(pixels), labels=jnp.asarray(labels))
    return images._replace(train=train)


def _from_images(module: nn.Module) -> problems.Network:
    """Returns the functions of a module of `experiments.training`, which takes bytes."""
    example = jnp.zeros((1, 28, 28), jnp.uint8)
    init = lambda key: (module.init(key, example)["params"], {})
    apply = lambda variables, x, train, key: (module.apply({"params": variables[0]}, x), {})
    variables = {"params": jax.eval_shape(init, jax.random.key(0))[0]}
    return problems.Network(init, apply, rmtjax.linen.kernel_axes(module, variables, example))


def thin_start(params: Any, rank: int) -> Any:
    """Returns factors of this rank, with the squares of the kernels that they stand for."""
    plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(rank), multiple=1)

    def scale(dense, thin):
        if not isinstance(thin, rmtjax.Factors):
            return thin
        share = jnp.linalg.norm(thin.left @ thin.right) / jnp.linalg.norm(dense)
        return rmtjax.Factors(*(factor / jnp.sqrt(share) for factor in thin))

    return jax.tree.map(scale, params, rmtjax.factorize(params, plan))


def _thin(module: nn.Module, rank: int) -> problems.Network:
    """Returns the functions of a module whose kernels are factors from the start."""
    dense = _from_images(module)

    def apply(variables, x, train, key):
        del train, key
        return rmtjax.linen.apply(module, {"params": variables[0]}, x), {}

    return problems.Network(
        lambda key: (thin_start(dense.init(key)[0], rank), {}), apply, dense.axes
    )


def _shrunk(build: Callable[[Any], problems.Network]) -> problems.Network:
    """Returns a network of the ten tasks for bytes of 28 x 28, which it sees as 14 x 14."""
    network = build(jnp.zeros((1, 14, 14)))

    def apply(variables, x, train, key):
        pairs = x.reshape(len(x), 14, 2, 14, 2).astype(jnp.float32)
        return network.apply(variables, pairs.mean((2, 4)) / 255, train, key)

    return network._replace(apply=apply)


_linen = lambda module: _shrunk(problems.from_linen(module))
NETWORKS: dict[str, Callable[[], problems.Network]] = {
    "784-512-512-10": lambda: _from_images(training.MLP((512, 512))),
    "784-512-512-512-10": lambda: _from_images(training.MLP((512, 512, 512))),
    # 59,514 parameters of 669,706.
    "784-512-512-10 of rank 23": lambda: _thin(training.MLP((512, 512)), 23),
    "CNN": lambda: _from_images(training.CNN()),
    "transformer, linen": lambda: _linen(models.ScannedTransformer(96)),
    "transformer, nnx": lambda: _shrunk(
        problems.from_nnx(lambda rngs: models.NnxTransformer(7, 96, rngs))
    ),
    "GRU": lambda: _linen(models.Recurrent(nn.GRUCell, 128, 10)),
    "LSTM": lambda: _linen(models.Recurrent(nn.OptimizedLSTMCell, 128, 10)),
}
# Each takes the number of all steps.
OPTIMIZERS: dict[str, Callable[[int], optax.GradientTransformation]] = {
    "SGD": lambda steps: optax.sgd(0.05, 0.9),
    "SGD, cosine": lambda steps: optax.sgd(optax.cosine_decay_schedule(0.05, steps), 0.9),
    "Adam": lambda steps: optax.adam(1e-3),
    "AdamW": lambda steps: optax.adamw(1e-3),
}


@lru_cache(maxsize=4)
def network(name: str) -> problems.Network:
    """Returns a network, the same one for all seeds, so that programs are compiled once."""
    return NETWORKS[name]()


CORE = Cell("core")
FASHION = Cell("Fashion-MNIST", "fashion_mnist")
CLEAN = Cell("clean", noise=0.0)
CLEAN_FASHION = Cell("clean Fashion-MNIST", "fashion_mnist", noise=0.0)
CLEAN_TWICE = replace(CLEAN, name="clean, twice the epochs", epochs=120)
NEIGHBOURS = Cell("each wrong label is the next class", asymmetric=True)
SEQUENCE = {"optimizer": "AdamW", "epochs": 30, "batch": 64}
LINEN = Cell("transformer of linen", network="transformer, linen", **SEQUENCE)
NNX = Cell("transformer of nnx", network="transformer, nnx", **SEQUENCE)
GRU = Cell("GRU", "fashion_mnist", network="GRU", **SEQUENCE)
CNN = Cell("CNN", "fashion_mnist", network="CNN", epochs=40)
GRU_TWICE = replace(GRU, name="GRU, twice the epochs", epochs=60)
CNN_TWICE = replace(CNN, name="CNN, twice the epochs", epochs=80)
ADAM = Cell("Adam", optimizer="Adam")
DEEPER = Cell("three hidden layers", network="784-512-512-512-10")
ALL = Cell("all of MNIST", images=None, epochs=20)
LONG = Cell("200 epochs", epochs=200)
ALL_TWICE = replace(ALL, name="all of MNIST, twice the epochs", epochs=40)
GRU_FOUR_TIMES = replace(GRU, name="GRU, four times the epochs", epochs=120)
FEW = Cell("1,000 clean images", images=1000, noise=0.0, batch=32)
PIXELS = Cell("noisy images", noise=0.0, pixel_noise=0.5)
REGRESSION = Cell("regression, noisy targets", noise=0.0, target_noise=1.0)
THIN = Cell("thin from the start", network="784-512-512-10 of rank 23")
THIN_TWICE = replace(THIN, name="thin, twice the epochs", epochs=120)
THIN_CLEAN = replace(THIN_TWICE, name="thin, clean, twice the epochs", noise=0.0)
WITH_PLAIN = (arms.PAIR, arms.PLAIN)
WITH_REST = (arms.PAIR, arms.REST)
SMOOTHING, SAM, M3, RM3, MASK = arms.RIVALS
# What comes first is run first.
PLAN: tuple[tuple[Cell, tuple[Arm, ...], tuple[int, ...]], ...] = (
    (CORE, (arms.PAIR, arms.AVERAGED, arms.CHAIN, arms.FOUR), SEEDS),
    (THIN, WITH_PLAIN, SEEDS[:3]),
    (THIN_TWICE, WITH_REST, SEEDS[:3]),
    (THIN_CLEAN, WITH_REST, SEEDS[:1]),
    (CORE, (M3, RM3), SEEDS[:3]),
    (FASHION, (arms.PAIR,), SEEDS[:1]),
    (CORE, (arms.REST,), SEEDS[:1]),
    (CLEAN, WITH_REST, SEEDS[:1]),
    (CLEAN_FASHION, (*WITH_REST, arms.PLAIN), SEEDS[:1]),
    (LINEN, WITH_PLAIN, SEEDS[:1]),
    (NEIGHBOURS, WITH_PLAIN, SEEDS[:1]),
    (GRU, WITH_PLAIN, SEEDS[:1]),
    (CNN, (arms.PAIR,), SEEDS[:1]),
    (CORE, (SMOOTHING,), SEEDS[:3]),
    (NEIGHBOURS, (SMOOTHING,), SEEDS[:1]),
    (FASHION, (SMOOTHING,), SEEDS[:1]),
    (CLEAN, (SMOOTHING,), SEEDS[:1]),
    (ALL, WITH_REST, SEEDS[:1]),
    (LONG, (arms.PAIR,), SEEDS[:1]),
    (NNX, WITH_PLAIN, SEEDS[:1]),
    (GRU_TWICE, (arms.PAIR,), SEEDS[:1]),
    (CNN_TWICE, (arms.PAIR,), SEEDS[:1]),
    (ADAM, (*WITH_PLAIN, arms.CHAIN), SEEDS[:1]),
    (CORE, (SAM,), SEEDS[:3]),
    (Cell("20 % redrawn", noise=0.2), (arms.PAIR,), SEEDS[:1]),
    (Cell("60 % redrawn", noise=0.6), (arms.PAIR,), SEEDS[:1]),
    (DEEPER, WITH_PLAIN, SEEDS[:1]),
    (Cell("cosine", optimizer="SGD, cosine"), WITH_PLAIN, SEEDS[:1]),
    (CLEAN_TWICE, (arms.PAIR,), SEEDS[:1]),
    (FEW, WITH_PLAIN, SEEDS[:3]),
    (REGRESSION, WITH_PLAIN, SEEDS[:1]),
    (PIXELS, WITH_PLAIN, SEEDS[:1]),
    (CORE, (*arms.PERIODS, arms.FIXED), SEEDS[:1]),
    (ALL_TWICE, (arms.PAIR,), SEEDS[:3]),
    (LONG, (arms.FIXED, arms.FOUR), SEEDS[:1]),
    (CORE, (arms.EIGHT,), SEEDS[:1]),
    (GRU_FOUR_TIMES, (arms.PAIR,), SEEDS[:1]),
    (CORE, (MASK,), SEEDS[:3]),
)


def grid(run: Run) -> list[Run]:
    """Returns the runs that choose the value of a rival on the core task, or nothing."""
    values = arms.RULES[run.arm.rule].values
    return [Run(CORE, replace(run.arm, value=value), TUNING_SEED, tuning=True) for value in values]


def plan_runs(find: Callable[[Run], dict[str, Any] | None]) -> Iterator[Run]:
    """Yields all runs, in order; a rival that is tuned comes after its grid.

    The value is chosen as for weight decay in the study: by clean validation images at the end.
    """
    for cell, group, seeds in PLAN:
        for arm in group:
            runs = grid(Run(cell, arm, TUNING_SEED))
            yield from runs
            found = [find(run) for run in runs]
            if runs and None in found:
                continue
            scores = [record["final"]["validation"] for record in found if record]
            chosen = runs[int(np.argmax(scores))].arm if runs else arm
            yield from (Run(cell, chosen, seed) for seed in seeds)
