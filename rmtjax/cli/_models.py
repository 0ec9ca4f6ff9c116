"""Loads a model that a Python file builds, and data: what `moments` and `compare` run."""

import contextlib
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import numpy as np

from rmtjax import checkpoint, linen, nnx
from rmtjax.cli._arguments import UsageError
from rmtjax.moments import Moments
from rmtjax.planning import leaves_by_path


class Batches(list[tuple[np.ndarray, ...]]):
    """Batches of samples, with what one sample of a file looks like in words."""

    def __init__(self, named: Mapping[str, np.ndarray], size: int):
        arrays = list(named.values())
        starts = range(0, len(arrays[0]), size)
        super().__init__(tuple(array[start : start + size] for array in arrays) for start in starts)
        samples = (f"{name!r} {a.shape[1:]} {a.dtype}" for name, a in named.items())
        self.words = f"{len(arrays[0]):,} samples of {', '.join(samples)}"


@dataclass(frozen=True)
class Model:
    """A model with its parameters: of linen with its variables, or of nnx.

    Attributes:
      module: The module.
      variables: Those of a linen module; None for a model of nnx.
      source: What `--model` was.
    """

    module: Any
    variables: Any
    source: str

    @property
    def params(self) -> Any:
        """The tree of parameters."""
        return nnx.params(self.module) if self.variables is None else self.variables["params"]

    def moments(self, batches: Batches, **options: Any) -> Moments:
        """Returns the moments of the inputs of the kernels."""
        with _saying(f"the model of --model {self.source} fails on --data, {batches.words}"):
            if self.variables is None:
                return nnx.moments(self.module, batches, **options)
            return linen.moments(self.module, self.variables, batches, **options)

    def outputs_of(self, path: str, batches: Batches) -> Callable[..., Any]:
        """Returns a function that runs the model with the parameters of a checkpoint."""
        params = checkpoint.restore(path)
        stray = min({*leaves_by_path(params)} ^ {*leaves_by_path(self.params)}, default=None)
        if stray is not None:
            holder = repr(path) if stray in leaves_by_path(params) else f"--model {self.source}"
            raise ValueError(
                f"{path!r} does not have the parameters of --model {self.source}: only {holder} "
                f"has {stray!r}. Save the tree that the model runs with `rmtjax.checkpoint.save`."
            )
        if self.variables is not None:
            variables = {**self.variables, "params": params}
            run = jax.jit(lambda *batch: linen.apply(self.module, variables, *batch))
        else:
            run = nnx.replace(self.module, params)
            run.eval()

        words = f"fails with the tensors of {path!r} on --data, {batches.words}"

        def call(*batch):
            with _saying(f"the model of --model {self.source} {words}"), warnings.catch_warnings():
                # Outputs are compared, and those of factors that are multiplied out are right.
                warnings.filterwarnings("ignore", ".* multiplied out", UserWarning)
                return run(*batch)

        return call


@contextlib.contextmanager
def _saying(words: str) -> Iterator[None]:
    """Turns any error of the user's code into one line; errors of `rmtjax` stay as they are."""
    try:
        yield
    except Exception as error:
        cause = str(error)
        if isinstance(error, ValueError | TypeError) and cause.startswith("`"):
            raise
        line = next((line for line in cause.splitlines() if line.strip()), "no words")
        raise ValueError(f"{words}: {type(error).__name__}: {line}") from error


def _import_file(path: str) -> ModuleType:
    """Imports a file under a name of its own, with its folder first among those of modules."""
    name = f"_rmtjax_model_{os.path.splitext(os.path.basename(path))[0]}"
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importing_from(folder: str) -> Iterator[None]:
    """Puts a folder first among those that modules are imported from."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def load_model(source: str) -> Model:
    """Builds a model from "module:function" or "file.py:function".

    The function takes nothing. It returns `(module, variables)` of linen, or a model of nnx.
    """
    place, colon, name = source.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise UsageError(f"--model must be MODULE:FUNCTION or FILE.py:FUNCTION, got {source!r}.")
    is_file = place.endswith(".py")
    if is_file and not os.path.isfile(place):
        raise FileNotFoundError(f"--model: there is no file {place!r}: give FILE.py:FUNCTION.")
    folder = os.path.dirname(os.path.abspath(place)) if is_file else os.getcwd()
    with _importing_from(folder):
        if not is_file and importlib.util.find_spec(place.partition(".")[0]) is None:
            raise ModuleNotFoundError(
                f"--model: there is no module {place!r} here, nor among those installed: give the "
                "path of a file, as FILE.py:FUNCTION."
            )
        with _saying(f"--model {source}: the import fails"):
            module = _import_file(place) if is_file else importlib.import_module(place)
        build = getattr(module, name, None)
        if not callable(build):
            raise ValueError(f"--model: {place!r} has no function {name!r}: give one of its names.")
        with _saying(f"--model {source}: the function fails"):
            built = build()
    return _to_model(built, source)


def _to_model(built: Any, source: str) -> Model:
    """Returns what a function has built as a model; raises ValueError for anything else."""
    if isinstance(built, tuple):
        if len(built) == 2 and hasattr(built[1], "keys") and "params" in built[1]:
            return Model(*built, source)
        kinds = ", ".join(type(part).__name__ for part in built)
        raise ValueError(
            f"--model {source} returned a tuple of ({kinds}): return the module and its variables, "
            '{"params": tree}, or a model of nnx.'
        )
    try:
        nnx.params(built)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--model {source} returned {type(built).__name__}: return a linen module with its "
            "variables, as a tuple, or a model of nnx."
        ) from error
    return Model(built, None, source)


def load_batches(path: str, size: int) -> Batches:
    """Returns the batches of a .npy file, or of a .npz file with an array for each argument."""
    try:
        # Nothing is read of a .npy file before its batch is used. Pickled objects run code.
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        named = {path: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (EOFError, ValueError) as error:
        raise ValueError(
            f"--data {path!r} is not a file of arrays: write it with `numpy.save` or "
            "`numpy.savez`, without objects."
        ) from error
    arrays = list(named.values())
    shapes = ", ".join(str(array.shape) for array in arrays)
    counts = {array.shape[0] if array.ndim else None for array in arrays}
    if len(counts) != 1 or counts <= {None, 0}:
        raise ValueError(
            f"--data {path!r} has arrays of shapes {shapes or '(none)'}: the first axis must be "
            "that of the samples, as long in all of them and not 0."
        )
    return Batches(named, size)
