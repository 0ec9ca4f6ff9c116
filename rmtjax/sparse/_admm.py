"""Trains towards a constraint by the alternating direction method of multipliers (ADMM)."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from rmtjax._axes import KernelAxes, MatrixView
from rmtjax._modes import in_usual_modes
from rmtjax._types import Axes, Where
from rmtjax.planning import check_count, is_abstract, map_kernels, warn_if_idle
from rmtjax.sparse.projections import find_projected, project_kernel, Projection
from rmtjax.spectra import lift
from rmtjax.training import (
    by_field,
    is_due,
    is_placeholder,
    map_alike,
    moving_kernels,
    register_state,
    root_mean_square,
)


class AdmmState(NamedTuple):
    r"""State of `admm`, of arrays.

    Attributes:
      step: Number of updates seen.
      targets: Path to $G$, the projected kernel; 0 before the first projection.
      multipliers: Path to $Y$, the Lagrange multipliers of $W = G$.
      primal: Path to $\|W - G\|_F / \|W\|_F$ at the last projection; 1 before.
      dual: Path to $\|G - G_{before}\|_F / \|G\|_F$ at the last projection; 1 before.
      projected: Path to whether the kernel was projected.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> admm = rmtjax.admm(lambda kernel: jnp.sign(kernel), every=20)
      >>> state = admm.init({"kernel": jnp.ones((8, 4))})
      >>> int(state.step), float(state.primal["kernel"])
      (0, 1.0)
    """

    step: Int[Array, ""]
    targets: dict[str, Float[Array, "..."]]
    multipliers: dict[str, Float[Array, "..."]]
    primal: dict[str, Float[Array, ""]]
    dual: dict[str, Float[Array, ""]]
    projected: dict[str, Bool[Array, ""]]


class _Dual(NamedTuple):
    """State of one kernel, in the order of the fields of `AdmmState`."""

    target: Float[Array, "..."]
    multiplier: Float[Array, "..."]
    primal: Float[Array, ""]
    dual: Float[Array, ""]
    projected: Bool[Array, ""]


def _fresh(kernel) -> _Dual:
    """Returns the state of a kernel before the first projection."""
    kernel = lift(jnp.asarray(kernel))
    # One array each: a buffer that appears twice in a state cannot be donated to `jit`.
    zeros, one = partial(jnp.zeros_like, kernel), partial(jnp.ones, (), kernel.dtype)
    return _Dual(zeros(), zeros(), one(), one(), jnp.zeros((), bool))


def _ratio(part: Array, whole: Array) -> Float[Array, ""]:
    """Returns the norm of a part over that of the whole; 0 for two arrays of zeros."""
    norm = root_mean_square(whole)
    return root_mean_square(part) / jnp.where(norm > 0, norm, 1)


def _renew(arrays, axes: tuple[KernelAxes, Projection], rho) -> _Dual:
    """Returns the state of a kernel after a projection."""
    kernel, old = arrays
    view = lambda leaf: MatrixView("", leaf, axes[0])
    wide = kernel.astype(old.target.dtype)
    target = project_kernel(view(wide + old.multiplier / rho), axes[1]).astype(wide.dtype)
    # Before the first projection there was no target, of which the multiplier could be.
    multiplier = jnp.where(old.projected, old.multiplier + rho * (wide - target), 0)
    ratios = _ratio(wide - target, wide), _ratio(target - old.target, target)
    return _Dual(target, multiplier, *ratios, jnp.ones((), bool))


# Compiled also for users who call `update` outside `jit`. Projections are known by their identity.
@partial(jax.jit, static_argnames="axes")
def _advance(due, active, kernels, updates, duals, rho, *, axes):
    """Returns updates with the gradient of the constraint, and states: renewed if it is due."""
    renew = lambda duals: map_alike(
        partial(_renew, rho=rho), list(zip(kernels, duals, strict=True)), axes
    )
    duals = jax.lax.cond(due, renew, lambda duals: duals, duals)

    def pull(kernel, update, dual: _Dual):
        gap = kernel.astype(dual.target.dtype) - dual.target
        gradient = jnp.where(active & dual.projected, dual.multiplier + rho * gap, 0)
        return update + gradient.astype(update.dtype)

    return list(map(pull, kernels, updates, duals)), duals


def admm(
    projection: Projection | Mapping[str, Projection],
    *,
    rho: ArrayLike | Callable[[Any], ArrayLike] = 1e-2,
    every: Int[ArrayLike, ""] = 100,
    start: Int[ArrayLike, ""] = 1,
    where: Where | None = None,
    axes: Axes | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Pulls kernels towards a constraint while they train. Put it first in a chain.

    It minimises the loss $f(W)$ subject to $W = G$ with $G$ in a set that has a projection $\Pi$,
    such as grids of few bits or matrices of rank r. To the gradient of the loss it adds that of the
    augmented Lagrangian,

    $$\nabla f(W) + Y + \rho\,(W - G).$$

    Every `every` steps it renews the target and the multipliers:
    $G = \Pi(W + Y / \rho)$ and $Y \leftarrow Y + \rho\,(W - G)$. At the first projection $Y = 0$
    and $G = \Pi(W)$. After training, `rmtjax.projections.project` makes $W = \Pi(W)$ exactly.

    It needs gradients, so it goes before the optimizer: `optax.chain(admm(...), optax.sgd(0.1))`.
    Behind it, where updates have the opposite sign, it pushes kernels away from their targets.
    `primal/PATH` in `rmtjax.metrics` then grows from one projection to the next. Adam rescales the
    sum of both gradients, so that the pull is then not weaker for a small `rho`.

    Args:
      projection: A function of a matrix (inputs, outputs) that returns the nearest one allowed, as
        those of `rmtjax.projections`; or such functions by path.
      rho: $\rho$, above 0: weight of the squared distance. Or an optax schedule of it, called with
        the number of steps before this one. Grids and ranks are not convex, so the method converges
        only if $\rho$ is not small beside the curvature of the loss: if `primal/PATH` rises and
        falls, raise it. Large values stay near the first projection. The pull must be stable:
        $\rho$ times the learning rate of SGD well below 2.
      every: Steps between projections, at least 1.
      start: Step of the first projection, at least 1. Before it, gradients pass unchanged.
      where, axes: As in `rmtjax.plan`. Each matrix of a stack has its own projection. `Factors`
        and leaves that are no matrices pass unchanged.

    Returns:
      A transformation with an `AdmmState`, which has two copies of each kernel. It takes any tree
      that optax takes, needs `params` in `update` and ignores extra arguments. It works inside
      `masked`, `partition`, `MultiSteps` and `inject_hyperparams` (with callables as
      `static_args`).

    Warns:
      UserWarning: `init` finds no kernel that can be projected.

    Raises:
      ValueError, TypeError: A number is out of range, `projection` is not a function, or `update`
        was called without `params` or with a kernel that `init` did not get.

    Examples:
      >>> import functools, jax, jax.numpy as jnp, optax, rmtjax
      >>> ternary = functools.partial(rmtjax.projections.project_bits, bits=2)
      >>> optimizer = optax.chain(rmtjax.admm(ternary, rho=1.0, every=20), optax.sgd(0.1))
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> state, wanted = optimizer.init(params), params["kernel"]
      >>> for _ in range(400):
      ...     gradients = {"kernel": params["kernel"] - wanted}
      ...     updates, state = optimizer.update(gradients, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(jnp.unique(jnp.abs(params["kernel"]).round(2)))  # nearly on the grid
      [0.   1.42]

    References:
      Xu, Chen, Hu, Yu, Liu and Meng (2021), https://arxiv.org/abs/2111.14836. Boyd, Parikh, Chu,
      Peleato and Eckstein (2011), https://doi.org/10.1561/2200000016, for the method.
    """
    check_count("every", every)
    check_count("start", start)
    given: Any = 1.0 if callable(rho) or isinstance(rho, jax.Array) else rho
    if not 0 < given < math.inf:
        raise ValueError(f"`rho` must be above 0 and finite, got {rho}.")
    find_views = lambda params: find_projected(params, projection, where, axes)

    @in_usual_modes
    def init_fn(params: PyTree) -> AdmmState:
        if is_abstract(params):
            return jax.eval_shape(init_fn, params)
        step = jnp.zeros((), jnp.int32)
        if is_placeholder(params):
            return AdmmState._make([step] * len(AdmmState._fields))
        found = find_views(params)
        warn_if_idle("admm", found, params, where, axes)
        duals = {path: _fresh(view.leaf) for path, (view, _) in found.items()}
        return AdmmState(step, *by_field(_Dual, duals))

    @in_usual_modes
    def update_fn(updates, state, params: Any = None, **extra_args):
        del extra_args
        found, chosen = moving_kernels(updates, params, find_views, state.targets)
        step = jnp.asarray(optax.safe_increment(state.step))
        weight = rho(state.step) if callable(rho) else rho
        kernels = [jnp.asarray(view.leaf) for view, _ in found.values()]
        kinds = tuple((view.axes, function) for view, function in found.values())
        old = [_Dual(*(field[path] for field in state[1:])) for path in found]
        moves, new = _advance(
            is_due(step, every, start),
            step >= start,
            kernels,
            list(chosen.values()),
            old,
            jnp.asarray(weight, jnp.float32),
            axes=kinds,
        )
        # Kernels without an update keep their state.
        fields = by_field(_Dual, dict(zip(found, new, strict=True)))
        fields = [old | new for old, new in zip(state[1:], fields, strict=True)]
        moved = dict(zip(found, moves, strict=True))
        return map_kernels(lambda path, _: moved[path], updates, moved), AdmmState(step, *fields)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


register_state(AdmmState, lambda state: {"primal": state.primal, "dual": state.dual})
