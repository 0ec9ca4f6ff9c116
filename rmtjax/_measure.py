"""Spectra, noise and signal of the kernels of a tree, those of one shape at once."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from rmtjax import _kernels
from rmtjax._bulk import above_rounding, count_above
from rmtjax._factors import is_factors, kernel_shape, svd, to_stack
from rmtjax._spectrum import spectrum
from rmtjax._typing import BulkFit, KernelAxes, Spectrum

Kernels = dict[str, tuple[Any, KernelAxes]]


class Measurement(NamedTuple):
    """What was found in a kernel: NumPy arrays with an entry for each matrix of a stack.

    Attributes:
      spectra: Those of factors end in the zeros that the dense kernel would have.
      fits: The noise in force; NaN for factors that were given none.
      accepted: Whether the rule may be believed.
      signal: Number of signal directions.
      populated: Number of directions that may be kept: of factors, those that are not zero.
    """

    spectra: Spectrum
    fits: BulkFit
    accepted: Bool[Array, " b"]
    signal: Int[Array, " b"]
    populated: Int[Array, " b"]


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


@partial(jax.jit, static_argnums=1)
def _measure(matrices, rule, fits: BulkFit | None) -> Measurement:
    """Measures each matrix of a stack, or each pair of a stack of factors."""
    spectra = jax.vmap(_spectrum_of)(matrices)
    size = jnp.full(spectra.ratio.shape, spectra.eigenvalues.shape[-1], jnp.int32)
    if fits is None:
        fits = _unfitted(spectra) if is_factors(matrices) else jax.vmap(rule.fit)(spectra)
    return Measurement(
        spectra=spectra,
        # A fit that was given counted the spikes of its own day.
        fits=fits._replace(num_spikes=jax.vmap(count_above)(spectra, fits.threshold)),
        accepted=jax.vmap(rule.accepts)(spectra, fits),
        signal=jax.vmap(rule)(spectra, fits),
        populated=jax.vmap(_num_populated)(spectra) if is_factors(matrices) else size,
    )


def _group(leaf: Any, axes: KernelAxes) -> tuple:
    """What kernels must have in common to be measured at once."""
    sides = _kernels.matrix_shape(kernel_shape(leaf), axes)[1:]
    rank = leaf.left.shape[-1] if is_factors(leaf) else None
    return (sides, rank, *(array.dtype for array in jax.tree.leaves(leaf)))


def measure(kernels: Kernels, rule, given: Mapping[str, BulkFit]) -> dict[str, Measurement]:
    """Measures all kernels, with the noise levels that are given for some of them."""
    groups: dict[tuple, list[str]] = {}
    for path, (leaf, axes) in kernels.items():
        groups.setdefault((path in given, *_group(leaf, axes)), []).append(path)
    measured = {}
    for (has_fit, *_), paths in groups.items():
        stacks = [to_stack(*kernels[path]) for path in paths]
        fits = _stack_fits([given[path] for path in paths]) if has_fit else None
        joined = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *stacks)
        results = jax.device_get(_measure(joined, rule, fits))
        ends = np.cumsum([0, *(len(jax.tree.leaves(stack)[0]) for stack in stacks)])
        for path, first, last in zip(paths, ends[:-1], ends[1:], strict=True):
            measured[path] = jax.tree.map(lambda a: a[first:last], results)  # noqa: B023
    return measured


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
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_factors)
    unknown = fits.keys() - {_kernels.path_name(key) for key, _ in leaves}
    if unknown:
        raise ValueError(
            f"`fits` has {min(unknown)!r}, which is no path of `params`. Give `plan` the tree that "
            "the optimizer was given."
        )


def check_fits(given: Mapping[str, BulkFit], kernels: Kernels) -> None:
    """Refuses noise levels of another tree."""
    for path in given.keys() & kernels.keys():
        leaf, axes = kernels[path]
        stack = _kernels.matrix_shape(kernel_shape(leaf), axes)[0]
        seen = jnp.size(given[path].threshold)
        if seen != stack:
            raise ValueError(
                f"`fits` must have an entry for each matrix of {path!r}, {stack}, got {seen}. "
                "Take them from the state of `prune_spectrum` with the same `axes`."
            )
