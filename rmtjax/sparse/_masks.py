"""Masks of kernels by path: which entries stay, and which entries are the smallest."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt

from rmtjax._types import Where
from rmtjax.planning import check_share, find_kernels, leaves_by_path, path_name
from rmtjax.spectra import lift

LAST = np.uint32(2**32 - 1)  # a place behind that of every entry: there are less than 2**31

Masks = dict[str, Bool[Array, "..."]]
Keys = dict[str, UInt[Array, "..."]]
Pattern = tuple[int, int]  # N of M consecutive entries stay
Groups = Mapping[str, int]  # path to the index of the group whose entries compete


def check_sparsity(sparsity: Any) -> None:
    """Raises ValueError if a share of entries is out of range."""
    meaning = "the entries of all chosen kernels together that are set to zero"
    check_share("sparsity", sparsity, meaning, below_one=True)


def check_pattern(pattern: Any) -> None:
    """Raises ValueError unless a pattern is two integers N < M."""
    fine = isinstance(pattern, tuple) and len(pattern) == 2
    if not fine or not all(type(n) is int for n in pattern) or not 1 <= pattern[0] < pattern[1]:
        raise ValueError(
            "`pattern` must be two integers (N, M) with 1 <= N < M, such as (2, 4), got "
            f"{pattern!r}."
        )


def check_weights(name: str, weights: Mapping[str, Any]) -> None:
    """Raises ValueError for a weight that is not positive. Traced weights are not checked."""
    for path, weight in weights.items():
        if not isinstance(weight, Tracer) and not np.all(np.asarray(weight) > 0):
            raise ValueError(f"`{name}` must be positive, got {weight} for {path!r}.")


def check_size(kernels: Mapping[str, Array]) -> int:
    """Returns the number of entries; raises ValueError if an integer cannot count them."""
    size = sum(kernel.size for kernel in kernels.values())
    if size >= 2**31:
        raise ValueError(
            f"`params` must have less than 2**31 entries to choose among, got {size}: use `where`."
        )
    return size


def find_floating(params: PyTree, where: Where | None) -> dict[str, Array]:
    """Returns path and kernel of each chosen leaf that has entries to remove."""
    # JAX does not promote floats of 8 bits. The package leaves them alone everywhere.
    floating = lambda dtype: jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16
    return {
        path: jnp.asarray(kernel.leaf)
        for path, kernel in find_kernels(params, where).items()
        # Factors have no entries to remove: a zero in one of them is not a zero of the kernel.
        if not kernel.is_factored and floating(kernel.dtype) and 0 not in kernel.shape
    }


def pick(name: str, values: Mapping[str, Any], kernels: dict[str, Array]) -> dict[str, Any]:
    """Returns the values of these kernels; raises ValueError if one is missing."""
    missing = min(kernels.keys() - values.keys(), default=None)
    if missing is not None:
        raise ValueError(
            f"`{name}` must have an entry for each chosen kernel, and has none for {missing!r}. "
            "Make it from the same tree, or choose fewer kernels by `where`."
        )
    return {path: values[path] for path in kernels}


def pick_masks(mask: PyTree | None, kernels: dict[str, Array]) -> Masks:
    """Returns the masks of these kernels from a tree of booleans; all True without a tree."""
    if mask is None:
        return {path: jnp.ones_like(kernel, bool) for path, kernel in kernels.items()}
    masks = pick("mask", leaves_by_path(mask, lambda path, _: path in kernels), kernels)
    for path, kernel in kernels.items():
        shape, dtype = jnp.shape(masks[path]), jnp.result_type(masks[path])
        if shape != kernel.shape or not jnp.issubdtype(dtype, jnp.bool_):
            raise ValueError(
                f"`mask` must have booleans of shape {kernel.shape} for {path!r}, got {dtype} of "
                f"shape {shape}."
            )
    return {path: jnp.asarray(mask) for path, mask in masks.items()}


def fill(params: PyTree, masks: Masks) -> PyTree:
    """Returns a tree of booleans like `params`: the masks at their paths, True everywhere else."""
    mask_of = lambda path, leaf: masks[path] if path in masks else jnp.ones(jnp.shape(leaf), bool)
    return jax.tree_util.tree_map_with_path(lambda key, leaf: mask_of(path_name(key), leaf), params)


def order_keys(kernel, mask, weight, dtype) -> UInt[Array, "..."]:
    """Returns integers in the order of |w| / weight; 0 where a mask is False."""
    score = (jnp.abs(lift(kernel)) / weight).astype(dtype)
    # The bits of floats that are not negative, read as integers, have the order of the floats. NaN
    # comes last.
    bits = lax.bitcast_convert_type(score, jnp.uint64 if dtype == jnp.float64 else jnp.uint32)
    return jnp.where(mask, bits + 1, 0)


def _cuts(keys: Keys, groups: Groups, counts: Int[Array, " g"]):
    """Returns the largest cut of each group with at most `counts` keys below, and what is missing.

    A bisection by bits needs only sums. Entries are not copied, so that sharded kernels stay on
    their devices.
    """
    dtype = next(iter(keys.values())).dtype
    bits = 8 * dtype.itemsize

    def below(cuts):
        smaller = lambda path: jnp.sum(keys[path] < cuts[groups[path]], dtype=jnp.int32)
        parts = jnp.stack([smaller(path) for path in keys])
        return jnp.zeros_like(counts).at[np.array([groups[path] for path in keys])].add(parts)

    def narrow(index, cuts):
        # Without `jit` the index is an integer of Python.
        trial = cuts | (jnp.ones((), dtype) << jnp.asarray(bits - 1 - index, dtype))
        return jnp.where(below(trial) <= counts, trial, cuts)

    cuts = lax.fori_loop(0, bits, narrow, jnp.zeros(counts.shape, dtype))
    return cuts, counts - below(cuts)


def without_smallest(keys: Keys, groups: Groups, counts: Int[Array, " g"]) -> Masks:
    """Returns masks that are False at the `counts` smallest keys of each group.

    Of equal keys the first in the tree go. The counts may be traced.
    """
    cuts, missing = _cuts(keys, groups, counts)
    places, start = {}, 0
    for path, key in keys.items():
        place = jnp.arange(start, start + key.size, dtype=jnp.uint32).reshape(key.shape)
        places[path] = jnp.where(key == cuts[groups[path]], place, LAST)
        start += key.size
    ends, _ = _cuts(places, groups, missing)
    at = lambda path: (keys[path] >= cuts[groups[path]]) & (places[path] >= ends[groups[path]])
    return {path: at(path) for path in keys}


def one_group(paths: Iterable[str]) -> Groups:
    """Returns the groups in which all kernels compete with one another."""
    return dict.fromkeys(paths, 0)


def count_removed(masks: Masks) -> Int[Array, ""]:
    """Returns how many entries are removed in all."""
    size = sum(mask.size for mask in masks.values())
    return jnp.asarray(size - sum(jnp.sum(mask, dtype=jnp.int32) for mask in masks.values()))


@jax.jit
def _shrink(kernels, masks, weights, sparsity):
    size = sum(kernel.size for kernel in kernels.values())
    count = jnp.round(jnp.asarray(sparsity, jnp.float32) * size).astype(jnp.int32)
    dtype = jnp.result_type(*map(lift, kernels.values()))

    def remove(masks):
        key = lambda path: order_keys(kernels[path], masks[path], weights[path], dtype)
        keys = {path: key(path) for path in kernels}
        kept = without_smallest(keys, one_group(keys), count[None])
        return {path: masks[path] & kept[path] for path in masks}

    return lax.cond(count > count_removed(masks), remove, lambda masks: masks, masks)


def shrink(
    kernels: dict[str, Float[Array, "..."]],
    masks: Masks,
    weights: Mapping[str, ArrayLike] | None,
    sparsity: Float[ArrayLike, ""],
) -> Masks:
    """Removes the entries with the smallest |w| / weight until `sparsity` of all have gone.

    Entries that have gone count and never come back. If enough have gone, nothing is done.
    """
    size = check_size(kernels)
    weights = dict.fromkeys(kernels, 1.0) if weights is None else weights
    check_weights("weights", weights)
    divisors = pick("weights", weights, kernels)
    return _shrink(kernels, masks, divisors, sparsity) if size else masks
