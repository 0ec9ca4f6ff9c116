"""Applies moments of the inputs to kernels: losses of outputs, and repaired factors.

`refit` finds factors after a cut by least squares on the outputs of the dense kernel.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rmtjax._axes import (
    Factors,
    kernel_shape,
    KernelAxes,
    MatrixView,
    Views,
)
from rmtjax._sharding import place_like
from rmtjax._types import Axes, check_type
from rmtjax.moments import Moments, Second, shrink
from rmtjax.planning._kernels import check_tree, find_kernels, leaves_by_path, map_kernels
from rmtjax.spectra import multiply, output_losses, OutputLosses


def along(moments: Moments, view: MatrixView) -> MatrixView:
    """Returns a kernel along the axes on which rows met it: as it is read, or turned.

    A model may multiply by the transpose of a kernel, as Torch does. Its spectrum is the same.
    """
    turned = KernelAxes(view.axes.outputs, view.axes.inputs, view.axes.batch)
    met = dict(moments.axes).get(view.path)
    return replace(view, axes=turned) if met == turned and not view.is_factored else view


def turn(factors: Factors, axes: KernelAxes) -> Factors:
    """Returns the factors of the transpose; those of its transpose are these again."""
    stack = len(axes.batch)
    return Factors(
        jnp.moveaxis(jnp.asarray(factors.right), stack, -1),
        jnp.moveaxis(jnp.asarray(factors.left), -1, stack),
    )


def in_order(axes: KernelAxes) -> KernelAxes:
    """Returns the axes that the product of factors has: batch, input and output axes in order."""
    first, last = len(axes.batch), len(axes.batch) + len(axes.inputs)
    ends = range(first, last), range(last, len(axes.order)), range(first)
    return KernelAxes(*map(tuple, ends))


def bias_of(view: MatrixView, leaves: Mapping[str, Any]) -> str | None:
    """Returns the path of the bias beside a kernel; None if there is none of its outputs."""
    parent, slash, _ = view.path.rpartition("/")
    path = f"{parent}{slash}bias"
    shape = tuple(view.shape[axis] for axis in (*view.axes.batch, *view.axes.outputs))
    return path if path in leaves and kernel_shape(leaves[path]) == shape else None


def second_of(moments: Moments, view: MatrixView, leaves: Mapping[str, Any]) -> Second:
    """Returns the second moments of the inputs of a kernel in a tree with these leaves.

    They are centred only if there is a bias to correct. Raises ValueError for other inputs.
    """
    moment, met = moments[view.path], dict(moments.axes).get(view.path)
    alike = met is not None and len(met.order) == len(view.axes.order)
    # A square kernel fits both ways.
    if met is not None and alike and met.inputs != view.axes.inputs:
        raise ValueError(
            f"`moments` met {view.path!r} along its axes {met.inputs}, and it is read with inputs "
            f"along {view.axes.inputs}: give the `axes` that the moments were collected with."
        )
    if moment.size != view.rows:
        raise ValueError(
            f"`moments` is of another model: it has {moment.size} inputs for {view.path!r}, whose "
            f"kernel of shape {view.shape} has {view.rows}. Collect the moments with this model, "
            "or give `axes`."
        )
    if len(moment.total) not in (1, view.stack):
        raise ValueError(
            f"`moments` must have one moment for each matrix of {view.path!r}, {view.stack}, or "
            f"one for all, got {len(moment.total)}. Collect the moments with the same `axes`."
        )
    second = moments.second(view.path, centred=bias_of(view, leaves) is not None)
    both = second.transposed
    if both is not None and both.exact.shape[-1] != view.columns:
        raise ValueError(
            f"`moments` is of another model: the rows that it has for the transpose of "
            f"{view.path!r} have {both.exact.shape[-1]} entries, and the kernel of shape "
            f"{view.shape} has {view.columns} outputs. Collect the moments with this model."
        )
    if not np.isfinite(second.exact).all():
        raise ValueError(
            f"`moments` is not finite for {view.path!r}: collect the moments anew, or leave the "
            "kernel out with `where`."
        )
    return second


def all_losses(
    views: Views, moments: Moments | None, leaves: Mapping[str, Any]
) -> dict[str, OutputLosses]:
    """Returns what cuts of each rank do to the outputs of the kernels that have moments."""
    losses = {}
    for path, view in views.items():
        if moments is not None and path in moments and not view.in_parts:
            met = along(moments, view)
            losses[path] = output_losses(met, second_of(moments, met, leaves))
    return losses


def _solve(smooth: np.ndarray, left: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Returns the right factor that is nearest in outputs, for a left one."""
    weighted = smooth[:, None] * left if smooth.ndim == 1 else smooth @ left
    # Directions without inputs, or that two columns share, have no say: no inverse is taken.
    return np.linalg.lstsq(left.T @ weighted, weighted.T @ dense, rcond=1e-12)[0]


