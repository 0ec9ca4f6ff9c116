"""A jaxpr interpreter for factored kernels: each product with a kernel becomes two thin products.

A function is traced with dense kernels to a jaxpr, JAX's list of primitive operations. The
interpreter evaluates the operations one by one, with factors in place of kernels. Products,
convolutions, transposes and casts have rules for factors. Any other operation multiplies them out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array, PyTree

from rmtjax._axes import as_pair, factored_axes, FactoredKernel, Factors, is_factors, kernel_shape
from rmtjax.models._convolutions import run_equation
from rmtjax.spectra import multiply


class _Kernel(NamedTuple):
    """A kernel held as factors, with its axes transposed."""

    factors: Factors | FactoredKernel  # without batch axes; other parts if two are not thin
    # Axis `k` of the kernel is axis `order[k]` of the product of the factors.
    order: tuple[int, ...]

    def split(self, axes: tuple[int, ...]) -> tuple[Array, Array, list[int]] | None:
        """Returns the factor that has these axes, the other one, and the axes in the first.

        The rank is the last axis of the first factor and the first axis of the other. None if
        the axes are not exactly those of one factor.
        """
        if isinstance(self.factors, FactoredKernel):
            return None
        left, right = self.factors
        num_inputs = left.ndim - 1
        places = [self.order[axis] for axis in axes]
        if sorted(places) == list(range(num_inputs)):
            return left, right, places
        if sorted(places) == list(range(num_inputs, len(self.order))):
            rank_moved = jnp.moveaxis(right, 0, -1), jnp.moveaxis(left, -1, 0)
            return *rank_moved, [place - num_inputs for place in places]
        return None


def _dense(operand: Any) -> Any:
    """Returns an operand, multiplied out if it is a kernel."""
    if not isinstance(operand, _Kernel):
        return operand
    return jnp.transpose(multiply(operand.factors), operand.order)


def _product(lhs, rhs, axes, params) -> Array:
    """Returns a product with the options of the dense product that it is a part of."""
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    return lax.dot_general(lhs, rhs, (axes, ((), ())), **options)


def _contract(inputs, axes, kernel: _Kernel, contracted, params) -> Array | None:
    """Returns a product: the remaining axes of the inputs, then those of the kernel."""
    if isinstance(kernel.factors, FactoredKernel):
        return _contract_parts(inputs, axes, kernel, contracted, params)
    sides = kernel.split(tuple(contracted))
    if sides is None:
        return None
    first, second, places = sides
    # `preferred_element_type` may widen the hidden activations, and operands need equal dtypes.
    hidden = _product(inputs, first, (axes, places), params).astype(second.dtype)
    last = hidden.ndim - 1
    outputs = _product(hidden, second, ((last,), (0,)), params)
    return _in_order(outputs, last, kernel, contracted)


def _in_order(outputs, last: int, kernel: _Kernel, contracted) -> Array:
    """Returns outputs with the remaining axes of a kernel, from `last` on, in its order."""
    remaining = [place for axis, place in enumerate(kernel.order) if axis not in contracted]
    moved = [last + sorted(remaining).index(place) for place in remaining]
    return jnp.transpose(outputs, (*range(last), *moved))


def _dot(params) -> Callable:
    """Returns a product of two arrays with the options of a dense product."""
    # `preferred_element_type` may widen what the next part is multiplied by.
    return lambda lhs, rhs, axes: _product(lhs, rhs, axes, params).astype(rhs.dtype)


def _contract_parts(inputs, axes, kernel: _Kernel, contracted, params) -> Array | None:
    """Returns a product with a kernel in other parts than two factors, as `_contract` does."""
    held: Any = kernel.factors
    places = [kernel.order[axis] for axis in contracted]
    sides = [sorted(side) for side in held.axes[:2]]
    if sorted(places) not in sides:
        return None
    rest = [axis for axis in range(inputs.ndim) if axis not in axes]
    moved = jnp.transpose(inputs, [*rest, *(axes[i] for i in np.argsort(places))])
    transposed = sorted(places) == sides[1]
    outputs = held.contract(moved, _dot(params), transposed=transposed)
    return None if outputs is None else _in_order(outputs, len(rest), kernel, contracted)


def _dot_general(params, lhs, rhs) -> Array | None:
    (left_axes, right_axes), batch = params["dimension_numbers"]
    # `out_sharding` names the axes of the outputs of one product, and there would be two.
    sharded = params.get("out_sharding") is not None
    if any(batch) or sharded or (isinstance(lhs, _Kernel) and isinstance(rhs, _Kernel)):
        return None
    if isinstance(rhs, _Kernel):
        return _contract(lhs, left_axes, rhs, right_axes, params)
    outputs = _contract(rhs, right_axes, lhs, left_axes, params)
    if outputs is None:
        return None
    # `dot_general` puts the axes of its first operand first, and here that is the kernel.
    remaining = rhs.ndim - len(right_axes)
    return jnp.transpose(outputs, (*range(remaining, outputs.ndim), *range(remaining)))


def _convolve(params, lhs, rhs) -> Array | None:
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if isinstance(lhs, _Kernel) or groups * params["batch_group_count"] > 1:
        return None
    if isinstance(rhs.factors, FactoredKernel):
        return _convolve_parts(params, lhs, rhs)
    out, *window = numbers.rhs_spec
    sides = rhs.split(tuple(sorted(window)))
    if sides is None or sides[1].ndim != 2:
        return None
    first, second, places = sides
    thin = jnp.moveaxis(jnp.transpose(first, (*places, first.ndim - 1)), -1, out)
    hidden = lax.conv_general_dilated_p.bind(lhs, thin, **params).astype(second.dtype)
    feature = numbers.out_spec[1]
    return jnp.moveaxis(_product(hidden, second, ((feature,), (0,)), params), -1, feature)


def _convolve_parts(params, lhs, kernel: _Kernel) -> Array | None:
    """Returns a convolution with a kernel in other parts than two factors, as `_convolve` does."""
    held: Any = kernel.factors
    numbers = params["dimension_numbers"]
    out, feature, *window = numbers.rhs_spec
    count = len(window)
    if [kernel.order[axis] for axis in (*window, feature, out)] != list(range(count + 2)):
        return None

    def convolve(inputs, part, axes):
        """Convolves (samples, channels, *window axes) along some of the axes."""
        along = lambda name, none: [v if i in axes else none for i, v in enumerate(params[name])]
        wide = jnp.expand_dims(part, [axis for axis in range(count) if axis not in axes])
        outputs = lax.conv_general_dilated(
            inputs,
            jnp.transpose(wide, (count + 1, count, *range(count))),
            window_strides=along("window_strides", 1),
            padding=along("padding", (0, 0)),
            lhs_dilation=along("lhs_dilation", 1),
            rhs_dilation=along("rhs_dilation", 1),
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
        return outputs.astype(part.dtype)

    moved = jnp.transpose(lhs, numbers.lhs_spec)
    outputs = held.convolve(moved, convolve, _dot(params))
    if outputs is None:
        return None
    return jnp.transpose(outputs, np.argsort(numbers.out_spec).tolist())


def _cast(params, kernel: _Kernel) -> _Kernel | None:
    dtype = params["new_dtype"]
    # Rounded to integers or booleans, factors no longer multiply to the rounded kernel.
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return kernel._replace(factors=jax.tree.map(lambda part: part.astype(dtype), kernel.factors))


def _transpose(params, kernel: _Kernel) -> _Kernel:
    return kernel._replace(order=tuple(kernel.order[axis] for axis in params["permutation"]))


# By the names of primitives. A rule returns None if it does not apply to these operands.
_RULES: dict[str, Callable[..., Any]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolve,
    "transpose": _transpose,
    "convert_element_type": _cast,
    "copy": lambda params, kernel: kernel,
}


def _run(jaxpr, equation, operands) -> list[Array]:
    """Evaluates one equation on arrays; kernels are multiplied out."""
    return run_equation(jaxpr, equation, list(map(_dense, operands)))


def _apply(jaxpr, equation, known) -> tuple[list[Any], bool]:
    """Evaluates one equation; also returns whether a kernel was multiplied out for it."""
    name, params = equation.primitive.name, equation.params
    operands = [var.val if isinstance(var, Literal) else known[var] for var in equation.invars]
    if not any(isinstance(operand, _Kernel) for operand in operands):
        return _run(jaxpr, equation, operands), False
    if name in ("jit", "pjit"):
        return _evaluate(params["jaxpr"], operands)
    result = _RULES[name](params, *operands) if name in _RULES else None
    return (_run(jaxpr, equation, operands), True) if result is None else ([result], False)


def _evaluate(closed: ClosedJaxpr, inputs) -> tuple[list[Any], bool]:
    """Evaluates a jaxpr, whose outputs may be kernels; otherwise like `_apply`."""
    jaxpr, multiplied_out = closed.jaxpr, False
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *inputs), strict=True))
    for equation in jaxpr.eqns:
        results, dense = _apply(jaxpr, equation, known)
        multiplied_out |= dense
        known.update(zip(equation.outvars, results, strict=True))
    outputs = [var.val if isinstance(var, Literal) else known[var] for var in jaxpr.outvars]
    return outputs, multiplied_out


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of a leaf; of factors, those of the dense kernel."""
    dtype, weak = jnp.result_type(*jax.tree.leaves(leaf)), getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(kernel_shape(leaf), dtype, weak_type=weak)


