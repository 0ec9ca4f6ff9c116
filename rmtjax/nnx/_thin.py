"""Layers of `flax.nnx` made thin in place, and dense again.

A layer becomes thin by changing its class, so what holds it still holds it, and its other
attributes stay. A thin layer of Flax has two layers of Flax in place of its kernel, `left_factor`
and `right_factor`, which can be wrapped or quantized like any other.
"""

import functools
import inspect
import warnings
from collections.abc import Mapping
from functools import partialmethod
from typing import Any

import jax.numpy as jnp
from flax import nnx

from rmtjax._axes import factored_axes, FactoredKernel, Factors, kernel_shape
from rmtjax.models import evaluate
from rmtjax.nnx._layers import fold, gate_stages, is_unfolded, kernels, NAMES, stages
from rmtjax.nnx._variables import ABSENT, FactorPair, HeldParts, PartsOfKernel, Product, read
from rmtjax.planning import register_factor_layers
from rmtjax.spectra import multiply

HALVES = ("left_factor", "right_factor")
# Each half has a leaf `kernel`, which is not a kernel to prune or to save alone.
register_factor_layers(*HALVES)


class TwoFactors(nnx.Module):
    """A layer of Flax with two layers in place of its kernel."""

    left_factor: Any
    right_factor: Any

    @property
    def kernel(self) -> Product:
        """The dense kernel, multiplied out for code that reads it."""
        factors = factors_of(self)
        if not factors:
            raise AttributeError(f"{type(self).__name__} has wrapped factors: no kernel to read.")
        dense = multiply(*factors.values())
        return Product(fold(dense) if isinstance(self, ThinGates) else dense)


class Thin(TwoFactors):
    """A layer that runs as two thinner ones."""

    def __call__(self, inputs, **kwargs):
        return self.right_factor(self.left_factor(inputs), **kwargs)

    @property
    def bias(self) -> nnx.Param | None:
        """The bias of the layer, which the right factor holds."""
        return self.right_factor.bias


class ThinLoRA(Thin):
    """The base of a `nnx.LoRALinear` as two layers, with its adapter unchanged."""

    lora: Any

    def __call__(self, inputs, **kwargs):
        return super().__call__(inputs, **kwargs) + self.lora(inputs)


class ThinEmbed(Thin):
    """A narrow table of embeddings, and a product that widens its rows."""

    promote_dtype: Any
    dtype: Any

    @property
    def embedding(self) -> Product:
        """The dense table, multiplied out for code that ties weights to it."""
        return self.kernel

    def attend(self, query, **kwargs):
        """Returns inner products with each row of the table, as `nnx.Embed.attend` does."""
        kernel = read(self.right_factor.kernel)
        query, kernel = self.promote_dtype((query, kernel), dtype=self.dtype)
        return self.left_factor.attend(jnp.einsum("...n,rn->...r", query, kernel), **kwargs)


class ThinGates(TwoFactors):
    """The fused gates of a recurrent cell, with separate factors for each gate."""

    bias: Any
    promote_dtype: Any
    dtype: Any

    def __call__(self, inputs, **kwargs):
        hidden = jnp.moveaxis(self.left_factor(inputs), -2, 0)
        gates = jnp.moveaxis(self.right_factor(hidden, **kwargs), 0, -2)
        outputs = gates.reshape(*gates.shape[:-2], -1)
        if self.bias is None:
            return outputs
        outputs, bias = self.promote_dtype((outputs, read(self.bias)), dtype=self.dtype)
        return outputs + bias.reshape((1,) * (outputs.ndim - 1) + bias.shape)


class ThinRegistered(nnx.Module):
    """A registered layer that computes each product with its kernels as two thin products."""


def _through_products(name: str, method):
    """Wraps a method of a registered layer for its thin form."""

    @functools.wraps(method)
    def run(layer, *args, **kwargs):
        call = layer, args, kwargs

        def run_dense(dense_kernels):
            # On copies: the call may write to its arguments, and values of the trace must not stay.
            dense, copied_args, copied_kwargs = nnx.clone(call)
            make_dense(dense, {name: nnx.Param(value) for name, value in dense_kernels.items()})
            outputs = method.__get__(dense, type(dense))(*copied_args, **copied_kwargs)
            # Such as statistics and counts: a call does not write parameters.
            changed = nnx.All(nnx.Variable, nnx.Not(nnx.Param))
            return outputs, nnx.state((dense, copied_args, copied_kwargs), changed)

        (outputs, state), multiplied_out = evaluate(run_dense, factors_of(layer))
        if multiplied_out:
            warnings.warn(
                f"`{type(layer).__bases__[1].__name__}.{name}` runs with a kernel multiplied out, "
                "which saves no time: it does more than products. Leave it out by `where`.",
                stacklevel=2,
            )
        nnx.update(call, state)
        return outputs

    return run


def _methods(kind: type) -> dict[str, Any]:
    """Returns `__call__` and the public methods of a layer that `nnx.Module` does not have."""
    is_public = lambda name: not (name[0] == "_" or hasattr(nnx.Module, name))
    # Functions become methods of an object, also if they are compiled or partial.
    is_function = lambda m: hasattr(m, "__get__") and (callable(m) or isinstance(m, partialmethod))
    is_method = lambda m: is_function(m) and not isinstance(m, type | staticmethod | classmethod)
    members = inspect.getmembers_static(kind, is_method)
    return {name: m for name, m in members if name == "__call__" or is_public(name)}


def _empty(form: type, kind: type) -> nnx.Module:
    return object.__new__(_thin_type(form, kind))


def _reduce(layer: nnx.Module) -> tuple:
    # By the two classes: pickle would look for the class of the layer in a module, in vain.
    return _empty, type(layer).__bases__, vars(layer).copy()


