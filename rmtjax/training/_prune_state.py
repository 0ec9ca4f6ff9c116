"""The state of `prune_spectrum`: what it holds of each kernel by path, and of the loss."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from rmtjax._axes import KernelAxes, MatrixView, to_stack
from rmtjax._sharding import typed_sharding
from rmtjax._types import BulkFit, no_fit


class KernelState(NamedTuple):
    """State of one kernel, in the order of the fields of `PruneState`."""

    fit: BulkFit  # an entry for each matrix of a stack
    rank: Int[Array, ""]
    signal: Int[Array, ""]
    removed: Float[Array, ""]
    refused: Float[Array, ""]
    floor: Float[Array, "..."]  # an entry for each matrix of a stack
    cost: Float[Array, ""]
    norm: Float[Array, ""]
    previous: Int[Array, ""]
    landed: Bool[Array, ""]
    exponent: Int[Array, ""]
    reason: Int[Array, ""]
    taken: Float[Array, ""]


def by_field(kind: Any, states: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns states of kernels by path as dictionaries by path, one for each field of a kind."""
    return [{path: state[i] for path, state in states.items()} for i in range(len(kind._fields))]


class PruneState(NamedTuple):
    """State of `prune_spectrum`, of arrays.

    Attributes:
      step: Number of updates seen.
      fits: Path to the noise level that is carried. Before the first cut all is 0, and the distance
        1.
      ranks: Path to the rank after the last pruning; full before.
      signal: Path to the number of signal directions at the last pruning step; 0 before.
      removed: Path to the share of the squares that it has removed, in [0, 1).
      refused: Path to the share beyond the rank that is left: it fades, or was not allowed to go.
      floors: Path to the eigenvalue down to which directions must stay, since a cut was held back;
        -1 if all must, 0 if the threshold decides.
      costs: Path to what the cut was predicted to add to the loss; 0 if that was not measured.
      norms: Path to the root mean square that the last step lands on; 0 if it did not cut.
      previous: Path to the rank before the last step.
      landed: Path to whether the last cut was found in the parameters.
      exponents: Path to the exponent of the power of two over which the noise level and the floor
        are those of the kernel; 0 unless its squares could leave the range of float32.
      reasons: Path to why the last pruning step left it alone, as `rmtjax.metrics` lists them; 0 if
        it did not.
      taken: Path to the share of the squares that all cuts together have taken, in [0, 1], but for
        what training has added beyond the rank since the last one.
      reference: The parameters one period ago, for `value_fn`; None without `max_rise`.
      fall: By how much `value_fn` fell over the period before the last step; the largest number of
        float32 before, or if it was not finite.
      curvatures: Path to the moments of gradients by which kernels fade; None without `fade`.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> state = rmtjax.prune_spectrum(every=100).init(params)
      >>> int(state.step), state.ranks["kernel"].tolist()
      (0, 60)
    """

    step: Int[Array, ""]
    fits: dict[str, BulkFit]
    ranks: dict[str, Int[Array, ""]]
    signal: dict[str, Int[Array, ""]]
    removed: dict[str, Float[Array, ""]]
    refused: dict[str, Float[Array, ""]]
    floors: dict[str, Float[Array, "..."]]
    costs: dict[str, Float[Array, ""]]
    norms: dict[str, Float[Array, ""]]
    previous: dict[str, Int[Array, ""]]
    landed: dict[str, Bool[Array, ""]]
    exponents: dict[str, Int[Array, ""]]
    reasons: dict[str, Int[Array, ""]]
    taken: dict[str, Float[Array, ""]]
    reference: PyTree = None
    fall: PyTree = None
    curvatures: PyTree = None


# The fields of a state that have an entry for each kernel, in the order of `KernelState`.
FIELDS = PruneState._fields[1 : 1 + len(KernelState._fields)]


def unpruned(view: MatrixView) -> KernelState:
    """Returns the state of a kernel before the first step."""
    shape = (view.stack,) if view.axes.batch else ()
    dtype = jax.dtypes.canonicalize_dtype(jnp.promote_types(view.dtype, jnp.float32))
    # One array each: a buffer that appears twice in a state cannot be donated to `jit`.
    zeros = lambda shape=(): jnp.zeros(shape, dtype)
    return KernelState(
        fit=no_fit(shape, dtype),
        rank=jnp.asarray(view.short, jnp.int32),
        signal=jnp.zeros((), jnp.int32),
        removed=zeros(),
        refused=zeros(),
        floor=zeros(shape),
        cost=zeros(),
        norm=zeros(),
        previous=jnp.asarray(view.short, jnp.int32),
        landed=jnp.ones((), bool),
        exponent=jnp.zeros((), jnp.int32),
        reason=jnp.zeros((), jnp.int32),
        taken=zeros(),
    )


