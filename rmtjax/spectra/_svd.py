"""Singular value decompositions and spectra in compiled programs, on any device."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rmtjax._axes import Factors, KernelAxes, split_stacks, to_stack, Views
from rmtjax._sharding import by_compiler, fetch, in_shares, mesh_of, replicating_mesh
from rmtjax._types import Spectrum
from rmtjax.spectra._factors import svd
from rmtjax.spectra._spectrum import each, lift, matmul, spectrum, to_unit, triangle
from rmtjax.spectra._subspace_iteration import leading

Vectors = tuple[Array, Array, Array]  # (u, s, vt)
# Times the root of the machine's precision: the share of the largest singular value down to which
# squares distinguish values. There they are off by 0.1 %, about as much as neighbours in a bulk.
_CLEAR = 32


def _first(matrix: Float[Array, "m n"], count: int) -> Vectors:
    """Returns the first directions by a decomposition that has them all."""
    rows, columns = matrix.shape
    if rows < columns:
        u, s, vt = _first(matrix.T, count)
        return vt.T, s, u.T
    if rows < 2 * columns:
        u, s, vt = svd(matrix)
        return u[:, :count], s[:count], vt[:count]
    # The triangle R of A = Q R has the values s and the right vectors V of A, and A V / s are its
    # left ones. Neither Q nor the long vectors that are cut are formed.
    _, s, vt = svd(triangle(matrix))
    s, vt = s[:count], vt[:count]
    # A zero direction has no left vector, and needs none.
    return matmul(matrix, vt.T / jnp.where(s > 0, s, jnp.inf)[None]), s, vt


def _leading_or_first(matrix: Float[Array, "m n"], rank, block: int) -> Vectors:
    """Returns the first directions by iteration; by a decomposition if it does not converge."""

    def iterate():
        result = leading(matrix, rank, block)
        return lax.cond(result.converged, lambda: result[:3], lambda: _first(matrix, block))

    def nothing():
        u, s, vt = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(iterate))
        return u, s * jnp.nan, vt

    # A branch, and not a mask: the matrix is not copied for it.
    return lax.cond(jnp.isfinite(matrix).all(), iterate, nothing)


# The rank is traced, so that all ranks with one block size share a program.
@partial(jax.jit, static_argnames=("axes", "block", "iterate"))
def directions(kernel, rank, *, axes: KernelAxes, block: int, iterate: bool) -> Vectors:
    """Returns the first `block` singular directions of each matrix; s is NaN if not finite.

    The first `rank` of them are right; it may be traced. Products of `Factors` are never formed.
    With `iterate`, subspace iteration is tried first.
    """

    def find(kernel):
        stack = to_stack(kernel, axes)
        if isinstance(stack, Factors):
            return svd(stack)
        stack = lift(stack)
        if not iterate:
            return each(partial(_first, count=block), stack)
        # `vmap` would compute both branches.
        return lax.map(partial(_leading_or_first, rank=rank, block=block), stack)

    return by_compiler(find, kernel)


def _by_squares(matrix: Float[Array, "m n"]) -> Vectors:
    """Decomposes a finite matrix by the eigenvectors of the Gram matrix of its shorter side.

    With A A^T = U L U^T, for no more rows than columns, the rows of U^T A are s_k v_k. Their
    lengths are the singular values, and more exact than the roots of L. Where squares distinguish
    values, they are off by the rounding of s_1, as by an SVD of A. Elsewhere they are off by a few
    eps s_1^2 in their squares, and the rows of vt are not orthogonal. U always is.
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vt = _by_squares(matrix.T)
        return vt.T, s, u.T
    scale = jnp.maximum(jnp.abs(matrix).max(), jnp.finfo(matrix.dtype).tiny)
    matrix = matrix / scale  # no square overflows or underflows
    _, u = jnp.linalg.eigh(matmul(matrix, matrix.T), symmetrize_input=False)
    rows = matmul(u.T, matrix)
    s = jnp.linalg.norm(rows, axis=1)
    # Lengths that differ by less than the rounding of L come in no order.
    order = jnp.argsort(s, descending=True)
    s = s[order]
    vt = rows[order] / jnp.where(s > 0, s, jnp.inf)[:, None]
    return u[:, order], s * scale, vt


