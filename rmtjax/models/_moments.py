"""Collects the moments of the inputs of kernels over batches, for models of any API."""

from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import replace
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rmtjax._axes import KernelAxes, MatrixView
from rmtjax._progress import Step
from rmtjax._sharding import fetch
from rmtjax.models._products import find_uses, Tap
from rmtjax.models._uses import Use, View
from rmtjax.moments import Moment, Moments

# A kernel with more outputs has no weights for them: the matrix of these would be large.
_MOST = 8192
Names = tuple[tuple[str, str], ...]  # pairs of the path of a kernel and the name of its group


def _input_axes(view: MatrixView) -> KernelAxes:
    """Returns the axes of what meets the inputs: the kernel, or its left factor."""
    if view.in_parts or not view.is_factored:
        return view.axes
    return view.axes._replace(outputs=(view.leaf.left.ndim - 1,))


def _traced_as(view: MatrixView) -> list[View | None]:
    """Returns what the interpreter follows of each array of a leaf: of factors, the left one."""
    if view.in_parts:  # no one array of it meets the inputs
        return [None] * len(jax.tree.leaves(view.leaf))
    if view.is_factored:
        return [View(view.path, tuple(range(view.leaf.left.ndim))), None]
    return [View(view.path, tuple(range(len(view.shape))))]


def _stacked(use: Use, batch: tuple[int, ...]) -> Moment:
    """Returns the sums of a use with one leading axis, in the order of the batch axes."""
    count = len(use.axes)
    # Without axes, the members of a stack all have the same rows, which are summed once.
    order = [use.axes.index(axis) for axis in batch] if count else []

    def stack(array):
        moved = jnp.transpose(array, (*order, *range(count, array.ndim)))
        return moved.reshape(-1, *array.shape[count:])

    return jax.tree.map(stack, use.sums)


def _by_path(uses: list[Use], side: str) -> dict[str, list[Use]]:
    """Returns the uses of each kernel that rows meet on a side."""
    found: dict[str, list[Use]] = {}
    for use in uses:
        if use.side == side:
            found.setdefault(use.path, []).append(use)
    return dict(sorted(found.items()))


def _total(uses: list[Use], batch: tuple[int, ...]) -> Moment:
    first, *others = (_stacked(use, batch) for use in uses)
    return sum(others, first)


def _group(uses: list[Use], views: Mapping[str, MatrixView]):
    """Returns the sums by group, those over rows of the transpose, and the group of each kernel.

    Kernels of equal inputs make a group.
    """
    inputs, outputs = (_by_path(uses, side) for side in ("inputs", "outputs"))
    total = lambda path, found: _total(found, views[path].axes.batch)
    # The one factor of a thin kernel that is followed does not meet the rows of the transpose.
    lost = {path for path in outputs if path not in inputs or views[path].is_factored}
    owners, groups, names = {}, {}, []
    for path, found in inputs.items():
        if path in lost:
            continue
        owner = owners.setdefault(tuple((use.key, use.axes) for use in found), path)
        if owner == path:
            groups[path] = total(path, found)
        names.append((path, owner))
    transposed = {path: total(path, found) for path, found in outputs.items() if path not in lost}
    return groups, transposed, tuple(names)


def _check_finite(state: Mapping[str, tuple[Any, Any]], place: int) -> None:
    for path, (_, finite) in state.items():
        if not finite:
            raise ValueError(
                f"`batches` makes inputs of {path!r} that are not finite, in batch {place}. Check "
                "the batch and the parameters, or leave the kernel out with `where`."
            )


def _check_traced(traced: list[Names], views: Mapping[str, MatrixView]) -> None:
    if not traced:
        raise ValueError("`batches` must have at least one batch, got none.")
    if not traced[0]:
        some = ", ".join(map(repr, list(views)[:3])) or "none are chosen"
        raise ValueError(
            f"`batches` meets none of the kernels ({some}) in a product. Choose kernels of layers "
            "that the model calls with `where`, and give their `axes`."
        )
    if len(set(traced)) > 1:
        path = min(set(traced[0]) ^ set(traced[-1]))[0]
        raise ValueError(
            f"`batches` uses {path!r} in another way in some batch. Collect the moments of each "
            "kind of batch alone, and add them up with `+`."
        )


