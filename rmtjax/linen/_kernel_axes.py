"""The axes of the kernels of a linen module, recorded while one call of it is traced."""

import difflib
import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rmtjax._axes import kernel_shape, KernelAxes
from rmtjax.linen._boxes import unbox
from rmtjax.linen._layers import call_inputs, KNOWN, layer_axes
from rmtjax.models import check_names, registered
from rmtjax.planning import guess_axes, leaves_by_path, NAMES, Neighbours, register_container

register_container(nn.Module, 'give its parameters, `variables["params"]`.')

# The axes of a kernel, None if it is not a matrix, and its shape where its layer uses it.
Used = tuple[KernelAxes | None, tuple[int, ...]]


def _registered_kernels(module: nn.Module, kernels: Mapping[str, KernelAxes]) -> dict[str, Any]:
    """Returns the axes of the kernels that a registered layer has."""
    variables = module.variables.get("params", {})
    names = [name for name, leaf in variables.items() if not isinstance(leaf, Mapping)]
    missing, others = kernels.keys() - set(names), [name for name in names if name not in kernels]
    # Some configurations of a layer may lack a kernel, so a missing one is an error only if it
    # resembles another name or if all are missing.
    misspelled = any(difflib.get_close_matches(name, others) for name in missing)
    if misspelled or len(missing) == len(kernels):
        check_names(type(module), names)
    return {name: axes for name, axes in kernels.items() if name not in missing}


def _kernels_of(module: nn.Module, args, kwargs) -> dict[str, Used]:
    """Returns the kernels of a layer by name, as this call of it uses them."""
    shape = lambda name: jnp.shape(unbox(module.get_variable("params", name)))
    kernels = registered(type(module))
    if kernels is not None:
        return {n: (axes, shape(n)) for n, axes in _registered_kernels(module, kernels).items()}
    if type(module) not in KNOWN:
        return {}
    call = call_inputs(module, args, kwargs)
    equation = call[1] if call else None
    names = [name for name in NAMES if module.has_variable("params", name)]
    return {n: (layer_axes(module, len(shape(n)), equation), shape(n)) for n in names}


def _lift_axes(axes: KernelAxes, stored: tuple[int, ...], used: tuple[int, ...]) -> KernelAxes:
    """Returns axes of a kernel of shape `used` as axes of one of shape `stored`, a stack of it."""
    ndim = len(stored)
    # Several choices may fit. The first one has the leading axes, where Flax stacks by default.
    for kept in reversed(list(itertools.combinations(range(ndim), len(used)))):
        if tuple(stored[axis] for axis in kept) == used:
            stack = tuple(axis for axis in range(ndim) if axis not in kept)
            inputs, outputs, batch = (tuple(kept[axis] for axis in group) for group in axes)
            return KernelAxes(inputs, outputs, (*stack, *batch))
    raise ValueError(f"no axes of {stored} can be taken away to leave {used}")


class KernelTable(dict[str, KernelAxes | None]):
    """Maps the paths of a module's kernels to their axes, also for trees with other stacks.

    Attributes:
      used: The axes and the shape of each kernel by path, where its layer used it.
      tree: The shapes of all leaves, as the module has them.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax
      >>> module, x = nn.Dense(60), jnp.ones((2, 80))
      >>> variables = module.init(jax.random.key(0), x)
      >>> rmtjax.linen.kernel_axes(module, variables, x).used["kernel"]
      (KernelAxes(inputs=(0,), outputs=(1,), batch=()), (80, 60))
    """

    def __init__(self, used: dict[str, Used], params: PyTree):
        self.used = used
        leaves = leaves_by_path(params)
        self.tree = Neighbours(leaves)
        super().__init__({path: self(path, leaves[path]) for path in used if path in leaves})

    def __call__(self, path: str, leaf: Any) -> KernelAxes | None:
        """Returns the axes of a leaf. Axes that its layer did not see are batch axes."""
        if path not in self.used:
            # Of a leaf that was stacked since, the neighbours were stacked too.
            seen = self.tree.shape(path) == kernel_shape(leaf)
            return guess_axes(path, leaf, *[self.tree] * seen)
        axes, shape = self.used[path]
        return axes and _lift_axes(axes, jnp.shape(leaf), shape)


def kernel_axes(module: nn.Module, variables: PyTree, *args: Any, **kwargs: Any) -> KernelTable:
    """Finds the axes of a module's kernels by tracing one call of it.

    A parameter tree does not distinguish a stack of kernels, as `nn.scan` and `nn.vmap` make it,
    from a convolution. Nor does it show which axes a `DenseGeneral` contracts.

    Args:
      module: A linen module.
      variables: `{"params": tree, ...}`, not factorized.
      *args: As for `module.apply`; nothing is computed.
      **kwargs: As for `module.apply`.

    Returns:
      The `axes` argument of `rmtjax.plan` and `rmtjax.prune_spectrum`: a dictionary from paths to
      axes. Grouped and masked convolutions are not matrices (None). Registered layers are
      included. Kernels of other modules are guessed as without `axes`.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax
      >>> module, inputs = nn.DenseGeneral((4, 5)), jnp.ones((2, 3))
      >>> variables = module.init(jax.random.key(0), inputs)
      >>> axes = rmtjax.linen.kernel_axes(module, variables, inputs)
      >>> axes("kernel", variables["params"]["kernel"])
      KernelAxes(inputs=(0,), outputs=(1, 2), batch=())
    """
    used: dict[str, Used] = {}

    def record(next_fun, args, kwargs, context):
        layer = context.module
        outputs = next_fun(*args, **kwargs)
        # A layer without a scope has no parameters yet, and `setup` does not use them.
        if layer.scope is not None and context.method_name != "setup":
            for name, kernel in _kernels_of(layer, args, kwargs).items():
                used["/".join((*layer.path, name))] = kernel
        return outputs

    with nn.intercept_methods(record):
        # A module may return values that are not arrays, which `eval_shape` would refuse.
        run = lambda variables: (module.apply(variables, *args, **kwargs), None)[1]
        jax.eval_shape(run, variables)
    return KernelTable(used, variables["params"])
