r"""Folds of a cross-validation: singular vectors of one matrix, singular values from another one.

For matrices A and D with independent noise, $A = U \Sigma V^T$ and $r_m = u_m^T D v_m$, a fold is
$U \operatorname{diag}(\max(r, 0)) V^T$. V are eigenvectors of the Gram matrix of the shorter side,
and $U \Sigma = A V$.

Squares in float32 distinguish singular values down to a ninetieth of the largest. The columns of
A V below a share of the largest (the grade) are therefore squared again, on their scale, and so on
down to the rounding of A. What is left are turns between directions whose values are equal to
about three digits. Such directions belong to the noise. Any turn of them is as independent of D as
none, so r stays unbiased. It moves the result by 1e-3 of its
norm at sides up to 400, and by 3e-3 at 1000, as measured against float64.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from rmtjax._sharding import by_compiler, sum_over_parts
from rmtjax.spectra._lapack import one_blas_thread_each
from rmtjax.spectra._spectrum import matmul

# The share of the largest length down to which one Gram matrix is trusted: squares are then off by
# a two-thousandth of themselves.
_GRADE = 1 / 64
_MOST_GRADES = 3
# On the host a grade squares the columns that are left. In a program it squares the first of these
# eighths of all columns that has them. Changes by training leave most columns to the second grade.
_BLOCKS = (1, 3, 6, 8)
# Times the machine's precision and the largest length: shorter columns are rounding, which a grade
# carries over from the columns above it. They have no direction, and a matrix of lower rank must
# not get one from its rounding.
_ROUNDING = 2 / _GRADE
# From so many columns on, one fold uses all threads well, and several would fill the memory.
_LARGE = 2048

Fold = tuple[Any, Any]  # what is kept, and its effective rank


def _eigenvectors(squares: Float[Array, "p p"]) -> Float[Array, "p p"]:
    """Returns the eigenvectors of a symmetric matrix, by ascending eigenvalues."""
    # LAPACK reduces the upper triangle in less time than the lower one.
    return jnp.linalg.eigh(squares, UPLO="U", symmetrize_input=False)[1]


# XLA calls the same LAPACK as SciPy does, and lets other threads go on meanwhile.
_host_eigenvectors = jax.jit(_eigenvectors)


def _lengths(columns: Float[Array, "n p"]) -> Float[Array, " p"]:
    return jnp.linalg.norm(columns, axis=0)


def _in_order(v, y, start) -> tuple[Array, Array]:
    """Returns columns by descending length of y, from `start` on."""
    place = jnp.arange(y.shape[1], dtype=jnp.int32)
    order = jnp.argsort(jnp.where(place < start, jnp.inf, _lengths(y)), descending=True)
    return v[:, order], y[:, order]


def _turn(v, y, start, size: int) -> tuple[Array, Array]:
    """Turns columns from `start` on, which are among the last `size`, to singular directions."""
    head = y.shape[1] - size
    rest, start = y[:, head:], start - head
    below = jnp.arange(size, dtype=jnp.int32) >= start
    scale = jnp.max(jnp.where(below, _lengths(rest), 0))
    scaled = jnp.where(below[None], rest, 0) / jnp.where(scale > 0, scale, 1)
    # Columns that are settled have eigenvalues below all others, and come first: ascending.
    above = jnp.diag(jnp.where(below, 0, 1).astype(y.dtype))
    squares = matmul(scaled.T, scaled) - above
    w = _eigenvectors(squares)
    w = jnp.where(below[:, None] & below[None], w, above)
    last, rest = _in_order(matmul(v[:, head:], w), matmul(rest, w), start)
    return jnp.hstack([v[:, :head], last]), jnp.hstack([y[:, :head], rest])


def _next_grade(state):
    """Squares the columns of y from `start` on, in the smallest of some blocks."""
    v, y, start, _, turn = state
    columns = y.shape[1]
    sizes = sorted({-(-columns * eighths // 8) for eighths in _BLOCKS})
    branches = [partial(_turn, size=size) for size in sizes]
    which = sum((columns - start > size).astype(jnp.int32) for size in sizes[:-1])
    v, y = lax.switch(which, branches, v, y, start) if sizes[1:] else _turn(v, y, start, columns)
    return v, y, *_graded(y, start), turn + 1


def _graded(y, start) -> tuple[Array, Array]:
    """Returns where the next grade starts, and whether there is more than rounding in it."""
    lengths = _lengths(y)
    place = jnp.arange(y.shape[1], dtype=jnp.int32)
    largest = jnp.max(jnp.where(place >= start, lengths, 0))
    settled = jnp.sum((place < start) | (lengths >= _GRADE * largest), dtype=jnp.int32)
    rest = jnp.max(jnp.where(place >= settled, lengths, 0))
    return settled, rest > _ROUNDING * jnp.finfo(y.dtype).eps * lengths[0]


def _vectors(tall: Float[Array, "n p"]) -> tuple[Array, Array]:
    """Returns right singular vectors v and the columns A v of a finite matrix, descending."""
    v = _eigenvectors(matmul(tall.T, tall))
    zero = jnp.zeros((), jnp.int32)
    v, y = _in_order(v, matmul(tall, v), zero)
    more = lambda state: state[3] & (state[4] < _MOST_GRADES)
    v, y, *_ = lax.while_loop(more, _next_grade, (v, y, *_graded(y, zero), zero))
    return v, y


def effective_rank(values: Float[Array, " p"]) -> Float[Array, ""]:
    """Returns exp of the entropy of values that are not negative, over their sum; 0 for zeros."""
    total = jnp.sum(values)
    share = values / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1)))
    return jnp.where(total > 0, jnp.exp(entropy), 0)


def fold(others: Float[Array, "m n"], change: Float[Array, "m n"]) -> Fold:
    """Returns what `change` confirms of `others`, both finite, and the effective rank of it."""
    if others.shape[0] < others.shape[1]:
        kept, rank = fold(others.T, change.T)
        return kept.T, rank
    largest = jnp.max(jnp.abs(others))
    # No square over- or underflows. No derivative goes through an iteration.
    v, y = _vectors(lax.stop_gradient(others / jnp.where(largest > 0, largest, 1)))
    s = _lengths(y)
    present = s > _ROUNDING * jnp.finfo(s.dtype).eps * s[0]
    u = y / jnp.where(present, s, jnp.inf)[None]
    r = jnp.maximum(jnp.sum(u * matmul(change, v), axis=0), 0)
    return matmul(u * r[None], v.T), effective_rank(r)


def folds(changes: Float[Array, "k b m n"], total: Float[Array, "b m n"], count: int) -> Fold:
    """Returns the sum of folds over replicas, of which `total` is the sum, and of their ranks.

    Args:
      changes: The replicas that are given in turn; there may be others in `total`.
      total: The sum over all replicas.
      count: The number of all replicas.
    """
    size, stack, *sides = changes.shape

    def one(arguments):
        index, change = arguments
        return fold((total[index] - change) / (count - 1), change)

    indices = jnp.tile(jnp.arange(stack), size)
    # Not under `vmap`, which would compute all branches, and hold all folds in memory.
    kept, ranks = lax.map(one, (indices, changes.reshape(size * stack, *sides)))
    sums = lambda array: jnp.sum(array.reshape(size, stack, *array.shape[1:]), axis=0)
    return sums(kept), sums(ranks)


@partial(jax.jit, static_argnames=("mesh", "names"))
def compiled_folds(changes: Float[Array, "k b m n"], *, mesh: Any, names: tuple[str, ...]):
    """Returns the mean of the folds of k replicas in a program; NaN where not finite."""
    count = len(changes)

    def find(part, add):
        total = add(jnp.sum(part, axis=0))
        finite = jnp.isfinite(total).all(axis=(1, 2))
        safe = lambda array: jnp.where(finite[:, None, None], array, 0)
        kept, ranks = folds(safe(part), safe(total), count)
        nan = lambda array: jnp.where(
            jnp.expand_dims(finite, (*range(1, array.ndim),)), array, jnp.nan
        )
        return jax.tree.map(lambda array: nan(array) / count, (kept, ranks))

    def fold_all(changes):
        if mesh is None:
            return find(changes, lambda array: array)
        return sum_over_parts(find, changes, mesh, names)

    return by_compiler(fold_all, changes)


def _padded_eigenvectors(squares: np.ndarray, most: int, sizes: int) -> np.ndarray:
    """Returns eigenvectors, ascending, by one of so many programs up to a size."""
    step, size = max(most // sizes, 1), len(squares)
    missing = min(-(-size // step) * step, most) - size
    if missing == 0:
        return np.asarray(_host_eigenvectors(squares))
    # Below all eigenvalues, also those that are 0 but for rounding.
    padded = np.diag(np.full(size + missing, -squares.diagonal().max()))
    padded[missing:, missing:] = squares
    return np.asarray(_host_eigenvectors(padded))[missing:, missing:]


def _host_vectors(tall: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns right singular vectors v and the columns A v of a finite matrix, ascending.

    There are at most `most` columns.
    """
    v = np.array(_padded_eigenvectors(tall.T @ tall, most, 16))
    y = tall @ v
    lengths = np.linalg.norm(y, axis=0)
    least, end = _ROUNDING * np.finfo(y.dtype).eps * lengths.max(), len(lengths)
    while lengths.max() > least:
        end = np.count_nonzero(lengths < _GRADE * lengths.max())
        if end == 0:
            break
        scaled = y[:, :end] / max(np.max(lengths[:end]), np.finfo(y.dtype).tiny)
        w = _padded_eigenvectors(scaled.T @ scaled, most, 8)  # it changes from call to call
        v[:, :end], y[:, :end] = v[:, :end] @ w, y[:, :end] @ w
        lengths = np.linalg.norm(y[:, :end], axis=0)
    return v, y


