"""Collects the moments of the inputs of the kernels of a linen module."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from rmtjax._axes import MatrixView
from rmtjax._progress import Progress, showing
from rmtjax._types import Axes, Where
from rmtjax.linen._apply import apply
from rmtjax.linen._kernel_axes import kernel_axes
from rmtjax.linen._layers import call_layers, CELLS
from rmtjax.models import collect
from rmtjax.moments import Moments
from rmtjax.planning import find_kernels, map_kernels, merge


def _call_layers(next_fun, args, kwargs, context):
    """Runs cells that multiply by several kernels at once by those that call their layers."""
    module = context.module
    if type(module) not in CELLS or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    return call_layers(module, module.variables["params"], args, kwargs)


def _as_tuple(batch: Any) -> tuple:
    return batch if isinstance(batch, tuple) else (batch,)


def _peek(batches: Iterable[Any]) -> tuple[Iterable[Any], Any]:
    """Returns batches as they were, and the first of them; raises ValueError if there is none."""
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("`batches` must have at least one batch, got none.")
    return (batches if isinstance(batches, Sequence) else itertools.chain([first], rest)), first


def moments(
    module: nn.Module,
    variables: PyTree,
    batches: Iterable[Any],
    *,
    where: Where | None = None,
    axes: Axes | None = None,
    progress: Progress = None,
    key: jax.Array | None = None,
    **kwargs: Any,
) -> Moments:
    r"""Collects the second moments of the inputs of each kernel, $C = \frac1N \sum x x^T$.

    The module runs once for each batch, as one compiled program that also sums over the rows $x$
    that each kernel is multiplied with. No activations are stored. The products are found in the
    traced program, so layers of your own count too, and layers in `scan`, `vmap` and `remat`. For
    a convolution the rows are its patches, which are never formed. For an embedding, C is the
    diagonal of the frequencies of its rows. Batches may be divided over the devices of a mesh.

    Args:
      module: An unmodified linen module.
      variables: `{"params": tree, ...}` with or without `Factors` in the tree.
      batches: The inputs of the module: an array, or a tuple of positional arguments, for each
        call. Batches of equal shapes share a compiled program. Do not pad: padding counts too.
      where: Chooses the kernels, as in `rmtjax.plan`.
      axes: As in `rmtjax.plan`. By default `rmtjax.linen.kernel_axes` of the first batch.
      progress: True shows the progress on stderr. A function `progress(done, total, "moments")` is
        called before each batch. `total` is -1 if `batches` has no length.
      key: Of `jax.random`. If given, also collects the second moments G of the gradients of what
        the model returns with respect to the outputs of each kernel, along random directions. A
        cut then weighs the outputs of a kernel by what they change of those of the model. This
        takes a backward pass for each batch. What the model returns should be what matters:
        logits, or an embedding of length 1. Of a kernel with over 8,192 outputs all count alike.
      **kwargs: As for `module.apply`, equal for all batches. Switch dropout off.

    Returns:
      A mapping from paths to `Moment`. A kernel that is only used as its transpose has the moments
      of that product, and `axes` of the result say so. One that is used both ways, such as the
      table of a tied output layer, has those of both, and is cut for both; not one of factors.
      Kernels that are not used in a known product are left out.
      Kernels with the same inputs, such as those of query, key and value, share one matrix.

    Raises:
      ValueError: There are no batches, no kernel is used in a product, or the inputs of a kernel
        are not finite.
      TypeError: Under `jit` or `vmap`: it compiles the model itself.

    Examples:
      >>> import flax.linen as nn, jax, rmtjax
      >>> module, x = nn.Dense(60), jax.random.normal(jax.random.key(0), (500, 80))
      >>> variables = module.init(jax.random.key(0), x)
      >>> moments = rmtjax.linen.moments(module, variables, [x[:300], x[300:]])
      >>> plan = rmtjax.plan(variables["params"], moments=moments, rule=rmtjax.ranks.fixed(16))
      >>> thin = rmtjax.factorize(variables["params"], plan, moments=moments)
      >>> thin["kernel"].left.shape
      (80, 16)
    """
    batches, first = _peek(batches)
    params = variables["params"]
    if axes is None:
        dense = {**variables, "params": jax.eval_shape(merge, params)}
        axes = kernel_axes(module, dense, *_as_tuple(first), **kwargs)
    kernels = find_kernels(params, where, axes)
    views = {path: one for path, one in kernels.items() if isinstance(one, MatrixView)}

    def run(leaves, variables, batch):
        changed = map_kernels(lambda path, leaf: leaves[path], variables["params"], leaves)
        with nn.intercept_methods(_call_layers):
            return apply(module, {**variables, "params": changed}, *_as_tuple(batch), **kwargs)

    with showing(progress, "moments") as step:
        return collect(run, views, variables, batches, step, key)
