"""A chain of dense layers, found in a tree by its paths and checked."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from rmtjax._axes import is_factors
from rmtjax.certificate._rounding import Layer
from rmtjax.planning import path_name
from rmtjax.spectra import check_matrix


def read_layers(name: str, params: PyTree, layers: Sequence[str]) -> list[Layer]:
    """The layers of a tree, in order."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_factors)
    found, chain = {path_name(key): leaf for key, leaf in leaves}, []
    for layer in layers:
        path = f"{layer}/kernel"
        if path not in found:
            known = [other[:-7] for other in found if other.endswith("/kernel")]
            raise ValueError(f"`layers` must be dense layers of `{name}`, {known}, got {layer!r}.")
        if is_factors(found[path]):
            raise TypeError(f"`{name}` has factors at {path!r}: give it `rmtjax.merge({name})`.")
        kernel = jnp.asarray(found[path])
        check_matrix(f"{name}[{path!r}]", kernel)
        bias = found.get(f"{layer}/bias", jnp.zeros(kernel.shape[1:], kernel.dtype))
        chain.append(Layer(kernel, jnp.asarray(bias)))
    return chain


def check_chain(old: list[Layer], new: list[Layer], inputs: Array) -> None:
    """Refuses layers that do not follow each other, or differ in shape."""
    if not old:
        raise ValueError("`layers` must name at least one layer.")
    if inputs.ndim != 2 or 0 in inputs.shape:
        raise ValueError(f"`inputs` must have shape (samples, inputs), got {inputs.shape}.")
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(
            f"`inputs` must be floating, got {inputs.dtype}. They are what the first layer "
            "receives: scale and flatten images as the module does."
        )
    width = inputs.shape[1]
    for number, (first, second) in enumerate(zip(old, new, strict=True)):
        shapes, others = (jax.tree.map(jnp.shape, layer) for layer in (first, second))
        if shapes != others:
            raise ValueError(
                f"`after` must have the shapes of `before`, got {others} for {shapes} in "
                f"`layers[{number}]`. Merge factors, or take both from the same module."
            )
        rows, columns = shapes.kernel
        if rows != width:
            raise ValueError(
                f"`layers[{number}]` takes {rows} inputs, but is given {width}. Name all dense "
                "layers, in the order in which they are applied."
            )
        width = columns


def _manner(activation: Callable[[Array], Array], grid: Array) -> tuple[Array, Array]:
    """The steepest slope on a grid, and whether each entry is treated by itself."""
    one = lambda entry: activation(entry[None])[0]
    slope = jnp.max(jnp.abs(jax.vmap(jax.grad(one))(grid)))
    return slope, jnp.allclose(activation(grid), jax.vmap(one)(grid), equal_nan=True)


def check_activation(activation: Callable[[Array], Array]) -> None:
    """Refuses what is plainly steeper than 1 somewhere, such as gelu, or not elementwise."""
    with jax.ensure_compile_time_eval():
        # At no period of its own, and far out too.
        half = jnp.concatenate([jnp.geomspace(1e-3, 1, 200), jnp.geomspace(1, 1e4, 2000)])
        grid = jnp.concatenate([-half[::-1], half])
        # Compiled anew, since what it does may have changed since the last time.
        slope, alone = map(float, jax.jit(lambda grid: _manner(activation, grid))(grid))
    if not alone:
        raise ValueError("`activation` must act on each entry by itself, which softmax does not.")
    if not slope < 1.001:
        raise ValueError(
            f"`activation` must have slopes in [-1, 1], as relu and tanh, got {slope:.3f}. Divide "
            "it by its steepest slope, and multiply the kernels after it."
        )


def check_labels(labels: Array, samples: int) -> None:
    """Refuses what is not a class for each sample."""
    if labels.shape != (samples,):
        raise ValueError(f"`labels` must have shape {(samples,)}, got {labels.shape}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` must be integers, got {labels.dtype}: classes, not one-hot.")
