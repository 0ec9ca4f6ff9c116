"""Collects the moments of the inputs of the kernels of an nnx model."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rmtjax._axes import MatrixView
from rmtjax._progress import Progress, showing
from rmtjax._types import Axes, check_type, Where
from rmtjax.models import collect
from rmtjax.moments import Moments
from rmtjax.nnx._thin import pairs_of
from rmtjax.nnx._trees import axes_of, name_of, open_layers, to_tree, variables_of
from rmtjax.planning import find_kernels, path_name


def _call(model: Any, batch: Any) -> Any:
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _places(model: nnx.Module) -> dict[str, tuple[str, ...]]:
    """Returns the paths of the variables of each kernel: one, or those of its factors."""
    paths = {id(variable): name_of(path) for path, variable in variables_of(model).items()}
    places: dict[str, tuple[str, ...]] = {path: (path,) for path in paths.values()}
    for path, layer in nnx.iter_graph(model):
        for kernel, pair in pairs_of(layer).items() if isinstance(layer, nnx.Module) else ():
            places[name_of((*path, kernel))] = paths[id(pair.left)], paths[id(pair.right)]
    return places


def _fit(array: Any, shape: tuple[int, ...]) -> Any:
    """Returns a factor in the shape of its variable: fused gates are behind the inputs there."""
    return array if array.shape == shape else jnp.moveaxis(array, 0, -2)


def moments(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], Any] = _call,
    where: Where | None = None,
    axes: Axes | None = None,
    progress: Progress = None,
    key: jax.Array | None = None,
) -> Moments:
    r"""Collects the second moments of the inputs of each kernel, $C = \frac1N \sum x x^T$.

    As `rmtjax.linen.moments`. The model is not changed: a copy runs, in the mode of evaluation.

    Args:
      model: Any nnx model, dense or thin.
      batches: The inputs of the model: an array, or a tuple of positional arguments, for each
        call.
      call: `call(model, batch)` runs the model. By default `model(batch)` or `model(*batch)`.
      where, progress, key: As in `rmtjax.linen.moments`.
      axes: As in `rmtjax.plan`. By default those of `rmtjax.nnx.kernel_axes`.

    Returns:
      A mapping from paths, as `rmtjax.nnx.params` has them, to `Moment`.

    Raises:
      ValueError, TypeError: As `rmtjax.linen.moments`, or `model` is not a module.

    Examples:
      >>> import flax.nnx as nnx, jax, rmtjax
      >>> model = nnx.Linear(80, 60, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (500, 80))
      >>> moments = rmtjax.nnx.moments(model, [x[:300], x[300:]])
      >>> plan = rmtjax.nnx.plan(model, moments=moments, rule=rmtjax.ranks.fixed(16))
      >>> rmtjax.nnx.factorize(model, plan, moments=moments)(x).shape
      (500, 60)
    """
    check_type("model", model, nnx.Module, "Give a `flax.nnx.Module`: `rmtjax` takes trees.")
    opened, runner = open_layers(model), nnx.clone(model)
    runner.eval()
    places = _places(runner)
    kernels = find_kernels(to_tree(opened), where, axes_of(opened) if axes is None else axes)
    known = lambda path, kernel: isinstance(kernel, MatrixView) and path in places
    views: Any = {path: kernel for path, kernel in kernels.items() if known(path, kernel)}
    graph, state = nnx.split(runner)
    keys, structure = jax.tree_util.tree_flatten_with_path(state)
    index = {path_name(key): place for place, (key, _) in enumerate(keys)}

    def run(leaves, values, batch):
        values = list(values)
        for path, leaf in leaves.items():
            for place, array in zip(places[path], jax.tree.leaves(leaf), strict=True):
                values[index[place]] = _fit(array, values[index[place]].shape)
        return call(nnx.merge(graph, structure.unflatten(values)), batch)

    with showing(progress, "moments") as step:
        return collect(run, views, [value for _, value in keys], batches, step, key)