def _taps(views: Mapping[str, MatrixView]) -> dict[str, Tap]:
    """Returns zeros by kernel, whose gradients are the sums over those of the kernel's outputs."""
    taps = {}
    for path, view in views.items():
        batch = [view.shape[axis] for axis in view.axes.batch]
        shapes: Any = {"total": [view.columns], "second": [view.columns] * 2}
        shapes |= {"third": [view.columns], "fourth": []}
        # The left factor of a kernel has the rank for outputs.
        if not view.is_factored and view.columns <= _MOST:
            zeros = {name: jnp.zeros((*batch, *shape)) for name, shape in shapes.items()}
            taps[path] = Tap(view.axes.batch, zeros)
    return taps


def _along_random(key: Any, outputs: list[Any]) -> Any:
    """Returns the inner product of outputs with standard normal draws, if they have derivatives."""
    draws = zip(jax.random.split(key, max(len(outputs), 1)), outputs, strict=False)
    parts = [
        jnp.sum(jax.random.normal(key, array.shape, jnp.float32) * array)
        for key, array in draws
        if jnp.issubdtype(array.dtype, jnp.floating)
    ]
    return sum(parts, jnp.zeros(()))


def _to_moments(sums: dict[str, dict], rows: Mapping[str, Any], names: Names) -> dict[str, Moment]:
    """Returns the sums over gradients by path, for the kernels that have moments."""
    found = {}
    for path, owner in names:
        if path in sums:
            stack = len(np.shape(sums[path]["fourth"]))
            flat = {n: np.reshape(a, (-1, *np.shape(a)[stack:])) for n, a in sums[path].items()}
            found[path] = Moment(rows[owner], **flat)
    return found


class _Program:
    """One compiled program for each shape of a batch, which adds its sums to totals.

    Attributes:
      views: The kernels by path.
      traced: The kernels with moments and their groups, of each program that was traced.
      turned: The kernels that rows met on their output axes alone.
    """

    def __init__(self, function: Callable, views: Mapping[str, MatrixView]):
        self.function, self.views = function, views
        self.axes = {path: _input_axes(view) for path, view in views.items()}
        self.traced: list[Names] = []
        self.turned: set[str] = set()
        self.add = jax.jit(self._add, donate_argnums=0)  # the sums are updated in place

    def met(self, key, *arguments) -> tuple["_Program", PyTree]:
        """Returns the program of kernels along the axes on which rows meet them, and no sums yet.

        Without these the first batch would compile a program of its own.
        """
        sums = jax.eval_shape(self._sums, key, *arguments)
        if not self.turned:
            return self, jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), sums)
        turn = lambda axes: KernelAxes(axes.outputs, axes.inputs, axes.batch)
        views = {
            path: replace(view, axes=turn(view.axes)) if path in self.turned else view
            for path, view in self.views.items()
        }
        return _Program(self.function, views).met(key, *arguments)

    def _run(self, taps, arguments):
        known = [view for one in self.views.values() for view in _traced_as(one)]
        others = [None] * (len(jax.tree.leaves(arguments)) - len(known))
        uses, outputs = find_uses(self.function, arguments, [*known, *others], self.axes, taps)
        sides = {path: {use.side for use in uses if use.path == path} for path in self.views}
        # The one factor of a thin kernel that is followed has the rank for outputs.
        dense = lambda path: not self.views[path].is_factored
        self.turned = {p for p, found in sides.items() if found == {"outputs"} and dense(p)}
        groups, transposed, names = _group(uses, self.views)
        self.traced.append(names)
        return (groups, transposed), outputs

    def _with_gradients(self, key, arguments):
        taps = _taps(self.views)

        def project(zeros):
            tapped = {path: tap._replace(zeros=zeros[path]) for path, tap in taps.items()}
            sums, outputs = self._run(tapped, arguments)
            return _along_random(key, outputs), sums

        zeros = {path: tap.zeros for path, tap in taps.items()}
        return jax.grad(project, has_aux=True)(zeros)[::-1]

    def _sums(self, key, *arguments):
        """Returns the sums over the rows of a batch, of the transpose; and those over gradients."""
        if key is None:
            return self._run({}, arguments)[0], {}
        return self._with_gradients(key, arguments)

    def _add(self, totals, key, *arguments):
        sums = (groups, transposed), _ = self._sums(key, *arguments)
        finite = lambda moment: jnp.isfinite(moment.fourth).all()
        count = lambda part: {name: (one.rows, finite(one)) for name, one in part.items()}
        state = count(groups), count(transposed)
        return jax.tree.map(jnp.add, totals, sums), state


