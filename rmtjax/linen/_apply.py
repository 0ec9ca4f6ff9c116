"""Runs factorized trees under unmodified linen modules, by intercepting their methods."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import flax.errors
import flax.linen as nn
import jax
from flax.core.scope import Scope, subtract_filters
from jaxtyping import PyTree

from rmtjax._axes import as_pair, FactoredKernel, Factors, is_factors
from rmtjax.linen._boxes import unbox
from rmtjax.linen._layers import call_inputs, has_variables, run_cell, run_embed, run_layer
from rmtjax.models import evaluate, registered
from rmtjax.spectra import multiply

# What to do about a module that is not a known layer.
REMEDY = (
    "For a layer of Flax, make the plan with `axes=rmtjax.linen.kernel_axes(module, variables, "
    "inputs)`. If qwix made a subclass of it, as for a model of one layer, put the layer into "
    "`nn.Sequential([layer])`. If it is your layer and only multiplies by its kernel, call "
    "`rmtjax.register_layer`. Otherwise leave the kernel out with `where`."
)


# They rewrite each array of the layer inside them, which the halves of a kernel cannot stand.
REWRITERS = (nn.WeightNorm, nn.SpectralNorm)


def _place(module: nn.Module) -> str:
    path = "/".join(module.path)
    return f"{type(module).__name__} {path!r}" if path else f"{type(module).__name__} (the root)"


def _warn(told: set[str], module: nn.Module, remedy: str) -> None:
    """Warns of a module that is not split, once for all its methods and calls."""
    place = _place(module)
    if place not in told:
        told.add(place)
        words = "runs with its factors multiplied out, which is correct and saves no time."
        warnings.warn(f"{place} {words} {remedy}", stacklevel=2)


def _merge(module: nn.Module, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of a module with its factors multiplied out."""
    unboxed = {name: unbox(leaf) for name, leaf in params.items()}
    for name, leaf in unboxed.items():
        # qwix holds quantized arrays in its own containers.
        if isinstance(leaf, Factors) and not jax.tree_util.all_leaves(leaf):
            raise TypeError(
                f"{_place(module)} needs factors that are arrays to multiply them out, got "
                f"{type(leaf.left).__name__} in {name!r}. {REMEDY}"
            )
    return {name: multiply(leaf) if is_factors(leaf) else leaf for name, leaf in unboxed.items()}


def _run_merged(module: nn.Module, method: str, args, kwargs, told: set[str], remedy: str = REMEDY):
    """Runs a module that is not a known layer, with its factors multiplied out."""
    _warn(told, module, remedy)
    run = lambda module, *args, **kwargs: getattr(module, method)(*args, **kwargs)
    merge = lambda variables: {"params": _merge(module, variables["params"])}
    return nn.map_variables(run, "params", merge)(module, *args, **kwargs)


def _run_registered(module: nn.Module, method: str, args, kwargs, told: set[str]):
    """Runs a registered layer, with two thin products for each product with its kernel."""
    scope: Any = module.scope
    # The call is traced in a separate scope. Values of the trace must not remain in the caller's.
    mutable, counters = subtract_filters(scope.mutable, "params"), dict(scope.rng_counters)

    def run(params):
        variables: Any = {**module.variables, "params": params}
        traced = Scope(variables, dict(scope.rngs), mutable=mutable)
        traced.rng_counters = counters
        outputs = getattr(module.clone(parent=traced), method)(*args, **kwargs)
        return outputs, traced.mutable_variables()

    params = unbox(module.variables["params"])
    (outputs, written), multiplied_out = evaluate(run, params)
    # Without this, the layer's next call would draw the same random numbers again.
    scope.rng_counters.update(counters)
    for collection, variables in written.items():
        for name, value in variables.items():
            scope.put_variable(collection, name, value)
    if multiplied_out:
        remedy = "It uses a kernel in other ways than products. Leave it out with `where`."
        _warn(told, module, remedy)
    return outputs


def _run_thin(module: nn.Module, method: str, params: Mapping[str, Any], args, kwargs):
    """Runs a layer of Flax as two thin layers; None for other layers and other calls."""
    call = call_inputs(module, args, kwargs)
    if call is None:
        return None
    inputs, equation = call
    if type(module) is nn.Embed and method in ("__call__", "attend"):
        return run_embed(module, params, inputs, method)
    if "kernel" in params and method == "__call__":
        return run_layer(module, params, inputs, equation)
    return None


