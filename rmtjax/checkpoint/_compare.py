"""Compares the tensors of two checkpoints, one at a time."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmtjax._axes import factored_axes, Factors, is_factors, kernel_shape
from rmtjax._modes import in_usual_modes
from rmtjax._progress import Progress, showing
from rmtjax.checkpoint._manifest import read_manifest
from rmtjax.checkpoint._open import open_tensors
from rmtjax.checkpoint._tensor_names import find_leaves
from rmtjax.checkpoint._tensors import FilePath
from rmtjax.planning import merge

_BLOCK = 2**22  # entries that are held in float64 at once


class Drift(NamedTuple):
    r"""Tells how far an array $b$ is from the array $a$ that it was.

    Attributes:
      path: The path of the leaf; of outputs, their place in what the model returns.
      shape: The shape; None for outputs of batches of several shapes.
      relative: $\|b - a\|_F / \|a\|_F$; infinite for an array that was all zero.
      cosine: $\langle a, b \rangle / (\|a\|_F \|b\|_F)$ of all entries; of outputs, the mean over
        the vectors along the last axis. 1 where both are zero, and NaN where one of them is.
      largest: $\max |b - a|$.

    Examples:
      >>> import jax.numpy as jnp, rmtjax, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     paths = f"{folder}/a.safetensors", f"{folder}/b.safetensors"
      ...     for path, value in zip(paths, (1.0, 2.0)):
      ...         rmtjax.checkpoint.save(path, {"kernel": jnp.full((4, 4), value)})
      ...     (drift,) = rmtjax.checkpoint.compare_files(*paths).rows
      >>> drift.relative, round(drift.cosine, 3), drift.largest
      (1.0, 1.0, 1.0)
    """

    path: str
    shape: tuple[int, ...] | None
    relative: float
    cosine: float
    largest: float


class Comparison(NamedTuple):
    """Holds how far two checkpoints are from one another.

    Attributes:
      rows: A `Drift` for each leaf that both have, in the order of the first.
      unmatched: Paths of the leaves that only one has, or both in other shapes, or that are not
        read as numbers. Nothing is told of them.

    Examples:
      >>> import jax.numpy as jnp, rmtjax, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     paths = f"{folder}/a.safetensors", f"{folder}/b.safetensors"
      ...     rmtjax.checkpoint.save(paths[0], {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)})
      ...     rmtjax.checkpoint.save(paths[1], {"kernel": jnp.ones((4, 4))})
      ...     found = rmtjax.checkpoint.compare_files(*paths)
      >>> [row.path for row in found.rows], found.unmatched
      (['kernel'], ('bias',))
    """

    rows: tuple[Drift, ...]
    unmatched: tuple[str, ...]


class Sums:
    """Sums over the entries of two arrays that come in parts, in float64."""

    def __init__(self):
        self.before = self.after = self.inner = self.moved = self.largest = 0.0

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Adds the entries of a part of both."""
        for one, other in _blocks(before, after):
            # Masks have infinities, whose difference would be NaN.
            differ = (one != other) & ~(np.isnan(one) & np.isnan(other))
            moved = np.subtract(other, one, out=np.zeros_like(one), where=differ)
            finite = np.isfinite(one) | differ
            one, other = (np.where(finite, part, 0.0) for part in (one, other))
            self.before += float(one @ one)
            self.after += float(other @ other)
            self.inner += float(one @ other)
            self.moved += float(moved @ moved)
            self.largest = float(np.maximum(self.largest, np.abs(moved).max()))  # NaN stays

    @property
    def relative(self) -> float:
        """The norm of the change over that of the first."""
        if not self.before:
            return float(np.inf) if self.moved else 0.0
        return float(np.sqrt(self.moved / self.before))

    @property
    def cosine(self) -> float:
        """The cosine of the angle between both."""
        norms = np.sqrt(self.before) * np.sqrt(self.after)
        if not norms:
            return float(np.nan) if self.moved else 1.0
        return float(self.inner / norms)


