r"""Directions of the outputs of a matrix on given inputs, from the second moment of the inputs.

For outputs $y = x W$ of inputs with $C = E\,x x^T$, the leading eigenvectors $U_r$ of $W^T C W$
span the outputs best: $E|y - y U_r U_r^T|^2$ is the sum of the other eigenvalues. So
$W U_r U_r^T$, with the factors $W U_r$ and $U_r^T$, is the nearest matrix of rank r in outputs.
C is not inverted, so it may be singular.

A matrix W becomes `W @ down @ up`, here with `down` $U_r$ and `up` $U_r^T$.

A table $W$ of a tied output layer also multiplies rows with $D = E\,h h^T$ by its transpose. What
changes of both products, each over its energy, is

$\operatorname{tr}(R^T C R) / \operatorname{tr}(W^T C W)
+ \operatorname{tr}(R D R^T) / \operatorname{tr}(W D W^T)$ for a change R.

Its least has no closed form. In the eigenvectors of C and D an entry of R counts by a sum
$c_i + d_j$ of their eigenvalues over these energies. The cut takes the product of its geometric
means over i and over j in the place of it: moments $C'$ with eigenvalues
$\exp \overline{\log(c_i + d_j)}^j$, and weights G likewise.

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
# Times the largest: the least weight of an entry, since weights of outputs are inverted.
_FAINT = 1e-6


class OutputLosses(NamedTuple):
    """Holds what matrices lose if the first 0, 1, ... directions of their outputs are kept.

    By the moments without shrinkage, in float64; NaN if a matrix is not finite.

    Attributes:
      outputs: Mean square of the change of the outputs. Of a kernel whose transpose is used too, it
        is the sum over both uses, each over its energy.
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


def _losses(matrix: Any, exact, smooth, weights, transposed) -> OutputLosses:
    """Returns what one matrix loses. The change is a sum over directions, and a rest.

    `transposed` is the moment of the rows of the transpose, or None.
    """
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
    if transposed is None:
        weighted = np.append(np.cumsum(np.sum(along * seen, axis=0)[::-1])[::-1], 0.0)
        return OutputLosses(outputs, weighted, squares)
    met = up @ transposed
    others = _from_rank(
        whole.T @ whole * (met @ up.T),
        np.sum(whole.T @ missing * met, axis=1),
        np.sum(missing * (missing @ transposed)),
    )
    share = lambda lost: lost / lost[0] if lost[0] > 0 else lost
    outputs = share(outputs) + share(others)
    return OutputLosses(outputs, np.minimum.accumulate(outputs), squares)


def _eigen(moment: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns eigenvalues, and eigenvectors of a moment that is not a diagonal."""
    return (moment, None) if moment.ndim == 1 else np.linalg.eigh(moment)


def _from_eigen(values: np.ndarray, vectors: np.ndarray | None) -> np.ndarray:
    return values if vectors is None else (vectors * values) @ vectors.T


def _for_both(inputs: np.ndarray, outputs: np.ndarray, matrix: np.ndarray):
    """Returns moments of inputs, and weights of outputs, for a kernel that is used both ways."""
    energies = np.sum(matrix * _apply(inputs, matrix)), np.sum(matrix * (matrix @ outputs))
    if not (np.isfinite(energies).all() and min(energies) > 0):
        return inputs, None  # nothing to weigh one use against the other
    (rows, left), (columns, right) = (
        _eigen(moment / energy) for moment, energy in zip((inputs, outputs), energies, strict=True)
    )
    sums = rows[:, None] + columns[None, :]
    logs = np.log(np.maximum(sums, _FAINT * sums.max()))
    along = np.exp(logs.mean(axis=0) - logs.mean())
    return _from_eigen(np.exp(logs.mean(axis=1)), left), _from_eigen(along, right)


def _members(stack: Any, second: Second):
    """Yields each matrix of a stack, its exact and its shrunk moment, its weights, and the other.

    The other is the moment of the rows that its transpose is multiplied with, or None.
    """
    smooth, weights, both = shrink(second), second.weights, second.transposed
    turned = None if both is None else shrink(both)
    # One moment for all members of a stack that have the same inputs.
    pick: Any = lambda arrays, index: None if arrays is None else arrays[index % len(arrays)]
    for index in range(len(jax.tree.leaves(stack)[0])):
        one = jax.tree.map(lambda array, index=index: array[index], stack)
        mine = pick(smooth, index), pick(weights, index)
        if turned is not None:
            left, right = _parts(one)
            whole = right if left is None else left @ right
            mine = _for_both(mine[0], pick(turned, index), whole)
        yield one, pick(second.exact, index), *mine, pick(both and both.exact, index)


def host_directions(stack: Any, second: Second, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the directions, down (stack, n, r) and up (stack, r, n), by LAPACK in float64."""
    members = _members(stack, second)
    found = [_directions(one, smooth, mine, rank) for one, _, smooth, mine, _ in members]
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
    if second.transposed is not None:
        raise TypeError(
            "`moments` has both uses of a kernel that the model also multiplies by its transpose. "
            "How they are weighed depends on its values: cut it outside `jit`."
        )
    moments: Any = [member[2:4] for member in _members(stack, second)]
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