def root_mean_square(array: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns the root mean square, which never leaves the range of the entries."""
    scale = jnp.maximum(jnp.max(jnp.abs(array)), jnp.finfo(array.dtype).tiny)
    return scale * jnp.sqrt(jnp.mean(jnp.square(array / scale)))


def is_placeholder(params: PyTree) -> bool:
    """Returns True for the tree with which `optax.tree.map_params` asks for a state."""
    # It stands for any tree. optax maps a state by the structure that `init` returns for it, so
    # that a dictionary without kernels would not fit. The type is private; `optax.masked` uses it.
    return type(params).__name__ == "_ParamsPlaceholder"


def landing_norm(kernel: Float[Array, "..."], update: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns the root mean square of what an update lands on, as it is rounded there."""
    bits = jnp.finfo(kernel.dtype)
    # A cast alone may be left out by the compiler, which then keeps more bits than land.
    landed = lax.reduce_precision(kernel + update, bits.nexp, bits.nmant)
    return root_mean_square(landed.astype(jnp.promote_types(kernel.dtype, jnp.float32)))


def removed_share(s, matrices, rank) -> Float[Array, ""]:
    """Returns the share of the squares of a stack, or of its values, that a rank removes."""
    # Relative to the largest value no square overflows or underflows.
    scale = jnp.maximum(jnp.max(s), jnp.finfo(s.dtype).tiny)
    kept = jnp.where(jnp.arange(s.shape[-1]) < rank, s / scale, 0)
    total = jnp.sum(jnp.square(matrices / scale))
    # A kernel of zeros has no share, and must not have a gradient of NaN.
    return jnp.maximum(1 - jnp.sum(jnp.square(kept)) / jnp.where(total > 0, total, 1), 0)


def all_taken(before: Array, share: Array) -> Float[Array, ""]:
    """Returns the share of the squares that is gone, after one more cut."""
    return 1 - (1 - before) * (1 - jnp.clip(share, 0, 1))


def floor_under(last: Float[Array, " b"], matrices) -> Float[Array, " b"]:
    """Returns an eigenvalue below the singular values that stay, and above those that may come."""
    floor = jnp.square(last * 0.75) / max(matrices.shape[1:])
    return jnp.maximum(floor, jnp.finfo(floor.dtype).tiny)  # 0 would stand for none


@partial(jax.jit, static_argnames="axes")
def forget_lost(after_cut, kernels, states: list[KernelState], *, axes) -> list[KernelState]:
    """Returns states without cuts that another transform behind this one, or a wrapper, undid."""

    def check(kernel, state: KernelState, axes: KernelAxes) -> KernelState:
        known = state.norm > 0
        norm = root_mean_square(kernel.astype(state.norm.dtype))
        share = jnp.abs((norm / state.norm) ** 2 - 1)
        # A fiftieth of what was removed, over what is left; sums are rounded to some 1e-6.
        most = jnp.maximum(0.02 * state.removed / (1 - state.removed), 1e-5)
        lost = known & ~(share <= most)
        fresh = unpruned(MatrixView("", kernel, axes))
        # An earlier cut has landed: its noise level still holds.
        first = state.previous >= fresh.rank
        forget = lambda old, new: jnp.where(lost & first, new, old)
        return state._replace(
            fit=jax.tree.map(forget, state.fit, fresh.fit),
            rank=jnp.where(lost, state.previous, state.rank),
            floor=jnp.where(lost, fresh.floor, state.floor),
            landed=jnp.where(known, ~lost, state.landed),
            # Of later cuts it is not known what they took alone.
            taken=forget(state.taken, fresh.taken),
        )

    if any(typed_sharding(kernel) for kernel in kernels):
        return states  # sums over explicit axes of a mesh may wait for ever on CPU
    checked = lambda states: list(map(check, kernels, states, axes))
    return lax.cond(after_cut, checked, lambda states: states, states)


class Tall:
    """Turns a kernel and its state into tall matrices and back.

    So kernels of one size share a program, whatever their axes. On a mesh with explicit axes they
    stay as they are: the compiler decides on shardings inside alone.

    Attributes:
      axes: The axes of what `stack` returns.
      turned: Whether rows and columns change places.
    """

    def __init__(self, view: MatrixView):
        inputs, outputs, batch = view.axes
        explicit = typed_sharding(view.leaf) is not None
        self.turned = view.rows < view.columns and not explicit
        turned = KernelAxes(outputs, inputs, batch) if self.turned else view.axes
        self.axes = view.axes if explicit else KernelAxes((1,), (2,), (0,))
        self._view = None if explicit else MatrixView("", view.leaf, turned)

    def stack(self, array: Array) -> Any:
        """Returns an array with the axes of the kernel as tall matrices."""
        return array if self._view is None else to_stack(array, self._view.axes)

    def kernel(self, stack: Array) -> Array:
        """Returns tall matrices as an array with the axes of the kernel."""
        return stack if self._view is None else self._view.from_matrices(stack)

    def stacked(self, move: tuple[Array, KernelState]) -> tuple[Array, KernelState]:
        """Returns an update and a state of tall matrices."""
        update, state = move
        fit = jax.tree.map(jnp.ravel, state.fit)
        return self.stack(update), state._replace(fit=fit, floor=jnp.ravel(state.floor))

    def restored(self, move: tuple[Array, KernelState], state: KernelState):
        """Returns an update and a state of the kernel, whose state before gives the shapes."""
        like = lambda new, old: new.reshape(old.shape)
        return self.kernel(move[0]), jax.tree.map(like, move[1], state)
