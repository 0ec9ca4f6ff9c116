"""Spectra and singular vectors of kernels that are divided over devices, none of which is gathered.

The devices compute the Gram matrix of the shorter side, and the hosts decompose it in turn. The
vectors of the longer side follow from the kernel where it is stored. All vectors keep the axes of
the kernel: merging axes that are divided would gather them.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from rmtjax._axes import Kernel, KernelAxes, matrix_shape, MatrixView, to_matrices, Views
from rmtjax._sharding import by_compiler, constrain, mesh_of, specs, typed_sharding
from rmtjax.spectra._lapack import eigenvalues, eigenvectors
from rmtjax.spectra._spectrum import einsum, lift

# Its name before jax 0.8 was in `jax.experimental`.
_x64: Any = getattr(jax if hasattr(jax, "enable_x64") else jax.experimental, "enable_x64")  # noqa: B009

Ranks = Mapping[str, int]


def _divided_first(kernel: Kernel, axes: KernelAxes, sharding: NamedSharding) -> KernelAxes:
    """Returns axes in an order in which those of a side merge without moving data."""
    spec = specs(sharding, kernel.ndim)
    order = lambda group: tuple(sorted(group, key=lambda axis: spec[axis] is None))
    return KernelAxes(order(axes.inputs), order(axes.outputs), axes.batch)


def _merged(spec: list[Any], group: tuple[int, ...]) -> Any:
    """Returns the division of axes that have merged, in the order above."""
    divided = [spec[axis] for axis in group if spec[axis] is not None]
    # If two are divided, a device has scattered rows, which no `PartitionSpec` describes.
    return PartitionSpec.UNCONSTRAINED if len(divided) > 1 else next(iter(divided), None)


@partial(jax.jit, static_argnums=(1, 2))
def _gram(kernel: Kernel, axes: KernelAxes, sharding: NamedSharding) -> Float[Array, "b p p"]:
    """Returns A^T A of each matrix of a kernel, in float64; a stack stays divided as it was.

    Each device takes a part of the rows of a matrix with more rows than columns, and adds the
    square of its part. The kernel is moved once, and the sums have the short side only.
    """
    spec = specs(sharding, kernel.ndim)
    # The order of the axes within a side does not change the spectrum.
    order = _divided_first(kernel, axes, sharding)
    stack = spec[axes.batch[0]] if len(axes.batch) == 1 else None
    # Mesh axes that divide the stack are taken. The others divide the rows.
    rest = tuple(name for name in sharding.mesh.axis_names if name not in jax.tree.leaves(stack))
    parts = int(np.prod([sharding.mesh.shape[name] for name in rest]))
    batch, *sides = (_merged(spec, group) for group in (axes.batch, *order[:2]))
    as_stored = lambda array, places: constrain(array, sharding.mesh, (batch, *places))
    by_rows = lambda array, rows: constrain(array, sharding.mesh, (stack, rows, None))

    def square(kernel):
        matrices = to_matrices(kernel, order)
        long, places = matrices, sides
        if matrices.shape[1] < matrices.shape[2]:
            long, places = matrices.mT, sides[::-1]
        missing = -long.shape[1] % parts  # rows of zeros, which add nothing
        # Constrained before and after padding. Otherwise the compiler gathers the kernel.
        long = jnp.pad(as_stored(long, places), ((0, 0), (0, missing), (0, 0)))
        long = by_rows(as_stored(long, places), rest).astype(jnp.float64)
        return by_rows(jnp.matmul(long.mT, long), None)

    typed = typed_sharding(kernel)
    out = typed and NamedSharding(typed.mesh, PartitionSpec(stack))
    return by_compiler(square, kernel, out=out)


def _share(gram: Array, turn: int) -> Iterator[tuple[Any, list[np.ndarray]]]:
    """Yields the matrices of a stack that this process decomposes, with their index.

    Devices with the same ones take turns from kernel to kernel.
    """
    shards = gram.addressable_shards
    replicas = gram.sharding.num_devices * shards[0].data.size // gram.size
    for shard in shards:
        if shard.replica_id == turn % replicas:
            yield shard.index[0], list(np.asarray(shard.data))


def _sum_over_processes(results: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Returns results of which each process has a part, and zeros elsewhere, in every process."""
    devices = list(mesh.devices.flat)
    processes = [device.process_index for device in devices]
    if len(set(processes)) == 1:
        return results
    first = processes.index(jax.process_index())
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    part = lambda index: (results if index[0].start == first else np.zeros_like(results))[None]
    parts = jax.make_array_from_callback((len(devices), *results.shape), sharding, part)
    replicated = NamedSharding(mesh, PartitionSpec())
    total = jax.jit(partial(jnp.sum, axis=0), out_shardings=replicated)(parts)
    return np.asarray(total.addressable_data(0))


