"""Layers of one's own, told by one call."""

from collections.abc import Collection, Mapping

from rmtjax._axes import KernelAxes

_KERNELS: dict[type, dict[str, KernelAxes]] = {}


def register_layer(layer: type, kernels: Mapping[str, KernelAxes]) -> None:
    """Tells which parameters of a layer of one's own are kernels, and along which axes.

    From then on `rmtjax.linen.kernel_axes` and `rmtjax.nnx.kernel_axes` find them, and a
    layer whose kernels have been factorized runs with two thin products in the place of each
    product with the kernel, and with its kernel formed, and a warning, where it does
    something else with it. A subclass is another layer: it is registered by itself. Other modules
    must not read the kernel of a linen layer that makes it in `setup`.

    Args:
      layer: A subclass of `flax.linen.Module` or of `flax.nnx.Module`.
      kernels: From the name of a parameter of the layer to its axes: those contracted with the
        inputs, and those that the outputs carry. Of a kernel that is stored as (outputs, inputs)
        the transpose is taken, which has the same spectrum.

    Raises:
      TypeError: `layer` is no class, `kernels` no mapping, or an entry no `KernelAxes`.
      ValueError: `kernels` is empty, or two axes of an entry are the same. Where axes are asked
        for, or a plan: a layer of the model has no parameter of such a name.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax
      >>> class Affine(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         weight = self.param("weight", nn.initializers.orthogonal(), (80, 60))
      ...         return jnp.tanh(x @ weight)
      >>> rmtjax.register_layer(Affine, {"weight": rmtjax.KernelAxes((0,), (1,))})
      >>> module, x = Affine(), jnp.ones((2, 80))
      >>> variables = module.init(jax.random.key(0), x)
      >>> axes = rmtjax.linen.kernel_axes(module, variables, x)
      >>> plan = rmtjax.plan(variables["params"], rule=rmtjax.ranks.fixed(8), axes=axes)
      >>> print(plan)
      weight  factorized: 8 of 60 are signal, rank 8
      >>> thin = rmtjax.factorize(variables["params"], plan)
      >>> rmtjax.linen.apply(module, {"params": thin}, x).shape
      (2, 60)
    """
    if not isinstance(layer, type):
        raise TypeError(f"`layer` must be a class, got {layer!r}: give its type.")
    if not isinstance(kernels, Mapping):
        raise TypeError(
            "`kernels` must map names of parameters to their `rmtjax.KernelAxes`, as "
            f'{{"weight": axes}} does, got {kernels!r}.'
        )
    if not kernels:
        raise ValueError("`kernels` must name at least one parameter of the layer, got none.")
    for name, axes in kernels.items():
        if not isinstance(axes, KernelAxes):
            raise TypeError(f"`kernels` must map {name!r} to a `rmtjax.KernelAxes`, got {axes!r}.")
        named = [*axes.batch, *axes.inputs, *axes.outputs]
        if sorted(named) != list(range(len(named))) or not (axes.inputs and axes.outputs):
            raise ValueError(
                f"`kernels` must name each axis of {name!r} once, from 0, and have inputs and "
                f"outputs, got {axes}."
            )
    _KERNELS[layer] = {name: _in_order(axes) for name, axes in kernels.items()}


def _in_order(axes: KernelAxes) -> KernelAxes:
    """The matrix or its transpose, whichever has its axes in the order of the kernel."""
    turned = KernelAxes(axes.outputs, axes.inputs, axes.batch)
    order = (*turned.batch, *turned.inputs, *turned.outputs)
    return turned if order == tuple(range(len(order))) else axes


def registered(layer: type) -> dict[str, KernelAxes] | None:
    """The kernels of a layer by name; None where it has not been registered."""
    return _KERNELS.get(layer)


def check_names(layer: type, held: Collection[str]) -> None:
    """Refuses a kernel that was told under a name which the layer does not have."""
    missing = min((registered(layer) or {}).keys() - set(held), default=None)
    if missing is not None:
        raise ValueError(
            f"`rmtjax.register_layer` was told a kernel {missing!r} of `{layer.__name__}`, whose "
            f"parameters are {', '.join(map(repr, sorted(held))) or 'none'}: register it again, "
            "by the names that are there."
        )
