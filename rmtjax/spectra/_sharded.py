"""Kernels that are divided over several devices, of one process or of more: their Gram matrices.

These are made without gathering a kernel, and the hosts decompose them in turn.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from rmtjax._axes import Kernel, KernelAxes, to_matrices
from rmtjax._sharding import by_compiler, constrain, mesh_of, specs, typed_sharding
from rmtjax._types import Spectrum
from rmtjax.spectra._values import eigenvalues, to_spectrum

# Its name before jax 0.8.
_x64: Any = getattr(jax if hasattr(jax, "enable_x64") else jax.experimental, "enable_x64")  # noqa: B009

Kernels = dict[str, tuple[Kernel, KernelAxes]]
# Finds something in the Gram matrix of a kernel at a path, in the place of the matrix.
Find = Callable[[str, np.ndarray], np.ndarray]
# Room for what is found in a stack of them, (b, p), of a kernel at a path: zeros.
Blank = Callable[[str, tuple[int, int]], np.ndarray]


def is_spread(leaf: Any) -> bool:
    """Whether a kernel is divided over devices, and may be squared: in float64 it may not.

    Factors are thin, and need no care.
    """
    divided = mesh_of(leaf) is not None and not leaf.is_fully_replicated
    return divided and leaf.dtype.itemsize < 8


def _names(spec: Any) -> tuple[str, ...]:
    """The axes of a mesh over which an axis of an array is divided."""
    return () if spec is None else spec if isinstance(spec, tuple) else (spec,)


def order_in_place(kernel: Kernel, axes: KernelAxes, sharding: NamedSharding) -> KernelAxes:
    """The axes in an order in which those of a side merge in place: with a divided one first."""
    spec = specs(sharding, kernel.ndim)
    divided_first = lambda group: tuple(sorted(group, key=lambda axis: spec[axis] is None))
    return KernelAxes(divided_first(axes.inputs), divided_first(axes.outputs), axes.batch)


def _merged(spec: list[Any], group: tuple[int, ...]) -> Any:
    """Over what axes are divided that have merged, in the order above."""
    divided = [spec[axis] for axis in group if spec[axis] is not None]
    # Of two that are divided a device has rows here and there: no division has a name for it.
    return PartitionSpec.UNCONSTRAINED if len(divided) > 1 else next(iter(divided), None)


@partial(jax.jit, static_argnums=(1, 2))
def _gram(kernel: Kernel, axes: KernelAxes, sharding: NamedSharding) -> Float[Array, "b p p"]:
    """A^T A of each matrix of a kernel, in float64; a stack stays divided as it was.

    The axes of the sides are in the order of `order_in_place`, which is free for a spectrum.
    Each device has a part of the rows of a matrix with more rows than columns, and adds the square
    of its own: what is moved is the kernel, once, and what is summed has p columns and rows.
    """
    spec = specs(sharding, kernel.ndim)
    order = order_in_place(kernel, axes, sharding)
    stack = spec[axes.batch[0]] if len(axes.batch) == 1 else None
    rest = tuple(name for name in sharding.mesh.axis_names if name not in _names(stack))
    parts = int(np.prod([sharding.mesh.shape[name] for name in rest]))

    batch, *own = (_merged(spec, group) for group in (axes.batch, *order[:2]))
    lie = lambda array, places: constrain(array, sharding.mesh, (batch, *places))
    split = lambda array, rows: constrain(array, sharding.mesh, (stack, rows, None))

    def square(kernel):
        matrices = to_matrices(kernel, order)
        long, places = matrices, own
        if matrices.shape[1] < matrices.shape[2]:
            long, places = matrices.mT, own[::-1]
        fill = -long.shape[1] % parts  # with rows of zeros, which add nothing
        # Where it lies, or the compiler would gather it to divide it anew.
        long = jnp.pad(lie(long, places), ((0, 0), (0, fill), (0, 0)))
        long = split(lie(long, places), rest).astype(jnp.float64)
        return split(jnp.matmul(long.mT, long), None)

    typed = typed_sharding(kernel)
    out = typed and NamedSharding(typed.mesh, PartitionSpec(stack))
    return by_compiler(square, kernel, out=out)


def _own(gram: Array, turn: int) -> Iterator[tuple[Any, list[np.ndarray]]]:
    """Which matrices of a stack this process is to decompose, copied to the host.

    Of those devices that have the same ones it is the turn of another for each kernel.
    """
    shards = gram.addressable_shards
    replicas = gram.sharding.num_devices * shards[0].data.size // gram.size
    for shard in shards:
        if shard.replica_id == turn % replicas:
            yield shard.index[0], list(np.asarray(shard.data))


def _together(found: np.ndarray, mesh: Mesh) -> np.ndarray:
    """What was found, in every process of a mesh: each part in one, and zero elsewhere."""
    devices = list(mesh.devices.flat)
    processes = [device.process_index for device in devices]
    if len(set(processes)) == 1:
        return found
    first = processes.index(jax.process_index())
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    own = lambda index: (found if index[0].start == first else np.zeros_like(found))[None]
    shape = (len(devices), *found.shape)
    parts = jax.make_array_from_callback(shape, sharding, own)
    whole = NamedSharding(mesh, PartitionSpec())
    total = jax.jit(partial(jnp.sum, axis=0), out_shardings=whole)(parts)
    return np.asarray(total.addressable_data(0))


def _decompose(kernels: Kernels, find: Find, blank: Blank) -> Iterator[tuple[str, np.ndarray]]:
    """What is found in some kernels, of which each process decomposes its share meanwhile."""
    waiting = []
    for turn, (path, (kernel, axes)) in enumerate(kernels.items()):
        placed: Any = kernel
        gram = _gram(placed, axes, placed.sharding)
        # One at a time: what others decompose is not kept.
        waiting.append((path, gram.shape[:2], list(_own(gram, turn))))
    for path, shape, own in waiting:
        found = blank(path, shape)
        for index, matrices in own:  # copied, as they are decomposed in their place
            found[index] = [find(path, np.array(matrix, order="F")) for matrix in matrices]
        yield path, found


def in_turns(kernels: Kernels, find: Find, blank: Blank) -> Iterator[tuple[str, np.ndarray]]:
    """What is found in the Gram matrices of kernels on meshes of devices, in their order.

    As many kernels at a time as a mesh has processes, of which each decomposes its share. Every
    process of a mesh must call it, with the same kernels, and has the same from it.
    """
    paths = list(kernels)
    while paths:
        devices = mesh_of(kernels[paths[0]][0]).devices.flat
        count = len({device.process_index for device in devices})
        now, paths = {path: kernels[path] for path in paths[:count]}, paths[count:]
        with _x64(True):  # and not while others use what is found
            decomposed = _decompose(now, find, blank)
            found = [(path, _together(own, mesh_of(now[path][0]))) for path, own in decomposed]
        yield from found


def sharded_spectra(kernels: Kernels) -> dict[str, Spectrum]:
    """The spectra of kernels on meshes of devices, as NumPy arrays with a leading axis.

    By Gram matrices in float64, which the hosts decompose in turn; as accurate as
    `rmtjax._host_spectra`, and as little meant for float64 kernels.
    """
    found = in_turns(kernels, lambda _, gram: eigenvalues(gram), lambda _, shape: np.zeros(shape))
    return {path: to_spectrum(values[:, ::-1], *kernels[path]) for path, values in found}
