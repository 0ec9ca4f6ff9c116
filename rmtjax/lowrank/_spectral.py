"""Kernels held as singular vectors and values, which train without a decomposition."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from rmtjax._axes import as_pair, FactoredKernel, Factors, is_factors, KernelAxes, MatrixView
from rmtjax._sharding import by_compiler, place_factors
from rmtjax._types import Axes, Where
from rmtjax.lowrank._judge import in_order
from rmtjax.planning import check_chosen, check_count, find_kernels, map_kernels, obstacle
from rmtjax.spectra import lift, multiply, singular_vectors, split


@dataclass(frozen=True, eq=False)
class SpectralFactors(FactoredKernel):
    r"""Holds a kernel as $U \operatorname{diag}(s) V^T$, in the kernel's place of a tree.

    A convolution of window k x l, i inputs and o outputs has two forms. Channel-wise it is the
    matrix (k l i) x o: a k x l convolution to r channels, then a 1 x 1 product. Spatial-wise it is
    the matrix (k i) x (l o): a k x 1 convolution to r channels, then a 1 x l convolution.

    Values may have any sign and order: $|s|$ are the singular values while U and V have orthonormal
    columns. The product is linear in s, so that a value of 0 has a finite derivative.

    Attributes:
      u: The input axes of the kernel, then the rank; batch axes first. Spatial-wise the first axis
        of the window and the inputs, then the rank.
      s: The values; batch axes first.
      v: The rank, then the output axes of the kernel; batch axes first. Spatial-wise the rank, the
        second axis of the window and the outputs.
      spatial: Whether the form is spatial-wise.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> s = jnp.array([3.0, 2.0])
      >>> kernel = rmtjax.lowrank.SpectralFactors(jnp.eye(4, 2), s, jnp.eye(2, 4))
      >>> kernel.shape, kernel.rank
      ((4, 4), 2)
    """

    u: Any
    s: Any
    v: Any
    spatial: bool = False

    @property
    def _batch(self) -> int:
        return len(self.s.shape) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense kernel."""
        b = self._batch
        rows, columns = self.u.shape[b:-1], self.v.shape[b + 1 :]
        sides = (rows[0], columns[0], rows[1], columns[1]) if self.spatial else (*rows, *columns)
        return (*self.s.shape[:-1], *sides)

    @property
    def axes(self) -> KernelAxes:
        """The axes of the dense kernel."""
        b, last = self._batch, len(self.shape)
        first = last - 1 if self.spatial else len(self.u.shape) - 1
        axes = tuple(range(last))
        return KernelAxes(axes[b:first], axes[first:], axes[:b])

    @property
    def rank(self) -> int | None:
        """The number of values; None spatial-wise, where they are those of another matrix."""
        return None if self.spatial else self.s.shape[-1]

    @property
    def multiply_adds(self) -> int:
        """Those of one row, or of one position of a convolution."""
        return math.prod(self.u.shape) + math.prod(self.v.shape)

    def factors(self) -> Factors | None:
        """Returns `Factors(u * s, v)`; None spatial-wise."""
        if self.spatial:
            return None
        places = tuple(range(self._batch, self.u.ndim - 1))
        return Factors(self.u * jnp.expand_dims(self.s, places), self.v)

    def multiply(self) -> Array:
        """Returns the dense kernel."""
        pair = self.factors()
        if pair is not None:
            return multiply(pair)
        parts = map(lift, (self.u, self.s, self.v))
        kernel = jnp.einsum("...air,...r,...rbo->...abio", *parts, precision=lax.Precision.HIGHEST)
        return kernel.astype(self.u.dtype)

    def convolve(self, inputs, convolve, dot) -> Array | None:
        """Returns two convolutions, each along one axis of the window."""
        del dot
        hidden = convolve(inputs, self.u, (0,))
        return convolve(hidden, jnp.moveaxis(self.s[:, None, None] * self.v, 0, 1), (1,))

    def describe(self) -> dict[str, Any]:
        """Returns whether the form is spatial-wise."""
        return {"spatial": self.spatial}

    @classmethod
    def restore(cls, description: Mapping[str, Any], parts: Sequence[Any]) -> "SpectralFactors":
        """Returns the kernel with these u, s and v; raises ValueError if they do not fit."""
        spatial = description["spatial"]
        if not isinstance(spatial, bool) or len(parts) != 3:
            raise ValueError(f"{dict(description)!r:.60} does not describe {len(parts)} parts")
        kernel = cls(*parts, spatial=spatial)
        u, s, v = (tuple(part.shape) for part in parts)
        b = len(s) - 1
        counts = (3, 3) if spatial else (max(len(u) - b, 2), max(len(v) - b, 2))
        ends = (*s[:b], s[-1]) if s else ()
        fits = s and (*u[:b], u[-1]) == ends == v[: b + 1]
        if not fits or (len(u) - b, len(v) - b) != counts:
            raise ValueError(f"parts of shapes {u}, {s} and {v} do not fit together")
        return kernel


jax.tree_util.register_dataclass(SpectralFactors, ("u", "s", "v"), ("spatial",))


