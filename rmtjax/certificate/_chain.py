"""Reads a chain of dense layers from a tree, and checks it with its inputs and activation."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from rmtjax._axes import is_factors, native
from rmtjax.certificate._rounding import Layer
from rmtjax.planning import leaves_by_path
from rmtjax.spectra import as_matrix

# Each layer before and after the change.
Pairs = list[tuple[Layer, Layer]]


def _read_layers(name: str, params: PyTree, layers: Sequence[str]) -> list[Layer]:
    """Returns the layers of a tree in order; raises an error for a missing or factored one."""
    leaves, chain = leaves_by_path(params), []
    for layer in layers:
        path = f"{layer}/kernel"
        if path not in leaves:
            known = [other[:-7] for other in leaves if other.endswith("/kernel")]
            raise ValueError(f"`layers` must be dense layers of `{name}`, {known}, got {layer!r}.")
        if is_factors(leaves[path]):
            raise TypeError(f"`{name}` has factors at {path!r}. Give `rmtjax.merge({name})`.")
        kernel = as_matrix(f"{name}[{path!r}]", leaves[path])
        bias = leaves.get(f"{layer}/bias", jnp.zeros(kernel.shape[1:], kernel.dtype))
        chain.append(Layer(kernel, jnp.asarray(native(bias))))
    return chain


def read_chain(before: PyTree, after: PyTree, layers: Sequence[str], width: int) -> Pairs:
    """Returns the layers of both trees; raises an error if a layer does not fit the one before."""
    old, new = _read_layers("before", before, layers), _read_layers("after", after, layers)
    pairs = list(zip(old, new, strict=True))
    if not pairs:
        raise ValueError(
            f"`layers` must name at least one layer, got {layers!r}: name the dense layers in "
            'their order, such as `["Dense_0", "Dense_1"]`.'
        )
    for number, pair in enumerate(pairs):
        shapes, others = (jax.tree.map(jnp.shape, layer) for layer in pair)
        if shapes != others:
            raise ValueError(
                f"`after` must have the shapes of `before`, got {others} for {shapes} in "
                f"`layers[{number}]`. Merge factors, or take both from the same module."
            )
        rows, columns = shapes.kernel
        if rows != width:
            raise ValueError(
                f"`layers[{number}]` must take {width} inputs, got {rows}: name all in their order."
            )
        width = columns
    return pairs


def check_inputs(inputs: Array, labels: Array | None) -> None:
    """Raises an error unless there are floating inputs, and one integer label a sample or none."""
    if inputs.ndim != 2 or 0 in inputs.shape:
        raise ValueError(f"`inputs` must have shape (samples, inputs), got {inputs.shape}.")
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(f"`inputs` must be floating, got {inputs.dtype}: scale as for the module.")
    if labels is None:
        return
    if labels.shape != inputs.shape[:1]:
        raise ValueError(f"`labels` must have shape {inputs.shape[:1]}, got {labels.shape}.")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` must be integers, got {labels.dtype}: classes, not one-hot.")


def check_activation(activation: Callable[[Array], Array]) -> None:
    """Raises ValueError if a slope exceeds 1 on a grid, as for gelu, or if not elementwise."""
    single = lambda entry: activation(entry[None])[0]

    # A new function is compiled anew: the activation may depend on a variable that changed.
    def probe(grid):
        slopes = jnp.abs(jax.vmap(jax.grad(single))(grid))
        slope = jnp.max(jnp.where(jnp.isnan(slopes), jnp.inf, slopes))
        return slope, jnp.allclose(activation(grid), jax.vmap(single)(grid), equal_nan=True)

    with jax.ensure_compile_time_eval():
        # Geometric steps, so that no periodic activation hides between the points.
        half = jnp.concatenate([jnp.geomspace(1e-3, 1, 200), jnp.geomspace(1, 1e4, 2000)])
        grid = jnp.concatenate([-half[::-1], half])
        slope, elementwise = map(float, jax.jit(probe)(grid))
    if not elementwise:
        raise ValueError("`activation` must be elementwise, such as relu; softmax is not.")
    if not slope < 1.001:
        raise ValueError(
            f"`activation` must have slopes in [-1, 1], as relu has, got {slope:.3f}. Divide it by "
            "its steepest slope, and multiply the kernels after it."
        )
