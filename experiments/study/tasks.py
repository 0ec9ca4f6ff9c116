"""What a network is trained and tested on: some images, a share of their labels redrawn."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import data, training


@dataclass(frozen=True)
class Task:
    """Which images and labels; the seed of a run draws them."""

    dataset: str
    images: int | None  # training images; None takes all that are not held out
    validation: int  # training images held out, with their true labels
    label_noise: float  # share of the training labels redrawn at random

    def title(self) -> str:
        """The task in words."""
        images = "all" if self.images is None else f"{self.images:,}"
        noise = f", {self.label_noise:.0%} of labels redrawn" if self.label_noise else ""
        return f"{data.TITLES[self.dataset]}, {images} images{noise}"


class Images(NamedTuple):
    """The images of a run, on the device."""

    train: training.Split  # with the labels given, right or wrong
    true_labels: np.ndarray  # of the same images
    validation: training.Split
    test: training.Split


@lru_cache(maxsize=2)
def dataset(name: str, source: str, data_dir: Path | None) -> data.Dataset:
    """The data set asked for, and no other.

    Raises:
      FileNotFoundError: It is not there; the sample does not stand in for it.
    """
    found = data.load(name, source=source, data_dir=data_dir)
    if found.source == "sample" and source != "sample":
        raise FileNotFoundError(
            f"{data.TITLES[name]} was not found. {' '.join(found.notes)} A shortened run needs "
            "nothing: `--source sample` with Fashion-MNIST."
        )
    return found


def load(task: Task, seed: int, source: str = "auto", data_dir: Path | None = None) -> Images:
    """Draws the images of a run and redraws some of their labels.

    Raises:
      ValueError: There are too few images.
      FileNotFoundError: The data set is not there.
    """
    whole = dataset(task.dataset, source, data_dir)
    available = whole.train_labels.size
    size = available - task.validation if task.images is None else task.images
    if size < 1 or size + task.validation > available:
        raise ValueError(
            f"`images` and `validation` must be at most {available:,} together, got "
            f"{task.images} and {task.validation}."
        )
    # Not `seed` alone, which draws the labels.
    order = np.random.default_rng([seed, 1]).permutation(available)
    held_out, chosen = np.split(order[: task.validation + size], [task.validation])
    labels = whole.train_labels[chosen]
    part = whole._replace(train_images=whole.train_images[chosen], train_labels=labels)
    train, test = training.to_device(part, task.label_noise, seed)
    validation = training.Split(
        jnp.asarray(whole.train_images[held_out]),
        jnp.asarray(whole.train_labels[held_out], jnp.int32),
    )
    return Images(train, labels, validation, test)
