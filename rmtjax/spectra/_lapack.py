r"""Spectra and singular vectors by NumPy and SciPy, from Gram matrices in the memory of the host.

In float64 the products of float32 entries are exact, and an eigenvalue is off by about
$2^{-53} \lambda_1$ times a small multiple of p. That is less than the error of singular values in
float32, which is $2^{-24} s_1$, down to $\lambda_k = 10^{-12} \lambda_1$. Kernels of float64 are
not decomposed here: squared, their small values would drown in the rounding of the large ones.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
from threadpoolctl import ThreadpoolController

from rmtjax._axes import KernelAxes, MatrixView, to_matrices
from rmtjax.spectra._spectrum import lift
from rmtjax.spectra._subspace_iteration import leading

# So many entries are squared at a time. A cast of all of a long matrix would double its memory.
_PART = 2**20
# From so many columns on, BLAS uses all threads well on one matrix, which fills the memory.
_LARGE = 2048
# NumPy releases Python's lock for more than 500 columns, counted over a stack.
_UNLOCKED = 512
# Largest over smallest eigenvalue up to which squares in float32 give four digits of the smallest.
_MODERATE = 2048
_SMALL = 1e-30  # squares below may be less than the smallest normal float32

_limiting = threading.Lock()


def _parts(tall: np.ndarray, dtype: type) -> Iterator[np.ndarray]:
    """Yields rows of a matrix with no fewer rows than columns, cast a part at a time."""
    step = max(1, _PART // tall.shape[1])
    for first in range(0, len(tall), step):
        yield tall[first : first + step].astype(dtype, order="C", copy=False)


def gram(tall: np.ndarray, dtype: type) -> np.ndarray:
    """Returns the lower triangle of A^T A, and zeros above it, by `syrk`."""
    from scipy.linalg import blas  # SciPy comes with JAX; those who need it load it

    squares = np.zeros((tall.shape[1],) * 2, dtype, order="F")
    add: Any = blas.get_blas_funcs("syrk", dtype=squares.dtype)
    for rows in _parts(tall, dtype):
        squares = add(1, rows.T, beta=1, c=squares, overwrite_c=True, lower=True)
    return squares


def eigenvalues(squares: np.ndarray) -> np.ndarray:
    """Returns the eigenvalues of a lower triangle, which is overwritten; ascending or NaN."""
    from scipy.linalg import eigvalsh

    if not np.isfinite(squares).all():
        return np.full(len(squares), np.nan)
    return eigvalsh(squares, driver="ev", overwrite_a=True, check_finite=False)


def eigenvectors(squares: np.ndarray, first: int, last: int) -> np.ndarray:
    """Returns eigenvectors `first` to `last`, from the largest on, in float32.

    The lower triangle is overwritten. Driver evr needs no memory besides what it returns.
    """
    from scipy.linalg import eigh

    if not np.isfinite(squares).all():
        return np.full((len(squares), last - first), np.nan, np.float32)
    subset = len(squares) - last, len(squares) - first - 1
    options: Any = {"driver": "evr", "overwrite_a": True, "check_finite": False}
    _, vectors = eigh(squares, subset_by_index=subset, **options)
    del squares
    return vectors[:, ::-1].astype(np.float32)


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


@contextlib.contextmanager
def _one_blas_thread_each() -> Iterator[ThreadPoolExecutor]:
    """Opens a pool of as many threads as BLAS has, and gives BLAS one thread in each."""
    limit = lambda: _blas().limit(limits=1)
    counts = [library.num_threads or 0 for library in _blas().lib_controllers]
    # Limits are of the whole process. Of two that overlap, the first to end would lift the other.
    with _limiting:
        count = max(counts, default=0) or os.cpu_count() or 1
        # Some libraries limit the thread that asks, so each thread of the pool asks too.
        with limit(), ThreadPoolExecutor(count, initializer=limit) as pool:
            yield pool


def _by_scipy(talls: list[np.ndarray], dtype: type) -> np.ndarray:
    """Returns eigenvalues of Gram matrices one after another, in place, with all threads."""
    return np.stack([eigenvalues(gram(tall, dtype)) for tall in talls])


def _by_numpy(talls: list[np.ndarray], dtype: type) -> np.ndarray:
    """Returns eigenvalues of Gram matrices by functions that let other threads go on."""
    # SciPy's wrappers hold Python's lock. Overflow is seen in the results, as NaN.
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.stack([sum(rows.T @ rows for rows in _parts(tall, dtype)) for tall in talls])
    finite = np.isfinite(squares).all(axis=(1, 2))
    squares[~finite] = 0
    values = np.linalg.eigvalsh(squares)
    values[~finite] = np.nan
    return values


def _squared_values(talls: list[np.ndarray], find: Callable) -> np.ndarray:
    """Returns squared singular values, from Gram matrices in the dtype that they need."""
    rows, columns = talls[0].shape
    if rows < 2 * columns:
        return find(talls, np.float64)
    # The law of a long matrix has no small eigenvalues, so float32 does unless signal is large.
    values = find(talls, np.float32).astype(np.float64)
    smallest, largest = values[:, 0], values[:, -1]
    doubtful = ~((largest > _SMALL) & (largest <= _MODERATE * smallest))
    if doubtful.any():
        again = [tall for tall, doubt in zip(talls, doubtful, strict=True) if doubt]
        values[doubtful] = find(again, np.float64)
    return values


def _chunks(views: Mapping[str, MatrixView]) -> list[tuple[int, list[tuple[str, int]]]]:
    """Returns places (path, index) of matrices that share a call, with their columns.

    The longest calls come first, so that no thread is left with one at the end.
    """
    groups: dict[tuple[int, bool], list[tuple[str, int]]] = {}
    for path, view in views.items():
        group = groups.setdefault((view.short, view.long >= 2 * view.short), [])
        group += [(path, index) for index in range(view.stack)]
    chunks = []
    for (columns, _), places in sorted(groups.items(), reverse=True):
        size = -(-_UNLOCKED // columns)
        chunks += [(columns, places[i : i + size]) for i in range(0, len(places), size)]
    return chunks


def squared_singular_values(views: Mapping[str, MatrixView]) -> dict[str, np.ndarray]:
    """Returns the squared singular values of kernels as arrays (stack, p), descending."""
    # Before the pool: a leaf may run code of its own when it becomes an array.
    arrays = {path: np.asarray(view.leaf) for path, view in views.items()}

    def decompose(places: list[tuple[str, int]], find: Callable) -> np.ndarray:
        # In the pool: of some layouts the matrices are copies, and are dropped after their turn.
        talls = {path: _talls(arrays[path], views[path].axes) for path, _ in places}
        return _squared_values([talls[path][index] for path, index in places], find)

    chunks = _chunks(views)
    large = [places for columns, places in chunks if columns >= _LARGE or len(chunks) == 1]
    small = [places for _, places in chunks[len(large) :]]
    values = [decompose(places, _by_scipy) for places in large]
    if small:
        with _one_blas_thread_each() as pool:
            values += pool.map(lambda places: decompose(places, _by_numpy), small)
    squared = {path: np.empty((view.stack, view.short)) for path, view in views.items()}
    for places, rows in zip(large + small, values, strict=True):
        for (path, index), row in zip(places, rows, strict=True):
            squared[path][index] = row[::-1]
    return squared


def _stack_of(view: MatrixView) -> np.ndarray:
    return to_matrices(np.asarray(view.leaf), view.axes)


def _talls(kernel: np.ndarray, axes: KernelAxes) -> np.ndarray:
    """Returns the matrices of a kernel, with no fewer rows than columns; usually as views."""
    stack = to_matrices(kernel, axes)
    return stack if stack.shape[1] >= stack.shape[2] else stack.mT


def _tall(matrix: np.ndarray) -> np.ndarray:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _short_vectors(
    waiting: list[np.ndarray], first: int, last: int, block: int | None
) -> np.ndarray:
    """Takes a matrix from the list; returns singular vectors of its shorter side."""
    if block is not None and np.isfinite(waiting[0]).all():
        result = leading(lift(jnp.asarray(_tall(waiting[0]))), last, block)
        if result.converged:
            waiting.pop(0)
            return np.asarray(result.vt[:last].T)
    # Popped in the call: the matrix is freed before its Gram matrix is decomposed.
    return eigenvectors(gram(_tall(waiting.pop(0)), np.float64), first, last)


def _map_matrices(
    cut: Callable, view: MatrixView, first: int, last: int, block: int | None = None
) -> list[Any]:
    """Applies `cut(matrix, vectors)` to each matrix in float32 and vectors of its shorter side."""
    waiting = [*_stack_of(view)]
    vectors = []
    while waiting:
        vectors.append(_short_vectors(waiting, first, last, block))
    # Read again, if the kernel is in a file. It was not kept during the decompositions.
    with np.errstate(invalid="ignore", over="ignore"):  # seen in the results
        pairs = zip(_stack_of(view), vectors, strict=True)
        return [cut(matrix.astype(np.float32, copy=False), short) for matrix, short in pairs]


def _stack(parts: list[np.ndarray]) -> np.ndarray:
    return np.stack(parts) if len(parts) > 1 else parts[0][None]  # one is not copied


def directions(view: MatrixView, rank: int, block: int | None) -> tuple[np.ndarray, ...]:
    """Returns the first singular directions (u, s, vt) of each matrix of a kernel, in float32.

    Vectors of the shorter side are orthonormal; those of the longer side are A v / s. NaN where
    the kernel is not finite.

    Args:
      view: The kernel. It is read twice, and not in memory while its last Gram matrix is
        decomposed.
      rank: Number of directions.
      block: Size of the block for subspace iteration, tried first; None for none.
    """

    def cut(matrix, short):
        long = _tall(matrix) @ short
        s = np.sqrt(np.einsum("ij,ij->j", long, long, dtype=np.float64)).astype(np.float32)
        long /= np.where(s > 0, s, np.inf)  # a zero direction has no vector, and needs none
        return (long, s, short.T) if len(long) == len(matrix) else (short, s, long.T)

    u, s, vt = map(list, zip(*_map_matrices(cut, view, 0, rank, block), strict=True))
    return _stack(u), _stack(s), _stack(vt)


def without_last(view: MatrixView, rank: int) -> np.ndarray:
    """Returns each matrix of a kernel less its directions after the first `rank`, in float32.

    For ranks above half of the directions: fewer vectors are found and held.
    """

    def cut(matrix, short):
        last = (_tall(matrix) @ short) @ short.T
        last = last if len(last) == len(matrix) else last.T
        return np.subtract(matrix, last, out=last)

    return _stack(_map_matrices(cut, view, rank, view.short))
