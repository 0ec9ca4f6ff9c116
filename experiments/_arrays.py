"""The four arrays of an MNIST-shaped data set: their checks, and their .npz files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

NUM_CLASSES = 10
SIDE = 28  # pixels

Folder = str | os.PathLike[str]

type_of = lambda array: f"{array.dtype}{list(array.shape)}"


class Arrays(NamedTuple):
    """Images in 0..255, black is 0, and labels in 0..9."""

    train_images: UInt8[np.ndarray, "train 28 28"]
    train_labels: UInt8[np.ndarray, " train"]
    test_images: UInt8[np.ndarray, "test 28 28"]
    test_labels: UInt8[np.ndarray, " test"]


def damaged(place: str | Path, problem: str) -> ValueError:
    """The error about data that are there but can not be used."""
    return ValueError(
        f"{place}: {problem}. Get it again, or move it away: what is not there is looked "
        "for elsewhere, what is there but damaged is never passed over."
    )


def _check_split(images: np.ndarray, labels: np.ndarray, places: Sequence[str | Path]) -> None:
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or images.dtype != np.uint8:
        raise damaged(places[0], f"expected images uint8[n, 28, 28], got {type_of(images)}")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise damaged(places[1], f"expected labels uint8[n], got {type_of(labels)}")
    if len(images) != len(labels):
        problem = f"{len(labels)} labels for the {len(images)} images of {places[0]}"
        raise damaged(places[1], problem)
    if len(images) == 0:
        raise damaged(places[0], "no images in it")
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        problem = f"labels must be in 0..9, got {labels.min()}..{labels.max()}"
        raise damaged(places[1], problem)


def check(arrays: Arrays, places: Sequence[str | Path]) -> Arrays:
    """Returns arrays with labels as uint8; raises ValueError if they are not shaped like MNIST.

    Args:
      arrays: The four arrays.
      places: Where each came from, for the message.

    Raises:
      ValueError: A wrong shape or dtype, labels out of 0..9, or not one for each image.
    """
    _check_split(*arrays[:2], places[:2])
    _check_split(*arrays[2:], places[2:])
    as_bytes = lambda labels: labels.astype(np.uint8)
    return arrays._replace(
        train_labels=as_bytes(arrays.train_labels), test_labels=as_bytes(arrays.test_labels)
    )


def load_npz(path: Path, key: str | None = None) -> Arrays:
    """Reads what `save_npz` wrote.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: The file is damaged, or was written under another key.
    """
    try:
        # Opened here, since NumPy forgets to close what it finds damaged.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            written_under = str(file["key"]) if key is not None else None
            arrays = Arrays(*(file[field] for field in Arrays._fields))
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy each have errors of their own
        raise damaged(path, f"no readable .npz file ({error})") from error
    if written_under != key:
        raise damaged(path, "out of date")
    return check(arrays, [path] * 4)


def save_npz(path: Path, arrays: Arrays, key: str) -> None:
    """Writes the arrays under a key, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            # Not compressed: it is read often, and decompression is most of the time.
            np.savez(file, key=np.asarray(key), **arrays._asdict())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
