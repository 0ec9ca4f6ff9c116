"""Helpers for sharded arrays: query shardings, place results, run under explicit meshes."""

import functools
import importlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from rmtjax._axes import KernelAxes, native


def mesh_of(array: Any) -> Any:
    """Returns the mesh that a concrete array is stored on; None for one device and for tracers."""
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        return None
    sharding: Any = array.sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None


def _is_explicit(mesh: Any) -> bool:
    """Returns True for a mesh with an axis of type Explicit, which came with jax 0.7."""
    kinds = getattr(mesh, "axis_types", None) if hasattr(jax.sharding, "auto_axes") else None
    return any(kind == jax.sharding.AxisType.Explicit for kind in kinds or ())


def typed_sharding(array: Any) -> NamedSharding | None:
    """Returns the sharding in the type of an array, which it has on a mesh with explicit axes."""
    # Explicit axes came with jax 0.7. Before it no array has a sharding in its type.
    if not hasattr(jax.sharding, "auto_axes") or not isinstance(array, jax.Array):
        return None
    sharding = jax.typeof(array).sharding
    return sharding if _is_explicit(sharding.mesh) else None


@functools.lru_cache(maxsize=64)
def _compiled(function: Callable, out: Any) -> Callable:
    return jax.jit(jax.sharding.auto_axes(function, out_sharding=out))


def by_compiler(function: Callable, *arguments: PyTree, out: Any = None) -> Any:
    """Calls a function of trees under automatic axes: the compiler decides on shardings inside.

    Meshes with axes of type Auto need nothing for that. On a mesh with explicit axes, a
    decomposition would refuse a sharded matrix. There, `out` has the shardings of the results: one,
    or a tuple that begins as the results do. None replicates a result.
    """
    leaves = jax.tree.leaves(arguments)
    mesh = next((sharding.mesh for sharding in map(typed_sharding, leaves) if sharding), None)
    if mesh is None:
        return function(*arguments)
    replicated = NamedSharding(mesh, PartitionSpec())
    out = jax.tree.map(lambda one: one or replicated, out, is_leaf=lambda one: one is None)
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return _compiled(function, out)(*arguments)
    # `auto_axes` needs a compiled program. Under `vmap` alone there is none yet.
    return jax.jit(jax.sharding.auto_axes(function, out_sharding=out))(*arguments)


def beside_accelerator() -> AbstractContextManager:
    """Returns a context that computes on the CPU where JAX's default is an accelerator."""
    if jax.default_backend() == "cpu":
        return nullcontext()
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX was started without its CPU backend
        return nullcontext()


def fetch(tree: PyTree) -> PyTree:
    """Returns arrays in the memory of the host, gathered from all processes that hold parts."""

    def gather(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gather, tree)


def specs(sharding: NamedSharding, ndim: int) -> list[Any]:
    """Returns the mesh axes over which each axis of an array is divided, None for no division."""
    return [*sharding.spec, *[None] * (ndim - len(sharding.spec))]


def _in_force(mesh: Any) -> Any:
    """Returns the mesh to use inside a program: `by_compiler` changes the types of its axes."""
    current = jax.sharding.get_abstract_mesh()
    return current if current.axis_names == mesh.axis_names else mesh


def constrain(array: jax.Array, mesh: Any, spec: Iterable[Any]) -> jax.Array:
    """Constrains the sharding of an array within a compiled program, and within `by_compiler`."""
    sharding = NamedSharding(_in_force(mesh), PartitionSpec(*spec))
    if _is_explicit(sharding.mesh):  # outside of `by_compiler`, such as of arrays on one device
        return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def _shard_map() -> Callable:
    if hasattr(jax, "shard_map"):
        return jax.shard_map
    # In jax 0.6 it is experimental, and its check of replication lacks rules for decompositions.
    old: Any = importlib.import_module("jax.experimental.shard_map")
    return functools.partial(old.shard_map, check_rep=False)


def replicating_mesh(tree: PyTree) -> Any:
    """Returns the mesh on which all arrays of a tree are replicated; None if there is none."""
    leaves = jax.tree.leaves(tree)
    meshes = {mesh_of(leaf) for leaf in leaves}
    if len(meshes) > 1 or None in meshes or not all(leaf.is_fully_replicated for leaf in leaves):
        return None
    return meshes.pop()