def _check_rewriter(module: nn.Module) -> None:
    """Raises ValueError for a module that rewrites the factors of the layer inside it."""
    layer: Any = getattr(module, "layer_instance", None)
    if isinstance(module, REWRITERS) and isinstance(layer, nn.Module) and layer.scope is not None:
        for name, leaf in layer.variables.get("params", {}).items():
            if is_factors(unbox(leaf)):
                raise ValueError(
                    f"{_place(module)} rewrites the parameters of {_place(layer)}, of which "
                    f"{name!r} holds thin factors. Leave this kernel out of the plan with `where`."
                )


def _intercept(told: set[str], next_fun, args, kwargs, context):
    """Runs a method of a module, by thin layers if the module has `Factors`."""
    module, method = context.module, context.method_name
    _check_rewriter(module)
    params = module.variables.get("params", {}) if module.scope is not None else {}
    cell_outputs = run_cell(module, params, args, kwargs) if method == "__call__" else None
    if cell_outputs is not None:
        return cell_outputs
    params = {name: as_pair(unbox(leaf)) for name, leaf in params.items()}
    if not any(is_factors(leaf) for leaf in params.values()):
        return next_fun(*args, **kwargs)
    if method == "setup":
        # `setup` would ask for a dense kernel, and fail on its shape. The methods called later do
        # not need it. Other modules read the embedding to tie their weights to it.
        if type(module) is nn.Embed:
            module.embedding = multiply(params["embedding"])
        return None
    others = any(isinstance(leaf, FactoredKernel) for leaf in params.values())
    if others or registered(type(module)) is not None:
        try:
            return _run_registered(module, method, args, kwargs, told)
        # The layer calls a module that belongs to another one, which the separate scope lacks.
        except flax.errors.FlaxError:
            return _run_merged(module, method, args, kwargs, told)
    if has_variables(module):
        # They belong to one product, and two thin ones would need two of them.
        remedy = "Its product has variables, such as scales of fp8. Leave it out with `where`."
        return _run_merged(module, method, args, kwargs, told, remedy)
    outputs = _run_thin(module, method, params, args, kwargs)
    return _run_merged(module, method, args, kwargs, told) if outputs is None else outputs


def factorized() -> AbstractContextManager[None]:
    """Lets `module.apply` run trees with `Factors` in place of kernels, within a `with` block.

    Examples:
      >>> import flax.linen as nn, jax.numpy as jnp, rmtjax
      >>> params = {"kernel": rmtjax.factorize_matrix(jnp.ones((80, 60)), 8)}
      >>> with rmtjax.linen.factorized():
      ...     outputs = nn.Dense(60, use_bias=False).apply({"params": params}, jnp.ones((2, 80)))
      >>> outputs.shape
      (2, 60)
    """
    return nn.intercept_methods(partial(_intercept, set()))


def apply(module: nn.Module, variables: PyTree, *args: Any, **kwargs: Any) -> Any:
    """Runs `module.apply(variables, ...)` with a factorized tree.

    The outputs equal those of the merged tree (`rmtjax.merge`) up to rounding. Gradients are
    those of the factors, so training can go on in them. Works under `jit`, `grad` and `vmap`.
    Modules that rewrite the parameters of another module, such as `nn.WeightNorm` and
    `nn.SpectralNorm`, raise an error on factors. Leave their kernels out of the plan with `where`.

    Args:
      module: An unmodified linen module.
      variables: `{"params": tree, ...}` with or without `Factors` in the tree.
      *args: As for `module.apply`.
      **kwargs: As for `module.apply`.

    Warns:
      UserWarning: A module runs with its factors multiplied out, because `rmtjax.linen` does not
        know this layer or because its factors have other axes. Once for each module.

    Raises:
      ValueError: `variables` is the tree without `{"params": tree}` around it, or a module rewrites
        the parameters of another one that has factors.
      TypeError: The factors to multiply out are not arrays, for example quantized.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax
      >>> module, inputs = nn.Dense(60), jnp.ones((2, 80))
      >>> params = module.init(jax.random.key(0), inputs)["params"]
      >>> plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(8))
      >>> factored = rmtjax.factorize(params, plan)
      >>> rmtjax.linen.apply(module, {"params": factored}, inputs).shape
      (2, 60)
    """
    leaves = jax.tree.leaves(variables, is_leaf=is_factors)
    if "params" not in variables and any(map(is_factors, leaves)):
        some = ", ".join(map(repr, list(variables)[:5]))
        raise ValueError(
            '`variables` must be {"params": tree}, with other collections beside it, got a tree '
            f'of parameters with {some}. Give {{"params": variables}}.'
        )
    with factorized():
        return module.apply(variables, *args, **kwargs)
