"""Arrays on several devices: what lies where, and who decides on it."""

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

from rmtjax._axes import KernelAxes


def mesh_of(array: Any) -> Any:
    """The mesh on whose devices, more than one, a concrete array lies; None of others."""
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        return None
    sharding: Any = array.sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None


def typed_sharding(array: Any) -> NamedSharding | None:
    """The sharding that is part of the type of an array, on a mesh with explicit axes."""
    # Which came with jax 0.7, and without which nothing can be done about it.
    if not hasattr(jax.sharding, "auto_axes") or not isinstance(array, jax.Array):
        return None
    sharding = jax.typeof(array).sharding
    explicit = any(kind == jax.sharding.AxisType.Explicit for kind in sharding.mesh.axis_types)
    return sharding if explicit else None


@functools.lru_cache(maxsize=64)
def _compiled(function: Callable, out: Any) -> Callable:
    return jax.jit(jax.sharding.auto_axes(function, out_sharding=out))


def by_compiler(function: Callable, *arguments: PyTree, out: Any = None, anew: bool = False) -> Any:
    """Calls a function in which the compiler decides where arrays lie.

    As it does anyway where the axes of a mesh are of the type Auto. On a mesh with explicit axes
    a decomposition would refuse a sharded matrix. There the results lie as `out` says, a sharding
    or a tuple that begins as the results do: whole on each device where it has None. Compiled
    `anew` for a function of the user's, which may not do again what it has done.
    """
    leaves = jax.tree.leaves(arguments)
    found = (typed_sharding(leaf) for leaf in leaves)
    mesh = next((sharding.mesh for sharding in found if sharding is not None), None)
    if mesh is None:
        return function(*arguments)
    whole = NamedSharding(mesh, PartitionSpec())
    place = lambda own: whole if own is None else own
    out = jax.tree.map(place, out, is_leaf=lambda own: own is None)
    if not (anew or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)):
        return _compiled(function, out)(*arguments)
    # Compiled, for those who are not yet: under `vmap` alone.
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
    """Arrays in the memory of the host, also where other processes hold parts of them."""

    def gather(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gather, tree)


def specs(sharding: NamedSharding, ndim: int) -> list[Any]:
    """What each axis of an array is divided over."""
    return [*sharding.spec, *[None] * (ndim - len(sharding.spec))]


def _in_force(mesh: Any) -> Any:
    """A mesh within a compiled program: within `by_compiler` it has other types of axes."""
    current = jax.sharding.get_abstract_mesh()
    return current if current.axis_names == mesh.axis_names else mesh


def constrain(array: jax.Array, mesh: Any, spec: Iterable[Any]) -> jax.Array:
    """An array within a compiled program, and within `by_compiler`, divided over a mesh."""
    sharding = NamedSharding(_in_force(mesh), PartitionSpec(*spec))
    return jax.lax.with_sharding_constraint(array, sharding)


def _shard_map() -> Callable:
    if hasattr(jax, "shard_map"):
        return jax.shard_map
    old: Any = importlib.import_module("jax.experimental.shard_map")  # its place in jax 0.6
    return functools.partial(old.shard_map, check_rep=False)  # it does not know all of ours


def mesh_of_whole(tree: PyTree) -> Any:
    """The mesh on each of whose devices concrete arrays lie whole; None of others."""
    meshes = {mesh_of(leaf) for leaf in jax.tree.leaves(tree)}
    whole = len(meshes) == 1 and None not in meshes
    whole = whole and all(leaf.is_fully_replicated for leaf in jax.tree.leaves(tree))
    return meshes.pop() if whole else None


def in_shares(function: Callable[[PyTree], PyTree], stack: PyTree, mesh: Any) -> PyTree:
    """A function of a stack, arrays with a leading axis, of which each device has a share.

    Within a compiled program. What the function returns has the same leading axis.
    """
    size, names = len(jax.tree.leaves(stack)[0]), mesh.axis_names
    if size == 1:  # large, it may be, and not to be copied
        return function(stack)
    share = -(-size // mesh.size)

    def own(stack):
        # The last again where there are none left: what is found of it is left out.
        indices = jax.lax.axis_index(names) * share + jnp.arange(share)
        return function(jax.tree.map(lambda leaf: leaf[jnp.minimum(indices, size - 1)], stack))

    whole, shares = PartitionSpec(), PartitionSpec(names)
    divide = _shard_map()(own, mesh=_in_force(mesh), in_specs=whole, out_specs=shares)
    return jax.tree.map(lambda leaf: leaf[:size], divide(stack))


def _sharding_of(array: Any) -> NamedSharding | None:
    """How an array lies on a mesh, where that can be known."""
    if isinstance(array, jax.core.Tracer):
        return typed_sharding(array)
    sharding = getattr(array, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def place_like(new: jax.Array, old: Any) -> jax.Array:
    """An array where another of its shape lies."""
    sharding = _sharding_of(old)
    return _commit_like(new, old) if sharding is None else jax.device_put(new, sharding)


def _commit_like(new: jax.Array, old: Any) -> jax.Array:
    """An array on the one device on which another is to stay."""
    concrete = not any(isinstance(array, jax.core.Tracer) for array in (new, old))
    bound = concrete and isinstance(old, jax.Array) and old.committed
    return jax.device_put(new, old.sharding) if bound else new


def place_factors(left: jax.Array, right: jax.Array, kernel: Any, axes: KernelAxes):
    """Factors of a kernel, divided along its axes as it is; their rank is not divided."""
    sharding = _sharding_of(kernel)
    if sharding is None:
        return _commit_like(left, kernel), _commit_like(right, kernel)
    spec = specs(sharding, kernel.ndim)
    batch, inputs, outputs = ([spec[axis] for axis in group] for group in (axes[2], *axes[:2]))
    put = lambda array, own: jax.device_put(
        array, NamedSharding(sharding.mesh, PartitionSpec(*own), memory_kind=sharding.memory_kind)
    )
    return put(left, [*batch, *inputs, None]), put(right, [*batch, None, *outputs])


def merged_sharding(left: jax.Array, right: jax.Array, axes: KernelAxes) -> NamedSharding | None:
    """How the product of factors lies that have shardings in their types."""
    own = typed_sharding(left), typed_sharding(right)
    if own[0] is None or own[1] is None:
        return None
    outputs = specs(own[1], right.ndim)[1 + len(axes.batch) :]
    spec = [*specs(own[0], left.ndim)[:-1], *outputs]
    names = [name for part in spec for name in (part if isinstance(part, tuple) else (part,))]
    taken = [name for name in names if name is not None]
    return NamedSharding(own[0].mesh, PartitionSpec(*spec if len(taken) == len({*taken}) else ()))
