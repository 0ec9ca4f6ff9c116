"""The spectra of kernels in the memory of the host, several of which are decomposed at once.

As many as BLAS has threads, each of which then decomposes matrices of its own: those of
most networks are too small for several threads to share one.
"""

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from rmtjax._axes import KernelAxes, matrix_shape, to_matrices
from rmtjax._types import Spectrum
from rmtjax.spectra._values import eigenvalues, gram, PART, to_spectrum

# Of a matrix with so many columns all threads share the work, and one is in memory.
_LARGE = 2048
# NumPy lets go of Python's lock for more columns than 500, counted over a stack.
_FREE = 512
# Largest over smallest eigenvalue up to which squares in float32 have four digits of it or more.
_MODERATE = 2048
_SMALL = 1e-30  # squares under it may be less than normal in float32

_Result = TypeVar("_Result")
_Kernels = dict[str, tuple[Any, KernelAxes]]
# The paths and the places in their stacks of matrices that are alike.
_Chunk = list[tuple[str, int]]
# The eigenvalues of Gram matrices that are made in a dtype, ascending: (b, p).
_Find = Callable[[list[np.ndarray], type], np.ndarray]

# Who limits while others do would restore their limit; a rule may make a plan of its own.
_limiting = threading.RLock()


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


def _num_threads(libraries: Any) -> int:
    """The most that a BLAS has, or the processors where none tells."""
    told = [library.num_threads or 0 for library in libraries.lib_controllers]
    here = hasattr(os, "sched_getaffinity")  # of all processors those that are ours
    processors = len(os.sched_getaffinity(0)) if here else os.cpu_count()
    return max(told, default=0) or processors or 1


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as BLAS has, which has one in each meanwhile."""
    libraries = _libraries()
    limit = lambda: libraries.limit(limits=1)
    with _limiting:
        count = _num_threads(libraries)
        # Of the whole process with some libraries, of a thread with others.
        with limit():
            if libraries.lib_controllers and _num_threads(libraries) > 1:
                count = 1  # another thread has limited it, and keeps its limit
            with ThreadPoolExecutor(count, initializer=limit) as pool:
                yield pool


def _in_place(talls: list[np.ndarray], dtype: type) -> np.ndarray:
    """In little room, one after another, by all threads."""
    return np.stack([eigenvalues(gram(tall, dtype)) for tall in talls])


def _add_square(squares: np.ndarray, tall: np.ndarray) -> None:
    step = max(1, PART // tall.shape[1])
    for first in range(0, len(tall), step):
        part = tall[first : first + step].astype(squares.dtype, order="C", copy=False)
        squares += part.T @ part


def _beside_others(talls: list[np.ndarray], dtype: type) -> np.ndarray:
    """By functions of NumPy, in which other threads go on."""
    squares = np.zeros((len(talls), *[talls[0].shape[1]] * 2), dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # told by what comes out
        for own, tall in zip(squares, talls, strict=True):
            _add_square(own, tall)
    finite = np.isfinite(squares).all(axis=(1, 2))
    squares[~finite] = 0
    values = np.linalg.eigvalsh(squares)
    values[~finite] = np.nan
    return values


def _is_long(sides: Sequence[int]) -> bool:
    """Whether the law of the noise of a matrix has no small values."""
    return max(sides) >= 2 * min(sides)


def _squared_values(talls: list[np.ndarray], find: _Find) -> np.ndarray:
    """The squared singular values, from Gram matrices in the dtype that they need."""
    if not _is_long(talls[0].shape):
        return find(talls, np.float64)
    values = find(talls, np.float32).astype(np.float64)
    least, most = values[:, 0], values[:, -1]
    doubtful = ~((most > _SMALL) & (most <= _MODERATE * least))
    if doubtful.any():
        again = [tall for tall, doubt in zip(talls, doubtful, strict=True) if doubt]
        values[doubtful] = find(again, np.float64)
    return values


def _talls(kernel: Any, axes: KernelAxes) -> np.ndarray:
    """The matrices of a kernel, with no fewer rows than columns; of most a view."""
    stack = to_matrices(np.asarray(kernel), axes)
    return stack if stack.shape[1] >= stack.shape[2] else stack.mT


def _chunks(kernels: _Kernels) -> list[tuple[int, _Chunk]]:
    """Matrices that are alike, with their columns: as many as free Python's lock.

    Those that take longest come first.
    """
    alike: dict[tuple[int, bool], _Chunk] = {}
    for path, (kernel, axes) in kernels.items():
        stack, *sides = matrix_shape(kernel.shape, axes)
        alike.setdefault((min(sides), _is_long(sides)), []).extend(
            (path, index) for index in range(stack)
        )
    chunks = []
    for (columns, _), group in sorted(alike.items(), reverse=True):
        count = -(-_FREE // columns)
        parts = (group[first : first + count] for first in range(0, len(group), count))
        chunks += [(columns, part) for part in parts]
    return chunks


def _decompose(kernels: _Kernels) -> Generator[tuple[_Chunk, np.ndarray]]:
    """The squared singular values of each chunk."""

    def find(chunk: _Chunk, by: _Find) -> tuple[_Chunk, np.ndarray]:
        # Only now, since of some layouts it is a copy.
        talls = {path: _talls(*kernels[path]) for path, _ in chunk}
        return chunk, _squared_values([talls[path][index] for path, index in chunk], by)

    chunks = _chunks(kernels)
    large = [chunk for columns, chunk in chunks if columns >= _LARGE or len(chunks) == 1]
    small = [chunk for _, chunk in chunks[len(large) :]]
    yield from (find(chunk, _in_place) for chunk in large)
    if small:
        with _threads() as pool:
            yield from pool.map(lambda chunk: find(chunk, _beside_others), small)


def host_spectra(kernels: _Kernels, use: Callable[[str, Spectrum], _Result]) -> dict[str, _Result]:
    r"""What a function makes of the spectra of kernels, of at most 32 bits, as NumPy arrays.

    By Gram matrices. In float64 the products of entries are exact, and an eigenvalue is off by
    about $2^{-53} \lambda_1$ times a small multiple of p: less than by the singular values in
    float32, which are off by $2^{-24} s_1$, down to $\lambda_k = 10^{-12} \lambda_1$. In float32,
    which is taken where all eigenvalues are of one size, it is off by a few $2^{-24} \lambda_1$.

    Args:
      kernels: By path, each with its axes.
      use: Is called with a path and its spectra, which have a leading axis, while others are
        decomposed.
    """
    waiting, used = {path: [] for path in kernels}, {}
    with contextlib.closing(_decompose(kernels)) as decomposed:
        pairs = itertools.chain.from_iterable(zip(chunk, v, strict=True) for chunk, v in decomposed)
        for (path, _), values in pairs:
            waiting[path].append(values)
            kernel, axes = kernels[path]
            if len(waiting[path]) == matrix_shape(kernel.shape, axes)[0]:
                squared = np.stack(waiting.pop(path))[:, ::-1]
                used[path] = use(path, to_spectrum(squared, kernel, axes))
    return used
