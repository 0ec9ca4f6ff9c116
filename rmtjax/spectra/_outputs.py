r"""Directions of the outputs of a matrix on given inputs, from the second moment of the inputs.

For outputs $y = x W$ of inputs with $C = E\,x x^T$, the leading eigenvectors $U_r$ of $W^T C W$
span the outputs best: $E|y - y U_r U_r^T|^2$ is the sum of the other eigenvalues. So
$W U_r U_r^T$, with the factors $W U_r$ and $U_r^T$, is the nearest matrix of rank r in outputs.
C is not inverted, so it may be singular.

A matrix W becomes `W @ down @ up`, here with `down` $U_r$ and `up` $U_r^T$.

With weights $G = T T^T$ of the outputs, $E\,(y - y') G (y - y')^T$ is least for the eigenvectors
$U_r$ of $T^T W^T C W T$. Then `down` is $T U_r$ and `up` is $U_r^T T^{-1}$.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rmtjax._axes import Factors, is_factors
from rmtjax.moments import Second, shrink
from rmtjax.spectra._factors import svd
from rmtjax.spectra._spectrum import lift, matmul

# Times the largest: what is smaller is the rounding of squares in float64.
_CLEAR = 1e-7


class OutputLosses(NamedTuple):
    """Holds what matrices lose if the first 0, 1, ... directions of their outputs are kept.

    By the moments without shrinkage, in float64; NaN if a matrix is not finite.

    Attributes:
      outputs: Mean square of the change of the outputs.
      weighted: As `outputs`, with the weights of the outputs; equal without weights.
      squares: Squared length of the change of the matrix.
    """

    outputs: Float[np.ndarray, "*stack ranks"]
    weighted: Float[np.ndarray, "*stack ranks"]
    squares: Float[np.ndarray, "*stack ranks"]


def _eigenvectors(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Returns the leading eigenvectors of a symmetric matrix, the first one first."""
    from scipy.linalg import eigh  # SciPy comes with JAX; those who need it load it

    subset = len(matrix) - rank, len(matrix) - 1
    _, vectors = eigh(matrix, subset_by_index=subset, driver="evr", check_finite=False)
    return vectors[:, ::-1]


