"""Follows kernels through a traced function, and sums over the inputs of each product with one.

A function is traced to a jaxpr, JAX's list of primitive operations. The interpreter evaluates the
operations one by one and follows each kernel through casts, transposes, calls and loops. Where a
kernel is multiplied, it sums over the rows that it is multiplied with. So it sees any layer of any
API, also in `scan`, `vmap` and `remat`. A loop over a stack gives sums for each member of the
stack. A loop that uses one kernel again and again adds up its sums.

Sums over gradients come out of the same program, as gradients themselves: each product adds nothing
to its outputs, of which the derivative is defined to be the sums over the gradients that arrive.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal

from rmtjax._axes import KernelAxes
from rmtjax.models._convolutions import run_equation
from rmtjax.models._uses import RULES, Use, Value, View
from rmtjax.moments import sums_of_rows

# Calls whose program is evaluated in their place, and the names under which they hold it.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
_CALLS |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
_PROGRAMS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# They return their operand in another form: the same one for equal options. Layers cast and
# reshape their inputs, each for itself, and their inputs are still known to be the same.
_FORMS = {"convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim", "copy"}


def _moved(name: str, params, view: View | None) -> View | None:
    """Returns a kernel in another form; None if it is no longer known which axes it has."""
    if view is None or name in ("convert_element_type", "copy"):
        return view
    if name == "transpose":
        return view._replace(order=tuple(view.order[axis] for axis in params["permutation"]))
    return None


def _deeper(view: View | None, in_turn: bool) -> View | None:
    """Returns a kernel as a loop sees it: whole, or its members in turn along the first axis."""
    if view is None:
        return None
    taken, order = (view.order[0], view.order[1:]) if in_turn else (None, view.order)
    return View(view.path, order, (*view.levels, taken))


def _run(jaxpr, equation, operands: Sequence[Value]) -> list[Any]:
    """Evaluates one equation on the arrays of its operands."""
    return run_equation(jaxpr, equation, [value.array for value in operands])


class Tap(NamedTuple):
    """Zeros whose gradient is defined to be the sums over the gradients of a product's outputs.

    Attributes:
      axes: The batch axes of the kernel that the leading axes of the zeros stand for.
      zeros: A dictionary of the sums of a `Moment`, without its rows.
    """

    axes: tuple[int, ...]
    zeros: dict[str, Any]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _tap(outputs, zeros: dict[str, Any], arrange: Callable):
    del zeros, arrange
    return outputs


def _tap_backward(arrange: Callable, _, gradient):
    rows = arrange(gradient)
    sums = vars(sums_of_rows(rows.reshape(-1, *rows.shape[-2:])))
    batch = rows.shape[:-2]
    return gradient, {n: a.reshape(*batch, *a.shape[1:]) for n, a in sums.items() if n != "rows"}


_tap.defvjp(lambda outputs, zeros, arrange: (outputs, None), _tap_backward)


class _Interpreter:
    """Evaluates programs, and collects the uses of kernels in them."""

    def __init__(self, axes: Mapping[str, KernelAxes]):
        self.axes, self._fresh = axes, itertools.count()

    def value(self, array: Any, view: View | None = None) -> Value:
        """Returns a value that is not known to equal another one."""
        return Value(array, next(self._fresh), view)

    def evaluate(
        self, closed: ClosedJaxpr, inputs: Sequence[Value], taps: Mapping[str, Tap], uses: list[Use]
    ) -> list[Value]:
        """Evaluates a program, and appends the uses of kernels in it."""
        jaxpr = closed.jaxpr
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= zip(jaxpr.constvars, map(self.value, closed.consts), strict=True)
        read = lambda var: self.value(var.val) if isinstance(var, Literal) else known[var]
        for equation in jaxpr.eqns:
            operands = [read(var) for var in equation.invars]
            results = self._apply(jaxpr, equation, operands, taps, uses)
            known.update(zip(equation.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _apply(self, jaxpr, equation, operands, taps, uses: list[Use]) -> list[Value]:
        name, params, use = equation.primitive.name, equation.params, None
        if any(operand.view for operand in operands):
            if name in _CALLS:
                program = next(params[key] for key in _PROGRAMS if key in params)
                closed = program if hasattr(program, "consts") else ClosedJaxpr(program, ())
                return self.evaluate(closed, operands, taps, uses)
            if name == "scan":
                return self._scan(params, operands, taps, uses)
            use = RULES[name](self.axes, params, *operands) if name in RULES else None
            uses += [use] if use else []
        results = _run(jaxpr, equation, operands)
        if use and use.arrange and use.path in taps:
            results = [_tap(results[0], taps[use.path].zeros, use.arrange)]
        if name not in _FORMS:
            return list(map(self.value, results))
        key = name, str(params), operands[0].key
        return [Value(results[0], key, _moved(name, params, operands[0].view))]

    def _scan(self, params, operands: list[Value], taps, uses: list[Use]) -> list[Value]:
        """Evaluates a loop; sums of a kernel that it uses again and again are carried along."""
        closed, first, last = params["jaxpr"], params["num_consts"], params["num_carry"]
        last += first
        arrays = [operand.array for operand in operands]
        views = [_deeper(value.view, i >= last) for i, value in enumerate(operands)]
        views[first:last] = [None] * (last - first)  # a kernel that a loop may change
        in_turn: Any = {view.path: view.levels[-1] for view in views[last:] if view}
        moved = {
            path: _first_axis(taps[path], axis) for path, axis in in_turn.items() if path in taps
        }
        inner: list[Use] = []

        def step(state, slices):
            (carry, totals), (ours, tapped) = state, slices
            inputs = list(map(self.value, (*arrays[:first], *carry, *ours), views))
            inside = {**taps, **{p: Tap(moved[p].axes[1:], zeros) for p, zeros in tapped.items()}}
            inner.clear()
            outputs = [value.array for value in self.evaluate(closed, inputs, inside, inner)]
            kept, taken = (list(sums.values()) for sums in _by_level(inner))
            totals = kept if totals is None else jax.tree.map(jnp.add, totals, kept)
            return (outputs[: last - first], totals), (outputs[last - first :], taken)

        carry, xs = arrays[first:last], (arrays[last:], {p: tap.zeros for p, tap in moved.items()})
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)
        (_, totals), _ = jax.eval_shape(step, (carry, None), one)
        zeros = jax.tree.map(lambda total: jnp.zeros(total.shape, total.dtype), totals)
        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        (carry, totals), (ys, taken) = lax.scan(step, (carry, zeros), xs, **options)
        uses += self._after(inner, totals, taken)
        return list(map(self.value, (*carry, *ys)))

    def _after(self, inner: list[Use], totals: list, in_turn: list) -> list[Use]:
        """Returns the uses of kernels in a loop as its surroundings see them."""
        loop, (kept, taken) = next(self._fresh), _by_level(inner)
        sums = dict(zip(kept, totals, strict=True)), dict(zip(taken, in_turn, strict=True))
        outer = []
        for use in inner:
            *levels, level = use.levels
            stacked = level is not None
            axes = (level, *use.axes) if stacked else use.axes
            key, total = (loop, stacked, use.key), sums[stacked][use.key]
            outer.append(use._replace(key=key, levels=(*levels,), axes=axes, sums=total))
        return outer


def _first_axis(tap: Tap, axis: int) -> Tap:
    """Returns a tap whose zeros have the axis of a kernel first over which a loop goes."""
    place = tap.axes.index(axis)
    axes = axis, *tap.axes[:place], *tap.axes[place + 1 :]
    return Tap(axes, jax.tree.map(lambda zeros: jnp.moveaxis(zeros, place, 0), tap.zeros))


def _by_level(uses: Sequence[Use]) -> tuple[dict, dict]:
    """Returns the sums of a loop by key: those of all its steps, and those of each step."""
    kept = {use.key: use.sums for use in uses if use.levels[-1] is None}
    return kept, {use.key: use.sums for use in uses if use.levels[-1] is not None}


def find_uses(
    function: Callable,
    arguments: Sequence[Any],
    views: Sequence[View | None],
    axes: Mapping[str, KernelAxes],
    taps: Mapping[str, Tap] | None = None,
) -> tuple[list[Use], list[Any]]:
    """Returns the uses of kernels in a call of a function, and the arrays that it returns.

    Args:
      function: Of trees of arrays. It may also return values that are not arrays.
      arguments: Its arguments.
      views: For each leaf of the arguments, the kernel that it is.
      axes: The axes of each kernel by path.
      taps: By path, where the gradients of the outputs of a kernel's products are summed.
    """

    def run(*arguments):
        leaves = jax.tree.leaves(function(*arguments))
        return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    closed = jax.make_jaxpr(run)(*arguments)
    found, uses = _Interpreter(axes), []
    inputs = list(map(found.value, jax.tree.leaves(arguments), views))
    outputs = found.evaluate(closed, inputs, taps or {}, uses)
    return uses, [output.array for output in outputs]
