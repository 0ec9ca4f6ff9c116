"""Spectra, noise and signal of the kernels of a tree."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from rmtjax._axes import is_factors, kernel_shape, KernelAxes, matrix_shape, to_stack
from rmtjax._sharding import by_compiler, fetch, in_shares, mesh_of, mesh_of_whole
from rmtjax._types import BulkFit, Spectrum
from rmtjax.noise import above_rounding, count_above
from rmtjax.planning._kernels import path_name
from rmtjax.spectra import (
    each,
    estimate,
    estimate_pays,
    host_spectra,
    is_spread,
    on_host,
    sharded_spectra,
    spectrum,
    svd,
)

# Distance from the law of which an estimate, which is off by 0.01, leaves no doubt.
_CLEARLY = 0.05

Kernels = dict[str, tuple[Any, KernelAxes]]


class Measurement(NamedTuple):
    """What was found in a kernel: NumPy arrays with an entry for each matrix of a stack.

    Attributes:
      spectra: Those of factors end in the zeros that the dense kernel would have.
      fits: The noise in force; NaN for factors that were given none.
      noisy: Whether there is noise above rounding.
      accepted: Whether the rule may be believed.
      signal: Number of signal directions.
      populated: Number of directions that may be kept: of factors, those that are not zero.
      estimated: Whether the bulk of the spectra is made of estimated quantiles.
    """

    spectra: Spectrum
    fits: BulkFit
    noisy: Bool[Array, " b"]
    accepted: Bool[Array, " b"]
    signal: Int[Array, " b"]
    populated: Int[Array, " b"]
    estimated: bool = False


def _spectrum_of(matrix) -> Spectrum:
    """The spectrum of a matrix, or of the product of two factors, which is never formed."""
    if not is_factors(matrix):
        return spectrum(matrix)
    sides = matrix.left.shape[0], matrix.right.shape[1]
    _, s, _ = svd(matrix)
    eigenvalues = jnp.pad(s**2 / max(sides), (0, min(sides) - len(s)))
    return Spectrum(eigenvalues, jnp.asarray(min(sides) / max(sides), s.dtype))


def _unfitted(spectra: Spectrum) -> BulkFit:
    """The noise of factors: what they have left out cannot be fitted any more."""
    nan = jnp.full_like(spectra.ratio, jnp.nan)
    return BulkFit(nan, nan, nan, nan, num_spikes=jnp.zeros(nan.shape, jnp.int32))


def _num_populated(spectrum: Spectrum) -> Int[Array, ""]:
    """The number of directions that are not zero."""
    present = jax.vmap(above_rounding, (None, 0))(spectrum, spectrum.eigenvalues)
    return jnp.sum(present, dtype=jnp.int32)


@partial(jax.jit, static_argnums=(1, 2))
def _find_spectra(kernels: list, axes: tuple[KernelAxes, ...], mesh: Any):
    """The spectra of kernels of one shape, and how many directions each has.

    Apart from the fit, which is compiled for a number of eigenvalues and not for each shape. Each
    device of a mesh, on which they are whole, has a share of them.
    """

    def find(kernels):
        stacks = [to_stack(kernel, own) for kernel, own in zip(kernels, axes, strict=True)]
        joined = stacks[0]  # large, and not to be copied if it is the only one
        if len(stacks) > 1:
            joined = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *stacks)
        find = partial(each, _spectrum_of)
        spectra = find(joined) if mesh is None else in_shares(find, joined, mesh)
        if is_factors(joined):
            return spectra, jax.vmap(_num_populated)(spectra)
        return spectra, jnp.full(spectra.ratio.shape, spectra.eigenvalues.shape[-1], jnp.int32)

    return by_compiler(find, kernels)


@partial(jax.jit, static_argnums=(2, 3))
def _judge(spectra: Spectrum, fits: BulkFit | None, rule, thin: bool):
    """What a `Measurement` says besides the spectrum."""
    if fits is None:
        # One by one on CPU, where those that are soon done would else go on with the slowest.
        fits = _unfitted(spectra) if thin else each(rule.fit, spectra)
    # A fit that was given counted the spikes of its own day.
    counted = fits._replace(num_spikes=jax.vmap(count_above)(spectra, fits.threshold))
    return {
        "fits": counted,
        "noisy": jax.vmap(above_rounding)(spectra, fits.variance),
        "accepted": jax.vmap(rule.accepts)(spectra, fits),
        "signal": jax.vmap(rule)(spectra, fits),
    }


def _group(leaf: Any, axes: KernelAxes) -> tuple:
    """What kernels must have in common to be measured at once."""
    sides = matrix_shape(kernel_shape(leaf), axes)[1:]
    rank = leaf.left.shape[-1] if is_factors(leaf) else None
    arrays = jax.tree.leaves(leaf)
    return (sides, rank, *(array.dtype for array in arrays), *map(mesh_of, arrays))


def _kind(spectra: Spectrum) -> tuple:
    """What spectra must have in common to be judged at once."""
    return spectra.eigenvalues.shape[-1], spectra.eigenvalues.dtype


def _collect(paths: Iterable[str], group_of: Callable[[str], tuple]) -> list[list[str]]:
    """The paths that have something in common, together."""
    groups: dict[tuple, list[str]] = {}
    for path in paths:
        groups.setdefault(group_of(path), []).append(path)
    return list(groups.values())


def _share(paths: list[str], sizes: list[int], results) -> dict[str, Any]:
    """Results of a group, on the host, of which each path has so many."""
    ends, results = np.cumsum([0, *sizes]), fetch(results)
    cut = lambda first, last: jax.tree.map(lambda a: a[first:last], results)
    return {p: cut(*pair) for p, pair in zip(paths, itertools.pairwise(ends), strict=True)}


def _measure_spectra(spectra: Spectrum, rule, given: BulkFit | None) -> Measurement:
    """What JAX finds in spectra on the host, while the host goes on to the next."""
    stack, size = spectra.eigenvalues.shape
    fits = None if given is None else _stack_fits([given])
    populated: Any = np.full(stack, size, np.int32)
    return Measurement(spectra, **_judge(spectra, fits, rule, False), populated=populated)


def _measure_there(kernels: Kernels, rule, given: Mapping[str, BulkFit]):
    """Measures kernels in compiled programs, those that have a shape in common at once."""
    found, measured = {}, {}
    for paths in _collect(kernels, lambda path: _group(*kernels[path])):
        own = [kernels[path] for path in paths]
        arrays = [jax.tree.map(jnp.asarray, leaf) for leaf, _ in own]
        sizes = [matrix_shape(kernel_shape(leaf), named)[0] for leaf, named in own]
        spectra = _find_spectra(arrays, tuple(named for _, named in own), mesh_of_whole(arrays))
        found |= _share(paths, sizes, spectra)
    alike = lambda path: (path in given, is_factors(kernels[path][0]), *_kind(found[path][0]))
    for paths in _collect(kernels, alike):
        spectra = jax.tree.map(lambda *a: np.concatenate(a), *(found[path][0] for path in paths))
        fits = _stack_fits([given[path] for path in paths]) if paths[0] in given else None
        judged = _judge(spectra, fits, rule, is_factors(kernels[paths[0]][0]))
        sizes = [len(found[path][1]) for path in paths]
        for path, results in _share(paths, sizes, judged).items():
            own, populated = found[path]
            measured[path] = Measurement(own, **results, populated=populated)
    return measured


@partial(jax.jit, static_argnums=1)
def _estimate_spectra(kernel, axes: KernelAxes):
    return by_compiler(lambda kernel: lax.map(estimate, to_stack(kernel, axes)), kernel)


def _measure_large(kernel, axes: KernelAxes, rule, given: BulkFit | None) -> Measurement | None:
    """Measures a kernel by an estimate of its spectrum; None where this does not decide."""
    spectra, num_found = fetch(_estimate_spectra(kernel, axes))
    fits = None if given is None else _stack_fits([given])
    judged = jax.device_get(_judge(spectra, fits, rule, False))
    found = judged["accepted"] & (judged["signal"] <= num_found)
    refused = ~judged["accepted"] & (judged["fits"].distance > _CLEARLY)
    if not (found | refused).all():
        return None
    size = spectra.eigenvalues.shape[-1]
    populated: Any = np.full(len(num_found), size, np.int32)
    return Measurement(spectra, **judged, populated=populated, estimated=True)


def measure(
    kernels: Kernels, rule, given: Mapping[str, BulkFit], exact_below: int
) -> dict[str, Measurement]:
    """Measures all kernels, with the noise levels that are given for some of them."""
    measured = {}
    for path, (leaf, axes) in kernels.items():
        sides = matrix_shape(kernel_shape(leaf), axes)[1:]
        if not is_factors(leaf) and min(sides) >= exact_below and estimate_pays(sides):
            measured[path] = _measure_large(leaf, axes, rule, given.get(path))
    rest = {path: kernels[path] for path in kernels if measured.get(path) is None}
    here = {path: found for path, found in rest.items() if on_host(found[0])}
    spread = {p: found for p, found in rest.items() if p not in here and is_spread(found[0])}
    there = {path: found for path, found in rest.items() if path not in here | spread}
    judge = lambda path, spectra: _measure_spectra(spectra, rule, given.get(path))
    found = host_spectra(here, judge)
    found |= {path: judge(path, spectra) for path, spectra in sharded_spectra(spread).items()}
    measured |= jax.device_get(found)
    measured |= _measure_there(there, rule, given)
    return {path: measured[path] for path in kernels}


def _stack_fits(fits: Iterable[BulkFit]) -> BulkFit:
    """Fits of several kernels as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate([jnp.ravel(a) for a in leaves]), *fits)


