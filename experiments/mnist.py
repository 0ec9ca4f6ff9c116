"""The main job: train, prune in the chain, factorize, fine-tune, and compare.

A baseline and a pruned network start from the same weights and see the same batches under
the same schedule, each with a fresh optimizer for training and for fine-tuning. The tables
go to the terminal; `results.json` and the figures to the output folder.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from rich.console import Console

import rmtjax
from experiments import data, figures, measure, output, training


@dataclass(frozen=True)
class Config:
    """Trains a baseline and a pruned network from equal starts, and compares them."""

    dataset: Literal["mnist", "fashion_mnist"] = "mnist"
    """Images to classify."""
    source: Literal["auto", "tfds", "idx", "download", "sample"] = "auto"
    """Where to take them from; auto takes the first that has them."""
    data_dir: Path | None = None
    """Folder of the data, if not a usual one."""
    widths: tuple[int, ...] = (1000,)
    """Widths of the hidden layers."""
    seeds: tuple[int, ...] = (0,)
    """One run for each: of the weights, the batches and the label noise."""
    epochs: int = 10
    """Epochs of training."""
    batch_size: int = 128
    """Images in a step."""
    learning_rate: float = 0.08
    """Of SGD, at the start."""
    momentum: float = 0.9
    """Of SGD."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes to 0, if it does."""
    label_noise: float = 0.0
    """Share of the training labels that are redrawn at random."""
    prune_every: int = 1
    """Epochs between prunings."""
    prune_start: int = 5
    """Epoch after which the first pruning comes."""
    keep: float = 0.0
    """Share of the directions under the threshold that the first pruning keeps; it falls to 0."""
    trim: float = 0.25
    """Share of the eigenvalues left out at each end of the fit of the noise."""
    level: float = 0.01
    """Probability that noise alone gives a spike."""
    fine_tune_epochs: int = 2
    """Epochs after factorizing; the baseline gets them too."""
    fine_tune_rate: float = 0.016
    """Learning rate of SGD in these."""
    devices: int = 1
    """Devices that share the images of each step."""
    replicas: int = 1
    """From two on, a network more: replicas on disjoint images, merged by agreement each epoch."""
    compilation_cache: Path | None = None
    """Folder in which JAX keeps compiled programs for the next run."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for results.json and the figures; by default the next free one, as runs/mnist."""
    overwrite: bool = False
    """Replaces the results that the folder has."""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "prune_every", "prune_start", "devices", "replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.prune_start > self.epochs:
            raise ValueError(
                f"`prune_start` must be at most `epochs` ({self.epochs}), got {self.prune_start}."
            )
        for name in ("label_noise", "keep"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        if self.devices > jax.device_count():
            raise ValueError(
                f"`devices` must be at most {jax.device_count()}, those that JAX sees here, got "
                f"{self.devices}."
            )
        if self.batch_size % self.devices:
            raise ValueError(
                f"`batch_size` must be a multiple of `devices` ({self.devices}), got "
                f"{self.batch_size}."
            )
        if self.replicas > 1 and self.devices > 1:
            raise ValueError(
                f"`replicas` must be 1 with several devices, got {self.replicas} with "
                f"{self.devices} devices."
            )
        rmtjax.ranks.bema(self.trim, self.level)  # has its own checks
        if not self.seeds or not self.widths:
            raise ValueError("`seeds` and `widths` need at least one number each.")
        if self.fine_tune_epochs < 0:
            raise ValueError(f"`fine_tune_epochs` must not be negative: {self.fine_tune_epochs}.")


class Stage(NamedTuple):
    """Some epochs with one optimizer, whose state starts anew."""

    epochs: int
    optimizer: optax.GradientTransformation
    run: Callable  # from `training.make_epoch`


class Stages(NamedTuple):
    """The stages that all networks go through, compiled once for all seeds."""

    plain: Stage
    pruning: Stage
    fine_tuning: Stage


def make_stages(config: Config, module: training.MLP, num_images: int) -> Stages:
    """The optimizers of the job. Here the transform meets its chain."""
    steps = -(-num_images // config.batch_size)
    total, first = config.epochs * steps, config.prune_start * steps
    rate = {
        "constant": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, total),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, total),
    }[config.schedule]
    plain = optax.sgd(rate, config.momentum)
    pruning = optax.chain(
        plain,
        rmtjax.prune_spectrum(
            every=config.prune_every * steps,
            start=first,
            # Called with the steps before: the last pruning sees `total - 1` of them.
            keep=optax.linear_schedule(config.keep, 0.0, max(total - first, 1), first - 1),
            rule=rmtjax.ranks.bema(config.trim, config.level),
            max_removed=1.0,  # few images lift few directions, and then noise holds most squares
        ),
    )
    tuning = optax.sgd(config.fine_tune_rate, config.momentum)
    stage = lambda epochs, chain: Stage(epochs, chain, training.make_epoch(module, chain))
    return Stages(
        stage(config.epochs, plain),
        stage(config.epochs, pruning),
        stage(config.fine_tune_epochs, tuning),
    )


