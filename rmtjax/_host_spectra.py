"""The spectra of kernels in the memory of the host, several of which are decomposed at once.

As many as NumPy's BLAS has threads, each of which then decomposes matrices of its own: those of
most networks are too small for several threads to share one.
"""

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from rmtjax._kernels import to_matrices
from rmtjax._typing import KernelAxes, Spectrum
from rmtjax._values import eigenvalues, gram, PART, to_spectrum

# Of a matrix with so many columns all threads share the work, and one is in memory.
_LARGE = 2048
# NumPy lets go of Python's lock for more columns than 500, counted over a stack.
_FREE = 512
# Largest over smallest eigenvalue up to which squares in float32 have four digits of it or more.
_MODERATE = 2048
_SMALL = 1e-30  # squares under it may be less than normal in float32

_Result = TypeVar("_Result")
# Matrices of one number of columns, and no fewer rows, and the paths of their kernels.
_Chunk = list[tuple[str, np.ndarray]]
# The eigenvalues of Gram matrices that are made in a dtype, ascending: (b, p).
_Find = Callable[[list[np.ndarray], type], np.ndarray]

_limiting = threading.Lock()  # who limits while others do would restore their limit


@functools.cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as BLAS has, or the machine where it does not tell; it has one in each."""
    libraries = _libraries()
    limit = lambda: libraries.limit(limits=1)
    with _limiting:
        count = max((own.num_threads for own in libraries.lib_controllers), default=os.cpu_count())
        # Of the whole process with some libraries, of a thread with others.
        with limit(), ThreadPoolExecutor(count, initializer=limit) as pool:
            yield pool


def _in_place(talls: list[np.ndarray], dtype: type) -> np.ndarray:
    """In little room, one after another, by all threads."""
    return np.stack([eigenvalues(gram(tall, dtype)) for tall in talls])


def _square(tall: np.ndarray, dtype: type) -> np.ndarray:
    step = max(1, PART // tall.shape[1])
    starts = range(0, len(tall), step)
    parts = (tall[first : first + step].astype(dtype, copy=False) for first in starts)
    return functools.reduce(np.add, (part.T @ part for part in parts))


def _beside_others(talls: list[np.ndarray], dtype: type) -> np.ndarray:
    """By functions of NumPy, in which other threads go on."""
    with np.errstate(over="ignore", invalid="ignore"):  # told by what comes out
        squares = np.stack([_square(tall, dtype) for tall in talls])
    finite = np.isfinite(squares).all(axis=(1, 2))
    squares[~finite] = 0
    values = np.linalg.eigvalsh(squares)
    values[~finite] = np.nan
    return values


def _squared_values(talls: list[np.ndarray], find: _Find) -> np.ndarray:
    """The squared singular values, from Gram matrices in the dtype that they need."""
    if not _is_long(talls[0]):
        return find(talls, np.float64)
    values = find(talls, np.float32).astype(np.float64)
    last, first = values[:, 0], values[:, -1]
    doubtful = ~((first > _SMALL) & (first <= _MODERATE * last))
    if doubtful.any():
        again = [tall for tall, doubt in zip(talls, doubtful, strict=True) if doubt]
        values[doubtful] = find(again, np.float64)
    return values


def _is_long(tall: np.ndarray) -> bool:
    """Whether the law of its noise has no small values."""
    return tall.shape[0] >= 2 * tall.shape[1]


def _chunks(matrices: dict[str, np.ndarray]) -> list[_Chunk]:
    """Matrices that are alike, as many as free Python's lock; those that take longest first."""
    alike: dict[tuple, _Chunk] = {}
    for path, stack in matrices.items():
        for tall in stack:
            alike.setdefault((tall.shape[1], _is_long(tall)), []).append((path, tall))
    chunks = []
    for (columns, _), group in sorted(alike.items(), key=lambda item: -item[0][0]):
        count = -(-_FREE // columns)
        chunks += [group[first : first + count] for first in range(0, len(group), count)]
    return chunks


def _decompose(chunks: list[_Chunk]) -> Generator[tuple[_Chunk, np.ndarray]]:
    """The squared singular values of each chunk."""
    find = lambda chunk, by: (chunk, _squared_values([tall for _, tall in chunk], by))
    alone = len(chunks) if len(chunks) == 1 else sum(c[0][1].shape[1] >= _LARGE for c in chunks)
    yield from (find(chunk, _in_place) for chunk in chunks[:alone])
    if alone < len(chunks):
        with _threads() as pool:
            yield from pool.map(lambda chunk: find(chunk, _beside_others), chunks[alone:])


def host_spectra(
    kernels: dict[str, tuple[Any, KernelAxes]], use: Callable[[str, Spectrum], _Result]
) -> dict[str, _Result]:
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
    matrices = {}
    for path, (kernel, axes) in kernels.items():
        stack = to_matrices(np.asarray(kernel), axes)
        matrices[path] = stack if stack.shape[1] >= stack.shape[2] else stack.mT
    waiting, used = {path: [] for path in kernels}, {}
    with contextlib.closing(_decompose(_chunks(matrices))) as decomposed:
        pairs = itertools.chain.from_iterable(zip(chunk, v, strict=True) for chunk, v in decomposed)
        for (path, _), values in pairs:
            waiting[path].append(values)
            if len(waiting[path]) == len(matrices[path]):
                squared = np.stack(waiting.pop(path))[:, ::-1]
                used[path] = use(path, to_spectrum(squared, *kernels[path]))
    return used
