"""Lets Flax read a kernel in parts as what it stands for: the dense kernel.

Flax unboxes each parameter that a module asks for, if it is an `AxisMetadata`: a box that holds an
array and facts about it. A kernel in parts is such a box, so a module that does not know factors
gets their product. `module.apply` is then right on thin parameters, and says how to save time.
"""

import warnings
from typing import Any

import jax
from flax.core.meta import AxisMetadata, is_axis_metadata
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from rmtjax._axes import FactoredKernel, Factors, is_factors, kernel_shape
from rmtjax.spectra import multiply


def _unbox(self: Factors | FactoredKernel) -> Any:
    """Returns the dense kernel, and warns."""
    warnings.warn(
        f"Flax has multiplied out thin factors of a kernel of shape {kernel_shape(self)}, which "
        "is correct and saves no time. Call `rmtjax.linen.apply(module, variables, ...)`, or "
        "`module.apply` in a block `with rmtjax.linen.factorized():`. For dense parameters, call "
        "`rmtjax.merge(params)`.",
        stacklevel=2,
    )
    return multiply(self)


def _replace_boxed(self: Factors | FactoredKernel, value: Any) -> Any:
    """Returns the new value: dense, or in parts, as it was given."""
    del self
    return value


def _same(self: Factors | FactoredKernel, index: int, params: dict[Any, Any]) -> Any:
    """Returns the kernel itself: it has no names of axes that `nn.scan` could change."""
    del index, params
    return self


def _partition_spec(self: Factors | FactoredKernel) -> Any:
    """Returns the spec of a replicated array for each part, as for arrays without a box."""
    return jax.tree.map(lambda _: PartitionSpec(), self)


def _sharding(self: Factors | FactoredKernel, mesh: Mesh) -> Any:
    """Returns the sharding of a replicated array for each part."""
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), self)


# The rooms below do not know Flax, so the methods of a box come to these classes here.
for kind in (Factors, FactoredKernel):
    methods = {
        "unbox": _unbox,
        "replace_boxed": _replace_boxed,
        "add_axis": _same,
        "remove_axis": _same,
        "get_partition_spec": _partition_spec,
        "get_sharding": _sharding,
    }
    for name, method in methods.items():
        setattr(kind, name, method)
    AxisMetadata.register(kind)


def unbox(tree: PyTree) -> PyTree:
    """Returns a tree without the boxes of Flax, in which kernels in parts stay in parts."""

    def strip(leaf: Any) -> Any:
        if is_factors(leaf) or not isinstance(leaf, AxisMetadata):
            return leaf
        return unbox(leaf.unbox())

    return jax.tree.map(strip, tree, is_leaf=is_axis_metadata)
