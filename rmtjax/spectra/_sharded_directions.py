"""Singular directions of kernels that are divided over several devices, none of which is gathered.

Those of the shorter side are eigenvectors of the Gram matrix, which the host decomposes; those of
the longer follow from the kernel where it lies. All of them keep the axes of the kernel: axes that
are divided do not merge in place.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from rmtjax._axes import Kernel, KernelAxes, matrix_shape
from rmtjax._sharding import by_compiler, constrain, specs, typed_sharding
from rmtjax.spectra._host_directions import eigenvectors
from rmtjax.spectra._sharded import in_turns, Kernels, order_in_place
from rmtjax.spectra._spectrum import lift

_product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _is_tall(kernel: Kernel, axes: KernelAxes) -> bool:
    _, rows, columns = matrix_shape(kernel.shape, axes)
    return rows >= columns


def _with_axes(vectors: np.ndarray, kernel: Any, axes: KernelAxes) -> np.ndarray:
    """Vectors (b, p, r) of the shorter side, in the order of a Gram matrix, as (*b, *side, r)."""
    order = order_in_place(kernel, axes, kernel.sharding)
    found, wanted = (o.outputs if _is_tall(kernel, axes) else o.inputs for o in (order, axes))
    sizes = [kernel.shape[axis] for axis in (*axes.batch, *found)]
    first, last = len(axes.batch), len(sizes)
    moved = [first + found.index(axis) for axis in wanted]
    return vectors.reshape(*sizes, -1).transpose(*range(first), *moved, last)


def short_vectors(kernels: Kernels, ranks: dict[str, int]) -> Iterator[np.ndarray]:
    """The first vectors of the shorter side of kernels on meshes of devices, in their order.

    In float32 and with the axes of the side, (*batch, *side, rank); NaN where not finite. Every
    process of a mesh must call it, with the same kernels, and has the same from it.
    """
    find = lambda path, gram: eigenvectors(gram, 0, ranks[path])
    blank = lambda path, shape: np.zeros((*shape, ranks[path]), np.float32)
    for path, vectors in in_turns(kernels, find, blank):
        yield _with_axes(vectors, *kernels[path])


def _normalize(long: Array, rows: tuple[int, ...]) -> tuple[Array, Array]:
    """Vectors over their norms, and these; what is zero has no direction, and needs none."""
    # Relative to the largest entry, so that no square is too large or too small for float32.
    most = jnp.max(jnp.abs(long), axis=rows, keepdims=True)
    scaled = long / jnp.where(most > 0, most, 1)
    norms = jnp.sqrt(jnp.sum(scaled**2, axis=rows, keepdims=True))
    return scaled / jnp.where(norms > 0, norms, jnp.inf), jnp.squeeze(most * norms, rows)


@partial(jax.jit, static_argnums=(2, 3))
def _longer(kernel: Kernel, short: Array, axes: KernelAxes, sharding: NamedSharding):
    """The directions A v / s of the longer side, divided as the kernel, and s on each device."""
    batch, tall, last = axes.batch, _is_tall(kernel, axes), kernel.ndim
    side, other = axes[:2] if tall else (axes.outputs, axes.inputs)
    spec = specs(sharding, last)
    own = *(spec[axis] for axis in (*batch, *side)), None
    rows = tuple(range(len(batch), len(own) - 1))

    def find(kernel, short):
        # In the kernel's own axes: each device multiplies its part, and sums are of thin ones.
        operands = lift(kernel), [*range(last)], short, [*batch, *other, last]
        long = constrain(_product(*operands, [*batch, *side, last]), sharding.mesh, own)
        vectors, values = _normalize(long, rows)
        return constrain(vectors, sharding.mesh, own), constrain(values, sharding.mesh, ())

    typed = typed_sharding(kernel)
    out = typed and (NamedSharding(typed.mesh, PartitionSpec(*own)), None)
    return by_compiler(find, kernel, short, out=out)


def _place(short: np.ndarray, kernel: Any, axes: KernelAxes) -> Array:
    """Vectors of the shorter side on the devices of a kernel, divided along its axes as it is."""
    side = axes.outputs if _is_tall(kernel, axes) else axes.inputs
    spec = specs(kernel.sharding, kernel.ndim)
    own = PartitionSpec(*(spec[axis] for axis in (*axes.batch, *side)), None)
    # Not `device_put`, which compares what processes have, and finds that NaN is not NaN.
    place = NamedSharding(kernel.sharding.mesh, own)
    return jax.make_array_from_callback(short.shape, place, lambda index: short[index])


def sharded_directions(kernel: Any, axes: KernelAxes, short: np.ndarray) -> tuple[Array, ...]:
    """The singular directions (u, s, vt) that belong to vectors of the shorter side, in float32.

    Of shapes (*batch, *inputs, r), (*batch, r) and (*batch, r, *outputs); u and vt lie as factors
    of the kernel, s whole on each device. NaN where not finite.
    """
    placed = _place(short, kernel, axes)
    long, values = _longer(kernel, placed, axes, kernel.sharding)
    u, v = (long, placed) if _is_tall(kernel, axes) else (placed, long)
    return u, values, jnp.moveaxis(v, -1, len(axes.batch))


@partial(jax.jit, static_argnames=("axes", "dtype", "sharding"))
def sharded_product(
    left: Float[Array, "*inputs r"],
    right: Float[Array, "*r_outputs"],
    *,
    axes: KernelAxes,
    dtype: Any,
    sharding: NamedSharding,
) -> Array:
    """The kernel of which these are the factors, divided as it is to be."""
    inputs, outputs, batch = axes
    last = sum(map(len, axes))

    def multiply(left, right):
        operands = left, [*batch, *inputs, last], right, [*batch, last, *outputs]
        product = _product(*operands, [*range(last)]).astype(dtype)
        return constrain(product, sharding.mesh, sharding.spec)

    typed = typed_sharding(left)
    out = typed and NamedSharding(typed.mesh, sharding.spec)
    return by_compiler(multiply, left, right, out=out)