def _trace(function: Callable[[PyTree], PyTree], tree: PyTree):
    """Returns the jaxpr of a function, the structure of its outputs, and those not arrays."""
    structures = []

    def arrays_of(tree):
        leaves, treedef = jax.tree.flatten(function(tree))
        # A jaxpr returns arrays only. None, which is never a leaf, marks their places among the
        # other leaves, such as strings.
        is_array = lambda leaf: isinstance(leaf, jax.Array | np.ndarray)
        structures.append((treedef, [None if is_array(leaf) else leaf for leaf in leaves]))
        return list(filter(is_array, leaves))

    closed = jax.make_jaxpr(arrays_of)(tree)
    return closed, *structures[-1]


def evaluate(function: Callable[[PyTree], PyTree], tree: PyTree) -> tuple[PyTree, bool]:
    """Evaluates `function(merge(tree))` with factors; works under `jit`, `grad` and `vmap`.

    The pure function may close over other arrays, and may return values that are not arrays.
    Also returns whether a kernel had to be multiplied out.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_factors)
    closed, structure, others = _trace(function, treedef.unflatten(map(_abstract, leaves)))
    # Products of a stack of matrices have batch axes, for which there is no rule.
    is_stack = lambda leaf: is_factors(leaf) and bool(factored_axes(leaf).batch)
    hold = lambda leaf: _Kernel(as_pair(leaf), tuple(range(len(kernel_shape(leaf)))))
    inputs = [multiply(leaf) if is_stack(leaf) else leaf for leaf in leaves]
    inputs = [hold(leaf) if is_factors(leaf) else leaf for leaf in inputs]
    outputs, multiplied_out = _evaluate(closed, inputs)
    arrays = map(_dense, outputs)
    merged = structure.unflatten(next(arrays) if leaf is None else leaf for leaf in others)
    return merged, multiplied_out or any(map(is_stack, leaves))
