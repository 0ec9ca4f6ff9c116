"""Defines the protocol of a rank rule and turns the count of a rule into a rank."""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from rmtjax._types import BulkFit, Spectrum

Rank = Int[ArrayLike, ""] | None


@runtime_checkable
class RankRule(Protocol):
    """Describes a rank rule: a noise fit, a verdict on it, and a count of signal directions."""

    @property
    def needs_noise(self) -> bool:
        """Returns True if the count depends on a noise level."""
        ...

    def fit(self, spectrum: Spectrum, rank: Rank = None) -> BulkFit:
        """Estimates the noise."""
        ...

    def accepts(self, spectrum: Spectrum, fit: BulkFit) -> Bool[Array, ""]:
        """Returns True if the count can be trusted."""
        ...

    def __call__(self, spectrum: Spectrum, fit: BulkFit | None = None) -> Int[Array, ""]:
        """Counts the signal directions."""
        ...


def check_rule(rule: object) -> None:
    """Raises TypeError if `rule` is not a rank rule."""
    # A class has the same methods as its instances, so the protocol alone would accept it.
    if isinstance(rule, type) or not isinstance(rule, RankRule):
        raise TypeError(
            "`rule` must be a rank rule such as `rmtjax.ranks.bema()` or "
            f"`rmtjax.ranks.fixed(16)`, got {rule!r} ({type(rule).__name__})."
        )


def kept_rank(
    num_signal: Int[ArrayLike, ""],
    size: Int[ArrayLike, ""],
    keep: ArrayLike = 0.0,
    min_rank: Int[ArrayLike, ""] = 1,
) -> Int[Array, ""]:
    r"""Returns $r = K + \lfloor keep \cdot (p - K) \rfloor$, or `min_rank` if that is more.

    As in the papers, a kernel keeps its $K$ signal directions of $p$ = `size`, and the largest part
    of the rest.
    """
    share = jnp.asarray(keep, jnp.float32)  # A bfloat16 has no integers between 256 and 1,000.
    # In float32, 0.7 * 10 may round to just below 7. A thousandth of a rank forgives that.
    rest = jnp.floor(share * jnp.subtract(size, num_signal) + 1e-3).astype(jnp.int32)
    return jnp.clip(num_signal + rest, jnp.minimum(min_rank, size), size)
