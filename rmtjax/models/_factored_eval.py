"""Functions of factorized kernels, computed without forming the kernels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun, Literal
from jaxtyping import Array, PyTree

from rmtjax._axes import factored_axes, Factors, is_factors, kernel_shape
from rmtjax.spectra import multiply


class _Kernel(NamedTuple):
    """A kernel that is held as factors, with its axes in some order.

    Attributes:
      factors: Left and right, without batch axes.
      order: For each axis of the kernel as it stands now, its place among the axes of the
        kernel that the factors stand for.
    """

    factors: Factors
    order: tuple[int, ...]

    def form(self) -> Array:
        """The dense kernel."""
        return jnp.transpose(multiply(self.factors), self.order)

    def sides(self, axes: tuple[int, ...]) -> tuple[Array, Array, list[int]] | None:
        """The factor that holds these axes, the other one, and theirs in the first.

        The rank is the last axis of the first factor and the first axis of the other. None
        where neither holds just these.
        """
        left, right = self.factors
        inputs = left.ndim - 1
        places = [self.order[axis] for axis in axes]
        if sorted(places) == list(range(inputs)):
            return left, right, places
        if sorted(places) == list(range(inputs, len(self.order))):
            turned = jnp.moveaxis(right, 0, -1), jnp.moveaxis(left, -1, 0)
            return *turned, [place - inputs for place in places]
        return None

    def rest(self, axes: tuple[int, ...]) -> list[int]:
        """The order of the axes that are not among these, from 0."""
        places = [place for axis, place in enumerate(self.order) if axis not in axes]
        return [sorted(places).index(place) for place in places]


def _contract(inputs, axes, kernel: _Kernel, contracted, params) -> Array | None:
    """The inputs' own axes, then those of the kernel that are left."""
    sides = kernel.sides(tuple(contracted))
    if sides is None:
        return None
    first, second, places = sides
    how = {name: params[name] for name in ("precision", "preferred_element_type")}
    hidden = lax.dot_general(inputs, first, ((axes, places), ((), ())), **how)
    hidden = hidden.astype(second.dtype)
    last = hidden.ndim - 1
    outputs = lax.dot_general(hidden, second, (((last,), (0,)), ((), ())), **how)
    moved = [last + place for place in kernel.rest(tuple(contracted))]
    return jnp.transpose(outputs, (*range(last), *moved))


def _dot_general(params, lhs, rhs) -> Array | None:
    (left_axes, right_axes), batch = params["dimension_numbers"]
    placed = params.get("out_sharding") is not None  # by name, for the outputs of one product
    if any(batch) or placed or (isinstance(lhs, _Kernel) and isinstance(rhs, _Kernel)):
        return None
    if isinstance(rhs, _Kernel):
        return _contract(lhs, left_axes, rhs, right_axes, params)
    outputs = _contract(rhs, right_axes, lhs, left_axes, params)
    if outputs is None:
        return None
    own = rhs.ndim - len(right_axes)  # come last where the kernel is written first
    return jnp.transpose(outputs, (*range(own, outputs.ndim), *range(own)))


def _convolve(params, lhs, rhs) -> Array | None:
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if isinstance(lhs, _Kernel) or groups * params["batch_group_count"] > 1:
        return None
    out, *window = numbers.rhs_spec
    sides = rhs.sides(tuple(sorted(window)))
    if sides is None or sides[1].ndim != 2:
        return None
    first, second, places = sides
    thin = jnp.moveaxis(jnp.transpose(first, (*places, first.ndim - 1)), -1, out)
    hidden = lax.conv_general_dilated_p.bind(lhs, thin, **params)
    feature = numbers.out_spec[1]
    how = {name: params[name] for name in ("precision", "preferred_element_type")}
    axes = (((feature,), (0,)), ((), ()))
    outputs = lax.dot_general(hidden.astype(second.dtype), second, axes, **how)
    return jnp.moveaxis(outputs, -1, feature)


def _cast(params, kernel: _Kernel) -> _Kernel | None:
    dtype = params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None  # rounded factors are not those of a rounded kernel
    return kernel._replace(factors=Factors(*(factor.astype(dtype) for factor in kernel.factors)))


