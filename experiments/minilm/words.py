"""Sentences as tokens: the ones of this study, and a WordPiece for English."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

SENTENCES = Path(__file__).with_name("sentences.txt")


class Sentences(NamedTuple):
    """Sentences by topic, as tokens."""

    texts: tuple[str, ...]
    topics: tuple[str, ...]
    tokens: Int[np.ndarray, "n t"]
    mask: Bool[np.ndarray, "n t"]


def read_vocabulary(folder: Path) -> dict[str, int]:
    """The index of each token."""
    return {token: i for i, token in enumerate((folder / "vocab.txt").read_text().splitlines())}


def split_word(word: str, vocabulary: Mapping[str, int]) -> list[int]:
    """The pieces of a word: the longest that is known, again and again.

    Examples:
      >>> split_word("untuned", {"un": 1, "##tun": 2, "##t": 3, "##ed": 4})
      [1, 2, 4]
    """
    pieces, first = [], 0
    while first < len(word):
        starts = "##" if first else ""
        ends = range(len(word), first, -1)
        last = next((end for end in ends if starts + word[first:end] in vocabulary), None)
        if last is None:
            return [vocabulary["[UNK]"]]
        pieces.append(vocabulary[starts + word[first:last]])
        first = last
    return pieces


def tokenize(
    sentences: Sequence[str], vocabulary: Mapping[str, int]
) -> tuple[Int[np.ndarray, "n t"], Bool[np.ndarray, "n t"]]:
    """WordPiece tokens of English sentences, in lower case, as long as the longest.

    Returns:
      The tokens, padded at the end, and the mask that is True where there is one.

    Raises:
      ValueError: A sentence is not ASCII, for which BERT's rules say more than these.
    """
    if strange := [sentence for sentence in sentences if not sentence.isascii()]:
        raise ValueError(f"`sentences` must be ASCII, got {strange[0]!r}.")
    rows = []
    for sentence in sentences:
        words = re.findall(r"[a-z0-9]+|[^a-z0-9\s]", sentence.lower())
        pieces = [piece for word in words for piece in split_word(word, vocabulary)]
        rows.append([vocabulary["[CLS]"], *pieces, vocabulary["[SEP]"]])
    tokens = np.full((len(rows), max(map(len, rows))), vocabulary["[PAD]"], np.int32)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = row
    return tokens, np.arange(tokens.shape[1])[None] < np.array([[len(row)] for row in rows])


def read_sentences(folder: Path, path: Path = SENTENCES) -> Sentences:
    """Reads a sentence a line, each below the "# topic" that it is on."""
    texts, topics, topic = [], [], ""
    for line in path.read_text().splitlines():
        if line.startswith("# "):
            topic = line[2:]
        else:
            texts.append(line)
            topics.append(topic)
    return Sentences(tuple(texts), tuple(topics), *tokenize(texts, read_vocabulary(folder)))
