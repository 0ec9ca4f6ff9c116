"""The state of `monitor`: what it has measured of each kernel, and what has become of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rmtjax._axes import MatrixView
from rmtjax.monitoring._look import Look, LookOptions, shapes_of


class KernelLook(NamedTuple):
    """Holds what `monitor` knows of a kernel, with an entry for each matrix of a stack.

    Attributes:
      columns: Name to the number of the last look; 0 before, and where a number does not exist.
      fitted: Whether the law has fitted at some look.
      left_law: Whether it has, and does not at the last.
      traps: Whether most random orders of the entries had a spike at the last look.
      spikes: Number of spikes at the last look.
      growing: Number of looks in a row at which the spikes have grown while the loss was flat.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> look = rmtjax.monitor(every=10, columns=["spikes"]).init(params).kernels["kernel"]
      >>> [*look.columns], bool(look.fitted)
      (['spikes'], False)
    """

    columns: dict[str, Array]
    fitted: Bool[Array, "*b"]
    left_law: Bool[Array, "*b"]
    traps: Bool[Array, "*b"]
    spikes: Int[Array, "*b"]
    growing: Int[Array, "*b"]


class MonitorState(NamedTuple):
    """State of `monitor`, of arrays.

    Attributes:
      step: Number of updates seen.
      looks: Number of looks so far.
      measured: Step of the last look; 0 before.
      kernels: Path to what is known of a kernel.
      total: Sum of the losses since the last look.
      counted: Number of these losses.
      loss: Mean of the losses of the period before the last look.
      periods: Number of periods that had a loss.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> state = rmtjax.monitor(every=10).init(params)
      >>> int(state.step), int(state.looks), [*state.kernels]
      (0, 0, ['kernel'])
    """

    step: Int[Array, ""]
    looks: Int[Array, ""]
    measured: Int[Array, ""]
    kernels: dict[str, KernelLook]
    total: Float[Array, ""]
    counted: Int[Array, ""]
    loss: Float[Array, ""]
    periods: Int[Array, ""]


def unseen(view: MatrixView, options: LookOptions) -> KernelLook:
    """Returns the state of a kernel before the first look."""
    kernel = jax.ShapeDtypeStruct(view.shape, jax.dtypes.canonicalize_dtype(view.dtype))
    found = jax.eval_shape(
        lambda kernel: shapes_of(kernel, axes=view.axes, options=options), kernel
    )
    shape = (view.stack,) if view.axes.batch else ()
    # One array each: a buffer that appears twice in a state cannot be donated to `jit`.
    columns = {name: jnp.zeros(shape, column.dtype) for name, column in found.columns.items()}
    no, none = (lambda: jnp.zeros(shape, bool)), (lambda: jnp.zeros(shape, jnp.int32))
    return KernelLook(columns, no(), no(), no(), none(), none())


def after_look(old: KernelLook, look: Look, flat: Any, first: Any) -> KernelLook:
    """Returns the state of a kernel after a look."""
    shape = old.fitted.shape
    columns, accepted, spikes, traps = jax.tree.map(lambda array: array.reshape(shape), look)
    columns = {name: columns[name].astype(old.columns[name].dtype) for name in old.columns}
    # At the first look there is no other to compare with.
    grows = (spikes > old.spikes) & flat & ~first
    return KernelLook(
        columns=columns,
        fitted=old.fitted | accepted,
        left_law=old.fitted & ~accepted,
        traps=traps,
        spikes=spikes,
        growing=jnp.where(grows, old.growing + 1, 0),
    )
