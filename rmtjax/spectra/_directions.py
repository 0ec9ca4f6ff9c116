"""The first singular directions of kernels, in a compiled program."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rmtjax._axes import Factors, KernelAxes, to_stack
from rmtjax._sharding import by_compiler
from rmtjax.spectra._factors import svd
from rmtjax.spectra._spectrum import each, lift, triangle
from rmtjax.spectra._subspace_iteration import block_size, leading, pays

_product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _svd_of_long(matrix: Float[Array, "m n"], count: int) -> tuple[Array, Array, Array]:
    """The first directions of a matrix with more rows than columns.

    The triangle R of A = Q R has the singular values and the right vectors V of A, and
    A V S^-1 are its left ones. The decomposition is that of the shorter side, and neither Q
    nor the long vectors that are cut are formed.
    """
    _, s, vt = svd(triangle(matrix))
    s, vt = s[:count], vt[:count]
    # A direction of nothing has no left vector, and needs none.
    return _product(matrix, vt.T / jnp.where(s > 0, s, jnp.inf)[None]), s, vt


def _first(matrix: Float[Array, "m n"], count: int) -> tuple[Array, Array, Array]:
    """The first directions by a decomposition that has them all."""
    rows, columns = matrix.shape
    if rows < columns:
        u, s, vt = _first(matrix.T, count)
        return vt.T, s, u.T
    if rows >= 2 * columns:
        return _svd_of_long(matrix, count)
    u, s, vt = svd(matrix)
    return u[:, :count], s[:count], vt[:count]


def _leading_or_first(matrix: Float[Array, "m n"], rank, block: int):
    """The first directions by iteration, and where this does not converge by a decomposition."""
    (rows, columns), dtype = matrix.shape, matrix.dtype

    def iterate():
        found = leading(matrix, rank, block)
        iterated = lambda: (found.u, found.s, found.vt)
        return lax.cond(found.converged, iterated, lambda: _first(matrix, block))

    def nothing():
        vectors = jnp.zeros((rows, block), dtype), jnp.zeros((block, columns), dtype)
        return vectors[0], jnp.full((block,), jnp.nan, dtype), vectors[1]

    # A branch, for which the matrix is not copied.
    return lax.cond(jnp.isfinite(matrix).all(), iterate, nothing)


# Compiled for the size of a block, of which many ranks have one.
@partial(jax.jit, static_argnames=("axes", "block"))
def _directions(kernel, rank, *, axes: KernelAxes, block: int):

    def find(kernel):
        stack = to_stack(kernel, axes)
        if isinstance(stack, Factors):
            return svd(stack)
        stack = lift(stack)
        if not pays(block, stack.shape[-2:]):
            return each(partial(_first, count=block), stack)
        # Not `vmap`, which would compute both branches.
        return lax.map(partial(_leading_or_first, rank=rank, block=block), stack)

    return by_compiler(find, kernel)


def first_directions(kernel, axes: KernelAxes, rank: int) -> tuple[Array, Array, Array]:
    """The first `rank` singular directions of each matrix of a kernel, in float32 at least.

    Those left out are not computed where that is cheaper. s is NaN where not finite.
    """
    u, s, vt = _directions(kernel, rank, axes=axes, block=block_size(rank))
    return u[..., :rank], s[..., :rank], vt[..., :rank, :]
