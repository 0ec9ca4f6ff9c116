"""Crops of the pictures that ship with scikit-image, read as data."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

COMMAND = "pip install --no-deps scikit-image"
# All that are photographs, but for a second view of a motorcycle.
NAMES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "horse.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
SIDE = 224
Crops = Float[np.ndarray, "n side side 3"]


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


def crops(folder: Path, names: Sequence[str], count: int, seed: Any) -> Crops:
    """Returns random square crops of pictures, half of them mirrored, as the network takes them.

    The side of a crop is 0.5 to 1 of the short side of its picture. The pictures take turns.

    Raises:
      FileNotFoundError: A picture is missing.
      ModuleNotFoundError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Pictures need Pillow: pip install pillow") from error
    rng = np.random.default_rng(seed)
    pictures = [Image.open(folder / name).convert("RGB") for name in names]
    made = np.empty((count, SIDE, SIDE, 3), np.float32)
    for index in range(count):
        picture = pictures[index % len(pictures)]
        side = int(min(picture.size) * rng.uniform(0.5, 1.0))
        left, top = (int(rng.integers(0, length - side + 1)) for length in picture.size)
        box = (left, top, left + side, top + side)
        pixels = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box))
        made[index] = pixels[:, :: rng.choice([-1, 1])]
    return (made - 127) / 128


def read(folder: Path, count: int, measured: int, draw: int) -> tuple[Crops, dict[str, Crops]]:
    """Returns crops of a random half of the pictures, and those that a cut is measured on.

    Args:
      folder: Of the pictures.
      count: Of the crops that moments come from.
      measured: The number of other crops, of each kind.
      draw: Seed of the halves and of the crops.

    Returns:
      The crops that moments come from; and others by their kind: of the same pictures, and of the
      other half of the pictures.
    """
    order = np.random.default_rng(draw).permutation(len(NAMES))
    names = [NAMES[place] for place in order]
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    known = crops(folder, first, count, (draw, 0))
    same = crops(folder, first, measured, (draw, 1))
    other = crops(folder, second, measured, (draw, 2))
    return known, {"same pictures": same, "other pictures": other}
