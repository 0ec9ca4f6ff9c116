"""The spectra of kernels that lie on several devices, of one process or of more."""

from functools import partial
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from rmtjax._kernels import Kernel, matrix_shape, to_matrices
from rmtjax._placing import by_compiler, mesh_of, split_over
from rmtjax._typing import KernelAxes, Spectrum

# Its name before jax 0.8.
_x64: Any = getattr(jax if hasattr(jax, "enable_x64") else jax.experimental, "enable_x64")  # noqa: B009


@partial(jax.jit, static_argnums=(1, 2))
def _gram(kernel: Kernel, axes: KernelAxes, mesh) -> Float[Array, "b p p"]:
    """A^T A of each matrix of a kernel, whole on each device, in float64.

    Each device has a part of the rows of a matrix with more rows than columns, and adds the square
    of its own: what is moved is the kernel, once, and what is summed has p columns and rows.
    """

    def square(kernel):
        matrices = to_matrices(kernel, axes)
        rows, columns = matrices.shape[1:]
        long = matrices if rows >= columns else matrices.mT
        fill = -max(rows, columns) % mesh.size  # with rows of zeros, which add nothing
        long = split_over(mesh, jnp.pad(long, ((0, 0), (0, fill), (0, 0))), 1)
        long = long.astype(jnp.float64)
        return split_over(mesh, jnp.matmul(long.mT, long), None)

    return by_compiler(square, kernel)


@jax.jit
def _eigenvalues(gram: Float[Array, "b p p"]) -> Float[Array, "b p"]:
    """Ascending; NaN where the matrix is not finite."""
    finite = jnp.isfinite(gram).all(axis=(1, 2), keepdims=True)
    values = lax.map(jnp.linalg.eigvalsh, jnp.where(finite, gram, 0))
    return jnp.where(finite[..., 0], values, jnp.nan)


def _decompose(grams: list[Array], meshes: list) -> list[Array]:
    """The eigenvalues of each, by the device whose turn it is; zeros where that is elsewhere."""
    found = []
    for turn, (gram, mesh) in enumerate(zip(grams, meshes, strict=True)):
        device = mesh.devices.flat[turn % mesh.size]
        own = [shard.data for shard in gram.addressable_shards if shard.device == device]
        found.append(_eigenvalues(own[0]) if own else np.zeros(gram.shape[:2]))
    return found


def _together(values: list) -> list[np.ndarray]:
    """Eigenvalues in the memory of every process, each found in one."""
    values = jax.device_get(values)
    if jax.process_count() == 1:
        return values
    return [part.sum(axis=0) for part in multihost_utils.process_allgather(values)]


def _as_spectrum(values: np.ndarray, kernel: Kernel, axes: KernelAxes) -> Spectrum:
    stack, rows, columns = matrix_shape(kernel.shape, axes)
    dtype = np.dtype(jnp.promote_types(kernel.dtype, jnp.float32))
    eigenvalues: Any = np.maximum(values[:, ::-1], 0) / max(rows, columns)
    ratios: Any = np.full(stack, min(rows, columns) / max(rows, columns), dtype)
    return Spectrum(eigenvalues.astype(dtype), ratios)


def sharded_spectra(kernels: dict[str, tuple[Kernel, KernelAxes]]) -> dict[str, Spectrum]:
    """The spectra of kernels on meshes of devices, as NumPy arrays with a leading axis.

    By Gram matrices in float64, of which each device decomposes its share; as accurate as
    `rmtjax._values.host_spectra`. No device has a whole kernel, but p^2 numbers for each of as many
    kernels as there are devices. Every process of a mesh must call it, with the same kernels.
    """
    found, paths = {}, list(kernels)
    with _x64(True):
        while paths:
            meshes: list[Any] = [mesh_of(kernels[path][0]) for path in paths]
            now, meshes = paths[: meshes[0].size], meshes[: meshes[0].size]
            grams = [_gram(*kernels[path], mesh) for path, mesh in zip(now, meshes, strict=True)]
            # To the end: a device that decomposes must not keep others waiting for its part.
            values = _together(_decompose(jax.block_until_ready(grams), meshes))
            found |= {p: _as_spectrum(v, *kernels[p]) for p, v in zip(now, values, strict=True)}
            paths = paths[len(now) :]
    return found
