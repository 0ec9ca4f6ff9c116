"""Prunes the values of kernels in spectral form by a rank rule."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from rmtjax._axes import Factors
from rmtjax._types import Spectrum, Where
from rmtjax.lowrank._judge import judge
from rmtjax.lowrank._penalties import spectral_leaves
from rmtjax.lowrank._spectral import SpectralFactors
from rmtjax.noise import check_rule, ranks
from rmtjax.planning import check_count, map_kernels, to_predicate
from rmtjax.spectra import lift, svd


class PrunedValues(NamedTuple):
    """A tree with thinner kernels in spectral form.

    Attributes:
      params: The tree.
      ranks: Path to the number of values that stay, of each kernel in spectral form.
      reasons: Path to the reason in words.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> held = rmtjax.lowrank.to_spectral(params)
      >>> rmtjax.lowrank.prune_values(held, rule=rmtjax.ranks.fixed(8)).ranks
      {'kernel': 8}
    """

    params: PyTree
    ranks: dict[str, int]
    reasons: dict[str, str]


def _stack(kernel: SpectralFactors) -> tuple[Array, Array, Array]:
    """Returns the parts as stacks (b, rows, r), (b, r) and (b, r, columns) in float32 at least."""
    *batch, rank = kernel.s.shape
    stack, parts = math.prod(batch), map(lift, (kernel.u, kernel.s, kernel.v))
    u, s, v = (jnp.asarray(part) for part in parts)
    return u.reshape(stack, -1, rank), s.reshape(stack, rank), v.reshape(stack, rank, -1)


def _unstack(kernel: SpectralFactors, u, s, v) -> SpectralFactors:
    """Returns a kernel with other stacks for its parts, in its dtype."""
    batch, rank = kernel.s.shape[:-1], s.shape[-1]
    first, last = len(batch), kernel.u.ndim - 1
    shapes = (
        (*kernel.u.shape[:last], rank),
        (*batch, rank),
        (*batch, rank, *kernel.v.shape[first + 1 :]),
    )
    old = (kernel.u, kernel.s, kernel.v)
    new = [a.reshape(b).astype(c.dtype) for a, b, c in zip((u, s, v), shapes, old, strict=True)]
    return SpectralFactors(*new, spatial=kernel.spatial)


def _spectra(s: Float[Array, "b r"], sides: tuple[int, int]) -> tuple[Spectrum, int | None]:
    """Returns the spectra of a stack with values s, and their rank if some were cut before."""
    short, long = min(sides), max(sides)
    missing = short - s.shape[1]
    eigenvalues = jnp.sort(jnp.square(s), axis=1, descending=True) / long
    padded = jnp.pad(eigenvalues, ((0, 0), (0, missing)))
    return Spectrum(padded, jnp.asarray(short / long, s.dtype)), s.shape[1] if missing else None


def _choose(s, sides, rule, min_rank: int, multiple: int, min_size: int) -> tuple[int, str]:
    """Returns the rank of a stack with values (b, r), and why."""
    size = s.shape[1]
    if not jnp.isfinite(s).all():
        return size, "kept: not finite"
    if rule.needs_noise and min(sides) < min_size:
        return size, f"kept: short side {min(sides)} under {min_size}"
    count, accepted = judge(rule, *_spectra(s, sides))
    if not accepted.all():
        return size, "kept: the rule does not accept the values"
    if not count.any():
        return size, "kept: no signal stands out of the noise"
    # One rank for a stack: that of its richest member.
    rank = max(int(count.max()), min_rank)
    rank = min(-(-rank // multiple) * multiple, size)  # rounded up
    return rank, f"{count.max()} of {size} are signal, rank {rank}"


def prune_values(
    params: PyTree,
    *,
    rule: ranks.RankRule = ranks.energy(0.99),  # noqa: B008 - a frozen value
    exact: bool = False,
    where: Where | None = None,
    min_rank: int = 1,
    multiple: int = 1,
    min_size: int = 50,
) -> PrunedValues:
    r"""Makes kernels in spectral form thinner: the largest $|s|$ stay, as many as a rule counts.

    The rule sees $|s|$ as the singular values. They are that as far as `orthogonality` has kept the
    vectors orthonormal. With `exact` the product is decomposed first.

    Args:
      params: A tree with `SpectralFactors`.
      rule: Any rank rule of `rmtjax.ranks`. The paper has `rmtjax.ranks.energy(1 - e)`, with e from
        3e-6 to 0.3. A rule with a noise level needs the values of the bulk: use it before a
        penalty on values has pulled them to 0.
      exact: Whether to replace U, s and V by the decomposition of their product first.
      where: Chooses among the kernels, as in `rmtjax.plan`; None for all.
      min_rank: Smallest rank, at least 1.
      multiple: Ranks are rounded up to a multiple of it.
      min_size: Kernels with a shorter short side are kept by a rule with a noise level.

    Returns:
      `PrunedValues(params, ranks, reasons)`, with a reason for each kernel. It is made on the host,
      since a rank is a shape.

    Raises:
      ValueError, TypeError: An argument is not as described, or the tree has no such kernel.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"kernel": 1 + 0.1 * jax.random.normal(jax.random.key(0), (80, 60))}
      >>> held = rmtjax.lowrank.to_spectral(params)
      >>> pruned = rmtjax.lowrank.prune_values(held, rule=rmtjax.ranks.bema())
      >>> pruned.reasons["kernel"], pruned.params["kernel"].s.shape
      ('1 of 60 are signal, rank 1', (1,))

    References:
      Yang, Tang, Wen, Yan, Hu, Li, Li and Chen (2020), https://arxiv.org/abs/2004.09031.
    """
    check_rule(rule)
    for name, value in (("min_rank", min_rank), ("multiple", multiple), ("min_size", min_size)):
        check_count(name, value)
    chosen = to_predicate(where, params) or (lambda path, leaf: True)
    held = spectral_leaves("prune_values", params)
    thin, kept, reasons = {}, {}, {}
    for path, kernel in held.items():
        if not chosen(path, kernel):
            continue
        u, s, v = _stack(kernel)
        sides = u.shape[1], v.shape[2]
        if exact:
            u, s, v = svd(Factors(u * s[:, None], v))
        kept[path], reasons[path] = _choose(jnp.abs(s), sides, rule, min_rank, multiple, min_size)
        order = jnp.argsort(jnp.abs(s), axis=1, descending=True)[:, : kept[path]]
        take = lambda part, order, axis: jnp.take_along_axis(part, order, axis)
        parts = take(u, order[:, None], 2), take(s, order, 1), take(v, order[..., None], 1)
        unchanged = kept[path] == s.shape[1] and not exact
        thin[path] = kernel if unchanged else _unstack(kernel, *parts)
    return PrunedValues(map_kernels(lambda path, _: thin[path], params, thin), kept, reasons)
