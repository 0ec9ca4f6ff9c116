"""Layers of `flax.nnx` made thinner, in place, and dense again.

A layer becomes a thin one by changing its class: what holds it, be it several modules or a list,
goes on holding it, and what reads its attributes, as `in_features`, goes on reading them. Where
Flax's layers had a kernel they then have two layers of Flax's own, `left_factor` and
`right_factor`, which others may wrap or quantize as any.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from rmtjax._axes import Factors, kernel_shape
from rmtjax.models import evaluate
from rmtjax.nnx._layers import (
    FactorPair,
    fold,
    gate_stages,
    is_unfolded,
    kernels,
    NAMES,
    Pair,
    Product,
    read,
    stages,
)
from rmtjax.spectra import multiply

# Newer Flax keeps apart what is no data and what is data that is not there.
ABSENT = nnx.data(None) if hasattr(nnx, "data") else None


class Thin(nnx.Module):
    """A layer that runs as two thinner ones."""

    left_factor: Any
    right_factor: Any

    def __call__(self, inputs, **kwargs):
        """The outputs of the layer; keywords are those that it takes."""
        return self.right_factor(self.left_factor(inputs), **kwargs)

    @property
    def kernel(self) -> Product:
        """The dense kernel, multiplied out for who reads it."""
        return Product(_product(self))

    @property
    def bias(self) -> nnx.Param | None:
        """The bias of the layer, which the right factor holds."""
        return self.right_factor.bias


class ThinLoRA(Thin):
    """The base of a `nnx.LoRALinear` as two layers, and its adapter as it was."""

    lora: Any

    def __call__(self, inputs, **kwargs):
        """The outputs of the layer; keywords are those that it takes."""
        return super().__call__(inputs, **kwargs) + self.lora(inputs)


class ThinEmbed(Thin):
    """Rows of a narrow table, and a product that widens them."""

    promote_dtype: Any
    dtype: Any

    @property
    def embedding(self) -> Product:
        """The dense table, multiplied out for who reads it to tie weights."""
        return self.kernel

    def attend(self, query, **kwargs):
        """Inner products with each row of the table, as `nnx.Embed.attend`."""
        kernel = read(self.right_factor.kernel)
        query, kernel = self.promote_dtype((query, kernel), dtype=self.dtype)
        return self.left_factor.attend(jnp.einsum("...n,rn->...r", query, kernel), **kwargs)


class ThinGates(nnx.Module):
    """The fused gates of a recurrent cell, each with directions of its own."""

    left_factor: Any
    right_factor: Any
    bias: Any
    promote_dtype: Any
    dtype: Any

    def __call__(self, inputs, **kwargs):
        """The outputs of all gates, one after another."""
        hidden = jnp.moveaxis(self.left_factor(inputs), -2, 0)
        gates = jnp.moveaxis(self.right_factor(hidden, **kwargs), 0, -2)
        outputs = gates.reshape(*gates.shape[:-2], -1)
        if self.bias is None:
            return outputs
        outputs, bias = self.promote_dtype((outputs, read(self.bias)), dtype=self.dtype)
        return outputs + bias.reshape((1,) * (outputs.ndim - 1) + bias.shape)

    @property
    def kernel(self) -> Product:
        """The dense kernel, multiplied out for who reads it."""
        return Product(fold(_product(self)))


class ThinOwn(nnx.Module):
    """A registered layer: each product with its kernels as two thin ones."""


def _warn(kind: type, method: str) -> None:
    warnings.warn(
        f"`{kind.__name__}.{method}` runs with a kernel multiplied out, which is correct and saves "
        "no time: it does something else with it than products. Leave it out of the plan with "
        "`where`.",
        stacklevel=2,
    )


def _through_products(name: str, method):
    """A method of a registered layer as one of its thin form."""

    @functools.wraps(method)
    def run(layer, *args, **kwargs):
        given = layer, args, kwargs

        def run_dense(kernels):
            # All that a call may write to, as random numbers that it is given: none of it may
            # be written to from within the trace.
            dense, own, named = nnx.clone(given)
            make_dense(dense, lambda name, *_: nnx.Param(kernels[name]))
            outputs = method.__get__(dense, type(dense))(*own, **named)
            for name in kernels:
                delattr(dense, name)
            changed = nnx.All(nnx.Variable, nnx.Not(nnx.Param))  # as statistics, counts
            return outputs, nnx.state((dense, own, named), changed)

        warn = functools.partial(_warn, type(layer).__bases__[1], name)
        outputs, state = evaluate(run_dense, factors_of(layer), warn)
        nnx.update(given, state)
        return outputs

    return run


def _is_method(member: Any) -> bool:
    """Whether it becomes a method of an object: a function, be it compiled, and a part of one."""
    called = callable(member) or isinstance(member, functools.partialmethod)
    bound = hasattr(member, "__get__") and not isinstance(member, type | staticmethod | classmethod)
    return called and bound


def _methods(kind: type) -> dict[str, Any]:
    """What a layer may be called by: its `__call__` and the public methods of its own."""
    own = lambda name: name == "__call__" or not (name[0] == "_" or hasattr(nnx.Module, name))
    found = {name: inspect.getattr_static(kind, name) for name in dir(kind) if own(name)}
    return {name: method for name, method in found.items() if _is_method(method)}


def _empty(form: type, kind: type) -> nnx.Module:
    """A layer made thin, before it has anything."""
    return object.__new__(_thin_type(form, kind))


def _reduce(layer: nnx.Module) -> tuple:
    """How a layer made thin is pickled: its class has no name to be found by."""
    return _empty, type(layer).__bases__, vars(layer).copy()


@functools.cache
def _thin_type(form: type, kind: type) -> type:
    """The class of a layer made thin: still one of its kind, for who asks."""
    methods = _methods(kind) if form is ThinOwn else {}
    wrapped = {name: _through_products(name, method) for name, method in methods.items()}
    told = {"__module__": __name__, "__doc__": form.__doc__, "__reduce__": _reduce}
    return type(f"Thin{kind.__name__}", (form, kind), told | wrapped)


def _become(layer: nnx.Module, kind: type) -> None:
    """Changes the class of a layer, without a word to Flax, which would count it as data."""
    object.__setattr__(layer, "__class__", kind)


def _whole(layer) -> bool:
    """Whether both factors are still layers of Flax's own: else somebody has wrapped them."""
    return all(kernels(vars(layer)[name]) for name in ("left_factor", "right_factor"))


