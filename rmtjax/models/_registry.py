"""The registry of users' layers: which of their parameters are kernels, and along which axes."""

from collections.abc import Collection, Mapping

from rmtjax._axes import KernelAxes
from rmtjax._types import check_type

# By the exact type. A subclass may do anything with the kernel, so it does not inherit the entry.
_KERNELS: dict[type, dict[str, KernelAxes]] = {}


def register_layer(layer: type, kernels: Mapping[str, KernelAxes]) -> None:
    """Registers a layer of the user: which of its parameters are kernels, and their axes.

    `kernel_axes` of `rmtjax.linen` and `rmtjax.nnx` then finds these kernels. With factors, the
    layer computes two thin products in place of each product with a kernel. If it does anything
    else with a kernel, that kernel is multiplied out, with a warning. Register subclasses
    separately. If a linen layer makes its kernel in `setup`, other modules must not read it.

    Args:
      layer: A subclass of `flax.linen.Module` or of `flax.nnx.Module`.
      kernels: Maps the name of a parameter to its axes: those contracted with the inputs, and
        those that the outputs carry. A kernel stored as (outputs, inputs) is seen as its
        transpose, which has the same spectrum.

    Raises:
      TypeError: `layer` is not a class, or `kernels` not a mapping to `KernelAxes`.
      ValueError: `kernels` is empty, or an entry does not name each axis once. `kernel_axes` and
        `plan` raise it if a layer has no parameter of a registered name.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax
      >>> class Affine(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         weight = self.param("weight", nn.initializers.orthogonal(), (80, 60))
      ...         return jnp.tanh(x @ weight)
      >>> rmtjax.register_layer(Affine, {"weight": rmtjax.KernelAxes((0,), (1,))})
      >>> module, x = Affine(), jnp.ones((2, 80))
      >>> rmtjax.linen.kernel_axes(module, module.init(jax.random.key(0), x), x)
      {'weight': KernelAxes(inputs=(0,), outputs=(1,), batch=())}
    """
    check_type("layer", layer, type, "Give the class itself.")
    if not isinstance(kernels, Mapping):
        raise TypeError(
            "`kernels` must map names of parameters to their `rmtjax.KernelAxes`, such as "
            f'{{"weight": axes}}, got {kernels!r}.'
        )
    if not kernels:
        raise ValueError("`kernels` must name at least one parameter of the layer, got none.")
    in_order = {}
    for name, axes in kernels.items():
        if not isinstance(axes, KernelAxes):
            raise TypeError(f"`kernels` must map {name!r} to a `rmtjax.KernelAxes`, got {axes!r}.")
        if sorted(axes.order) != list(range(len(axes.order))) or not (axes.inputs and axes.outputs):
            raise ValueError(
                f"`kernels` must name each axis of {name!r} once, from 0, and have inputs and "
                f"outputs, got {axes}."
            )
        # Factors have no permutation of axes: their product is in the order inputs, outputs.
        transposed = KernelAxes(axes.outputs, axes.inputs, axes.batch)
        turned = transposed.order == tuple(range(len(axes.order)))
        in_order[name] = transposed if turned else axes
    _KERNELS[layer] = in_order


def registered(layer: type) -> dict[str, KernelAxes] | None:
    """Returns the kernels of a registered layer by name; None if it is not registered."""
    return _KERNELS.get(layer)


def check_names(layer: type, parameters: Collection[str]) -> None:
    """Raises ValueError if a kernel is registered under a name that the layer does not have."""
    missing = min((registered(layer) or {}).keys() - set(parameters), default=None)
    if missing is not None:
        raise ValueError(
            f"`rmtjax.register_layer` has a kernel {missing!r} for `{layer.__name__}`, whose "
            f"parameters are {', '.join(map(repr, sorted(parameters))) or 'none'}. Register it "
            "again with one of these names."
        )
