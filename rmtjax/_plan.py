"""A plan: the rank of each kernel and the reason, decided before anything is changed."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from rmtjax import _kernels, ranks
from rmtjax._bulk import count_above
from rmtjax._factors import is_factors, multiply
from rmtjax._kernels import find_kernels
from rmtjax._spectrum import spectrum
from rmtjax._typing import Axes, BulkFit, KernelAxes, Spectrum, Where

Action = Literal["factorize", "truncate", "keep"]


class LayerPlan(NamedTuple):
    """What is to happen to one kernel, and why.

    Attributes:
      rank: Rank after truncation; None where the kernel has no spectrum.
      fit: The noise as NumPy numbers, for a stack an array with an entry each; None
        where there is no spectrum.
      action: "factorize" (the factors are smaller), "truncate" (the rank goes down, but
        factors would not be smaller) or "keep".
      reason: Action and cause in words.
      shape: Of the kernel.
      axes: What makes it a matrix; None where nothing does.
      spectrum: The spectrum as NumPy arrays; None where there is none.
    """

    rank: int | None
    fit: BulkFit | None
    action: Action
    reason: str
    shape: tuple[int, ...]
    axes: KernelAxes | None
    spectrum: Spectrum | None


class Plan(dict[str, LayerPlan]):
    """The plan of a tree: a dictionary from paths to `LayerPlan`, one for each kernel."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{path:<{width}}  {row.reason}" for path, row in self.items())


@partial(jax.jit, static_argnums=1)
def _measure(matrices: Float[Array, "b m n"], rule, fits: BulkFit | None):
    """Spectrum, fit in force, verdict and signal count of each matrix of a stack."""
    spectra = jax.vmap(spectrum)(matrices)
    used = jax.vmap(rule.fit)(spectra) if fits is None else fits
    accepted = jax.vmap(rule.accepts)(spectra, used)
    # A fit that was given counted the spikes of its own day.
    used = used._replace(num_spikes=jax.vmap(count_above)(spectra, used.threshold))
    return spectra, used, accepted, jax.vmap(rule)(spectra, used)


def _measure_all(kernels: dict[str, tuple[Any, KernelAxes]], rule, given) -> dict[str, Any]:
    """Measures the kernels, those of one matrix shape at once."""
    groups: dict[tuple, list[str]] = {}
    for path, (leaf, axes) in kernels.items():
        shape = _kernels.matrix_shape(leaf.shape, axes)
        groups.setdefault((shape[1:], leaf.dtype, path in given), []).append(path)
    measured = {}
    for (_, _, has_fit), paths in groups.items():
        stacks = [
            _kernels.to_matrices(jnp.asarray(kernels[path][0]), kernels[path][1]) for path in paths
        ]
        fits = _stack_fits([given[path] for path in paths]) if has_fit else None
        results = jax.device_get(_measure(jnp.concatenate(stacks), rule, fits))
        ends = np.cumsum([0, *(len(stack) for stack in stacks)])
        for path, first, last in zip(paths, ends[:-1], ends[1:], strict=True):
            measured[path] = jax.tree.map(lambda a: a[first:last], results)  # noqa: B023
    return measured


def _check_paths(params: PyTree, fits: Mapping[str, BulkFit]) -> None:
    """Refuses noise levels of kernels that are not there: these would be fitted anew."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_factors)
    unknown = fits.keys() - {_kernels.path_name(key) for key, _ in leaves}
    if unknown:
        raise ValueError(
            f"`fits` has {min(unknown)!r}, which is no path of `params`. Give `plan` the tree that "
            "the optimizer was given."
        )


def _check_fits(given: Mapping[str, BulkFit], kernels: dict[str, tuple[Any, KernelAxes]]) -> None:
    """Refuses noise levels of another tree."""
    for path in given.keys() & kernels.keys():
        leaf, axes = kernels[path]
        stack, seen = _kernels.matrix_shape(leaf.shape, axes)[0], jnp.size(given[path].threshold)
        if seen != stack:
            raise ValueError(
                f"`fits` must have an entry for each matrix of {path!r}, {stack}, got {seen}. "
                "Take them from the state of `prune_spectrum` with the same `axes`."
            )


def _stack_fits(fits: Iterable[BulkFit]) -> BulkFit:
    """Fits of several kernels as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate([jnp.ravel(a) for a in leaves]), *fits)


def _unstack(tree, axes: KernelAxes):
    """Of a kernel that is no stack, the one matrix without its batch axis."""
    return tree if axes.batch else jax.tree.map(lambda a: a[0] if np.ndim(a) else a, tree)