def _spatial_axes(view: MatrixView) -> KernelAxes | None:
    """Returns the axes of the spatial-wise matrix of a convolution; None for other kernels."""
    inputs, outputs, batch = view.axes
    # Two axes of a window and one of channels, as Flax's convolutions have them.
    if view.is_factored or len(inputs) != 3 or len(outputs) != 1:
        return None
    return KernelAxes((inputs[0], inputs[2]), (inputs[1], outputs[0]), batch)


def _orthonormal(u: Array, v: Array, sides: tuple[int, int]) -> tuple[Array, Array]:
    """Returns singular vectors made orthonormal, each against those of larger values."""

    def turn(vectors):
        q, r = jnp.linalg.qr(vectors)
        signs = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(q.dtype)
        return q * signs[:, None]

    stack, rank = sides
    left = turn(lift(u).reshape(stack, -1, rank))
    right = turn(lift(v).reshape(stack, rank, -1).mT).mT
    return left.reshape(u.shape), right.reshape(v.shape)


def _hold(view: MatrixView, directions) -> SpectralFactors:
    """Returns singular directions in the dtype of a kernel, placed as it is."""
    spatial = view.axes.order != tuple(range(len(view.shape)))
    dtype = jax.dtypes.canonicalize_dtype(view.dtype)
    u, s, v = map(jnp.asarray, directions)
    # Vectors of values near zero are not orthogonal: a Gram matrix does not distinguish them.
    if isinstance(s, jax.core.Tracer) or bool(jnp.any(s[..., -1] <= 1e-3 * s[..., 0])):
        sides = math.prod(s.shape[:-1]), s.shape[-1]
        u, v = by_compiler(partial(_orthonormal, sides=sides), u, v)
    u, s, v = (part.astype(dtype) for part in (u, s, v))
    if not view.is_factored:
        u, v = place_factors(u, v, view.leaf, view.axes)
    return SpectralFactors(u, s, v, spatial)


def to_spectral(
    params: PyTree,
    *,
    rank: int | None = None,
    spatial: bool = False,
    where: Where | None = None,
    axes: Axes | None = None,
) -> PyTree:
    r"""Replaces kernels by `SpectralFactors`, by a singular value decomposition of each.

    The tree computes the same. Train it in $(U, s, V)$ with `orthogonality` and `hoyer` or
    `hoyer_square` as terms of the loss, and lower the rank by `prune_values`. No step then needs a
    decomposition. Run it with `rmtjax.linen.apply` or `rmtjax.nnx.replace`.

    Args:
      params: A tree of arrays, `Factors` or `SpectralFactors`.
      rank: The largest rank, at least 1; None for the short side. Singular values beyond it are
        cut.
      spatial: Whether convolutions with two axes of a window are held spatial-wise.
      where, axes: As in `rmtjax.plan`. Kernels that are no matrices, and those whose axes are not
        in the order batch, inputs, outputs, stay as they are.

    Returns:
      The tree, with the same paths. Leaves that are not replaced are the same objects.

    Raises:
      ValueError: `rank` is not as described, or no leaf is chosen as a kernel.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"Dense_0": {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}}
      >>> kernel = rmtjax.lowrank.to_spectral(params)["Dense_0"]["kernel"]
      >>> kernel.u.shape, kernel.s.shape, kernel.v.shape
      ((80, 60), (60,), (60, 60))

    References:
      Yang, Tang, Wen, Yan, Hu, Li, Li and Chen (2020), https://arxiv.org/abs/2004.09031. They
      multiply both vectors by $\sqrt{|s|}$, whose derivative at 0 is infinite.
    """
    if rank is not None:
        check_count("rank", rank)
    kernels, views = find_kernels(params, where, axes), {}
    check_chosen(kernels, params, where)
    for path, view in kernels.items():
        if not isinstance(view, MatrixView) or obstacle(view, 1) or not in_order(view):
            continue
        turned = _spatial_axes(view) if spatial else None
        views[path] = MatrixView(path, view.leaf, turned or view.axes)
    sides = {path: min(view.full_rank, rank or view.full_rank) for path, view in views.items()}
    held = {path: _hold(views[path], found) for path, found in singular_vectors(views, sides)}
    return map_kernels(lambda path, _: held[path], params, held)


def _to_pair(kernel: Any) -> Any:
    if isinstance(kernel, SpectralFactors) and not kernel.spatial:
        places = tuple(range(kernel.s.ndim - 1, kernel.u.ndim - 1))
        signs = jnp.expand_dims(jnp.sign(kernel.s), places)
        return split(kernel.u * signs, jnp.abs(kernel.s), kernel.v)
    return as_pair(kernel)


def to_factors(params: PyTree) -> PyTree:
    r"""Replaces kernels in other parts by `rmtjax.Factors`, where two thin factors give them.

    `SpectralFactors` become $U \sqrt{|s|}$ and $\pm\sqrt{|s|} V^T$. The tree computes the same. A
    spatial-wise form, and a tensor train whose inputs do not come before its outputs, stay.

    Args:
      params: A tree, such as `prune_values` returns it.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> held = rmtjax.lowrank.to_spectral(params, rank=8)
      >>> rmtjax.lowrank.to_factors(held)["kernel"].left.shape
      (80, 8)
    """
    return jax.tree.map(_to_pair, params, is_leaf=is_factors)