def _check_known(tree: PyTree) -> None:
    """Raises TypeError for values that are not known yet."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            "`moments` needs arrays with values, which it sums over batches: collect them outside "
            "`jit`, `grad` and `vmap`. It compiles the model itself."
        )


def collect(
    function: Callable[[Mapping[str, Any], PyTree, PyTree], Any],
    views: Mapping[str, MatrixView],
    rest: PyTree,
    batches: Iterable[PyTree],
    progress: Step,
    key: Any = None,
) -> Moments:
    """Returns the moments of the inputs of kernels, summed over batches.

    Kernels that rows meet on their output axes alone, as weights of Torch in `x @ weight.T`, have
    the moments of these rows. The axes of the moments say so.

    Args:
      function: `function(leaves, rest, batch)` calls the model. Its result is not used.
      views: The kernels by path, whose leaves are given to the function.
      rest: What else the function needs, as a tree of arrays.
      batches: Trees of arrays. A second shape compiles a second program.
      progress, key: As in `rmtjax.linen.moments`.
    """
    # In the order in which JAX flattens a dictionary.
    program = _Program(function, dict(sorted(views.items())))
    leaves = {path: view.leaf for path, view in program.views.items()}
    totals, count = None, len(batches) if isinstance(batches, Sized) else -1
    rows: tuple[dict[str, Any], ...] = ({}, {})
    waiting = None
    for place, batch in enumerate(batches):
        progress(place, count, "moments")
        _check_known((leaves, rest, batch))
        draw = None if key is None else jax.random.fold_in(key, place)
        if place == 0:
            program, totals = program.met(draw, leaves, rest, batch)
        totals, state = program.add(totals, draw, leaves, rest, batch)
        _check_known(state)
        _check_traced(program.traced, views)
        # The state of the batch before is read while the device computes.
        rows = _read(rows, waiting)
        waiting = place, state
    _check_traced(program.traced, views)
    names = program.traced[0]
    rows, (sums, gradients) = _read(rows, waiting), fetch(totals)
    groups, transposed = (
        {name: replace(moment, rows=known[name]) for name, moment in part.items()}
        for part, known in zip(sums, rows, strict=True)
    )
    met = tuple((path, program.views[path].axes) for path, _ in names)
    gradients = {path: one for path, one in gradients.items() if path not in transposed}
    gradients = _to_moments(gradients, rows[0], names)
    return Moments(groups, gradients, names, axes=met, transposed=transposed)


def _read(rows: tuple[dict[str, Any], ...], waiting: tuple[int, Any] | None):
    """Returns the rows with those of a batch, counted by the host in 64 bits."""
    if waiting is None:
        return rows
    place, state = waiting[0], fetch(waiting[1])
    for part in state:
        _check_finite(part, place)
    add = lambda old, part: {
        name: old.get(name, 0) + np.asarray(more, np.int64) for name, (more, _) in part.items()
    }
    return tuple(map(add, rows, state))