def check_paths(params: PyTree, fits: Mapping[str, BulkFit]) -> None:
    """Refuses noise levels of kernels that are not there: these would be fitted anew."""
    if not isinstance(fits, Mapping):
        raise TypeError(
            f"`fits` must be a dictionary from paths to fits, got {type(fits).__name__}. Of the "
            'state of an optimizer with `prune_spectrum` it is `optax.tree.get(state, "fits")`.'
        )
    for path, fit in fits.items():
        if not isinstance(fit, BulkFit):
            raise TypeError(
                f"`fits` must have a `rmtjax.BulkFit` for each path, got {type(fit).__name__} for "
                f"{path!r}. Those of a plan are `plan.fits`."
            )
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_factors)
    unknown = fits.keys() - {path_name(key) for key, _ in leaves}
    if unknown:
        raise ValueError(
            f"`fits` has {min(unknown)!r}, which is no path of `params`. Give `plan` the tree that "
            "the optimizer was given."
        )


def check_fits(given: Mapping[str, BulkFit], kernels: Kernels) -> None:
    """Refuses noise levels of another tree."""
    for path in given.keys() & kernels.keys():
        leaf, axes = kernels[path]
        stack = matrix_shape(kernel_shape(leaf), axes)[0]
        seen = jnp.size(given[path].threshold)
        if seen != stack:
            raise ValueError(
                f"`fits` must have an entry for each matrix of {path!r}, {stack}, got {seen}. "
                "Take them from the state of `prune_spectrum` with the same `axes`."
            )
