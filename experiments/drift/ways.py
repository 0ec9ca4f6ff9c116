"""The ways to cut a kernel after an epoch, and what a look at it finds."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

import rmtjax
from rmtjax import shrinkage


@dataclass(frozen=True)
class Way:
    """A way to cut a kernel after an epoch.

    Attributes:
      noise: Whose fit gives the threshold: that of the `first` cut, which is carried; that of the
        kernel `now`; or that of the `change` since the last cut.
      cuts: What is cut: the `kernel`, or the `change` since the last cut.
      shrinks: Whether what is kept is shrunk, as is best for the Frobenius norm.
      caps: Whether the rank of the first cut is the largest that is allowed.
      holds: Spaces of the first cut, outside of which nothing is kept: of `inputs`, `outputs`, or
        of both.
      freezes: The factors, `left` or `right`, that stay as they are after the first cut. There is
        no other cut: the rest is trained in the factors.
      resets: Whether the momentum begins anew after a cut.
      optimal: Whether the threshold is that of Gavish and Donoho for the same noise.
    """

    noise: str = "first"
    cuts: str = "kernel"
    shrinks: bool = False
    caps: bool = False
    holds: tuple[str, ...] = ()
    freezes: str = ""
    resets: bool = False
    optimal: bool = False


NOTHING, CARRIED = "nothing", "carried noise"
WAYS: dict[str, Way | None] = {
    NOTHING: None,
    CARRIED: Way(),
    "noise of now": Way(noise="now"),
    "noise of a period": Way(noise="change"),
    "change cut": Way(noise="change", cuts="change"),
    "shrunk": Way(shrinks=True),
    "shrunk, noise of a period": Way(noise="change", shrinks=True),
    "rank capped": Way(caps=True),
    "optimal threshold": Way(optimal=True),
    "momentum reset": Way(resets=True),
    "inputs held": Way(holds=("inputs",)),
    "outputs held": Way(holds=("outputs",)),
    "both held": Way(holds=("inputs", "outputs")),
    "left factors frozen": Way(freezes="left"),
    "right factors frozen": Way(freezes="right"),
}


class Known(NamedTuple):
    """Holds what is remembered of a kernel.

    Attributes:
      landed: The kernel after the last cut.
      variance, threshold: Noise at the first cut.
      rank: After the first cut.
      was_cut: Whether there was one.
      first: The kernel after the first cut.
    """

    landed: jax.Array
    variance: jax.Array
    threshold: jax.Array
    rank: jax.Array
    was_cut: jax.Array
    first: jax.Array

    @classmethod
    def of(cls, kernel: jax.Array) -> "Known":
        """Returns what is known before the first cut."""
        zero = jnp.zeros(())
        whole, rank = jnp.copy(kernel), jnp.int32(min(kernel.shape))
        return cls(whole, zero, zero, rank, jnp.bool_(False), whole)


class Look(NamedTuple):
    """Tells what a kernel was like right before a cut; eigenvalues are over the threshold.

    Attributes:
      rank: Directions that are kept.
      new: Those of them whose row or column is less than half in the spaces of the last cut.
      newest: The largest eigenvalue of these; 0 if there are none.
      next: The largest eigenvalue that is removed.
      beyond: That of what training added outside both spaces of the last cut.
      first: Share of the squares that are kept within both spaces of the first cut.
    """

    rank: jax.Array
    new: jax.Array
    newest: jax.Array
    next: jax.Array
    beyond: jax.Array
    first: jax.Array


def svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the thin decomposition."""
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def spaces(kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns bases of the column and the row space of a kernel that was cut, with zeros behind."""
    u, s, vt = svd(kept)
    live = (s > 1e-5 * s[0])[None, :]
    return u * live, vt.T * live


def outside(matrix: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """Returns what of a matrix is outside a column space and outside a row space."""
    rest = matrix - u @ (u.T @ matrix)
    return rest - (rest @ v) @ v.T


def held(kernel: jax.Array, known: Known, way: Way) -> jax.Array:
    """Returns what of a kernel is within spaces of the first cut, if there was one."""
    inputs, outputs = spaces(known.first)
    lower = inputs @ (inputs.T @ kernel) if "inputs" in way.holds else kernel
    lower = (lower @ outputs) @ outputs.T if "outputs" in way.holds else lower
    return jnp.where(known.was_cut, lower, kernel)


def optimal(ratio: float) -> float:
    r"""Returns the threshold of Gavish and Donoho for known noise, as an eigenvalue of unit noise.

    It is $2 (\gamma + 1) + 8 \gamma / (\gamma + 1 + \sqrt{\gamma^2 + 14 \gamma + 1})$.
    """
    return 2 * (ratio + 1) + 8 * ratio / (ratio + 1 + (ratio**2 + 14 * ratio + 1) ** 0.5)


def noise_of(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the variance of the noise of a matrix, and the threshold of its eigenvalues."""
    fit = rmtjax.fit_bema(rmtjax.spectrum(matrix))
    return fit.variance, fit.threshold


@partial(jax.jit, static_argnames="way")
def cut(kernel: jax.Array, known: Known, way: Way) -> tuple[jax.Array, Known, jax.Array]:
    """Returns the kernel after a cut, what is to be remembered, and the threshold."""
    longer, ratio = max(kernel.shape), min(kernel.shape) / max(kernel.shape)
    now, change = noise_of(kernel), noise_of(kernel - known.landed)
    once_cut = lambda new: [jnp.where(known.was_cut, *pair) for pair in zip(new, now, strict=True)]
    first = once_cut((known.variance, known.threshold))
    variance, threshold = {"first": first, "now": now, "change": once_cut(change)}[way.noise]
    threshold = optimal(ratio) * variance if way.optimal else threshold
    base = jnp.where(known.was_cut, known.landed, 0) if way.cuts == "change" else 0.0
    u, s, vt = svd(kernel - base)
    count = jnp.sum(s**2 > threshold * longer)
    count = jnp.minimum(count, known.rank) if way.caps else count
    scale = jnp.sqrt(longer * variance)
    values = scale * shrinkage.frobenius(s / scale, ratio) if way.shrinks else s
    kept = jnp.where(jnp.arange(len(s)) < count, values, 0)
    lower = base + (u * kept[None, :]) @ vt
    lower = held(lower, known, way)
    # If nothing stands out, a first cut would destroy the network.
    goes = known.was_cut | (count > 0)
    rank = jnp.where(known.was_cut, known.rank, count).astype(jnp.int32)
    kept = jnp.where(known.was_cut, known.first, lower)
    after = Known(lower, first[0], first[1], rank, goes, kept)
    new = jax.tree.map(partial(jnp.where, goes), after, known)
    return jnp.where(goes, lower, kernel), new, threshold


@jax.jit
def look_at(kernel: jax.Array, known: Known, threshold: jax.Array) -> Look:
    """Returns what of a kernel is above a threshold, and what of it is new."""
    (u, s, vt), (left, right) = svd(kernel), spaces(known.landed)
    overlaps = jnp.minimum(*(jnp.sum(x**2, axis=0) for x in (left.T @ u, right.T @ vt.T)))
    over = lambda values: values**2 / (threshold * max(kernel.shape))
    kept = over(s) > 1
    new = kept & (overlaps < 0.5)
    lower = (u * jnp.where(kept, s, 0)[None, :]) @ vt
    first = spaces(known.first)
    return Look(
        kept.sum(),
        new.sum(),
        over(jnp.max(jnp.where(new, s, 0))),
        over(jnp.max(jnp.where(kept, 0, s))),
        over(svd(outside(kernel - known.landed, left, right))[1][0]),
        jnp.sum((first[0].T @ lower @ first[1]) ** 2) / jnp.sum(lower**2),
    )