def squares_suffice(s: Float[Array, "b p"], floor: Float[Array, " b"]) -> Bool[Array, " b"]:
    """Returns True for matrices whose directions down to `floor` a Gram matrix distinguishes.

    A floor of NaN stands for the median of the singular values s: the bulk is to be fitted.
    """
    floor = jnp.where(jnp.isnan(floor), s[:, s.shape[1] // 2], floor)
    return floor >= _CLEAR * jnp.sqrt(jnp.finfo(s.dtype).eps) * s[:, 0]


@jax.jit
def gram_svd(matrices: Float[Array, "b m n"], floor: Float[Array, " b"]) -> Vectors:
    r"""Returns thin singular value decompositions by Gram matrices, cheaper than by `svd`.

    Eigenvectors of the Gram matrix distinguish values whose squares differ by more than
    $\epsilon s_1^2$: in float32 down to a ninetieth of the largest value. If a matrix of the stack
    needs less, all are decomposed by `svd` as well. s is NaN for a matrix that is not finite.
    """
    matrices = lift(matrices)
    # LAPACK may loop for long, or stop, on what is not finite.
    finite = jnp.isfinite(matrices).all(axis=(1, 2))
    u, s, vt = each(_by_squares, jnp.where(finite[:, None, None], matrices, 0))
    clear = squares_suffice(s, floor) | ~finite
    vectors = u, jnp.where(finite[:, None], s, jnp.nan), vt
    return lax.cond(jnp.all(clear), lambda: vectors, lambda: svd(matrices))


def _spectrum_of(matrix) -> tuple[Spectrum, Array]:
    """Returns the spectrum of a matrix over a power of two, and its exponent.

    Of two factors it is that of their product, which is not formed.
    """
    if not isinstance(matrix, Factors):
        scaled, exponent = to_unit(lift(matrix))
        return spectrum(scaled), exponent
    sides = matrix.left.shape[0], matrix.right.shape[1]
    (left, first), (right, second) = map(to_unit, map(lift, matrix))
    _, s, _ = svd(Factors(left, right))
    eigenvalues = jnp.pad(s**2 / max(sides), (0, min(sides) - len(s)))
    return Spectrum(eigenvalues, jnp.asarray(min(sides) / max(sides), s.dtype)), first + second


@partial(jax.jit, static_argnames=("axes", "mesh"))
def _stacked_spectra(kernels: list, *, axes: tuple[KernelAxes, ...], mesh: Any):
    """Returns the spectra of kernels with sides in common as one stack, and their exponents."""

    def find(kernels):
        stacks = map(to_stack, kernels, axes)
        joined = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *stacks)
        find = partial(each, _spectrum_of)
        # Each device of a mesh on which the kernels are replicated takes a share.
        return find(joined) if mesh is None else in_shares(find, joined, mesh)

    return by_compiler(find, kernels)


@partial(jax.jit, static_argnames="axes")
def live_sides(kernel, *, axes: KernelAxes) -> Int[Array, "b 2"]:
    """Returns how many rows and columns of each matrix of a dense kernel are not zero."""

    def count(kernel):
        # In the axes of the kernel: merging axes that are divided would gather them.
        present, (inputs, outputs, _) = kernel != 0, axes
        rows = jnp.any(present, outputs, keepdims=True).sum(inputs, jnp.int32, keepdims=True)
        columns = jnp.any(present, inputs, keepdims=True).sum(outputs, jnp.int32, keepdims=True)
        return jnp.stack([side.transpose(axes.order).ravel() for side in (rows, columns)], axis=1)

    return by_compiler(count, kernel)


def compiled_spectra(views: Views) -> dict[str, tuple[Spectrum, Any]]:
    """Returns spectra with exponents as NumPy arrays, those of one shape in one program."""
    # A decomposition compiles for seconds, so kernels of one shape share a program.
    groups: dict[tuple, list[str]] = {}
    for path, view in views.items():
        arrays = jax.tree.leaves(view.leaf)
        program = (view.rows, view.columns, view.rank, *(array.dtype for array in arrays))
        groups.setdefault((*program, *map(mesh_of, arrays)), []).append(path)
    spectra = {}
    for paths in groups.values():
        kernels = [jax.tree.map(jnp.asarray, views[path].leaf) for path in paths]
        axes = tuple(views[path].axes for path in paths)
        joined = fetch(_stacked_spectra(kernels, axes=axes, mesh=replicating_mesh(kernels)))
        spectra |= zip(paths, split_stacks(joined, [views[p].stack for p in paths]), strict=True)
    return spectra
