"""Nearest matrices that are cheap to store: on a grid of few bits, or of low rank.

A projection is a pure function of one matrix (inputs, outputs). `rmtjax.admm` trains towards one,
and `project` applies it to a tree. A function of your own works as well.

References:
  Xu, Chen, Hu, Yu, Liu and Meng (2021), https://arxiv.org/abs/2111.14836, for the grids and for the
  alternation of scale and assignment. Eckart and Young, Psychometrika 1 (1936) 211-218, for ranks.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from rmtjax import spectra
from rmtjax._axes import MatrixView, native
from rmtjax._sharding import by_compiler, typed_sharding
from rmtjax._types import Axes, Where
from rmtjax.noise import check_rule, ranks
from rmtjax.planning import check_chosen, check_plan, find_kernels, map_kernels, obstacle, Plan
from rmtjax.spectra import as_matrix, compose, decompose, each, from_singular_values, lift

__all__ = [
    "Quantized",
    "from_plan",
    "project",
    "project_bits",
    "project_rank",
    "quantize_bits",
]

Projection = Callable[[Array], Array]
Bits = int | tuple[int, ...]

# Scales to start from, over that of the largest entry, which alone leaves coarse grids near zero.
STARTS = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18)


class Quantized(NamedTuple):
    """A matrix on a grid: `codes * scale`.

    Attributes:
      codes: Integers of the grid, in the shape of the matrix.
      scale: The scale, in a shape that broadcasts with the codes.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> grid = rmtjax.projections.quantize_bits(jnp.array([[0.9, -1.1]]), 2)
      >>> (grid.codes * grid.scale).round(2).tolist()
      [[1.0, -1.0]]
    """

    codes: Int[Array, "..."]
    scale: Float[Array, "..."]


def _levels(bits: Any) -> np.ndarray:
    """Returns the magnitudes of a grid, ascending."""
    if isinstance(bits, int) and not isinstance(bits, bool) and 1 <= bits <= 8:
        return np.arange(2 ** (bits - 1), dtype=np.int8) if bits > 1 else np.ones(1, np.int8)
    if isinstance(bits, tuple) and bits:
        levels = np.asarray(bits)
        ascending = levels.dtype.kind in "iu" and (np.diff(levels) > 0).all()
        if ascending and levels[0] >= 0 and 0 < levels[-1] <= 127:
            return levels.astype(np.int8)
    raise ValueError(
        "`bits` must be an integer from 1 to 8, or the magnitudes of a grid as ascending integers "
        f"from 0 to 127, such as (0, 1, 2, 4); got {bits!r}."
    )


def _reduced(ndim: int, scale_axis: Any) -> tuple[int, ...]:
    """Returns the axes that share a scale."""
    if scale_axis is None:
        return tuple(range(ndim))
    if not isinstance(scale_axis, int) or not -ndim <= scale_axis < ndim:
        raise ValueError(f"`scale_axis` must be None or one of {ndim} axes, got {scale_axis!r}.")
    return tuple(axis for axis in range(ndim) if axis != scale_axis % ndim)


def quantize_bits(
    kernel: Float[ArrayLike, "..."], bits: Bits, scale_axis: int | None = None, *, steps: int = 10
) -> Quantized:
    r"""Returns the codes and scales of the nearest kernel on a grid of few bits.

    It minimises $\|W - \alpha\, q\|_F^2$ over the scale $\alpha$ and codes $q$ of the grid, in
    turns: $q$ is the nearest code to $W / \alpha$, and $\alpha = \langle W, q\rangle / \langle q,
    q\rangle$. Each turn lowers the error. The best of six starts is kept, a local minimum.

    Args:
      kernel: Array of any floating dtype and shape.
      bits: 1 is the grid {-1, 1}; b from 2 to 8 is {-L, ..., L} with $L = 2^{b-1} - 1$. Or the
        magnitudes of a grid, such as (0, 1, 2, 4).
      scale_axis: None for one scale. An axis for a scale at each of its indices: 1 for each output
        of a matrix (inputs, outputs), 0 for each input.
      steps: Turns from each start, at least 1.

    Returns:
      Codes as int8, and scales in float32 at least: 0 for zeros, NaN for what is not finite.

    Raises:
      ValueError, TypeError: An argument is not as described.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> kernel = jnp.array([[0.9, -0.1], [-1.1, 2.0]])
      >>> codes, scale = rmtjax.projections.quantize_bits(kernel, 2, scale_axis=1)
      >>> codes.tolist(), scale.tolist()
      ([[1, 0], [-1, 1]], [[1.0, 2.0]])
    """
    kernel, levels = jnp.asarray(native(kernel)), _levels(bits)
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise TypeError(f"`kernel` must be floating, got dtype {kernel.dtype}: cast it first.")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"`steps` must be an integer of at least 1, got {steps!r}.")
    fixed = tuple(levels.tolist()), _reduced(kernel.ndim, scale_axis), steps
    out = Quantized._make([typed_sharding(kernel), None])
    return by_compiler(lambda kernel: _quantize(lift(kernel), *fixed), kernel, out=out)


# Compiled also for users who call it outside `jit`: some sixty passes over the entries.
@partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(kernel, levels: tuple[int, ...], axes: tuple[int, ...], steps: int) -> Quantized:
    total = partial(jnp.sum, axis=axes, keepdims=True)
    # Over powers of two, exactly: products of very large and very small entries leave float32.
    _, exponent = jnp.frexp(jnp.max(jnp.abs(kernel), axes, keepdims=True, initial=0))
    magnitudes, grid = jnp.abs(spectra.times_power(kernel, -exponent)), np.asarray(levels)
    middles = jnp.asarray((grid[1:] + grid[:-1]) / 2, kernel.dtype)

    def assign(scale):
        index = jnp.searchsorted(middles, magnitudes / jnp.where(scale > 0, scale, 1))
        return jnp.asarray(grid, kernel.dtype)[index]

    def turn(_, scale):
        codes = assign(scale)
        square = total(codes**2)
        return total(magnitudes * codes) / jnp.where(square > 0, square, 1)

    def start(best, share):
        scale = lax.fori_loop(0, steps, turn, share * largest)
        codes = assign(scale)
        # With the best scale for these codes the error is |W|^2 less this.
        gain = scale * (2 * total(magnitudes * codes) - scale * total(codes**2))
        better = gain > best[1]
        return jax.tree.map(partial(jnp.where, better), (scale, gain), best), None

    largest = jnp.max(magnitudes, axes, keepdims=True, initial=0) / grid[-1]
    shares = jnp.asarray(STARTS, kernel.dtype)
    (scale, _), _ = lax.scan(start, (largest, jnp.zeros_like(largest)), shares)
    # A grid must not hide entries that are not finite. The largest of some may not be NaN.
    finite = jnp.isfinite(kernel).all(axis=axes, keepdims=True)
    codes = jnp.where(kernel < 0, -1, 1) * assign(scale)
    scale = jnp.where(finite, spectra.times_power(scale, exponent), jnp.nan)
    return Quantized(codes.astype(jnp.int8), scale)


def project_bits(
    kernel: Float[ArrayLike, "..."], bits: Bits, scale_axis: int | None = None, *, steps: int = 10
) -> Float[Array, "..."]:
    r"""Returns the nearest kernel on a grid of few bits, $\alpha\, q$ of `quantize_bits`.

    For `rmtjax.admm` fix the grid by `functools.partial(project_bits, bits=2, scale_axis=1)`.

    Args:
      kernel, bits, scale_axis, steps: As in `quantize_bits`.

    Returns:
      The shape and dtype of `kernel`. In fewer than 32 bits the product is rounded.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> kernel = jnp.array([[0.9, -0.1], [-1.1, 2.0]])
      >>> rmtjax.projections.project_bits(kernel, 2, scale_axis=1).tolist()
      [[1.0, 0.0], [-1.0, 2.0]]
    """
    kernel = jnp.asarray(native(kernel))
    codes, scale = quantize_bits(kernel, bits, scale_axis, steps=steps)
    return (codes.astype(scale.dtype) * scale).astype(kernel.dtype)


def project_rank(
    matrix: Float[ArrayLike, "m n"],
    rule: ranks.RankRule = ranks.bema(),  # noqa: B008 - a frozen value
) -> Float[Array, "m n"]:
    """Returns the nearest matrix of the rank that a rule finds.

    A matrix whose fit the rule refuses, and one without signal, comes back unchanged: zero is the
    nearest matrix to neither.

    Under `rmtjax.admm` a rule that fits the noise meets a matrix whose noise shrinks from step to
    step. Take the ranks of a plan then, by `from_plan`.

    Args:
      matrix: Real matrix of any floating dtype.
      rule: Counts the signal directions, as `rmtjax.ranks.bema()`, the default: the
        Marchenko-Pastur edge. `rmtjax.ranks.fixed(r)` projects on rank r.

    Returns:
      The shape and dtype of `matrix`.

    Examples:
      >>> import jax, jax.numpy as jnp, rmtjax
      >>> matrix = 1 + jax.random.normal(jax.random.key(0), (80, 60))
      >>> int(jnp.linalg.matrix_rank(rmtjax.projections.project_rank(matrix)))
      1
    """
    matrix = as_matrix("project_rank", matrix)
    check_rule(rule)

    def find(matrix):
        unit, exponent = spectra.to_unit(lift(matrix))
        u, s, vt = (array[0] for array in decompose(unit[None]))
        spectrum = from_singular_values(s, unit)
        rank = rule(spectrum, fit := rule.fit(spectrum))
        found = rule.accepts(spectrum, fit) & (rank > 0) & (rank < len(s))
        return spectra.times_power(jnp.where(found, compose(u, s, vt, rank), unit), exponent)

    return by_compiler(find, matrix, out=typed_sharding(matrix)).astype(matrix.dtype)


def from_plan(plan: Plan) -> dict[str, Projection]:
    """Returns the projection of each kernel to the rank that a plan has found for it.

    The ranks are those of the plan for good, as a noise level must not be fitted again to a kernel
    on its way to low rank.

    Args:
      plan: From `rmtjax.plan`. Kernels that it keeps have no projection.

    Returns:
      Path to projection, for `rmtjax.admm` and `project`.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": 1 + jax.random.normal(jax.random.key(0), (80, 60))}
      >>> rmtjax.projections.from_plan(rmtjax.plan(params, multiple=1))["kernel"].keywords
      {'rule': fixed(rank=1)}
    """
    check_plan(plan)
    rule = lambda rank: ranks.fixed(int(rank))
    return {path: partial(project_rank, rule=rule(row.rank)) for path, row in plan.changes.items()}


def find_projected(
    params: PyTree, projection: Any, where: Where | None, axes: Axes | None
) -> dict[str, tuple[MatrixView, Projection]]:
    """Returns the kernels that are projected, as matrices, each with its projection."""
    by_path = isinstance(projection, Mapping)
    if not by_path and not callable(projection):
        raise TypeError(
            "`projection` must be a function of a matrix, or a dictionary of such functions by "
            f"path, got {projection!r} ({type(projection).__name__})."
        )
    views = find_kernels(params, where, axes)
    unknown = min(projection.keys() - views.keys(), default=None) if by_path else None
    if unknown is not None and where is None:
        raise ValueError(
            f"`projection` has the path {unknown!r}, which is no kernel of the tree. The kernels "
            f"are {', '.join(map(repr, views))}."
        )
    chosen = {}
    for path, view in views.items():
        fine = isinstance(view, MatrixView) and not (view.is_factored or obstacle(view, 1))
        if fine and (not by_path or path in projection):
            chosen[path] = view, projection[path] if by_path else projection
    return chosen


def project_kernel(kernel: MatrixView, projection: Projection) -> Float[Array, "..."]:
    """Returns a kernel of which each matrix is projected."""

    def find(leaf):
        view = MatrixView(kernel.path, leaf, kernel.axes)
        return view.from_matrices(each(projection, lift(view.matrices())))

    return by_compiler(find, kernel.leaf, out=typed_sharding(kernel.leaf))


def project(
    params: PyTree,
    projection: Projection | Mapping[str, Projection],
    *,
    where: Where | None = None,
    axes: Axes | None = None,
) -> PyTree:
    """Projects the kernels of a tree, as the last step of `rmtjax.admm`.

    Args:
      params: A tree of arrays.
      projection: A function of a matrix (inputs, outputs), or such functions by path.
      where, axes: As in `rmtjax.plan`. Each matrix of a stack is projected alone. `Factors` and
        leaves that are no matrices stay as they are.

    Returns:
      A tree of the same shapes and dtypes.

    Raises:
      TypeError, ValueError: `projection` is not as described, or names a path that is no kernel.

    Examples:
      >>> import functools, jax.numpy as jnp, rmtjax
      >>> params = {"kernel": jnp.array([[0.9, -0.1], [-1.1, 2.0]]), "bias": jnp.ones(2)}
      >>> two_bits = functools.partial(rmtjax.projections.project_bits, bits=2)
      >>> print(rmtjax.projections.project(params, two_bits)["kernel"])
      [[ 1.3333334  0.       ]
       [-1.3333334  1.3333334]]
    """
    check_chosen(find_kernels(params, where, axes), params, where)
    found = find_projected(params, projection, where, axes)
    dtype = lambda view: jax.dtypes.canonicalize_dtype(view.dtype)
    projected = {p: project_kernel(v, f).astype(dtype(v)) for p, (v, f) in found.items()}
    return map_kernels(lambda path, _: projected[path], params, projected)
