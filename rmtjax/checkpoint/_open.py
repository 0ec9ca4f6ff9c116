"""Checkpoints on disk, read and written one tensor at a time."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from rmtjax.checkpoint._orbax import open_folder
from rmtjax.checkpoint._safetensors import (
    check_regular as check_regular,
    open_file,
    replacing as replacing,
    write_file,
)
from rmtjax.checkpoint._tensors import Entry as Entry, parse_json, Tensors as Tensors

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"


def _find_index(folder: Path) -> Path | None:
    """The index of a folder of shards; None where it has none."""
    found = sorted(folder.glob(f"*{INDEX}"))
    usual = folder / f"model{INDEX}"
    if len(found) > 1 and usual not in found:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{str(folder)!r} has several indexes: give the path of one of {names}.")
    return usual if usual in found else next(iter(found), None)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor to shard, as an index tells it."""
    refuse = lambda cause: ValueError(
        f"cannot read {str(path)!r}: {cause}. Copy or download it again."
    )
    if not path.is_file():
        raise refuse("it is no regular file")
    try:
        told = parse_json(path.read_bytes())
    except ValueError as error:
        raise refuse(f"it is no JSON ({error})") from error
    shards = told.get("weight_map") if isinstance(told, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise refuse("it has no `weight_map` of names to files")
    return shards


def _check_shard(folder: Path, name: str) -> Path:
    """The path of a shard, which lies in the folder and nowhere else."""
    path = folder / name
    if not name.isprintable() or "/" in name or "\\" in name or not name.endswith(SUFFIX):
        raise ValueError(
            f"the index in {str(folder)!r} names the shard {name!r}, and may only name "
            f"{SUFFIX} files of its own folder: do not trust it."
        )
    if name not in os.listdir(folder) or not path.exists():
        raise ValueError(f"{str(folder)!r} lacks its shard {name!r}: copy or download it again.")
    root = folder.resolve()
    if root.parent.name == "snapshots":  # the cache of Hugging Face links to ../../blobs
        root = root.parents[1]
    if not path.resolve().is_relative_to(root):
        raise ValueError(
            f"the shard {name!r} links out of {str(folder)!r}: copy the file in its place, if you "
            "trust the link."
        )
    return path


def _check_index(folder: Path, told: Mapping[str, str] | None, placed: Mapping[str, str]) -> None:
    """Refuses an index that does not tell just what the shards have."""
    if told is None:
        return
    for name in [*told, *placed]:
        if told.get(name) != placed.get(name):
            raise ValueError(
                f"the index of {str(folder)!r} places the tensor {name!r} in {told.get(name)!r}, "
                f"and it is in {placed.get(name)!r}: download both again."
            )


@contextlib.contextmanager
def _open_shards(folder: Path, index: Path | None) -> Iterator[Tensors]:
    """Several files as one checkpoint; the index, where there is one, names every tensor."""
    told = None if index is None else _read_index(index)
    names = {path.name for path in folder.glob(f"*{SUFFIX}")} if told is None else {*told.values()}
    paths = [_check_shard(folder, name) for name in sorted(names)]
    homes, entries, metadata = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for path in paths:
            shard = stack.enter_context(open_file(path))
            for name, entry in shard.entries.items():
                if name in homes:
                    raise ValueError(
                        f"{str(path)!r} and {str(homes[name].path)!r} both have the tensor "
                        f"{name!r}: remove the one that does not belong there."
                    )
                homes[name], entries[name] = shard, entry
            metadata |= shard.metadata
        _check_index(folder, told, {name: shard.path.name for name, shard in homes.items()})
        read = lambda name: homes[name].read(name)
        files = (*paths, *([] if index is None else [index]))
        yield Tensors(folder, "safetensors", entries, metadata, read, files)


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[Tensors]:
    """Opens a checkpoint and reads what it holds, but no tensor of it.

    Args:
      path: A .safetensors file; a folder of such files, with an index or without; the index
        itself; a folder that orbax wrote: a tree, or a step with one tree among its items.

    Yields:
      `Tensors`, which can be read within the context.

    Raises:
      ValueError: The file is damaged or hostile, or nothing of these.
      FileNotFoundError: There is nothing at `path`.
    """
    path = Path(path)
    if path.name.endswith(INDEX):
        opened = _open_shards(path.parent, path)
    elif not path.is_dir():
        opened = open_file(path)
    elif (index := _find_index(path)) or any(path.glob(f"*{SUFFIX}")):
        opened = _open_shards(path, index)
    else:
        opened = open_folder(path)
    with opened as tensors:
        yield tensors


def check_target(tensors: Tensors, path: str | os.PathLike[str], name: str) -> None:
    """Refuses to write over a file that is read, or into the folder that it is read from.

    Args:
      tensors: What is read.
      path: Where is to be written.
      name: What the path is called where it was given.
    """
    folder, last = os.path.split(os.path.abspath(path))
    # As written, without its links, and without those of its folder: a shard may be a link.
    places = {
        Path(folder, last),
        Path(os.path.realpath(path)),
        Path(os.path.realpath(folder), last),
    }
    sources = {Path(os.path.abspath(tensors.path)), Path(os.path.realpath(tensors.path))}
    inside = any(sources & {place, *place.parents} for place in places)
    same = os.path.exists(path) and any(os.path.samefile(path, file) for file in tensors.files)
    if inside or same:
        raise ValueError(
            f"{name} must not be the input, nor lie in it, got {os.fspath(path)!r} for "
            f"{str(tensors.path)!r}: the input is read while the output is written."
        )


def write_tensors(
    path: str | os.PathLike[str],
    entries: Mapping[str, Entry],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a .safetensors file a tensor at a time; what is at `path` stays until all is written.

    Args:
      path: Of the file. A link there is followed, and stays.
      entries: Name to shape and dtype of each tensor.
      read: `read(name)` gives the tensor, of just that shape and dtype.
      metadata: Texts to keep with it.

    Raises:
      ValueError: A dtype is none of the format, a tensor is not as told, or something else than
        a regular file is at `path`.
    """
    write_file(Path(path), entries, read, metadata)
