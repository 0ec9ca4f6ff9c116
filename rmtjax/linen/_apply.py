"""Run factorized trees under unmodified linen modules, and ask a module for its kernel axes."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import Scope, subtract_filters
from jaxtyping import PyTree

from rmtjax._axes import is_factors, KernelAxes
from rmtjax.linen._layers import (
    call_inputs,
    form_kernels,
    lift_axes,
    own_kernels,
    run_cell,
    run_embed,
    run_layer,
)
from rmtjax.models import evaluate, registered
from rmtjax.planning import guess_axes, path_name
from rmtjax.spectra import multiply

UNKNOWN = (
    "If it is a layer of Flax's own, make the plan with `axes=rmtjax.linen.kernel_axes(module, "
    "variables, inputs)`; if qwix has made a subclass of it, as of a model that is one layer, put "
    "the layer into `nn.Sequential([layer])` first; if it is one of your own that only multiplies "
    "by its kernel, tell it to `rmtjax.register_layer`; else leave the kernel out"
)


def _warn_formed(module: nn.Module, cause: str = UNKNOWN) -> None:
    place = "/".join(module.path)
    warnings.warn(
        f"{type(module).__name__} {place!r} runs with its factors multiplied out, which is "
        f"correct and saves no time. {cause} with `where`.",
        stacklevel=2,
    )


def _run_merged(module: nn.Module, method: str, args, kwargs):
    """Any other module: with its own kernels multiplied out."""
    _warn_formed(module)
    remedy = f"{UNKNOWN} with `where`."
    run = lambda module, *args, **kwargs: getattr(module, method)(*args, **kwargs)
    merge = lambda variables: {"params": form_kernels(module, variables["params"], remedy)}
    return nn.map_variables(run, "params", merge)(module, *args, **kwargs)


def _run_registered(module: nn.Module, method: str, args, kwargs):
    """A layer of one's own with two thin products for each with its kernel."""
    scope, formed = module.scope, []
    assert scope is not None  # for the type checker: it is being called
    # Apart from that of the caller, which must not hold what belongs to the trace.
    mutable, counters = subtract_filters(scope.mutable, "params"), dict(scope.rng_counters)

    def run(params):
        variables: Any = {**module.variables, "params": params}
        rngs: Any = dict(scope.rngs)
        own = Scope(variables, rngs, mutable=mutable)
        own.rng_counters = counters
        outputs = getattr(module.clone(parent=own), method)(*args, **kwargs)
        return outputs, own.mutable_variables()

    params = nn.unbox(module.variables["params"])
    outputs, written = evaluate(run, params, lambda: formed.append(True))
    scope.rng_counters.update(counters)
    for collection, variables in written.items():
        for name, value in variables.items():
            scope.put_variable(collection, name, value)
    if formed:
        _warn_formed(module, "It does something else with a kernel than products: leave it out")
    return outputs


def _run_thin(module: nn.Module, method: str, params: Mapping[str, Any], args, kwargs):
    """A layer of Flax's own by two; None for other layers, and other calls."""
    call = call_inputs(module, args, kwargs)
    if call is None:
        return None
    inputs, equation = call
    if type(module) is nn.Embed and method in ("__call__", "attend"):
        return run_embed(module, params, inputs, method)
    if "kernel" in params and method == "__call__":
        return run_layer(module, params, inputs, equation)
    return None


def _interceptor(next_fun, args, kwargs, context):
    """Runs a layer as two where its kernel is `Factors`."""
    module, method = context.module, context.method_name
    params = module.variables.get("params", {}) if module.scope is not None else {}
    cell = run_cell(module, params, args, kwargs) if method == "__call__" else None
    if cell is not None:
        return cell
    params = {name: nn.unbox(leaf) for name, leaf in params.items()}
    if not any(is_factors(leaf) for leaf in params.values()):
        return next_fun(*args, **kwargs)
    if method == "setup":
        # It would ask for a dense kernel; what is called next runs without it.
        if type(module) is nn.Embed:
            module.embedding = multiply(params["embedding"])  # for who reads it to tie weights
        return None
    if registered(type(module)) is not None:
        try:
            return _run_registered(module, method, args, kwargs)
        except flax.errors.FlaxError:  # it shares a module that lies elsewhere
            return _run_merged(module, method, args, kwargs)
    outputs = _run_thin(module, method, params, args, kwargs)
    return _run_merged(module, method, args, kwargs) if outputs is None else outputs


@contextmanager
def factorized() -> Iterator[None]:
    """Within it, `module.apply` takes trees with `Factors` in the place of kernels.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax
      >>> module, inputs = nn.Dense(60), jnp.ones((2, 80))
      >>> params = module.init(jax.random.key(0), inputs)["params"]
      >>> plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(8))
      >>> thin = rmtjax.factorize(params, plan)
      >>> with rmtjax.linen.factorized():
      ...     outputs = module.apply({"params": thin}, inputs)
      >>> outputs.shape
      (2, 60)
    """
    with nn.intercept_methods(_interceptor):
        yield