class Job(NamedTuple):
    """The inputs that all networks of a seed share."""

    config: Config
    module: training.MLP
    stages: Stages
    train: training.Split
    test: training.Split
    seed: int
    advance: Callable[[str], None]  # told of each epoch that is done


def describe(job: Job, name: str, epoch: int, params: Any, loss, ranks) -> dict[str, Any]:
    """Returns the entry of an epoch in the history, and tells of it."""
    accuracy = training.accuracy(job.module, params, job.test)
    job.advance(f"seed {job.seed}, {name}: {accuracy:.2f} %")
    return {
        "seed": job.seed,
        "network": name,
        "epoch": epoch,
        "loss": float(loss),
        "test_accuracy": accuracy,
        "ranks": {path: int(rank) for path, rank in ranks.items()},
    }


def train(job: Job, name: str, stage: Stage, params: Any, first_epoch: int = 0):
    """Runs a stage; returns the new parameters, the optimizer state and the history."""
    devices, history = job.config.devices, []
    params = jax.tree.map(jnp.copy, params)  # an epoch takes its arguments over
    opt_state = training.on_devices(devices, stage.optimizer.init(params))
    key = jax.random.fold_in(jax.random.key(job.seed), 1)
    for epoch in range(first_epoch, first_epoch + stage.epochs):
        order = training.batches(
            jax.random.fold_in(key, epoch), job.train.labels.size, job.config.batch_size
        )
        order = training.on_devices(devices, order, axis=1)
        params, opt_state, loss = stage.run(params, opt_state, job.train, *order)
        ranks = optax.tree.get(opt_state, "ranks", {})
        history.append(describe(job, name, epoch + 1, params, loss, ranks))
    return params, opt_state, history