@np.errstate(over="ignore", invalid="ignore")  # seen in the results; of this thread
def _host_fold(total: np.ndarray, change: np.ndarray, count: int) -> Fold:
    """Returns the fold of one replica, in float32."""
    others = (total - change) / np.float32(count - 1)
    # Rows and columns that have not moved, as of dead units or unused words, have no part in it.
    live = np.ix_(others.any(axis=1), others.any(axis=0))
    if live[0].size * live[1].size == others.size:
        return _fold_of_live(others, change, min(others.shape))
    kept = np.zeros_like(others)
    kept[live], rank = _fold_of_live(others[live], change[live], min(others.shape))
    return kept, rank


def _fold_of_live(others: np.ndarray, change: np.ndarray, most: int) -> Fold:
    """Returns a fold of matrices that have at most so many rows or columns."""
    if others.size == 0:
        return np.zeros_like(others), np.float32(0)
    if others.shape[0] < others.shape[1]:
        kept, rank = _fold_of_live(others.T, change.T, most)
        return kept.T, rank
    largest = np.abs(others).max()
    v, y = _host_vectors(others / largest, most)
    s = np.linalg.norm(y, axis=0)
    present = s > _ROUNDING * np.finfo(s.dtype).eps * s.max()
    r = np.einsum("ij,ij->j", y, change @ v) / np.where(present, s, np.inf)
    positive = r > 0
    r, s = r[positive], s[positive]
    kept = (y[:, positive] * (r / s)) @ v[:, positive].T
    share = r / max(r.sum(), np.finfo(r.dtype).tiny)
    share = share[share > 0]
    rank = np.exp(-np.sum(share * np.log(share))) if len(share) else np.float32(0)
    return kept, rank


@np.errstate(over="ignore", invalid="ignore")
def _host_stack(changes: np.ndarray, apply: Any) -> Fold:
    """Returns the mean of folds of one matrix of a stack, from changes (k, m, n)."""
    total, count = changes.sum(axis=0), len(changes)
    if not np.isfinite(total).all():
        return np.full_like(total, np.nan), np.float32(np.nan)
    kept, ranks = np.zeros_like(total), np.float32(0)
    for part, rank in apply(partial(_host_fold, total, count=count), changes):
        kept += part / np.float32(count)
        ranks += np.float32(rank / count)
    return kept, ranks


def host_folds(changes: np.ndarray) -> Fold:
    """Returns the mean of folds over replicas and of their ranks, from (k, b, m, n), in float32.

    NaN for a matrix of which a replica is not finite.
    """
    stack = [changes[:, index] for index in range(changes.shape[1])]
    if min(changes.shape[2:]) >= _LARGE:
        results = [_host_stack(matrices, map) for matrices in stack]
    else:
        with one_blas_thread_each() as pool:
            results = [_host_stack(matrices, pool.map) for matrices in stack]
    kept, ranks = zip(*results, strict=True)
    return np.stack(kept), np.array(ranks)