def _decompose(views: Views, ranks: Ranks | None) -> dict[str, np.ndarray]:
    """Returns results for the Gram matrices of kernels, which processes decompose side by side."""
    waiting = {}
    for turn, (path, view) in enumerate(views.items()):
        gram = _gram(view.leaf, view.axes, view.leaf.sharding)
        # Only this process's share is kept, so that one Gram matrix at a time is on the devices.
        waiting[path] = (gram.shape[0], list(_share(gram, turn)))
    results = {}
    for path, (stack, shares) in waiting.items():
        shape, find = (stack, views[path].short), eigenvalues
        if ranks is not None:
            shape, find = (*shape, ranks[path]), partial(eigenvectors, first=0, last=ranks[path])
        result = np.zeros(shape, np.float64 if ranks is None else np.float32)
        for index, matrices in shares:  # copied, since they are overwritten
            result[index] = [find(np.array(matrix, order="F")) for matrix in matrices]
        results[path] = _sum_over_processes(result, mesh_of(views[path].leaf))
    return results


def _in_turns(views: Views, ranks: Ranks | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the path and the eigenvalues, or the first eigenvectors, of each Gram matrix.

    As many kernels at a time as a mesh has processes. Every process of a mesh must call it with
    the same kernels, and gets the same results.
    """
    paths = list(views)
    while paths:
        devices = mesh_of(views[paths[0]].leaf).devices.flat
        count = len({device.process_index for device in devices})
        batch, paths = {path: views[path] for path in paths[:count]}, paths[count:]
        with _x64(True):  # off again while the results are used
            results = _decompose(batch, ranks)
        yield from results.items()


def squared_singular_values(views: Views) -> dict[str, np.ndarray]:
    """Returns the squared singular values of divided kernels, (stack, p), descending."""
    return {path: ascending[:, ::-1] for path, ascending in _in_turns(views, None)}


def _normalize(long: Array, rows: tuple[int, ...]) -> tuple[Array, Array]:
    """Returns vectors over their norms, and the norms; a zero vector stays zero."""
    # Relative to the largest entry, so that no square overflows or underflows in float32.
    most = jnp.max(jnp.abs(long), axis=rows, keepdims=True)
    scaled = long / jnp.where(most > 0, most, 1)
    norms = jnp.sqrt(jnp.sum(scaled**2, axis=rows, keepdims=True))
    return scaled / jnp.where(norms > 0, norms, jnp.inf), jnp.squeeze(most * norms, rows)


@partial(jax.jit, static_argnums=(2, 3))
def _longer(kernel: Kernel, short: Array, axes: KernelAxes, sharding: NamedSharding):
    """Returns the directions A v / s of the longer side, divided as the kernel, and s."""
    _, rows, columns = matrix_shape(kernel.shape, axes)
    last, tall = kernel.ndim, rows >= columns
    side, other = (axes.inputs, axes.outputs) if tall else (axes.outputs, axes.inputs)
    spec = specs(sharding, last)
    places = *(spec[axis] for axis in (*axes.batch, *side)), None
    long_axes = tuple(range(len(axes.batch), len(places) - 1))

    def find(kernel, short):
        # In the axes of the kernel: each device multiplies its part, and the sums are thin.
        operands = lift(kernel), [*range(last)], short, [*axes.batch, *other, last]
        long = einsum(*operands, [*axes.batch, *side, last])
        vectors, values = _normalize(constrain(long, sharding.mesh, places), long_axes)
        return constrain(vectors, sharding.mesh, places), constrain(values, sharding.mesh, ())

    typed = typed_sharding(kernel)
    out = typed and (NamedSharding(typed.mesh, PartitionSpec(*places)), None)
    return by_compiler(find, kernel, short, out=out)


def _place(vectors: np.ndarray, view: MatrixView) -> Array:
    """Places vectors (b, p, r) of the shorter side as (*batch, *side, r), divided as the kernel."""
    sharding, batch = view.leaf.sharding, view.axes.batch
    side = 1 if view.rows >= view.columns else 0
    stored, wanted = _divided_first(view.leaf, view.axes, sharding)[side], view.axes[side]
    sizes = [view.shape[axis] for axis in (*batch, *stored)]
    moved = [len(batch) + stored.index(axis) for axis in wanted]
    short = vectors.reshape(*sizes, -1).transpose(*range(len(batch)), *moved, len(sizes))
    spec = specs(sharding, view.leaf.ndim)
    places = PartitionSpec(*(spec[axis] for axis in (*batch, *wanted)), None)
    # `device_put` compares what processes have, and finds that NaN is not NaN.
    placed = NamedSharding(sharding.mesh, places)
    return jax.make_array_from_callback(short.shape, placed, lambda index: short[index])


def directions(views: Views, ranks: Ranks) -> Iterator[tuple[str, tuple]]:
    """Yields the path and the first singular directions (u, s, vt) of each kernel, in float32.

    In the axes of factors: (*batch, *inputs, r), (*batch, r) and (*batch, r, *outputs). u and vt
    are divided as factors of the kernel, s is replicated. NaN where not finite.
    """
    for path, vectors in _in_turns(views, ranks):
        view = views[path]
        short = _place(vectors, view)
        long, values = _longer(view.leaf, short, view.axes, view.leaf.sharding)
        u, v = (long, short) if view.rows >= view.columns else (short, long)
        yield path, (u, values, jnp.moveaxis(v, -1, len(view.axes.batch)))
