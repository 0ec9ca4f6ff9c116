"""Chooses how spectra and singular vectors are found. No other file of the package chooses.

Conditions are tried from top to bottom. p is the short side, n the long one, r the rank.

| for | condition | algorithm | file | cost |
|---|---|---|---|---|
| spectra | p >= `exact_below`, Lanczos spans p/4 | block Lanczos | `_lanczos` | n p |
| | on the host: see below | Gram matrix and its eigenvalues, LAPACK | `_lapack` | n p^2 |
| | in parts on devices, not float64 | Gram matrix there, LAPACK here | `_sharded` | n p^2 |
| | else: accelerators, float64, factors, tracers | QR and SVD in XLA | `_svd` | n p^2 |
| vectors | in parts on devices, not float64 | Gram matrix there, LAPACK here | `_sharded` | n p^2 |
| | on the host, r small and p >= 1000 | subspace iteration, then Gram | `_lapack` | n p r |
| | on the host, else | eigenvectors of the Gram matrix, LAPACK | `_lapack` | n p^2 |
| | else, r small and p >= 1000 | subspace iteration, then SVD | `_svd` | n p r |
| | else | QR and SVD in XLA | `_svd` | n p^2 |
| truncation | on the host, r over p / 2 | subtract the other directions | `_lapack` | n p^2 |
| merge of replicas | on the host | Gram matrices in grades, a fold a thread | `_fold` | n p^2 |
| | replicas divided over devices | the same in XLA, each device its own fold | `_fold` | n p^2 |
| | else | the same in XLA, one fold after another | `_fold` | n p^2 |
| outputs, given moments | traced | root of the moment, then SVD in XLA | `_outputs` | m^3 |
| | else | eigenvectors of W^T C W, LAPACK in float64 | `_outputs` | m n^2 |
| pruning step | one matrix, known noise, p >= 1000 | iteration above it | `_svd` | n p r |
| | else; all directions | eigenvectors of the Gram matrix in XLA | `_svd` | n p^2 |

A kernel is on the host if it is a NumPy array or stored on CPU devices, complete in this process,
in 32 bits or less. NumPy arrays, and singular vectors, also need a CPU as JAX's default device.
XLA's `eigh` and `svd` on CPU take three times as long as LAPACK on a Gram matrix. In float64,
squares would lose the small values.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from rmtjax._axes import Factors, KernelAxes, MatrixView, to_matrices, to_stack, Views
from rmtjax._sharding import by_compiler, fetch, mesh_of
from rmtjax.moments import Second
from rmtjax.spectra import _fold, _lapack, _outputs, _sharded, _svd
from rmtjax.spectra._factors import compose, contract, project
from rmtjax.spectra._lanczos import estimated_spectrum, lanczos_pays
from rmtjax.spectra._outputs import OutputLosses
from rmtjax.spectra._spectrum import each, from_squares, lift, to_unit, Values
from rmtjax.spectra._subspace_iteration import block_size, iteration_pays, Leading, leading_above


class Directions(NamedTuple):
    """The first singular triplets of a kernel, whatever computed them, in the axes of factors.

    Attributes:
      u: Left vectors, (*batch, *inputs, r), in float32 at least.
      s: Singular values, (*batch, r), descending; NaN where a matrix is not finite.
      vt: Right vectors, (*batch, r, *outputs).
    """

    u: Any
    s: Any
    vt: Any


def _is_eager() -> bool:
    """Returns True if no program is traced. A kernel may be a constant of one."""
    return not isinstance(jnp.zeros(()), jax.core.Tracer)


def _on_host(view: MatrixView) -> bool:
    """Returns True if NumPy reads the kernel without moving it, and squares do not lose it."""
    leaf = view.leaf
    if view.is_factored or isinstance(leaf, jax.core.Tracer) or view.dtype.itemsize >= 8:
        return False
    # NumPy's, or still in a file. An accelerator would decompose it in less time than the host.
    if not isinstance(leaf, jax.Array):
        return jax.default_backend() == "cpu"
    whole = leaf.is_fully_replicated and bool(leaf.addressable_shards)
    return whole and all(device.platform == "cpu" for device in leaf.devices())


def _is_divided(view: MatrixView) -> bool:
    """Returns True for a kernel in parts on several devices, which may be squared."""
    if view.is_factored or view.dtype.itemsize >= 8 or mesh_of(view.leaf) is None:
        return False
    return not view.leaf.is_fully_replicated


def _cut_by_host(view: MatrixView) -> bool:
    """Returns True if the host finds singular vectors of a kernel."""
    if not (_on_host(view) and jax.default_backend() == "cpu" and _is_eager()):
        return False
    # Several hosts would each round in their way, and the results would not be one array.
    return getattr(view.leaf, "is_fully_addressable", True)


@partial(jax.jit, static_argnames="axes")
def _estimate(kernel, *, axes: KernelAxes):
    def estimate(matrix):
        scaled, exponent = to_unit(lift(matrix))
        return *estimated_spectrum(scaled), exponent

    find = lambda kernel: each(estimate, to_stack(kernel, axes))
    spectrum, num_exact, exponent = by_compiler(find, kernel)
    return spectrum, num_exact, _svd.live_sides(kernel, axes=axes), exponent


def _array(leaf: Any) -> Any:
    """Returns a leaf as an array that `jit` takes: it may still be in a file."""
    # A NumPy array stays: `jit` reads it in place, and `jnp.asarray` would copy it.
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def estimated_spectra(views: Views, exact_below: int) -> dict[str, Values]:
    """Returns estimates of spectra, from the short side `exact_below` on and where they pay."""
    pays = lambda view: view.short >= exact_below and lanczos_pays(view.short)
    large = {path: view for path, view in views.items() if pays(view) and not view.is_factored}
    estimate = lambda view: fetch(_estimate(_array(view.leaf), axes=view.axes))
    return {path: Values(*estimate(view)) for path, view in large.items()}


def spectra(views: Views) -> dict[str, Values]:
    """Returns the exact spectra of kernels by path."""
    host = {path: view for path, view in views.items() if _on_host(view)}
    divided = {p: view for p, view in views.items() if p not in host and _is_divided(view)}
    rest = {p: view for p, view in views.items() if p not in host and p not in divided}
    squared = _lapack.squared_singular_values(host)
    of_parts = _sharded.squared_singular_values(divided)
    squared |= {p: (found, live_sides(divided[p])) for p, found in of_parts.items()}
    spectra = {path: from_squares(views[path], found) for path, (found, _) in squared.items()}
    spectra |= _svd.compiled_spectra(rest)
    live = {path: sides for path, (_, sides) in squared.items()}
    live |= {path: live_sides(view) for path, view in rest.items()}
    exact = {path: np.full(view.stack, view.short, np.int32) for path, view in views.items()}
    return {p: Values(spectra[p][0], exact[p], live[p], spectra[p][1]) for p in views}


def live_sides(view: MatrixView) -> Any:
    """Returns the numbers of rows and columns that are not zero, (stack, 2); of factors, all."""
    if view.is_factored:
        return np.full((view.stack, 2), (view.rows, view.columns), np.int32)
    live = _svd.live_sides(_array(view.leaf), axes=view.axes)
    return fetch(live) if _is_eager() else live


def _vectors_of_one(view: MatrixView, rank: int) -> Directions:
    """Returns the first directions of a kernel that one process has whole."""
    block = block_size(rank)
    iterate = not view.is_factored and iteration_pays(block, (view.rows, view.columns))
    if _cut_by_host(view):
        u, s, vt = _lapack.directions(view, rank, block if iterate else None)
    else:
        kernel = jax.tree.map(jnp.asarray, view.leaf)
        u, s, vt = _svd.directions(kernel, rank, axes=view.axes, block=block, iterate=iterate)
        u, s, vt = u[..., :rank], s[..., :rank], vt[..., :rank, :]
    inputs, outputs, batch = ([view.shape[axis] for axis in group] for group in view.axes)
    u, vt = u.reshape(*batch, *inputs, -1), vt.reshape(*batch, s.shape[-1], *outputs)
    return Directions(u, s.reshape(*batch, -1), vt)


def singular_vectors(views: Views, ranks: Mapping[str, int]) -> Iterator[tuple[str, Directions]]:
    """Yields the path and the first `ranks[path]` singular triplets of each kernel.

    One kernel at a time. Divided kernels come first, since the processes of a mesh decompose
    several of them side by side.
    """
    # A compiled program cannot wait for the host, and leaves the division to the compiler.
    divided = {path: view for path, view in views.items() if _is_divided(view) and _is_eager()}
    for path, vectors in _sharded.directions(divided, ranks):
        yield path, Directions(*vectors)
    for path, view in views.items():
        if path not in divided:
            yield path, _vectors_of_one(view, ranks[path])


def output_losses(view: MatrixView, second: Second) -> OutputLosses:
    """Returns what a kernel that is not traced loses at each rank, if it is cut by output.

    Args:
      view: The kernel; one that is divided over devices is gathered on the host.
      second: The second moments of its inputs: for each matrix of a stack, or for all together.
    """
    return _outputs.host_losses(_host_stack(view), second)


def _host_stack(view: MatrixView) -> Any:
    """Returns the stack of a kernel in the memory of the host."""
    if view.is_factored:
        return jax.tree.map(np.asarray, fetch(view.matrices()))
    leaf = view.leaf if _on_host(view) else fetch(view.leaf)
    return to_matrices(np.asarray(leaf), view.axes)


def output_factors(view: MatrixView, second: Second, rank: int) -> Factors:
    """Returns the factors of the nearest kernel of a rank in outputs, in the axes of factors.

    Args:
      view, second: As in `output_losses`. The kernel may be traced.
      rank: The number of directions kept; of factors there are no more than they have.
    """
    stack = view.matrices()
    if _is_eager() and not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(stack)):
        down, up = _outputs.host_directions(_host_stack(view), second, rank)
    else:
        find = partial(_outputs.compiled_directions, second=second, rank=rank)
        down, up = by_compiler(find, stack, out=(None, None))
    left, right = _outputs.project(stack, down, up)
    inputs, outputs, batch = ([view.shape[axis] for axis in group] for group in view.axes)
    kept = left.shape[-1]
    return Factors(left.reshape(*batch, *inputs, kept), right.reshape(*batch, kept, *outputs))


def keeps_most(view: MatrixView, rank: int) -> bool:
    """Returns True if a truncation is cheaper by the directions that it removes."""
    # The fewer vectors are found, the less memory they take beside the Gram matrix.
    return view.short / 2 < rank < view.short and _cut_by_host(view)


def without_last(view: MatrixView, rank: int) -> Array:
    """Returns a kernel of which `keeps_most` is True less its directions after the first `rank`."""
    lower = view.from_matrices(jnp.asarray(_lapack.without_last(view, rank)))
    return lower.astype(jax.dtypes.canonicalize_dtype(view.dtype))


def product(factors: Factors, view: MatrixView) -> Array:
    """Returns the kernel that factors stand for, in the axes, the dtype and the sharding of one."""
    dtype = jax.dtypes.canonicalize_dtype(view.dtype)
    sharding = view.leaf.sharding if _is_divided(view) and _is_eager() else None
    return contract(factors, axes=view.axes, dtype=dtype, sharding=sharding)


def _search(matrix: Float[Array, "m n"], floor, search, block: int) -> Leading:
    """Returns the directions above a singular value; not converged if there is none to search."""
    # No derivative goes through an iteration.
    matrix, floor = lax.stop_gradient(matrix), lax.stop_gradient(floor)
    finite = jnp.isfinite(matrix).all()
    # `vmap` computes both branches, and an iteration on NaN would not end.
    matrix = jnp.where(finite, matrix, 0)
    run = lambda: leading_above(matrix, floor, block)
    nothing = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(run))
    return lax.cond((floor > 0) & search & finite, run, nothing)


def truncate_by(
    matrices: Float[Array, "b m n"],
    rank_of: Callable[[Array, bool], tuple[Array, Any]],
    floor: Float[Array, " b"],
    search: Any,
) -> tuple[Float[Array, "b m n"], Float[Array, "b p"], Any]:
    """Truncates a stack to the rank that a function reads off its singular values.

    For compiled programs. The derivative of a truncation by leading directions is that to first
    order in the values that are cut over those that stay.

    Args:
      matrices: A stack.
      rank_of: `rank_of(s, complete)` returns the rank and anything else that it knows, from
        singular values (b, p), descending. If `complete` is False, only those above `floor` are
        meaningful, and zeros stand at the end.
      floor: The singular value of each matrix above which directions count; NaN if unknown.
      search: Whether a search of the directions above `floor` alone may be enough. False, not
        traced, if the rank depends on other values too.

    Returns:
      The truncated stack, the singular values, and what `rank_of` returned besides the rank.
    """
    matrices, size = lift(matrices), min(matrices.shape[1:])
    # A tenth of the directions: more would cost as much as a decomposition.
    block = size // 80 * 8

    def by_all():
        u, s, vt = _svd.gram_svd(matrices, floor)
        rank, rest = rank_of(s, True)
        return compose(u, s, vt, rank), s, rest

    if search is False or len(matrices) > 1 or not iteration_pays(block, matrices.shape[1:]):
        return by_all()
    leading = _search(matrices[0], floor[0], search, block)
    s = jnp.pad(leading.s, (0, size - block))[None]
    rank, rest = rank_of(s, False)

    def by_leading():
        u, vt = leading.u[None], leading.vt[None]
        return project(u, leading.s[None], vt, matrices, rank), s, rest

    # Directions that stay without being above the floor have not been searched.
    enough = leading.converged & (rank <= jnp.sum(leading.s > floor[0]))
    return lax.cond(enough, by_leading, by_all)


def decompose(matrices: Float[Array, "b m n"]) -> tuple[Array, Array, Array]:
    """Returns all directions (u, s, vt) of a stack, in a program; s is NaN if it is not finite."""
    return _svd.gram_svd(matrices, jnp.full(len(matrices), jnp.nan, lift(matrices).dtype))


def cross_validate(
    changes: Float[Array, "k b m n"], divided: tuple[Any, tuple[str, ...]] = (None, ())
) -> tuple[Any, Any]:
    r"""Returns what k replicas of a stack of matrices agree on, and its effective rank.

    $\frac1k \sum_i U_i \operatorname{diag}(\max(r_i, 0)) V_i^T$, with the singular vectors of the
    mean of all replicas but i, and $r_{im} = u_m^T \Delta_i v_m$. The rank is the mean of those of
    the folds.

    Args:
      changes: In float32 at least.
      divided: The mesh, and the names of its axes, over which replicas are divided. Each device
        then makes the folds of its replicas.

    Returns:
      The agreed matrices (b, m, n) and the ranks (b); NaN for a matrix of which a replica is not
      finite.
    """
    mesh, names = divided
    if mesh is None and _cut_by_host(MatrixView("", changes, KernelAxes((2,), (3,), (0, 1)))):
        return _fold.host_folds(np.asarray(changes))
    return _fold.compiled_folds(changes, mesh=mesh, names=names)