@functools.cache
def _thin_type(form: type, kind: type) -> type:
    """Returns the class of a thin layer, a subclass of the layer's."""
    # One class for each kind of layer: `nnx.jit` compiles a model once for each graph of classes.
    methods = _methods(kind) if form is ThinRegistered else {}
    wrapped = {name: _through_products(name, method) for name, method in methods.items()}
    attributes = {"__module__": __name__, "__doc__": form.__doc__, "__reduce__": _reduce}
    return type(f"Thin{kind.__name__}", (form, kind), attributes | wrapped)


def _set_class(layer: nnx.Module, kind: type) -> None:
    # `nnx.Module.__setattr__` would count the class as data of the layer.
    object.__setattr__(layer, "__class__", kind)


def pairs_of(layer: nnx.Module) -> dict[str, PartsOfKernel]:
    """Returns the variables of the factors of a layer, by the name of the kernel."""
    if isinstance(layer, ThinRegistered):
        return {name: it for name, it in vars(layer).items() if isinstance(it, PartsOfKernel)}
    if not isinstance(layer, TwoFactors):
        return {}
    left, right = (list(kernels(vars(layer)[name]).values()) for name in HALVES)
    # Layers that the user has put in place of a factor, as quantized ones, have no known kernel.
    name = NAMES[type(layer).__bases__[1]]
    return {name: FactorPair(left[0], right[0])} if left and right else {}


def factors_of(layer: nnx.Module) -> dict[str, Any]:
    """Returns the factors of a layer, by the name of the kernel."""
    factors: dict[str, Any] = {name: pair.leaf() for name, pair in pairs_of(layer).items()}
    if isinstance(layer, ThinGates):
        # `LinearGeneral` holds the gates between inputs and rank; `Factors` have them first.
        first = lambda pair: Factors(jnp.moveaxis(pair.left, -2, 0), pair.right)
        return {name: first(pair) for name, pair in factors.items()}
    return factors


def _axis_names(metadata: dict[str, Any]) -> str | None:
    """Returns the key under which metadata name the axes for sharding, in any Flax version."""
    return next((key for key in ("out_sharding", "sharding") if metadata.get(key)), None)


def make_pair(layer: nnx.Module, kernel: nnx.Param, factors: Any) -> PartsOfKernel:
    """Returns the variables of factors, with the metadata of the variable of the kernel."""
    if isinstance(factors, FactoredKernel):
        metadata = kernel.get_metadata()
        # Names for the axes of the kernel do not fit those of its parts.
        metadata = {k: v for k, v in metadata.items() if k != _axis_names(metadata)}
        of_part: Any = type(kernel)
        return HeldParts(factors, lambda part: of_part(part, **metadata))
    left, right = factors
    batch, first = len(factored_axes(factors).batch), left.ndim - 1
    of_left = of_right = kernel.get_metadata()
    key, unfolded = _axis_names(of_left), is_unfolded(layer, kernel_shape(factors))
    if key is not None:
        # The rank axis is never sharded. Names of fused gates do not fit those of separate gates.
        names = tuple(of_left[key])
        of_left = of_left | {key: None if unfolded else (*names[:first], None)}
        of_right = of_right | {key: None if unfolded else (*names[:batch], None, *names[first:])}
    left = jnp.moveaxis(left, 0, -2) if unfolded else left
    kind: Any = type(kernel)
    return FactorPair(kind(left, **of_left), kind(right, **of_right))


def make_kernel(pair: Any, factors: Any) -> nnx.Param:
    """Returns the variable of a kernel, with the metadata of the variables of its factors."""
    if isinstance(pair, HeldParts):
        like: Any = pair.variable()
        return type(like)(factors, **like.get_metadata())
    metadata = pair.left.get_metadata()
    key = _axis_names(metadata)
    if key is not None:
        of_right = pair.right.get_metadata()[key][1 + len(factored_axes(factors).batch) :]
        metadata = metadata | {key: (*metadata[key][:-1], *of_right)}
    kind: Any = type(pair.left)
    return kind(factors, **metadata)


def make_thin(layer: Any, pairs: Mapping[str, Any]) -> None:
    """Replaces kernels of a layer, by name, by their factors."""
    kind = type(layer)
    # Other parts than two factors are no two layers: each product with them is rewritten.
    if kind not in NAMES or any(isinstance(pair, HeldParts) for pair in pairs.values()):
        for name, pair in pairs.items():
            setattr(layer, name, pair)
        _set_class(layer, _thin_type(ThinRegistered, kind))
        return
    ((name, pair),) = pairs.items()
    shape = kernel_shape(read(getattr(layer, name)))
    delattr(layer, name)
    if is_unfolded(layer, shape):
        form, halves = ThinGates, gate_stages(layer, pair.left, pair.right)
    else:
        form = {nnx.Embed: ThinEmbed, nnx.LoRALinear: ThinLoRA}.get(kind, Thin)
        halves = stages(layer, pair.left, pair.right, vars(layer).get("bias"))
        # `Thin.bias` reads it from the right factor. `Embed` has none.
        if kind is not nnx.Embed:
            del layer.bias
    layer.left_factor, layer.right_factor = halves
    _set_class(layer, _thin_type(form, kind))


def make_dense(layer: Any, dense_kernels: Mapping[str, nnx.Param]) -> None:
    """Replaces the factors of a thin layer by its kernels, by name."""
    form, kind = type(layer).__bases__
    values: dict[str, Any] = dict(dense_kernels)
    if form in (Thin, ThinLoRA):
        # The class of the layer has no property in its place.
        values["bias"] = ABSENT if layer.bias is None else layer.bias
    if form is not ThinRegistered:
        del layer.left_factor, layer.right_factor
    _set_class(layer, kind)
    for name, value in values.items():
        setattr(layer, name, value)
