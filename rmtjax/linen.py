"""Factorized trees under unmodified `flax.linen` modules.

Where the tree holds `Factors` in the place of a kernel, the layer that owns it runs as two
thinner layers of Flax's own: `Dense`, `DenseGeneral` and with it attention, `Conv`,
`ConvTranspose` (their window first, then a 1x1 product) and `Embed`, also inside `nn.scan`,
`nn.vmap` and `nn.remat`. Under `jit` all of this happens while tracing and costs nothing.
"""

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rmtjax import _kernels
from rmtjax._factors import Factors, is_factors, multiply
from rmtjax._typing import Axes, KernelAxes


def _as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _layer_axes(module: nn.Module, ndim: int) -> KernelAxes | None:
    """The axes of the kernel of one of Flax's layers; None where it is no matrix."""
    first = ndim - 1
    if type(module) is nn.DenseGeneral:
        batch = len(_as_tuple(module.batch_dims))
        first = batch + len(_as_tuple(module.axis))
        return KernelAxes(
            tuple(range(batch, first)), tuple(range(first, ndim)), tuple(range(batch))
        )
    if type(module) is nn.Conv and (module.feature_group_count > 1 or module.mask is not None):
        return None
    if type(module) is nn.ConvTranspose and (module.transpose_kernel or module.mask is not None):
        return None
    if type(module) in (nn.Dense, nn.Conv, nn.ConvTranspose, nn.Embed):
        return KernelAxes(tuple(range(first)), (first,))
    return None


def _stages(module: nn.Module, factors: Factors) -> tuple[nn.Module, nn.Module] | None:
    """The two layers that stand for one; None where the factors do not fit it."""
    batch = len(_as_tuple(getattr(module, "batch_dims", ())))
    axes = _layer_axes(module, factors.left.ndim + factors.right.ndim - 2 - batch)
    if axes is None or len(axes.inputs) != factors.left.ndim - 1 - batch:
        return None
    thin = {"parent": None, "features": factors.left.shape[-1], "use_bias": False}
    if type(module) is nn.Dense:
        return module.clone(**thin), module.clone(parent=None)
    if type(module) is nn.DenseGeneral:
        second = module.clone(parent=None, axis=-1, batch_dims=tuple(range(batch)))
        return module.clone(**thin), second
    if type(module) in (nn.Conv, nn.ConvTranspose):
        same = ("features", "use_bias", "dtype", "param_dtype", "precision")
        second = nn.Dense(**{name: getattr(module, name) for name in same}, parent=None)
        return module.clone(**thin), second
    return None


def _run_layer(module: nn.Module, params: Mapping[str, Any], inputs):
    """A layer whose kernel is `Factors`, as two; None where that cannot be."""
    factors = params["kernel"]
    stages = _stages(module, factors)
    if stages is None:
        return None
    first, second = stages
    hidden = first.apply({"params": {"kernel": factors.left}}, inputs)
    return second.apply({"params": {**params, "kernel": factors.right}}, hidden)


def _run_embed(module: nn.Embed, params: Mapping[str, Any], inputs, method: str):
    """Rows of the left factor, then the right one; `attend` the other way round."""
    left, right = params["embedding"]
    table = module.clone(parent=None, features=left.shape[-1])
    rows = {"params": {"embedding": left}}
    dense = lambda kernel, x: nn.Dense(
        kernel.shape[-1],
        use_bias=False,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        parent=None,
    ).apply({"params": {"kernel": kernel}}, x)
    if method == "attend":
        return table.apply(rows, dense(right.T, inputs), method=method)
    return dense(right, table.apply(rows, inputs))


def _run_merged(module: nn.Module, method: str, args, kwargs):
    """Any other module: with its own kernels multiplied out."""
    place = "/".join(module.path)
    warnings.warn(
        f"{type(module).__name__} {place!r} runs with its factors multiplied out, which is "
        "correct and saves no time. If it is a layer of Flax's own, make the plan with "
        "`axes=rmtjax.linen.kernel_axes(module, variables, inputs)`; else leave the kernel out "
        "with `where`.",
        stacklevel=2,
    )
    dense = lambda leaf: multiply(leaf) if is_factors(leaf) else leaf
    own = lambda params: {name: dense(leaf) for name, leaf in params.items()}
    run = lambda module, *args, **kwargs: getattr(module, method)(*args, **kwargs)
    merge = lambda variables: {"params": own(variables["params"])}
    return nn.map_variables(run, "params", merge)(module, *args, **kwargs)


