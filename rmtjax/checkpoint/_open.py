"""Opens checkpoints in any layout on disk, and keeps outputs away from their inputs."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from os.path import abspath, realpath
from pathlib import Path

from rmtjax.checkpoint._orbax import open_folder
from rmtjax.checkpoint._safetensors import open_file
from rmtjax.checkpoint._tensors import FilePath, parse_object, reading, Tensors

SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"


def _find_index(folder: Path) -> Path | None:
    """Returns the index of a folder of shards; None if it has none."""
    # Hugging Face gives this name to the index of a model, and others to those of its variants.
    usual = folder / f"model{INDEX}"
    indexes = [usual] if usual.exists() else sorted(folder.glob(f"*{INDEX}"))
    if len(indexes) > 1:
        names = ", ".join(path.name for path in indexes)
        raise ValueError(f"{str(folder)!r} has several indexes: give the path of one of {names}.")
    return next(iter(indexes), None)


def _read_index(path: Path) -> dict[str, str]:
    """Returns the file name of the shard of each tensor, as the index gives it."""
    with reading(path, "an index of shards"):
        if not path.is_file():  # a pipe would never end
            raise ValueError("it is not a regular file")
        shards = parse_object(path.read_bytes()).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
            raise ValueError("it has no `weight_map` of names to files")
    return shards


def _check_shard(folder: Path, name: str) -> Path:
    """Returns the path of a shard, and checks that it is a file in the folder."""
    path = folder / name
    # An index comes with a download. It must not make us read files outside of the folder.
    if not name.isprintable() or "/" in name or "\\" in name or not name.endswith(SUFFIX):
        raise ValueError(
            f"the index in {str(folder)!r} names the shard {name!r}, and may only name {SUFFIX} "
            "files of its folder: do not trust it."
        )
    if not os.path.exists(path):  # unlike `Path.exists`, also for a name that is too long
        raise ValueError(f"{str(folder)!r} lacks its shard {name!r}: copy or download it again.")
    root = folder.resolve()
    # In the cache of Hugging Face, a file in snapshots/REVISION/ is a link to ../../blobs/.
    if root.parent.name == "snapshots":
        root = root.parents[1]
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"the shard {name!r} links out of {str(folder)!r}: copy it, if trusted.")
    return path


@contextlib.contextmanager
def _open_shards(folder: Path, index: Path | None) -> Iterator[Tensors]:
    """Opens several files as one checkpoint. An index decides which tensor is in which file."""
    named = _read_index(index) if index else {}
    names = {*named.values()} if index else {path.name for path in folder.glob(f"*{SUFFIX}")}
    paths = [_check_shard(folder, name) for name in sorted(names)]
    shards, entries, metadata = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for path in paths:
            shard = stack.enter_context(open_file(path))
            for name, entry in shard.entries.items():
                # A copy that is left over in another shard does not count.
                if named.get(name, path.name) != path.name:
                    continue
                if name in shards:
                    raise ValueError(
                        f"{str(path)!r} and {str(shards[name].path)!r} both have the tensor "
                        f"{name!r}: remove the one that does not belong there."
                    )
                shards[name], entries[name] = shard, entry
            metadata |= shard.metadata
        missing = min(named.keys() - shards.keys(), default=None)
        if missing is not None:
            raise ValueError(
                f"the index of {str(folder)!r} places the tensor {missing!r} in "
                f"{named[missing]!r}, which does not have it: download both again."
            )
        read = lambda name: shards[name].read(name)
        files = (*paths, index) if index else (*paths,)
        yield Tensors(folder, "safetensors", entries, metadata, read, files)


def open_tensors(path: FilePath) -> AbstractContextManager[Tensors]:
    """Opens a checkpoint within a context, and reads the entries of its tensors, but no data.

    The path is that of a .safetensors file, of an index of such files, of their folder, or of a
    folder that orbax wrote: a tree, or a step with one tree among its items.
    """
    path = Path(path)
    if path.name.endswith(INDEX):
        return _open_shards(path.parent, path)
    if not path.is_dir():
        return open_file(path)
    index = _find_index(path)
    if index or any(path.glob(f"*{SUFFIX}")):
        return _open_shards(path, index)
    return open_folder(path)


def check_target(tensors: Tensors, path: FilePath, name: str) -> None:
    """Raises ValueError if an output would replace the input, or be in its folder."""
    folder, last = os.path.split(abspath(path))
    # A shard may be a link, and so may the folder of the output.
    places = {Path(folder, last), Path(realpath(path)), Path(realpath(folder), last)}
    sources = {Path(abspath(tensors.path)), Path(realpath(tensors.path))}
    inside = any(sources & {place, *place.parents} for place in places)
    same = os.path.exists(path) and any(os.path.samefile(path, file) for file in tensors.files)
    if inside or same:
        raise ValueError(
            f"{name} must not be the input, nor be in it, got {str(path)!r}: give another path."
        )