def pairs_of(layer: nnx.Module) -> dict[str, Pair]:
    """The variables of the factors that a layer holds in the place of its kernels, by name."""
    if isinstance(layer, ThinOwn):
        held = vars(layer).items()
        return {name: Pair(f.left, f.right) for name, f in held if isinstance(f, FactorPair)}
    if isinstance(layer, Thin | ThinGates) and _whole(layer):
        (left,), (right,) = (
            kernels(layer.left_factor).values(),
            kernels(layer.right_factor).values(),
        )
        return {NAMES[type(layer).__bases__[1]]: Pair(left, right)}
    return {}


def factors_of(layer: nnx.Module) -> dict[str, Factors]:
    """The factors that a layer holds in the place of its kernels, by name."""
    found = {}
    for name, pair in pairs_of(layer).items():
        left, right = read(pair.left), read(pair.right)
        # The gates come between inputs and rank, where the layer multiplies by them.
        left = jnp.moveaxis(left, -2, 0) if isinstance(layer, ThinGates) else left
        found[name] = Factors(left, right)
    return found


def _product(layer: nnx.Module):
    """The dense kernel of one of Flax's layers, made thin."""
    factors = factors_of(layer)
    if not factors:
        name = type(layer).__name__
        raise AttributeError(f"the factors of {name} are wrapped, and it has no kernel to read.")
    return multiply(*factors.values())


def make_thin(layer: Any, pairs: dict[str, Pair]) -> None:
    """Replaces kernels of a layer, by name, by their factors."""
    kind = type(layer)
    apart = any(
        is_unfolded(layer, kernel_shape(read(kernel))) for kernel in kernels(layer).values()
    )
    for name in pairs:
        delattr(layer, name)
    if kind not in NAMES:
        for name, pair in pairs.items():
            setattr(layer, name, FactorPair(*pair))
        _become(layer, _thin_type(ThinOwn, kind))
        return
    ((_, pair),) = pairs.items()
    if apart:
        form, pair_of_stages = ThinGates, gate_stages(layer, *pair)
    else:
        form = {nnx.Embed: ThinEmbed, nnx.LoRALinear: ThinLoRA}.get(kind, Thin)
        pair_of_stages = stages(layer, *pair, vars(layer).get("bias"))
        if kind is not nnx.Embed:
            del layer.bias
    layer.left_factor, layer.right_factor = pair_of_stages
    _become(layer, _thin_type(form, kind))


def make_dense(layer: Any, make: Callable[[str, Pair, Factors], nnx.Param]) -> None:
    """Puts back the kernels of a thin layer, as `make` tells from their factors."""
    pairs, factors = pairs_of(layer), factors_of(layer)
    if not pairs:
        return
    made = {name: make(name, pair, factors[name]) for name, pair in pairs.items()}
    form, kind = type(layer).__bases__
    bias = layer.right_factor.bias if form in (Thin, ThinLoRA) else None
    _become(layer, kind)
    for name, kernel in made.items():
        if kind not in NAMES:
            delattr(layer, name)
        setattr(layer, name, kernel)
    if kind in NAMES:
        del layer.left_factor, layer.right_factor
    if form in (Thin, ThinLoRA):
        layer.bias = ABSENT if bias is None else bias