def _refit(view: MatrixView, factors: Factors, second) -> tuple[np.ndarray, np.ndarray]:
    """Returns the right factors of a stack, and what the change adds to the bias."""
    thin = MatrixView(view.path, factors, in_order(view.axes))
    lefts = np.asarray(thin.matrices().left, np.float64)
    whole = view.matrices() if not view.is_factored else multiply(view.matrices())
    dense, smooth = np.asarray(whole, np.float64), shrink(second)
    place = lambda index: index % len(smooth)
    pairs = enumerate(zip(lefts, dense, strict=True))
    rights = np.stack([_solve(smooth[place(i)], left, matrix) for i, (left, matrix) in pairs])
    if second.mean is None:
        return rights, np.zeros((view.stack, view.columns))
    mean = np.broadcast_to(second.mean, (view.stack, view.rows))
    return rights, np.einsum("bi,bij->bj", mean, dense - lefts @ rights)


def refit(
    params: PyTree, factored: PyTree, moments: Moments, *, axes: Axes | None = None
) -> PyTree:
    r"""Repairs the right factors of a factorized tree, and its biases, by least squares.

    $R = \operatorname{argmin}_R E\,|x W - x L R|^2 = (L^T C L)^+ L^T C W$ for the left factor L,
    layer by layer, from moments alone. With `moments.with_options(centred=True)` a bias takes up
    what is left of the mean. Factors that were cut by output with the same moments are already the
    best for their left factors. So it repairs factors that were cut by weights, trained with other
    data, or rounded.

    Args:
      params: The tree before the cut.
      factored: The tree after it, with `Factors` in the place of some kernels.
      moments: Of the inputs of the kernels.
      axes: As in `rmtjax.plan`; needed where `params` has stacks.

    Returns:
      The factored tree with other right factors, in their dtypes; other left factors of kernels by
      whose transpose the model multiplies. Kernels without factors or without moments stay as they
      are, and so do those that the model uses both ways.

    Raises:
      ValueError, TypeError: The trees or the moments do not fit each other.

    Examples:
      >>> import flax.linen as nn, jax, rmtjax
      >>> module, x = nn.Dense(60), jax.random.normal(jax.random.key(0), (500, 80)).cumsum(1)
      >>> params = module.init(jax.random.key(0), x)["params"]
      >>> moments = rmtjax.linen.moments(module, {"params": params}, [x])
      >>> thin = rmtjax.factorize(params, rmtjax.plan(params, budget=0.5))
      >>> again = rmtjax.refit(params, thin, moments)
      >>> change = lambda tree: rmtjax.certificate.output_changes(params, tree, moments)
      >>> bool(change(again)["kernel"].change < change(thin)["kernel"].change)
      True
    """
    check_tree(params)
    check_type("moments", moments, Moments, "Collect them with `rmtjax.linen.moments`.")
    old, new = leaves_by_path(params), leaves_by_path(factored)
    kernels = find_kernels(params, lambda path, leaf: path in moments, axes)
    changed: dict[str, Any] = {}
    for path, view in kernels.items():
        leaf = new.get(path)
        if not isinstance(leaf, Factors) or not isinstance(view, MatrixView):
            continue
        if path in moments.transposed:  # what is best for one use is not for the other
            continue
        if kernel_shape(leaf) != view.shape or view.axes.order != tuple(range(len(view.shape))):
            raise ValueError(
                f"`factored` must have factors of shape {view.shape} for {path!r}, got "
                f"{kernel_shape(leaf)}: give the tree that was made of `params`."
            )
        met = along(moments, view)
        factors = leaf if met is view else turn(leaf, view.axes)
        rights, shift = _refit(met, factors, second_of(moments, met, old))
        right = jnp.asarray(rights.reshape(factors.right.shape)).astype(leaf.right.dtype)
        again = Factors(factors.left, right)
        again = again if met is view else turn(again, view.axes)
        changed[path] = Factors(*map(place_like, again, leaf))
        bias = bias_of(met, old)
        if moments.centred and bias is not None and bias in new:
            value = np.asarray(old[bias], np.float64) + shift.reshape(np.shape(old[bias]))
            value = jnp.asarray(value).astype(jnp.asarray(new[bias]).dtype)
            changed[bias] = place_like(value, new[bias])
    return map_kernels(lambda path, leaf: changed[path], factored, changed)