def _transpose(params, kernel: _Kernel) -> _Kernel:
    return kernel._replace(order=tuple(kernel.order[axis] for axis in params["permutation"]))


_RULES: dict[str, Callable[..., Any]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolve,
    "transpose": _transpose,
    "convert_element_type": _cast,
    "copy": lambda params, kernel: kernel,
}


def _run(jaxpr, equation, operands) -> list[Array]:
    """The results of one equation of a program on arrays, whatever functions it holds."""
    inputs = {
        atom: operand
        for atom, operand in zip(equation.invars, operands, strict=True)
        if not isinstance(atom, Literal)
    }
    alone = jaxpr.replace(
        constvars=(),
        invars=list(inputs),
        outvars=equation.outvars,
        eqns=[equation],
        effects=equation.effects,
    )
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*inputs.values())


def _apply(jaxpr, equation, operands, on_form: Callable[[], None]) -> list[Any]:
    """The results of one equation."""
    name, params = equation.primitive.name, equation.params
    lazy = any(isinstance(operand, _Kernel) for operand in operands)
    if lazy and name in ("jit", "pjit"):
        return _evaluate(params["jaxpr"], operands, on_form)
    result = _RULES[name](params, *operands) if lazy and name in _RULES else None
    if result is not None:
        return [result]
    if lazy:
        on_form()
        operands = [one.form() if isinstance(one, _Kernel) else one for one in operands]
    return _run(jaxpr, equation, operands)


def _evaluate(closed: ClosedJaxpr, inputs, on_form: Callable[[], None]) -> list[Any]:
    """The outputs of a traced function, kernels among them as they are."""
    jaxpr = closed.jaxpr
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *inputs), strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else known[atom]
    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        results = _apply(jaxpr, equation, operands, on_form)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _like(leaf: Any) -> jax.ShapeDtypeStruct:
    """What a leaf is traced as, factors as the kernel that they stand for."""
    dtype, weak = jnp.result_type(*jax.tree.leaves(leaf)), getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(kernel_shape(leaf), dtype, weak_type=weak)


def _trace(function: Callable[[PyTree], PyTree], tree: PyTree):
    """The program of a function, and how its outputs are made of those of the program."""
    made = []

    def arrays_of(tree):
        leaves, treedef = jax.tree.flatten(function(tree))
        arrays = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        fixed = [leaf for leaf, is_array in zip(leaves, arrays, strict=True) if not is_array]
        made.append((treedef, arrays, fixed))
        return [leaf for leaf, is_array in zip(leaves, arrays, strict=True) if is_array]

    closed = jax.make_jaxpr(arrays_of)(tree)
    treedef, arrays, fixed = made[-1]

    def rebuild(outputs):
        found, others = iter(outputs), iter(fixed)
        return treedef.unflatten(next(found if is_array else others) for is_array in arrays)

    return closed, rebuild


def evaluate(
    function: Callable[[PyTree], PyTree], tree: PyTree, on_form: Callable[[], None]
) -> PyTree:
    """`function(merge(tree))`, each product with a factorized kernel as two thin ones.

    The function is traced with dense kernels and evaluated with their factors. What it does
    with a kernel besides products, convolutions, transposes and casts is done with the dense
    one, which is formed then. Works under `jit`, `grad` and `vmap`.

    Args:
      function: Pure, of one tree; other arrays may be closed over. What it returns besides
        arrays is returned as it is.
      tree: With `Factors` among its leaves.
      on_form: Called each time that a kernel has to be formed, while tracing.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_factors)
    closed, rebuild = _trace(function, treedef.unflatten(map(_like, leaves)))
    inputs = []
    for leaf in leaves:
        if is_factors(leaf) and not factored_axes(leaf).batch:
            inputs.append(_Kernel(leaf, tuple(range(len(kernel_shape(leaf))))))
        elif is_factors(leaf):  # products of a stack have rules of their own
            on_form()
            inputs.append(multiply(leaf))
        else:
            inputs.append(leaf)
    outputs = _evaluate(closed, inputs, on_form)
    return rebuild(one.form() if isinstance(one, _Kernel) else one for one in outputs)