def _blocks(before: np.ndarray, after: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    one, other = np.ravel(before), np.ravel(after)
    for start in range(0, one.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        yield one[part].astype(np.float64), other[part].astype(np.float64)


def _is_read(leaf: Any) -> bool:
    """Returns True for a leaf whose entries are real numbers; float4 and float6 are packed."""
    parts = jax.tree.leaves(leaf)
    kinds = {part.dtype.kind for part in parts}  # those of ml_dtypes have the kind "V"
    packed = any(part.tensors.entries[part.name].is_packed for part in parts)
    return not packed and kinds <= set("biufV")


def _match(one: Any, other: Any) -> bool:
    return kernel_shape(one) == kernel_shape(other) and _is_read(one) and _is_read(other)


def _read(leaf: Any) -> np.ndarray:
    """Reads a leaf; of a kernel in parts, their product."""
    if not is_factors(leaf):
        return np.asarray(leaf)
    wide = lambda part: np.asarray(part).astype(np.promote_types(part.dtype, np.float32))
    parts: Any = jax.tree.map(wide, leaf)
    if not isinstance(parts, Factors):
        dense: Any = merge({"leaf": jax.tree.map(jnp.asarray, parts)})
        return np.asarray(dense["leaf"])
    # NumPy keeps float64, which may be switched off in JAX.
    stack = parts.left.shape[: len(factored_axes(parts).batch)]
    left = parts.left.reshape(*stack, -1, parts.left.shape[-1])
    right = parts.right.reshape(*stack, left.shape[-1], -1)
    return np.matmul(left, right).reshape(kernel_shape(parts))


@in_usual_modes
def compare_files(before: FilePath, after: FilePath, *, progress: Progress = None) -> Comparison:
    r"""Tells how far the tensors of a checkpoint are from those of another, one at a time.

    Of a kernel in factors, the product is compared, so a thin file may stand beside the dense one.

    Args:
      before, after: Two checkpoints of one model, as in `rmtjax.checkpoint.analyze_file`.
      progress: True shows the progress on stderr. A function `progress(done, total, path)` is
        called before each tensor.

    Returns:
      A `Comparison`.

    Raises:
      ValueError: No leaf has one path and one shape in both, or a file is damaged.
      OSError: A file cannot be read.

    Examples:
      >>> import jax.numpy as jnp, rmtjax, tempfile
      >>> kernel = jnp.diag(jnp.arange(1.0, 5.0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     paths = f"{folder}/a.safetensors", f"{folder}/b.safetensors"
      ...     rmtjax.checkpoint.save(paths[0], {"kernel": kernel})
      ...     rmtjax.checkpoint.save(paths[1], {"kernel": rmtjax.factorize_matrix(kernel, 3)})
      ...     (row,) = rmtjax.checkpoint.compare_files(*paths).rows
      >>> f"{row.relative:.3f} {row.cosine:.3f} {row.largest:.3f}"
      '0.183 0.983 1.000'
    """
    with open_tensors(before) as first, open_tensors(after) as second:
        ones, others = (find_leaves(t, read_manifest(t)) for t in (first, second))
        paths = [
            path for path, leaf in ones.items() if path in others and _match(leaf, others[path])
        ]
        if not paths:
            raise ValueError(
                f"{str(before)!r} and {str(after)!r} have no tensor of one name and shape, but "
                f"such as {[*ones, *others][:3]}: give two checkpoints of one model."
            )
        rows = []
        with showing(progress, "compare_files") as step:
            for place, path in enumerate(paths):
                step(place, len(paths), path)
                sums = Sums()
                sums.add(_read(ones[path]), _read(others[path]))
                shape = tuple(kernel_shape(ones[path]))
                rows.append(Drift(path, shape, sums.relative, sums.cosine, sums.largest))
    return Comparison(tuple(rows), tuple(sorted({*ones, *others} - {*paths})))
