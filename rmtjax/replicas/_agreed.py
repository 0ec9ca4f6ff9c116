"""Merges one kernel of several replicas: a dense one, or one that is stored as factors."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rmtjax._axes import Factors, KernelAxes, MatrixView, to_stack
from rmtjax._sharding import by_compiler, first_axis_only, leading_names, place_like
from rmtjax.spectra import cross_validate, decompose, each, lift, matmul, split


class Agreed(NamedTuple):
    """The merged leaf of one kernel, and how much of the mean change it keeps."""

    leaf: Any
    kept: Float[Array, ""]
    rank: Float[Array, ""]


def _stacks(leaf: Any, replicas: Any, axes: KernelAxes) -> tuple[Any, Any]:
    """Returns a kernel and its replicas as stacks of matrices, in float32 at least."""
    to_matrices = lambda leaf: jax.tree.map(lift, to_stack(leaf, axes))
    return to_matrices(leaf), jax.vmap(to_matrices)(replicas)


@partial(jax.jit, static_argnames="axes")
def _changes(kernel, replicas, *, axes: KernelAxes) -> Float[Array, "k b m n"]:
    def find(kernel, replicas):
        start, matrices = _stacks(kernel, replicas, axes)
        return matrices - start[None]

    return by_compiler(find, kernel, replicas, out=first_axis_only(replicas))


def _share(agreed: Float[Array, "b m n"], mean: Float[Array, "b m n"]) -> Float[Array, ""]:
    """Returns the squares of one stack over those of another; 0 if both are 0."""
    scale = jnp.max(jnp.abs(mean))
    scaled = lambda array: array / jnp.where(scale > 0, scale, 1)
    total = jnp.sum(jnp.square(scaled(mean)))
    share = jnp.sum(jnp.square(scaled(agreed))) / jnp.where(total > 0, total, 1)
    return jnp.where(jnp.isfinite(total), share, jnp.nan)


def _change(changes, agreed, rest):
    """Returns the change to be made, with a share of what was not agreed on, and what is kept."""
    mean = jnp.mean(changes, axis=0)
    return agreed + jnp.asarray(rest, agreed.dtype) * (mean - agreed), _share(agreed, mean)


@jax.jit
def _land(stack, changes, agreed, rest):
    def find(stack, changes, agreed, rest):
        change, kept = _change(changes, agreed, rest)
        return stack + change, kept

    return by_compiler(find, stack, changes, agreed, rest)


@partial(jax.jit, static_argnames="axes")
def _land_dense(kernel, changes, agreed, rest, *, axes: KernelAxes):
    def find(kernel, changes, agreed, rest):
        view = MatrixView("", kernel, axes)
        change, kept = _change(changes, agreed, rest)
        return view.from_matrices(lift(view.matrices()) + change).astype(kernel.dtype), kept

    return by_compiler(find, kernel, changes, agreed, rest)


def merge_dense(view: MatrixView, replicas: Any, rest: Any) -> Agreed:
    """Merges a dense kernel; `replicas` has a leading axis."""
    kernel = jnp.asarray(view.leaf)
    changes = _changes(kernel, replicas, axes=view.axes)
    agreed, ranks = cross_validate(changes, leading_names(replicas))
    landed, kept = _land_dense(kernel, changes, jnp.asarray(agreed), rest, axes=view.axes)
    return Agreed(place_like(landed, view.leaf), kept, jnp.mean(jnp.asarray(ranks)))


# Made once, since a loop is compiled anew for each new function.
_qr = partial(jnp.linalg.qr)
_thin_svd = partial(jnp.linalg.svd, full_matrices=False)


def _basis(start: Float[Array, "b m r"], moves: Float[Array, "k b m r"]):
    """Returns an orthonormal basis (b, m, q) of all columns, and the columns in that basis."""
    joined = jnp.concatenate([start[None], moves])
    count, stack, rows, rank = joined.shape
    joined = joined.transpose(1, 2, 0, 3).reshape(stack, rows, count * rank)
    q, coordinates = each(_qr, joined)
    coordinates = coordinates.reshape(stack, -1, count, rank).transpose(2, 0, 1, 3)
    return q, coordinates[0], coordinates[1:]


@partial(jax.jit, static_argnames="axes")
def _cores(factors: Factors, replicas: Factors, *, axes: KernelAxes):
    """Returns bases of both sides, and the product and its changes in them.

    The products themselves, which may be large, are never formed. No base changes what replicas
    agree on.
    """

    def find(factors, replicas):
        start, stacks = _stacks(factors, replicas, axes)
        # Of what factors have moved, and not of factors, so that small changes are exact.
        q, left, lefts = _basis(start.left, stacks.left - start.left[None])
        p, right, rights = _basis(start.right.mT, (stacks.right - start.right[None]).mT)
        changes = matmul(lefts, (right[None] + rights).mT) + matmul(left[None], rights.mT)
        return q, p, matmul(left, right.mT), changes

    return by_compiler(find, factors, replicas)


def _turned(left, right, start: Factors) -> tuple[Array, Array]:
    """Turns the directions of factors by the rotation that brings them nearest to the start."""
    # Orthogonal Procrustes. States of optimizers are about the directions that factors had.
    overlap = matmul(left.mT, start.left) + matmul(right, start.right.mT)
    u, _, vt = each(_thin_svd, jnp.where(jnp.isfinite(overlap), overlap, 0))
    rotation = matmul(u, vt)
    return matmul(left, rotation), matmul(rotation.mT, right)


@partial(jax.jit, static_argnames="axes")
def _refactor(factors: Factors, bases, landed, *, axes: KernelAxes) -> Factors:
    """Returns factors of the nearest product of the rank that the factors have."""
    return by_compiler(partial(_cut, axes=axes), factors, bases, landed)


def _cut(factors: Factors, bases, landed, axes: KernelAxes) -> Factors:
    """Cuts a product to the rank of factors, and casts and turns what is left like these."""
    start = jax.tree.map(lift, to_stack(factors, axes))
    rank = start.left.shape[-1]
    u, s, vt = decompose(landed)
    # A rank above the short side is possible, and has zeros at the end.
    missing = max(rank - s.shape[-1], 0)
    u, s, vt = u[..., :rank], s[..., :rank], vt[:, :rank]
    left, right = split(matmul(bases[0], u), s, matmul(vt, bases[1].mT))
    left = jnp.pad(left, ((0, 0), (0, 0), (0, missing)))
    right = jnp.pad(right, ((0, 0), (0, missing), (0, 0)))
    new = _turned(left, right, start)
    cast = lambda new, old: new.reshape(old.shape).astype(old.dtype)
    return Factors(cast(new[0], factors.left), cast(new[1], factors.right))


def merge_factors(view: MatrixView, replicas: Factors, rest: Any) -> Agreed:
    """Merges a kernel that is stored as factors; `replicas` are factors with a leading axis."""
    factors = Factors(*map(jnp.asarray, view.leaf))
    *bases, core, changes = _cores(factors, replicas, axes=view.axes)
    agreed, ranks = cross_validate(changes, leading_names(replicas.left))
    landed, kept = _land(core, changes, jnp.asarray(agreed), rest)
    merged = _refactor(factors, bases, landed, axes=view.axes)
    leaf = Factors(*map(place_like, merged, view.leaf))
    return Agreed(leaf, kept, jnp.mean(jnp.asarray(ranks)))