def _interceptor(next_fun, args, kwargs, context):
    """Runs a layer as two where its kernel is `Factors`."""
    module, method = context.module, context.method_name
    params = module.variables.get("params", {}) if module.scope is not None else {}
    if not any(is_factors(leaf) for leaf in params.values()):
        return next_fun(*args, **kwargs)
    if method == "setup":
        # It would ask for a dense kernel; what is called next runs without it.
        if type(module) is nn.Embed:
            module.embedding = multiply(params["embedding"])  # for who reads it to tie weights
        return None
    inputs = (*args, *kwargs.values())
    if len(inputs) == 1 and type(module) is nn.Embed and method in ("__call__", "attend"):
        return _run_embed(module, params, inputs[0], method)
    if len(inputs) == 1 and "kernel" in params and method == "__call__":
        outputs = _run_layer(module, params, inputs[0])
        if outputs is not None:
            return outputs
    return _run_merged(module, method, args, kwargs)


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

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax
      >>> module, inputs = nn.Dense(60), jnp.ones((2, 80))
      >>> params = module.init(jax.random.key(0), inputs)["params"]
      >>> plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(8))
      >>> thin = rmtjax.factorize(params, plan)
      >>> rmtjax.linen.apply(module, {"params": thin}, inputs).shape
      (2, 60)
    """
    with factorized():
        return module.apply(variables, *args, **kwargs)


def _stack_axes(stored: tuple[int, ...], used: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that a lifted transformation took away, the leading ones if several fit."""
    ndim = len(stored)
    for taken in itertools.combinations(range(ndim), ndim - len(used)):
        if tuple(stored[axis] for axis in range(ndim) if axis not in taken) == used:
            return taken
    raise ValueError(f"no axes of {stored} can be taken away to leave {used}")


def _lift_axes(axes: KernelAxes, taken: tuple[int, ...], ndim: int) -> KernelAxes:
    """Axes of a kernel as used, told as axes of the kernel as stored."""
    left = [axis for axis in range(ndim) if axis not in taken]
    move = lambda group: tuple(left[axis] for axis in group)
    return KernelAxes(move(axes.inputs), move(axes.outputs), (*taken, *move(axes.batch)))


def kernel_axes(module: nn.Module, variables: PyTree, *args: Any, **kwargs: Any) -> Axes:
    """Asks a module for the axes of its kernels, by tracing one call of it.

    A tree alone does not tell a stack of kernels, as `nn.scan` and `nn.vmap` make it, from
    a convolution, nor which axes a `DenseGeneral` contracts.

    Args:
      module: A linen module.
      variables: `{"params": tree, ...}`, not factorized.
      *args: As for `module.apply`; nothing is computed.
      **kwargs: As for `module.apply`.

    Returns:
      The `axes` argument of `rmtjax.plan` and `rmtjax.prune_spectrum`. Grouped and masked
      convolutions are no matrices (None); kernels of other modules are guessed as without.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax
      >>> module, inputs = nn.DenseGeneral((4, 5)), jnp.ones((2, 3))
      >>> variables = module.init(jax.random.key(0), inputs)
      >>> axes = rmtjax.linen.kernel_axes(module, variables, inputs)
      >>> axes("kernel", variables["params"]["kernel"])
      KernelAxes(inputs=(0,), outputs=(1, 2), batch=())
    """
    known = (nn.Dense, nn.DenseGeneral, nn.Conv, nn.ConvTranspose, nn.Embed)
    seen: dict[str, tuple[KernelAxes | None, tuple[int, ...]]] = {}

    def record(next_fun, args, kwargs, context):
        called = context.module
        outputs = next_fun(*args, **kwargs)
        if type(called) in known:
            for name in _kernels.NAMES:
                if called.has_variable("params", name):
                    shape = jnp.shape(called.get_variable("params", name))
                    path = "/".join((*called.path, name))
                    seen[path] = (_layer_axes(called, len(shape)), shape)
        return outputs

    with nn.intercept_methods(record):
        jax.eval_shape(lambda variables: module.apply(variables, *args, **kwargs), variables)

    def axes(path: str, leaf: Any) -> KernelAxes | None:
        if path not in seen:
            return _kernels.kernel_axes(path, leaf)
        named, used = seen[path]
        stored = jnp.shape(leaf)
        return named and _lift_axes(named, _stack_axes(stored, used), len(stored))

    return axes
