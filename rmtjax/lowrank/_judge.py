"""One kernel as matrices, and what a rank rule counts in their spectra."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from rmtjax._axes import factored_axes, is_factors, KernelAxes, MatrixView, native
from rmtjax._types import Spectrum
from rmtjax.noise import ranks


def kernel_view(name: str, kernel: Any, axes: KernelAxes | None) -> MatrixView:
    """Returns a kernel as matrices; raises an error for one that `axes` do not make a matrix."""
    if is_factors(kernel):
        return MatrixView("kernel", kernel, factored_axes(kernel))
    kernel = jnp.asarray(native(kernel))
    if axes is None and kernel.ndim != 2:
        raise ValueError(
            f"`{name}` needs `axes` for a kernel of shape {kernel.shape}: give a "
            "`rmtjax.KernelAxes` that names the axes of inputs and outputs."
        )
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise TypeError(f"`kernel` must be floating, got dtype {kernel.dtype}: cast it first.")
    if 0 in kernel.shape:
        raise ValueError(f"`kernel` must have entries, got shape {kernel.shape}.")
    return MatrixView("kernel", kernel, KernelAxes((0,), (1,)) if axes is None else axes)


def in_order(view: MatrixView) -> bool:
    """Returns True if parts can be stored: their axes are in the order batch, inputs, outputs."""
    return view.axes.order == tuple(range(len(view.shape))) and len(view.axes.batch) <= 1


# How a rule is mapped over a stack: its matrices have one aspect ratio.
EACH = Spectrum(eigenvalues=0, ratio=None)  # pyright: ignore[reportArgumentType]


@partial(jax.jit, static_argnames=("rule", "rank"))
def _fit_and_count(spectra: Spectrum, *, rule: ranks.RankRule, rank: int | None):
    fits = jax.vmap(partial(rule.fit, rank=rank), in_axes=(EACH,))(spectra)
    accepted = jax.vmap(rule.accepts, in_axes=(EACH, 0))(spectra, fits)
    return jax.vmap(rule, in_axes=(EACH, 0))(spectra, fits), accepted


def judge(
    rule: ranks.RankRule, spectra: Spectrum, rank: int | None = None
) -> tuple[Int[np.ndarray, " b"], Bool[np.ndarray, " b"]]:
    """Returns the signal directions of a stack of finite spectra, and whether the counts hold.

    `rank` is that of spectra that were truncated.
    """
    if rule.needs_noise:
        return jax.device_get(_fit_and_count(spectra, rule=rule, rank=rank))
    # Such a rule needs no fit, which compiles for long.
    counts = jax.device_get(jax.vmap(rule, in_axes=(EACH,))(spectra))
    return counts, np.ones_like(counts, bool)
