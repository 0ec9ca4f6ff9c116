"""Holds rank rules as numbers, so that one compiled program serves all of them."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from rmtjax._modes import in_usual_modes
from rmtjax._types import BulkFit, Spectrum
from rmtjax.noise._pieces import pad_spectrum
from rmtjax.noise.ranks import bema, energy, fixed, gavish_donoho, RankRule, size


class _AnyRule:
    """Stands for each rule whose noise BEMA fits, by numbers that may be traced.

    One compiled program then serves all of them, and all their levels, shares and ranks.
    """

    def __init__(self, base: bema, numbers: Mapping[str, Any]):
        self.kind, known = numbers["kind"], {**vars(base), **numbers}
        self.rules = [_unchecked(kind, known) for kind in _KINDS]

    def fit(self, spectrum: Spectrum) -> BulkFit:
        return self.rules[0].fit(spectrum)

    def accepts(self, spectrum: Spectrum, fit: BulkFit) -> Bool[Array, ""]:
        finite = self.rules[1].accepts(spectrum, fit)
        return jnp.where(self.kind == 0, self.rules[0].accepts(spectrum, fit), finite)

    def __call__(self, spectrum: Spectrum, fit: BulkFit) -> Int[Array, ""]:
        return jnp.stack([rule(spectrum, fit) for rule in self.rules])[self.kind]


_KINDS = (bema, energy, fixed, size)


def _unchecked(kind: type, known: Mapping[str, Any]) -> Any:
    """Returns a rule whose numbers are traced, which a check could not read."""
    rule = object.__new__(kind)
    rule.__dict__.update({name: known[name] for name in kind.__dataclass_fields__})
    return rule


def split_rule(rule: RankRule) -> tuple[RankRule, dict[str, Any] | None]:
    """Returns what a program must know of a rule, and its numbers; None for rules of others."""
    if type(rule) not in _KINDS:
        return rule, None
    given = vars(rule)
    base = bema(given.get("trim", bema.trim), significance=given.get("significance", 0.01))
    numbers = {"level": bema.level, "tolerance": bema.tolerance, "share": 1.0, "multiple": 1}
    numbers |= {name: given[name] for name in numbers if name in given}
    rank = min(given.get("rank", 1), 2**31 - 1)  # the largest number of JAX
    return base, {**numbers, "rank": rank, "kind": _KINDS.index(type(rule))}


def join_rule(base: Any, numbers: Mapping[str, Any] | None) -> Any:
    """Returns the rule that `split_rule` has split, whose numbers may be traced by now."""
    return base if numbers is None else _AnyRule(base, numbers)


def pad_for(rule: RankRule, spectrum: Spectrum) -> Spectrum:
    """Returns a padded spectrum, for which one program serves kernels of many sizes."""
    # A rule of a user may read the number of directions off the shape.
    return pad_spectrum(spectrum) if type(rule) in (*_KINDS, gavish_donoho) else spectrum


@in_usual_modes
def kept_rank(
    num_signal: Int[ArrayLike, ""],
    size: Int[ArrayLike, ""],
    keep: ArrayLike = 0.0,
    min_rank: Int[ArrayLike, ""] = 1,
) -> Int[Array, ""]:
    r"""Returns $K + \lfloor keep\, (p - K) \rfloor$ for $p$ = `size`, and at least `min_rank`."""
    share = jnp.asarray(keep, jnp.float32)  # A bfloat16 has no integers between 256 and 1,000.
    # In float32, 0.7 * 10 may round to just below 7. A thousandth of a rank forgives that.
    rest = jnp.floor(share * jnp.subtract(size, num_signal) + 1e-3).astype(jnp.int32)
    return jnp.clip(num_signal + rest, jnp.minimum(min_rank, size), size)
