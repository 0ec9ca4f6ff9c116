"""Singular directions of kernels in the memory of the host, found in little room.

Those of the shorter side are eigenvectors of the Gram matrix in float64, which tells apart what
differs in float32; the others follow from the kernel. A kernel that can be read again is not in
memory while the Gram matrix of its last matrix, of most kernels the only one, is decomposed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rmtjax._axes import KernelAxes, to_matrices
from rmtjax.spectra._spectrum import lift
from rmtjax.spectra._subspace_iteration import block_size, leading, pays
from rmtjax.spectra._values import gram

Read = Callable[[], Any]  # gives the kernel, at each call


def _tall(matrix: np.ndarray) -> np.ndarray:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _iterated(matrix: np.ndarray, rank: int) -> np.ndarray | None:
    """The first vectors of the shorter side, where iteration is cheaper and finds them."""
    block = block_size(rank)
    if not (pays(block, matrix.shape) and np.isfinite(matrix).all()):
        return None
    found = leading(lift(jnp.asarray(_tall(matrix))), rank, block)
    return np.asarray(found.vt[:rank].T) if found.converged else None


def eigenvectors(squares: np.ndarray, first: int, last: int) -> np.ndarray:
    """Those of a Gram matrix, in its place, from the `first` largest to the `last`, in float32."""
    from scipy.linalg import eigh  # comes with jax; loaded by those who need it

    if not np.isfinite(squares).all():
        return np.full((len(squares), last - first), np.nan, np.float32)
    chosen = len(squares) - last, len(squares) - first - 1
    # The driver that needs no room besides what it returns.
    options: Any = {"driver": "evr", "overwrite_a": True, "check_finite": False}
    _, vectors = eigh(squares, subset_by_index=chosen, **options)
    del squares
    return vectors[:, ::-1].astype(np.float32)


def _short_vectors(waiting: list[np.ndarray], directions: slice) -> np.ndarray:
    """Vectors of the shorter side of the matrix that waits first, which is let go."""
    first, last, _ = directions.indices(min(waiting[0].shape))
    found = None if first else _iterated(waiting[0], last)
    if found is None:  # the matrix is gone when its Gram matrix is decomposed
        return eigenvectors(gram(_tall(waiting.pop(0)), np.float64), first, last)
    waiting.pop(0)
    return found


def _map_matrices(cut: Callable, read: Read, axes: KernelAxes, directions: slice) -> list:
    """`cut(matrix, vectors)` of each matrix, in float32, with those of its shorter side."""
    waiting = [*to_matrices(np.asarray(read()), axes)]
    vectors = []
    while waiting:
        vectors.append(_short_vectors(waiting, directions))
    matrices = to_matrices(np.asarray(read()), axes)
    with np.errstate(invalid="ignore", over="ignore"):  # told by what comes out
        pairs = zip(matrices, vectors, strict=True)
        return [cut(matrix.astype(np.float32, copy=False), own) for matrix, own in pairs]


def _stack(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(parts) if len(parts) > 1 else parts[0][None]  # one is not copied


def host_directions(read: Read, axes: KernelAxes, rank: int) -> tuple[np.ndarray, ...]:
    """The first `rank` singular directions of each matrix of a kernel, as (u, s, vt) in float32.

    Those of the longer side are A v / s, those of the shorter orthonormal. NaN where not finite.
    """

    def cut(matrix, short):
        long = _tall(matrix) @ short
        s = np.sqrt(np.einsum("ij,ij->j", long, long, dtype=np.float64)).astype(np.float32)
        long /= np.where(s > 0, s, np.inf)  # what is zero has no direction, and needs none
        return (long, s, short.T) if len(long) == len(matrix) else (short, s, long.T)

    u, s, vt = map(_stack, zip(*_map_matrices(cut, read, axes, slice(rank)), strict=True))
    return u, s, vt


def host_without_last(read: Read, axes: KernelAxes, rank: int) -> np.ndarray:
    """Each matrix of a kernel less its directions after the first `rank`, in float32.

    For more than half of them: fewer are found.
    """

    def cut(matrix, short):
        last = (_tall(matrix) @ short) @ short.T
        last = last if len(last) == len(matrix) else last.T
        return np.subtract(matrix, last, out=last)

    return _stack(_map_matrices(cut, read, axes, slice(rank, None)))