def _root(moment: np.ndarray) -> np.ndarray:
    """Returns the symmetric root of a moment, or of its diagonal; rounding below 0 counts as 0."""
    if moment.ndim == 1:
        return np.sqrt(np.maximum(moment, 0))
    values, vectors = np.linalg.eigh(moment)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _roots(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns T of weights G = T T^T, and its inverse, by Cholesky: weights are positive."""
    from scipy.linalg import solve_triangular

    to = np.linalg.cholesky(weights)
    return to, solve_triangular(to, np.eye(len(to)), lower=True, check_finite=False)


def _apply(moment: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return moment[:, None] * matrix if moment.ndim == 1 else moment @ matrix


def _first_vectors(moment: np.ndarray, matrix: np.ndarray, rank: int) -> np.ndarray:
    """Returns the leading eigenvectors of A^T C A, as columns."""
    inner, outer = matrix.shape
    if outer <= inner:
        return _eigenvectors(matrix.T @ _apply(moment, matrix), rank)
    # Few of its eigenvalues are not 0, and a smaller matrix has these too.
    thin = _apply(_root(moment), matrix)
    vectors = thin.T @ _eigenvectors(thin @ thin.T, min(rank, inner))
    lengths = np.linalg.norm(vectors, axis=0)
    # A direction without outputs, up to the rounding of squares, has no vector and needs none.
    return vectors / np.where(lengths > _CLEAR * lengths[0], lengths, np.inf)


def _parts(matrix: Any) -> tuple[np.ndarray | None, np.ndarray]:
    """Returns L and R of y = (x L) R in float64; no L for a matrix that is not factored."""
    *lefts, right = (np.asarray(part, np.float64) for part in jax.tree.leaves(matrix))
    return (lefts[0] if lefts else None), right


def _meets(moment: np.ndarray, left: np.ndarray | None) -> np.ndarray:
    """Returns the moments of what meets R: L^T C L."""
    return moment if left is None else left.T @ _apply(moment, left)


def _directions(matrix: Any, smooth, weights, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the directions of one matrix, or of the product of two factors, down and up."""
    left, right = _parts(matrix)
    size = min(rank, *right.shape)
    if not all(np.isfinite(part).all() for part in (right, smooth, 0 if left is None else left)):
        nothing = np.full((right.shape[1], size), np.nan)
        return nothing, nothing.T
    if weights is None:
        vectors = _first_vectors(_meets(smooth, left), right, size)
        return vectors, vectors.T
    to, back = _roots(weights)
    vectors = _first_vectors(_meets(smooth, left), right @ to, size)
    return to @ vectors, vectors.T @ back


def _from_rank(pairs: np.ndarray, cross: np.ndarray, rest: float) -> np.ndarray:
    """Returns squared lengths of the sum of the directions from each place on, and of a rest.

    `pairs` are inner products of the directions, and `cross` those with the rest.
    """
    lost = np.diagonal(pairs[::-1, ::-1].cumsum(0).cumsum(1)) + 2 * cross[::-1].cumsum()
    return np.maximum(np.append(lost[::-1], 0.0) + rest, 0.0)


def _losses(matrix: Any, exact, smooth, weights) -> OutputLosses:
    """Returns what one matrix loses. The change is a sum over directions, and a rest."""
    left, right = _parts(matrix)
    down, up = _directions(matrix, smooth, weights, min(right.shape))
    along, meets = right @ down, _meets(exact, left)
    # What no direction has: zero, unless outputs along it are.
    rest = right - along @ up
    if left is not None:
        whole, missing = left @ along, left @ rest
    else:
        whole, missing = along, rest
    pairs, seen = up @ up.T, _apply(meets, along)
    outputs = _from_rank(
        along.T @ seen * pairs,
        np.sum(seen.T @ rest * up, axis=1),
        np.sum(rest * _apply(meets, rest)),
    )
    squares = _from_rank(
        whole.T @ whole * pairs, np.sum(whole.T @ missing * up, axis=1), np.sum(missing**2)
    )
    weighted = np.append(np.cumsum(np.sum(along * seen, axis=0)[::-1])[::-1], 0.0)
    return OutputLosses(outputs, weighted, squares)


def _members(stack: Any, second: Second):
    """Yields each matrix of a stack, its exact and its shrunk moment, and its weights."""
    smooth, weights = shrink(second), second.weights
    for index in range(len(jax.tree.leaves(stack)[0])):
        one = jax.tree.map(lambda array, index=index: array[index], stack)
        # One moment for all members of a stack that have the same inputs.
        place = index % len(second.exact)
        mine = None if weights is None else weights[index % len(weights)]
        yield one, second.exact[place], smooth[place], mine


def host_directions(stack: Any, second: Second, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the directions, down (stack, n, r) and up (stack, r, n), by LAPACK in float64."""
    members = _members(stack, second)
    found = [_directions(one, smooth, mine, rank) for one, _, smooth, mine in members]
    downs, ups = zip(*found, strict=True)
    return np.stack(downs), np.stack(ups)


def host_losses(stack: Any, second: Second) -> OutputLosses:
    """Returns what a stack, or `Factors` of stacks, loses at each rank."""
    members: Any = _members(stack, second)
    found = [_losses(*member) for member in members]
    fields: Any = map(np.stack, zip(*found, strict=True))
    return OutputLosses(*fields)


def compiled_directions(stack: Any, second: Second, rank: int) -> tuple[Array, Array]:
    """Returns the directions, down and up, in a program, where a kernel is traced."""
    first, *rest = jax.tree.leaves(jax.tree.map(lift, stack))
    moments: Any = [member[2:] for member in _members(stack, second)]
    stacked = lambda arrays: jnp.asarray(np.stack(list(arrays)), jnp.float32)
    roots = stacked(_root(smooth) for smooth, _ in moments)
    thin = roots[..., None] * first if roots.ndim == 2 else matmul(roots, first)
    if second.weights is None:
        vt = svd(Factors(thin, *rest) if rest else thin)[2][:, :rank]
        return vt.mT, vt
    to, back = map(stacked, zip(*(_roots(one) for _, one in moments), strict=True))
    vt = svd(Factors(thin, matmul(rest[0], to)) if rest else matmul(thin, to))[2][:, :rank]
    return matmul(to, vt.mT), matmul(vt, back)


def project(stack: Any, down: Any, up: Any) -> tuple[Array, Array]:
    """Returns the factors of a stack, or of `Factors` of stacks, that keep some directions."""
    first, *rest = jax.tree.leaves(jax.tree.map(lift, stack))
    down, up = (jnp.asarray(array, first.dtype) for array in (down, up))
    along = matmul(rest[0], down) if is_factors(stack) else down
    return matmul(first, along), up
