"""Saves and loads moments of the inputs of kernels, as .safetensors files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rmtjax._types import check_type
from rmtjax.checkpoint._open import open_tensors, SUFFIX
from rmtjax.checkpoint._safetensors import write_tensors
from rmtjax.checkpoint._tensors import Entry, FilePath
from rmtjax.moments import Moment, Moments

_KEY, _FORMAT = "rmtjax.moments", 1  # in the metadata; raised when an older reader would misread it
_FIELDS = ("rows", "total", "second", "third", "fourth")
_KINDS = ("groups", "gradients")


def save_moments(path: FilePath, moments: Moments) -> None:
    """Saves moments with their options. After an error, nothing has changed on disk.

    Args:
      path: A name in .safetensors; an existing file is replaced.
      moments: From `rmtjax.linen.moments` or `rmtjax.nnx.moments`.

    Raises:
      ValueError: `path` has another ending.
      TypeError: `moments` are not moments.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax, tempfile
      >>> module, x = nn.Dense(3), jnp.eye(4)
      >>> moments = rmtjax.linen.moments(module, module.init(jax.random.key(0), x), [x])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rmtjax.checkpoint.save_moments(f"{folder}/moments.safetensors", moments)
      ...     both = moments + rmtjax.checkpoint.load_moments(f"{folder}/moments.safetensors")
      >>> int(both["kernel"].rows[0])
      8
    """
    check_type("moments", moments, Moments, "Collect them with `rmtjax.linen.moments`.")
    if Path(path).suffix != SUFFIX:
        raise ValueError(f"`path` must end in {SUFFIX}, got '{path}': give '{path}{SUFFIX}'.")
    arrays = {
        f"{kind}/{name}/{field}": np.asarray(getattr(moment, field))
        for kind in _KINDS
        for name, moment in getattr(moments, kind).items()
        for field in _FIELDS
    }
    options = {"names": moments.names, "centred": moments.centred, "shrinkage": moments.shrinkage}
    metadata = {_KEY: json.dumps({"format": _FORMAT, **options})}
    entries = {name: Entry.of(array) for name, array in arrays.items()}
    write_tensors(path, entries, arrays.items(), metadata)


def load_moments(path: FilePath) -> Moments:
    """Loads moments as NumPy arrays, with their options.

    Args:
      path: A file that `save_moments` has written.

    Raises:
      ValueError: The file holds no moments, or is damaged or of a newer format.
      OSError: The file cannot be read.

    Examples:
      >>> import jax.numpy as jnp, rmtjax, tempfile
      >>> moments = rmtjax.moments.Moments({}, {}, ())
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rmtjax.checkpoint.save_moments(f"{folder}/none.safetensors", moments)
      ...     len(rmtjax.checkpoint.load_moments(f"{folder}/none.safetensors"))
      0
    """
    with open_tensors(path) as tensors:
        text = tensors.metadata.get(_KEY)
        if text is None:
            raise ValueError(
                f"`path` '{path}' holds no moments: give a file that `save_moments` has written."
            )
        try:
            options = json.loads(text)
            if options["format"] > _FORMAT:
                raise ValueError(
                    f"format {options['format']} is newer than {_FORMAT}: upgrade rmtjax"
                )
            parts: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in _KINDS}
            for name in tensors.entries:
                kind, _, rest = name.partition("/")
                group, _, field = rest.rpartition("/")
                parts[kind].setdefault(group, {})[field] = tensors.read(name)
            found = {k: {n: Moment(**one) for n, one in part.items()} for k, part in parts.items()}
            names = tuple((str(path), str(group)) for path, group in options["names"])
            missing = min({group for _, group in names} - found["groups"].keys(), default=None)
            if missing is not None:
                raise ValueError(f"the sums of {missing!r} are missing")
            sums = found["groups"], found["gradients"]
            moments = Moments(*sums, names, centred=bool(options["centred"]))
            return moments.with_options(shrinkage=options["shrinkage"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the moments in '{path}' cannot be read: {error}. If damaged, save them again."
            ) from error


def check_moments(moments: Moments | None, leaves: Mapping[str, Any]) -> None:
    """Raises ValueError for moments of a model that is not in the file, by the paths."""
    stray = min((path for path in moments or () if path not in leaves), default=None)
    if stray is not None:
        some = ", ".join(map(repr, [*leaves][:3]))
        raise ValueError(
            f"`moments` has {stray!r}, which is not in the file, which has {some}. Collect the "
            "moments with the model of this file, in the tree that was saved."
        )