def train_replicas(job: Job, params: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Trains replicas on parts that are drawn each epoch; returns their agreement and history.

    Each replica keeps its own state of the optimizer: a common one would carry the gradients of
    one into the others, which looks like agreement.
    """
    count, stage, size = job.config.replicas, job.stages.plain, job.train.labels.size
    states = rmtjax.replicate(stage.optimizer.init(params), count)

    @jax.jit
    def epoch(params, states, split, key):
        keys = jax.random.split(key, count + 1)
        parts = rmtjax.deal(keys[0], size, count)
        in_part = lambda key: training.batches(key, size // count, job.config.batch_size)
        order, weights = jax.vmap(in_part)(keys[1:])
        order = jax.vmap(lambda part, index: part[index])(parts, order)
        train = jax.vmap(stage.run, (None, 0, None, 0, 0))
        replicas, states, loss = train(params, states, split, order, weights)
        return rmtjax.merge_replicas(params, replicas).params, states, loss.mean()

    key, history = jax.random.fold_in(jax.random.key(job.seed), 2), []
    for number in range(stage.epochs):
        params, states, loss = epoch(params, states, job.train, jax.random.fold_in(key, number))
        history.append(describe(job, "agreement", number + 1, params, loss, {}))
    return params, history


def run_seed(job: Job) -> dict[str, Any]:
    """All networks of one seed: their parameters, reports, history and truncation curve."""
    config, stages = job.config, job.stages
    rule = rmtjax.ranks.bema(config.trim, config.level)
    start = job.module.init(jax.random.key(job.seed), job.train.images[:1])["params"]
    start = training.on_devices(config.devices, start)
    baseline, _, history = train(job, "baseline", stages.plain, start)
    pruned, opt_state, more = train(job, "pruned", stages.pruning, start)
    # The noise levels that the chain has carried: a truncated spectrum is not fitted anew.
    fits = rmtjax.noise_levels(opt_state)
    reports = {
        "baseline": rmtjax.analyze(baseline, rule=rule),
        "pruned": rmtjax.analyze(pruned, rule=rule, fits=fits),
    }
    networks = {
        "baseline": baseline,
        "baseline, factorized": rmtjax.factorize(baseline, reports["baseline"].plan),
        "pruned": pruned,
        "pruned, factorized": rmtjax.factorize(pruned, reports["pruned"].plan),
    }
    history = [*history, *more]
    if config.replicas > 1:
        networks["agreement"], more = train_replicas(job, start)
        history += more
    for name in ("baseline", "baseline, factorized", "pruned, factorized"):
        tuned, _, more = train(job, name, stages.fine_tuning, networks[name], config.epochs)
        networks[f"{name}, fine-tuned"] = tuned
        history += more
    curve = measure.truncation_curve(job.module, baseline, reports["baseline"], job.test)
    return {"networks": networks, "reports": reports, "history": history, "curve": curve}


def run(config: Config, dataset: data.Dataset, console: Console) -> output.Results:
    """The whole job; what is done is written after each seed."""
    module = training.MLP(config.widths)
    stages = make_stages(config, module, dataset.train_labels.size)
    results = output.Results(config, data.describe(dataset))
    trained = 2 + (config.replicas > 1)
    epochs = (trained * config.epochs + 3 * config.fine_tune_epochs) * len(config.seeds)
    assert config.out is not None  # `prepare` has chosen it
    with output.progress(console, epochs) as advance:
        for seed in config.seeds:
            splits = training.to_device(dataset, config.label_noise, seed)
            train, test = training.on_devices(config.devices, splits)
            result = run_seed(Job(config, module, stages, train, test, seed, advance))
            found = result.pop("networks").items()  # each by itself: JAX sorts dictionaries
            networks = {name: training.on_devices(1, tree) for name, tree in found}
            measured = measure.networks(module, networks, *splits)
            results = results.add(seed, measured, **result)
            output.save(results, config.out)
    return results


def prepare(arguments: list[str] | None, console: Console) -> tuple[Config, data.Dataset]:
    """Reads the options, makes the folder for the output and loads the data."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    if config.out is not None:  # before the data, which may take a while
        output.make_folder(config.out, config.overwrite)
    if config.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(config.compilation_cache))
    dataset = data.load(config.dataset, source=config.source, data_dir=config.data_dir)
    folder = config.out or output.make_folder(
        output.free_folder(dataset, config.overwrite), config.overwrite
    )
    for note in dataset.notes:
        console.print(f"passed over: {note}", style="dim", highlight=False, soft_wrap=True)
    console.print(data.describe(dataset), highlight=False)
    if dataset.source == "sample":
        console.print("A sample: on 1,000 test images accuracy has a standard error of a point.")
    return replace(config, out=folder), dataset


def main(arguments: list[str] | None = None) -> int:
    """Reads the options, runs the job, prints the tables and draws the figures."""
    console = output.console()
    try:
        config, dataset = prepare(arguments, console)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        console.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    try:
        results = run(config, dataset, console)
        output.show(results, console)
        folder = Path(config.out or "")
        for path in (folder / "results.json", *figures.draw(results, folder)):
            console.print(f"wrote {path}", highlight=False)
    except KeyboardInterrupt:
        console.print(
            "Stopped. Seeds that were finished are in results.json; no file is half-written."
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
