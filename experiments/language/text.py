"""Text that each installation of Python has: the sources of the standard library."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

VOCABULARY = 128  # characters of ASCII; all others are the last one
HELD_OUT = 10  # one file of so many is not trained on


class Text(NamedTuple):
    """Characters as numbers."""

    train: Int[np.ndarray, " n"]
    test: Int[np.ndarray, " m"]


def encode(text: str) -> Int[np.ndarray, " n"]:
    """The characters of a text as numbers below `VOCABULARY`."""
    codes = np.array([ord(one) for one in text], np.int64)
    return np.minimum(codes, VOCABULARY - 1).astype(np.int32)


def read_sources(folder: Path | None = None) -> Text:
    """The modules at the top of the standard library, split by file."""
    folder = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    files = sorted(folder.glob("*.py"))
    texts = [encode(path.read_text("utf-8", errors="replace")) for path in files]
    parts = [texts[place::HELD_OUT] for place in range(HELD_OUT)]
    join = lambda some: np.concatenate([text for part in some for text in part])
    return Text(join(parts[1:]), join(parts[:1]))


def windows(text: Int[np.ndarray, " n"], starts: Sequence[int] | np.ndarray, length: int):
    """Windows of a text with one character more than `length`, which is the last to predict."""
    return text[np.asarray(starts)[:, None] + np.arange(length + 1)]


def draw(text: Int[np.ndarray, " n"], count: int, length: int, seed: int):
    """Windows at random places."""
    starts = np.random.default_rng(seed).integers(len(text) - length, size=count)
    return windows(text, starts, length)


def spread(text: Int[np.ndarray, " n"], count: int, length: int):
    """Windows at places that are spread evenly over a text."""
    return windows(text, np.linspace(0, len(text) - length - 1, count).astype(int), length)
