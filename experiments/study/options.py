"""The options that all parts of the study share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

DatasetName = Literal["mnist", "fashion_mnist"]
Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class Options:
    """Where data come from and results go; nothing here changes a result."""

    source: Literal["auto", "tfds", "idx", "download", "sample"] = "auto"
    """Where to take the images from; auto takes the first that has them, but no sample."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the data, if not a usual one."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path(__file__).parents[1] / "results"
    """Folder for the results and the figure."""
    show_only: bool = False
    """Draw tables and figure of the runs there are, and run nothing."""
    discard: tuple[str, ...] = ()
    """Arms whose runs are thrown away first, to be made again."""


def check_positive(config: Options, *names: str) -> None:
    """Checks that numbers of epochs, images and the like are at least 1, and tuples not empty.

    Raises:
      ValueError: One of the fields named is too small, or has a member that is.
    """
    for name in names:
        value = getattr(config, name)
        if value == () or min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def check_shares(config: Options, *names: str) -> None:
    """Checks that shares are in [0, 1].

    Raises:
      ValueError: One of the fields named, or a member of it, is no share.
    """
    for name in names:
        value = getattr(config, name)
        if any(not 0 <= share <= 1 for share in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"`{name}` must be in [0, 1], got {value}.")


def check_choices(config: Options, name: str, allowed: tuple[str, ...]) -> None:
    """Checks that names are known.

    Raises:
      ValueError: A member of the field is not one of `allowed`.
    """
    for value in getattr(config, name):
        if value not in allowed:
            raise ValueError(f"`{name}` must be of {', '.join(allowed)}; got {value!r}.")
