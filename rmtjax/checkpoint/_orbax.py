"""Reads the leaves of a folder that orbax wrote, one at a time, and writes such folders."""

import contextlib
import errno
import functools
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rmtjax.checkpoint._tensors import Entry, KEY, parse_object, reading, Tensors, UnsupportedError
from rmtjax.planning import path_name

# Orbax compresses with zstd, of which a block of 4 bytes or more holds at most 128 KiB.
MAX_RATIO = 2**15


def _find_tree(path: Path) -> Path:
    """Returns the folder of the tree: the given one, or the only tree among the items of a step."""
    if (path / "_METADATA").exists():
        return path
    items = sorted(file.parent for file in path.glob("*/_METADATA"))
    if len(items) == 1:
        return items[0]
    # Either several items of one step, or the steps of a run.
    items = items or sorted({file.parents[1] for file in path.glob("*/*/_METADATA")})
    if items:
        names = ", ".join(item.name for item in items)
        raise ValueError(f"{str(path)!r} has several trees: give the path of one of them, {names}.")
    raise ValueError(
        f"{str(path)!r} is not a checkpoint: it has neither a .safetensors file nor the "
        "`_METADATA` that orbax writes. Give the path of a file, or of the folder of one step."
    )


def _read_texts(folder: Path) -> dict[str, str]:
    """Returns the texts that were saved with a tree."""
    # Not by orbax: from a damaged file it returns no texts, and no error.
    path = folder / "_CHECKPOINT_METADATA"
    fields = parse_object(path.read_bytes()) if path.is_file() else {}
    texts = fields.get("custom_metadata") or {}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _find_arrays(tree: Any, ours: bool, size: int) -> dict[str, tuple[Entry, Any]]:
    """Returns the entry and the keys of each array by path; the files have `size` bytes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # Orbax saves each leaf of an `nnx.State` in a dictionary with the key "value". We do not.
    box = jax.tree_util.DictKey("value")
    boxed = not ours and all(key[-1:] == (box,) and len(key) > 1 for key, _ in leaves)
    arrays = {}
    for key, leaf in leaves:
        # Texts and empty nodes are leaves as well.
        if getattr(leaf, "shape", None) is None or getattr(leaf, "dtype", None) is None:
            continue
        name, entry = path_name(key[:-1] if boxed else key), Entry.of(leaf)
        if name in arrays:
            raise UnsupportedError(f"two leaves have the path {name!r}: save it with other names")
        # Checked before the first read: tensorstore ends the process if it cannot allocate a chunk.
        chunk = getattr(getattr(leaf, "storage", None), "chunk_shape", None)
        for claimed in (entry, entry._replace(shape=tuple(chunk or ()))):
            if claimed.num_bytes > MAX_RATIO * size:
                raise ValueError(f"{name!r} claims {claimed}, and all files have {size} bytes")
        arrays[name] = entry, key
    return arrays


@contextlib.contextmanager
def open_folder(path: Path) -> Iterator[Tensors]:
    """Opens a folder that orbax wrote, as `open_tensors` describes."""
    # Imported late, because orbax takes longer to import than the rest of the package.
    import orbax.checkpoint as ocp
    from etils import epath  # the paths of orbax

    folder = _find_tree(path.absolute())
    # Damaged files make orbax, tensorstore and JSON raise errors of many types.
    damaged = functools.partial(reading, folder, "a checkpoint of orbax", Exception)
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        with damaged():
            texts = _read_texts(folder)
            tree = handler.metadata(epath.Path(folder)).tree
            size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
            leaves = _find_arrays(tree, KEY in texts, size)

        def read(name: str) -> np.ndarray:
            # Placeholders make orbax skip all other leaves.
            entry, wanted = leaves[name]
            only = lambda key, leaf: leaf if key == wanted else ocp.PLACEHOLDER
            item = jax.tree_util.tree_map_with_path(only, tree)
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            with damaged():
                args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy)
                restored = jax.tree.leaves(handler.restore(epath.Path(folder), args=args))
                array = np.asarray(next(leaf for leaf in restored if leaf is not ocp.PLACEHOLDER))
                if Entry.of(array) != entry:
                    raise ValueError(f"{name!r} is not {entry}")
            return array

        entries = {name: entry for name, (entry, _) in leaves.items()}
        yield Tensors(path, "orbax", entries, texts, read, (path,))


def save_folder(path: Path, tree: Any, metadata: Mapping[str, str]) -> None:
    """Saves a tree without empty arrays as a new folder; after an error there is none."""
    import orbax.checkpoint as ocp

    path = path.absolute()
    if path.exists():
        raise ValueError(f"`path` {str(path)!r} exists: remove it first, or give another one.")
    keys = [key for key, _ in jax.tree_util.tree_leaves_with_path(tree)]
    names = Counter(jax.tree_util.keystr(key, simple=True, separator=".") for key in keys)
    for name in names - Counter([*names]):
        raise ValueError(f"two leaves would be {name!r} for orbax: rename a key with a dot.")
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary,
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer,
    ):
        finished = Path(temporary) / path.name
        try:
            item = ocp.args.PyTreeSave(tree)
            checkpointer.save(finished, args=item, custom_metadata=dict(metadata))
        except ValueError as error:
            # What tensorstore raises for a full disk.
            if "RESOURCE_EXHAUSTED" in str(error):
                raise OSError(errno.ENOSPC, "no space left", str(path)) from error
            raise
        os.rename(finished, path)