def _check_variables(variables: PyTree) -> None:
    """Refuses parameters in the place of all variables."""
    if "params" not in variables and any(
        map(is_factors, jax.tree.leaves(variables, is_leaf=is_factors))
    ):
        some = ", ".join(map(repr, list(variables)[:5]))
        raise ValueError(
            '`variables` must be {"params": tree}, with other collections beside it, got a tree '
            f"of parameters, of {some}: wrap it."
        )


def apply(module: nn.Module, variables: PyTree, *args: Any, **kwargs: Any) -> Any:
    """`module.apply(variables, ...)` for a factorized tree.

    Computes what the module computes from `rmtjax.merge` of the tree, up to rounding, and
    has its gradients: training goes on in the factors. Works under `jit`, `grad` and `vmap`.

    Args:
      module: An unmodified linen module.
      variables: `{"params": tree, ...}` with or without `Factors` in the tree.
      *args: As for `module.apply`.
      **kwargs: As for `module.apply`.

    Returns:
      What `module.apply` returns.

    Modules that rewrite the parameters of another, as `nn.WeightNorm` and
    `nn.SpectralNorm` do, know no factors and fail: leave their kernels out with `where`.

    Warns:
      UserWarning: A module runs with its factors multiplied out, because it is none of
        the layers named at the head of this file or its factors have other axes.

    Raises:
      ValueError: `variables` is the tree without `{"params": tree}` around it.
      TypeError: Such a module has factors that are no arrays, as quantized ones.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax
      >>> module, inputs = nn.Dense(60), jnp.ones((2, 80))
      >>> params = module.init(jax.random.key(0), inputs)["params"]
      >>> plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(8))
      >>> thin = rmtjax.factorize(params, plan)
      >>> rmtjax.linen.apply(module, {"params": thin}, inputs).shape
      (2, 60)
    """
    _check_variables(variables)
    with factorized():
        return module.apply(variables, *args, **kwargs)


class KernelTable(dict[str, KernelAxes | None]):
    """The axes of the kernels of a module by path, also of a tree with more or fewer stacks.

    Attributes:
      seen: By path the axes, and the shape, of each kernel where its layer used it.
    """

    def __init__(self, seen: dict[str, tuple[KernelAxes | None, tuple[int, ...]]], params: PyTree):
        self.seen = seen
        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_factors)
        found = {path_name(key): leaf for key, leaf in leaves}
        super().__init__({path: self(path, found[path]) for path in seen if path in found})

    def __call__(self, path: str, leaf: Any) -> KernelAxes | None:
        """The axes of a leaf, of which the shape tells what was stacked."""
        if path not in self.seen:
            return guess_axes(path, leaf)
        named, used = self.seen[path]
        stored = jnp.shape(leaf)
        return named and lift_axes(named, stored, used)


def kernel_axes(module: nn.Module, variables: PyTree, *args: Any, **kwargs: Any) -> KernelTable:
    """Asks a module for the axes of its kernels, by tracing one call of it.

    A tree alone does not tell a stack of kernels, as `nn.scan` and `nn.vmap` make it, from
    a convolution, nor which axes a `DenseGeneral` contracts.

    Args:
      module: A linen module.
      variables: `{"params": tree, ...}`, not factorized.
      *args: As for `module.apply`; nothing is computed.
      **kwargs: As for `module.apply`.

    Returns:
      The `axes` argument of `rmtjax.plan` and `rmtjax.prune_spectrum`: a dictionary from
      paths to axes. Grouped and masked convolutions are no matrices (None); layers told to
      `rmtjax.register_layer` are among them; kernels of other modules are guessed as without.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax
      >>> module, inputs = nn.DenseGeneral((4, 5)), jnp.ones((2, 3))
      >>> variables = module.init(jax.random.key(0), inputs)
      >>> axes = rmtjax.linen.kernel_axes(module, variables, inputs)
      >>> axes("kernel", variables["params"]["kernel"])
      KernelAxes(inputs=(0,), outputs=(1, 2), batch=())
    """
    seen: dict[str, tuple[KernelAxes | None, tuple[int, ...]]] = {}

    def record(next_fun, args, kwargs, context):
        called = context.module
        outputs = next_fun(*args, **kwargs)
        if called.scope is not None and context.method_name != "setup":
            for name, known in own_kernels(called, args, kwargs).items():
                seen["/".join((*called.path, name))] = known
        return outputs

    with nn.intercept_methods(record):
        run = lambda variables: (module.apply(variables, *args, **kwargs), None)[1]
        jax.eval_shape(run, variables)  # whatever the module returns
    return KernelTable(seen, variables["params"])