def in_shares(function: Callable[[PyTree], PyTree], stack: PyTree, mesh: Any) -> PyTree:
    """Applies a function to a replicated stack, of which each device of a mesh takes a share.

    Call it within a compiled program. The stack and the results have the same leading axis.
    """
    size, names = len(jax.tree.leaves(stack)[0]), mesh.axis_names
    if size == 1:  # indexing would copy the matrix, which may be large
        return function(stack)
    share = -(-size // mesh.size)

    def of_device(stack):
        # Devices without work repeat the last matrix. Their results are cut off below.
        indices = jax.lax.axis_index(names) * share + jnp.arange(share)
        return function(jax.tree.map(lambda leaf: leaf[jnp.minimum(indices, size - 1)], stack))

    replicated, divided = PartitionSpec(), PartitionSpec(names)
    run = _shard_map()(of_device, mesh=_in_force(mesh), in_specs=replicated, out_specs=divided)
    return jax.tree.map(lambda leaf: leaf[:size], run(stack))


def _named_sharding(array: Any) -> NamedSharding | None:
    """Returns the sharding of an array on a mesh, where it can be known."""
    if isinstance(array, jax.core.Tracer):
        return typed_sharding(array)
    sharding = getattr(array, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def place_like(new: jax.Array, old: Any) -> jax.Array:
    """Places an array as another one of its shape is placed."""
    sharding = _named_sharding(old)
    return _commit_like(new, old) if sharding is None else jax.device_put(new, sharding)


def _commit_like(new: jax.Array, old: Any) -> jax.Array:
    """Commits an array to the device to which another is committed, if it is."""
    concrete = not any(isinstance(array, jax.core.Tracer) for array in (new, old))
    committed = concrete and isinstance(old, jax.Array) and old.committed
    return jax.device_put(new, old.sharding) if committed else new


def beside(new: Any, old: Any) -> jax.Array:
    """Returns an array where another one of its shape lies: it may have a device of its own."""
    arrays = isinstance(new, jax.Array) and isinstance(old, jax.Array)
    if not arrays or any(isinstance(array, jax.core.Tracer) for array in (new, old)):
        return jnp.asarray(native(new))
    return new if new.devices() == old.devices() else jax.device_put(new, old.sharding)


def place_factors(left: jax.Array, right: jax.Array, kernel: Any, axes: KernelAxes):
    """Divides factors along the axes of their kernel as it is divided; the rank is not divided."""
    sharding = _named_sharding(kernel)
    if sharding is None:
        return _commit_like(left, kernel), _commit_like(right, kernel)
    spec = specs(sharding, kernel.ndim)
    batch, inputs, outputs = ([spec[axis] for axis in group] for group in (axes[2], *axes[:2]))
    put = lambda array, spec: jax.device_put(
        array, NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)
    )
    return put(left, [*batch, *inputs, None]), put(right, [*batch, None, *outputs])


def merged_sharding(left: jax.Array, right: jax.Array, axes: KernelAxes) -> NamedSharding | None:
    """Returns the sharding of the product of factors that have shardings in their types."""
    of_left, of_right = typed_sharding(left), typed_sharding(right)
    if of_left is None or of_right is None:
        return None
    outputs = specs(of_right, right.ndim)[1 + len(axes.batch) :]
    spec = [*specs(of_left, left.ndim)[:-1], *outputs]
    names = jax.tree.leaves(spec)
    # A mesh axis can divide one array axis only. If both factors use it, replicate the product.
    return NamedSharding(of_left.mesh, PartitionSpec(*spec if len(names) == len({*names}) else ()))


def leading_names(array: Any) -> tuple[Any, tuple[str, ...]]:
    """Returns the mesh, and the names of its axes over which the first axis is divided.

    None and no names where the first axis is not divided, or the compiler decides on it.
    """
    sharding = _named_sharding(array)
    if sharding is None or not array.ndim:
        return None, ()
    first = specs(sharding, array.ndim)[0]
    names = first if isinstance(first, tuple) else (first,) if first else ()
    return (sharding.mesh, names) if names else (None, ())


def first_axis_only(array: Any) -> NamedSharding | None:
    """Returns the sharding by which only the first axis is divided, as it is in an array's type."""
    sharding = typed_sharding(array)
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(leading_names(array)[1] or None))


def sum_over_parts(
    function: Callable[[jax.Array, Callable], PyTree], array: jax.Array, mesh: Any, names: tuple
) -> PyTree:
    """Applies a function to each device's part of the first axis, and adds up what it returns.

    Call it within a compiled program. `function(part, add)` may add up arrays of all parts before,
    by `add`. Only sums are communicated, and they are replicated.
    """
    add = lambda tree: jax.lax.psum(tree, names)
    run = lambda part: add(function(part, add))
    divided, replicated = PartitionSpec(names), PartitionSpec()
    return _shard_map()(run, mesh=_in_force(mesh), in_specs=divided, out_specs=replicated)(array)