def _round_up(rank: int, multiple: int, size: int) -> int:
    return min(-(-rank // multiple) * multiple, size)


def _refusal(spectra: Spectrum, fits: BulkFit, accepted, signal) -> str | None:
    """Why the rule may not be believed, or None."""
    if not np.isfinite(spectra.eigenvalues).all():
        return "not finite"
    if not spectra.eigenvalues.any():
        return "all zero"
    if not accepted.all():
        return f"law does not fit (distance {fits.distance.max():.3f})"
    # Nothing stands out, as before training; to cut to nothing would destroy the network.
    return None if signal.any() else "no signal stands out of the noise"


def _hindrance(shape: tuple[int, ...], axes: KernelAxes, rank: int) -> str | None:
    """Why factors of this rank should not stand in the place of a kernel, or None."""
    if (*axes.batch, *axes.inputs, *axes.outputs) != tuple(range(len(shape))):
        return "factors have their axes in another order"
    if len(axes.batch) > 1:
        return f"stacked on axes {axes.batch}"
    several = not axes.batch and min(len(axes.inputs), len(axes.outputs)) > 1
    if several and shape[0] == rank == shape[axes.outputs[0]]:
        return "factors would look like those of a stack"  # see `multiply`
    _, rows, columns = _kernels.matrix_shape(shape, axes)
    return "no saving from factors" if rank * (rows + columns) >= rows * columns else None


def _decide(leaf, axes: KernelAxes, measured, keep, min_rank, multiple) -> LayerPlan:
    """One kernel's plan from its measurement."""
    spectra, fits, accepted, signal = measured
    _, rows, columns = _kernels.matrix_shape(leaf.shape, axes)
    size = min(rows, columns)
    count = int(signal.max())  # one rank for a stack: that of its richest member
    rank = _round_up(int(ranks.kept_rank(count, size, keep, min_rank)), multiple, size)
    found = f"{count} of {size} are signal, rank {rank}"
    refusal = _refusal(spectra, fits, accepted, signal)
    action: Action = "keep"
    if refusal:
        rank, reason = size, f"kept: {refusal}"
    elif rank == size:
        reason = f"kept: full rank ({found})"
    elif hindrance := _hindrance(leaf.shape, axes, rank):
        action, reason = "truncate", f"truncated: {hindrance} ({found})"
    else:
        action, reason = "factorize", f"factorized: {found}"
    spectra = Spectrum(spectra.eigenvalues, spectra.ratio[0])
    return LayerPlan(
        rank,
        _unstack(fits, axes),
        action,
        reason,
        leaf.shape,
        axes,
        _unstack(spectra, axes),
    )


def _check_options(keep: float, min_rank: int, multiple: int, min_size: int) -> None:
    if not 0 <= keep <= 1:
        raise ValueError(
            f"`keep` must be in [0, 1], got {keep}: the share of the directions that are "
            "no signal and stay all the same."
        )
    for name, value in (
        ("min_rank", min_rank),
        ("multiple", multiple),
        ("min_size", min_size),
    ):
        if not hasattr(value, "__index__") or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value}.")


def plan(
    params: PyTree,
    *,
    rule: ranks.RankRule = ranks.bema(),  # noqa: B008 - a frozen value
    keep: float = 0.0,
    where: Where | None = None,
    axes: Axes | None = None,
    fits: Mapping[str, BulkFit] | None = None,
    min_rank: int = 1,
    multiple: int = 8,
    min_size: int = 50,
) -> Plan:
    r"""Decides the rank of each kernel of a parameter tree; changes nothing.

    $r = K + \lfloor keep \cdot (p - K) \rfloor$ for $K$ signal directions of $p$, rounded
    up to a multiple. Factors of rank r are smaller than a kernel of m inputs and n
    outputs if $r (m + n) < m n$.

    Args:
      params: Nested dictionaries of arrays, as `module.init(...)["params"]`.
      rule: A rank rule of `rmtjax.ranks`.
      keep: Share of the directions that are no signal and stay, in [0, 1].
      where: `where(path, leaf)` chooses the kernels, with paths such as
        "Dense_0/kernel"; by default the leaves named `kernel` or `embedding`.
      axes: `axes(path, leaf)` names the axes that make a kernel a matrix, as
        `rmtjax.KernelAxes`; by default guessed from Flax's names. Stacked kernels need
        it: `rmtjax.linen.kernel_axes(module, variables, inputs)` finds it.
      fits: Noise levels to use instead of new fits, by path: those that
        `prune_spectrum` carried, `optax.tree.get(opt_state, "fits")`. A spectrum that
        has been truncated must not be fitted as if it were whole. Paths whose threshold
        is NaN are fitted anew.
      min_rank: Smallest rank, at least 1.
      multiple: Ranks are rounded up to a multiple of it, so that few shapes compile.
      min_size: Kernels with a shorter short side are left alone: they have too few
        eigenvalues for a law, and a classifier's head is one of them.

    Returns:
      A `Plan`: path to `LayerPlan`, a row with a reason for every kernel chosen.

    Raises:
      ValueError: An option is out of range, or `axes` or `fits` does not fit a leaf.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> params = {"Dense_0": {"kernel": noise.at[:, :3].add(5.0)}}
      >>> print(rmtjax.plan(params))
      Dense_0/kernel  factorized: 1 of 200 are signal, rank 8
    """
    _check_options(keep, min_rank, multiple, min_size)
    ranks.check_rule(rule)
    found = find_kernels(params, where, axes, is_leaf=is_factors)
    reasons = {
        path: "already factorized"
        if is_factors(leaf)
        else _kernels.unmatrixable(leaf, named, min_size)
        for path, (leaf, named) in found.items()
    }
    matrices = {
        path: (leaf, named)
        for path, (leaf, named) in found.items()
        if named is not None and reasons[path] is None
    }
    _check_paths(params, fits or {})
    given = {path: fit for path, fit in (fits or {}).items() if np.isfinite(fit.threshold).all()}
    _check_fits(given, matrices)
    measured = _measure_all(matrices, rule, given)
    rows = Plan()
    for path, (leaf, named) in found.items():
        if path in matrices:
            rows[path] = _decide(*matrices[path], measured[path], keep, min_rank, multiple)
        else:
            shape = jnp.shape(multiply(leaf) if is_factors(leaf) else leaf)
            reason = f"kept: {reasons[path]}"
            rows[path] = LayerPlan(None, None, "keep", reason, shape, named, None)
    return rows
