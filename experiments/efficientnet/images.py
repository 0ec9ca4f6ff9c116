"""Crops of the pictures that ship with scikit-image, read as data."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

COMMAND = "pip install --no-deps scikit-image"
# Moments come from the first. The others are what the network is measured on.
KNOWN = ("coffee", "rocket", "motorcycle_left", "retina", "hubble_deep_field", "brick", "coins")
MEASURED = ("chelsea", "astronaut", "camera", "ihc", "gravel", "horse", "moon")
SIDE = 224


def find_folder(folder: Path | None = None) -> Path:
    """Returns the folder of the pictures, by default that of the installed package.

    Raises:
      FileNotFoundError: It is not there; says how to get it.
    """
    if folder is None:
        spec = importlib.util.find_spec("skimage")
        if spec is None or spec.origin is None:
            raise FileNotFoundError(f"The pictures are not installed: {COMMAND} (13 MB).")
        folder = Path(spec.origin).parent / "data"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: {COMMAND}, or give one that is there.")
    return folder


def crops(folder: Path, names: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Returns random square crops of pictures, half of them mirrored, as the network takes them.

    The side of a crop is 0.5 to 1 of the short side of its picture.

    Raises:
      FileNotFoundError: A picture is missing.
      ModuleNotFoundError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Pictures need Pillow: pip install pillow") from error
    rng = np.random.default_rng(seed)
    pictures = []
    for name in names:
        file = next(
            (path for end in ("png", "jpg") if (path := folder / f"{name}.{end}").is_file()), None
        )
        if file is None:
            raise FileNotFoundError(f"{folder} has no picture {name!r}.")
        pictures.append(Image.open(file).convert("RGB"))
    made = np.empty((count, SIDE, SIDE, 3), np.float32)
    for index in range(count):
        picture = pictures[index % len(pictures)]
        side = int(min(picture.size) * rng.uniform(0.5, 1.0))
        left, top = (int(rng.integers(0, length - side + 1)) for length in picture.size)
        box = (left, top, left + side, top + side)
        pixels = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))
        made[index] = pixels[:, :: rng.choice([-1, 1])]
    return (made - 127) / 128
