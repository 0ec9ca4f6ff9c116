"""Tokens to collect moments from: prose of another domain, and the sentences of the study."""

import re
from collections.abc import Mapping, Sequence
from pydoc_data.topics import topics

import numpy as np
from jaxtyping import Int

LENGTH = 32  # of a window, about that of the longest sentence of the study


def python_prose() -> tuple[str, ...]:
    """The paragraphs on Python's language that each installation of Python has, without code."""
    paragraphs = re.split(r"\n\s*\n", "\n\n".join(topics[name] for name in sorted(topics)))
    texts = (re.sub(r"[*\"`]", "", " ".join(paragraph.split())) for paragraph in paragraphs)
    letters = lambda text: sum(one.isalpha() or one == " " for one in text)
    is_prose = lambda text: len(text) > 100 and text.isascii() and letters(text) > 0.9 * len(text)
    # Some topics repeat one another.
    return tuple(dict.fromkeys(filter(is_prose, texts)))


def windows(
    rows: Sequence[Sequence[int]], vocabulary: Mapping[str, int], length: int = LENGTH
) -> Int[np.ndarray, "n t"]:
    """Texts as tokens, one after another, in windows of one length without padding.

    Padding would count as rows of the moments. Each window begins and ends as a sentence does.
    """
    flat = np.array([token for row in rows for token in row], np.int32)
    inner = length - 2
    body = flat[: len(flat) // inner * inner].reshape(-1, inner)
    edge = lambda name: np.full((len(body), 1), vocabulary[name], np.int32)
    return np.concatenate([edge("[CLS]"), body, edge("[SEP]")], axis=1)
