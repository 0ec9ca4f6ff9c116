"""Chooses how spectra and singular vectors are found: the only file that does."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from rmtjax._axes import Factors, from_matrices, MatrixView, to_stack
from rmtjax._sharding import by_compiler, fetch
from rmtjax._types import Spectrum
from rmtjax.spectra._directions import first_directions
from rmtjax.spectra._factors import multiply, svd
from rmtjax.spectra._host_directions import host_directions, host_without_last
from rmtjax.spectra._host_spectra import host_spectra
from rmtjax.spectra._lanczos import estimate, pays
from rmtjax.spectra._sharded import is_spread, sharded_spectra
from rmtjax.spectra._sharded_directions import sharded_directions, sharded_product, short_vectors
from rmtjax.spectra._spectrum import each, spectrum
from rmtjax.spectra._values import on_host


class Values(NamedTuple):
    spectrum: Spectrum
    num_exact: Int[np.ndarray, " stack"]


class Directions(NamedTuple):
    u: Any
    s: Any
    vt: Any


def is_eager() -> bool:
    return not isinstance(jnp.zeros(()), jax.core.Tracer)


def _spectrum_of(matrix) -> Spectrum:
    if not isinstance(matrix, Factors):
        return spectrum(matrix)
    sides = matrix.left.shape[0], matrix.right.shape[1]
    _, s, _ = svd(matrix)
    eigenvalues = jnp.pad(s**2 / max(sides), (0, min(sides) - len(s)))
    return Spectrum(eigenvalues, jnp.asarray(min(sides) / max(sides), s.dtype))


@partial(jax.jit, static_argnums=1)
def _compiled(kernel, axes):
    return by_compiler(lambda kernel: each(_spectrum_of, to_stack(kernel, axes)), kernel)


@partial(jax.jit, static_argnums=1)
def _estimated(kernel, axes):
    return by_compiler(lambda kernel: jax.lax.map(estimate, to_stack(kernel, axes)), kernel)


def estimated_spectra(views: Mapping[str, MatrixView], exact_below: int) -> dict[str, Values]:
    found = {}
    for path, view in views.items():
        if not view.is_factored and view.short >= exact_below and pays((view.rows, view.columns)):
            found[path] = Values(*fetch(_estimated(view.leaf, view.axes)))
    return found


def spectra(views: Mapping[str, MatrixView]) -> dict[str, Values]:
    pair = lambda paths: {path: (views[path].leaf, views[path].axes) for path in paths}
    here = [p for p, v in views.items() if not v.is_factored and on_host(v.leaf)]
    spread = [
        p for p, v in views.items() if p not in here and not v.is_factored and is_spread(v.leaf)
    ]
    found = host_spectra(pair(here), lambda path, own: own) | sharded_spectra(pair(spread))
    for path, view in views.items():
        if path not in found:
            found[path] = fetch(_compiled(jax.tree.map(jnp.asarray, view.leaf), view.axes))
    full = lambda spectrum: np.full(len(spectrum.ratio), spectrum.eigenvalues.shape[-1], np.int32)
    return {path: Values(found[path], full(found[path])) for path in views}


def _by_host(view: MatrixView) -> bool:
    if view.is_factored or not (on_host(view.leaf) and jax.default_backend() == "cpu"):
        return False
    return getattr(view.leaf, "is_fully_addressable", True) and is_eager()


def _unfold(vectors, view: MatrixView) -> Directions:
    u, s, vt = vectors
    shape, (inputs, outputs, batch) = view.shape, view.axes
    batch, inputs, outputs = ([shape[axis] for axis in group] for group in (batch, inputs, outputs))
    rank = s.shape[-1]
    return Directions(
        u.reshape(*batch, *inputs, rank),
        s.reshape(*batch, rank),
        vt.reshape(*batch, rank, *outputs),
    )


def singular_vectors(
    views: Mapping[str, MatrixView], ranks: Mapping[str, int]
) -> Iterator[tuple[str, Directions]]:
    divided = {
        p: v for p, v in views.items() if not v.is_factored and is_spread(v.leaf) and is_eager()
    }
    kernels = {path: (view.leaf, view.axes) for path, view in divided.items()}
    for path, short in zip(divided, short_vectors(kernels, dict(ranks)), strict=True):
        yield path, Directions(*sharded_directions(*kernels[path], short))
    for path, view in views.items():
        if path in divided:
            continue
        if _by_host(view):
            vectors = host_directions(lambda: view.leaf, view.axes, ranks[path])
        else:
            leaf = view.leaf
            if not view.is_factored and not isinstance(leaf, jax.Array):
                leaf = jnp.asarray(np.asarray(leaf))
            vectors = first_directions(leaf, view.axes, ranks[path])
        yield path, _unfold(vectors, view)


def keeps_most(view: MatrixView, rank: int) -> bool:
    return view.short / 2 < rank < view.short and _by_host(view)


def without_last(view: MatrixView, rank: int) -> Array:
    dtype = jax.dtypes.canonicalize_dtype(view.dtype)
    lower = jnp.asarray(host_without_last(lambda: view.leaf, view.axes, rank))
    return view.from_matrices(lower).astype(dtype)


@partial(jax.jit, static_argnames=("shape", "axes", "dtype"))
def _dense(factors: Factors, shape, axes, dtype):
    _, rows, columns = (
        np.prod([shape[a] for a in group], dtype=int)
        for group in (axes.batch, axes.inputs, axes.outputs)
    )
    rank = factors.left.shape[len(axes.batch) + len(axes.inputs)]
    stack = Factors(factors.left.reshape(-1, rows, rank), factors.right.reshape(-1, rank, columns))
    return from_matrices(multiply(stack), shape, axes).astype(dtype)


def product(factors: Factors, view: MatrixView) -> Array:
    dtype = jax.dtypes.canonicalize_dtype(view.dtype)
    if not view.is_factored and is_spread(view.leaf) and is_eager():
        return sharded_product(*factors, axes=view.axes, dtype=dtype, sharding=view.leaf.sharding)
    return _dense(factors, shape=view.shape, axes=view.axes, dtype=dtype)
