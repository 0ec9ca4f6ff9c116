r"""Spectra and singular vectors by NumPy and SciPy, from Gram matrices in the memory of the host.

In float64 the products of float32 entries are exact, and an eigenvalue is off by about
$2^{-53} \lambda_1$ times a small multiple of p. That is less than the error of singular values in
float32, which is $2^{-24} s_1$, down to $\lambda_k = 10^{-12} \lambda_1$. Kernels of float64 are
not decomposed here: squared, their small values would drown in the rounding of the large ones.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np
import threadpoolctl

from rmtjax._axes import KernelAxes, MatrixView, to_matrices, Views
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


@contextlib.contextmanager
def one_blas_thread_each() -> Iterator[ThreadPoolExecutor]:
    """Opens a pool of as many threads as BLAS has, and gives BLAS one thread in each."""
    blas = threadpoolctl.ThreadpoolController().select(user_api="blas")
    limit = lambda: blas.limit(limits=1)
    # Limits are of the whole process. Of two that overlap, the first to end would lift the other.
    with _limiting:
        most = max((library.num_threads or 0 for library in blas.lib_controllers), default=0)
        # Some libraries limit the thread that asks, so each thread of the pool asks too.
        with limit(), ThreadPoolExecutor(most or os.cpu_count() or 1, initializer=limit) as pool:
            yield pool


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


def _chunks(views: Views) -> list[tuple[int, list[tuple[str, int]]]]:
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


def _live_sides(matrices: np.ndarray) -> np.ndarray:
    """Returns how many rows and columns of each matrix of a stack are not zero, (stack, 2)."""
    # A matrix at a time, so that a stack needs no more memory.
    count = lambda present: [np.count_nonzero(present.any(axis)) for axis in (1, 0)]
    return np.array([count(matrix != 0) for matrix in matrices], np.int32).reshape(-1, 2)


def squared_singular_values(views: Views) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the squared singular values of kernels, (stack, p), descending, and live sides.

    The live sides are the numbers of rows and columns that are not zero, (stack, 2).
    """
    # Before the pool: a leaf may run code of its user's when it becomes an array.
    arrays = {path: np.asarray(view.leaf) for path, view in views.items()}

    def decompose(places: list[tuple[str, int]], find: Callable) -> np.ndarray:
        # In the pool: matrices of some layouts are copies, which are dropped after their turn.
        talls = {path: _talls(arrays[path], views[path].axes) for path, _ in places}
        return _squared_values([talls[path][index] for path, index in places], find)

    chunks = _chunks(views)
    large = [places for columns, places in chunks if columns >= _LARGE or len(chunks) == 1]
    small = [places for _, places in chunks[len(large) :]]
    # One after another, in place and with all threads.
    in_place = lambda talls, dtype: np.stack([eigenvalues(gram(tall, dtype)) for tall in talls])
    values = [decompose(places, in_place) for places in large]
    if small:
        with one_blas_thread_each() as pool:
            values += pool.map(lambda places: decompose(places, _by_numpy), small)
    squared = {path: np.empty((view.stack, view.short)) for path, view in views.items()}
    for places, rows in zip(large + small, values, strict=True):
        for (path, index), row in zip(places, rows, strict=True):
            squared[path][index] = row[::-1]
    live = {p: _live_sides(to_matrices(arrays[p], view.axes)) for p, view in views.items()}
    return {path: (squared[path], live[path]) for path in views}


def _talls(kernel: Any, axes: KernelAxes) -> np.ndarray:
    """Returns the matrices of a kernel with no fewer rows than columns; usually as views."""
    stack = to_matrices(np.asarray(kernel), axes)
    return stack if stack.shape[1] >= stack.shape[2] else stack.mT


def _short_vectors(waiting: list[np.ndarray], first: int, last: int, block: int | None):
    """Takes a matrix from the list, and returns singular vectors of its shorter side."""
    if block is not None and np.isfinite(waiting[0]).all():
        result = leading(lift(jnp.asarray(waiting[0])), last, block)
        if result.converged:
            waiting.pop(0)
            return np.asarray(result.vt[:last].T)
    # Popped in the call: the matrix is freed before its Gram matrix is decomposed.
    return eigenvectors(gram(waiting.pop(0), np.float64), first, last)


def _map_talls(cut: Callable, view: MatrixView, first: int, last: int, block: int | None) -> Any:
    """Returns stacks of what `cut(matrix, vectors)` makes of each matrix, tall and in float32."""
    waiting = [*_talls(view.leaf, view.axes)]
    vectors = [_short_vectors(waiting, first, last, block) for _ in range(view.stack)]
    # Read again, if the kernel is in a file. It was not kept during the decompositions.
    talls = (tall.astype(np.float32, copy=False) for tall in _talls(view.leaf, view.axes))
    with np.errstate(invalid="ignore", over="ignore"):  # seen in the results
        parts = map(list, zip(*map(cut, talls, vectors), strict=True))
    # A single one may be large, and is not copied.
    return [np.stack(arrays) if len(arrays) > 1 else arrays[0][None] for arrays in parts]


def directions(view: MatrixView, rank: int, block: int | None) -> tuple[np.ndarray, ...]:
    """Returns the first singular directions (u, s, vt) of each matrix of a kernel, in float32.

    Vectors of the shorter side are orthonormal; those of the longer side are A v / s. NaN where
    the kernel is not finite. With a `block`, subspace iteration is tried first. The kernel is read
    twice, and is not in memory while its last Gram matrix is decomposed.
    """

    def cut(tall, short):
        long = tall @ short
        s = np.sqrt(np.einsum("ij,ij->j", long, long, dtype=np.float64)).astype(np.float32)
        long /= np.where(s > 0, s, np.inf)  # a zero direction has no vector, and needs none
        return long, s, short

    long, s, short = _map_talls(cut, view, 0, rank, block)
    u, v = (long, short) if view.rows >= view.columns else (short, long)
    return u, s, v.mT


def without_last(view: MatrixView, rank: int) -> np.ndarray:
    """Returns each matrix of a kernel less its directions after the first `rank`, in float32.

    For ranks above half of the directions: fewer vectors are found and held.
    """

    def cut(tall, short):
        last = (tall @ short) @ short.T
        return (np.subtract(tall, last, out=last),)

    (lower,) = _map_talls(cut, view, rank, view.short, None)
    return lower if view.rows >= view.columns else lower.mT
