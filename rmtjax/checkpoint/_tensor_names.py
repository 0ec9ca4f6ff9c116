"""Finds kernels, factors and optimizer moments in a checkpoint by the names of its tensors."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rmtjax._axes import factored_axes, FactoredKernel, Factors, KernelLeaf
from rmtjax._types import is_patterns
from rmtjax.checkpoint._manifest import Manifest
from rmtjax.checkpoint._tensors import Entry, StoredTensor, Tensors
from rmtjax.planning import (
    check_patterns,
    is_kernel,
    is_untold,
    nothing_chosen,
    path_name,
    PlanOptions,
    to_predicate,
)

# An optax moment has the name of its parameter, below `opt_state`, or `0/mu` of a state alone.
_MOMENT = re.compile(r"(.*/)?opt_state/.*|(.*/)?\d+/(mu|nu|trace)/.+/[^/]+")


def _flax_path(name: str) -> str:
    """Returns a name with "/" between its parts; Torch and some other writers use dots."""
    return name.replace(".", "/")


def is_moment(name: str) -> bool:
    """Returns True for the name of an optimizer's moment."""
    return bool(_MOMENT.fullmatch(_flax_path(name)))


def is_kernel_tensor(name: str, leaf: Any) -> bool:
    """Returns True for a kernel, but not for an optimizer's moment, which ends in its name."""
    return not is_moment(name) and is_kernel(name, leaf)


def unchosen(leaves: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, KernelLeaf]:
    """Returns the leaves that may be kernels, and that nothing has chosen."""
    told = lambda path, leaf: path not in chosen and not is_moment(path) and is_untold(path, leaf)
    return {path: KernelLeaf(path, leaf) for path, leaf in leaves.items() if told(path, leaf)}


def choose(leaves: Mapping[str, Any], options: PlanOptions) -> dict[str, Any]:
    """Returns the leaves that are kernels; raises ValueError for none, and for unknown paths."""
    for name in ("where", "axes", "fits"):
        option = getattr(options, name)
        # A table of `rmtjax.linen` is also a function. It may know leaves that were stacked since.
        for path in option if isinstance(option, Mapping) and not callable(option) else ():
            if path not in leaves:
                some = ", ".join(map(repr, [*leaves][:5]))
                raise ValueError(
                    f"`{name}` has {path!r}, which is not a path of the file. It has "
                    f"{some or 'none'}: give one of its paths, as `analyze_file` reports them."
                )
    where = options.where
    if isinstance(where, Mapping):
        where = {path: where.get(path, False) for path in leaves}
    check_patterns(where, dict(leaves))
    by_path = options.axes if isinstance(options.axes, Mapping) else {}
    default = lambda path, leaf: path in by_path or is_kernel_tensor(path, leaf)
    # A pattern does not choose the moments of an optimizer, whose names end as those of kernels.
    able = {p: leaf for p, leaf in leaves.items() if not (is_patterns(where) and is_moment(p))}
    is_chosen = to_predicate(where, able) or default
    chosen = {path: leaf for path, leaf in able.items() if is_chosen(path, leaf)}
    if not chosen:
        raise ValueError(nothing_chosen(leaves))
    return chosen


def halves(path: str) -> tuple[str, str]:
    """Returns the names of the factors of a kernel."""
    return f"{path}/left", f"{path}/right"


def named_parts(path: str, leaf: Any) -> dict[str, Any]:
    """Returns the arrays of a leaf by the names of their tensors."""
    if isinstance(leaf, FactoredKernel):
        parts = jax.tree_util.tree_leaves_with_path(leaf)
        return {f"{path}/{path_name(key)}": part for key, part in parts}
    if isinstance(leaf, Factors):
        return dict(zip(halves(path), leaf, strict=True))
    return {path: leaf}


def describe_parts(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns what a manifest says of the kernels in other parts than factors."""
    held = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, FactoredKernel)}
    names = lambda path, leaf: [name.removeprefix(f"{path}/") for name in named_parts(path, leaf)]
    return {
        path: {"kind": type(leaf).__name__, "names": names(path, leaf), **leaf.describe()}
        for path, leaf in held.items()
    }


def _restore_parts(path: str, fields: Any, stored: Mapping[str, Any]) -> FactoredKernel:
    """Returns a kernel in other parts than factors, of stored tensors."""
    try:
        kind, parts = FactoredKernel.kinds[fields["kind"]], fields["names"]
        return kind.restore(fields, [stored[f"{path}/{name}"] for name in parts])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the parts of {path!r} cannot be read: {type(error).__name__} {error}. If damaged, "
            "save it again."
        ) from error


def check_pairs(leaves: Mapping[str, Any]) -> None:
    """Raises ValueError if two tensors of a leaf are not the factors of one kernel."""
    for path, leaf in leaves.items():
        if not isinstance(leaf, Factors):
            continue
        left, right = leaf
        floating = left.dtype == right.dtype and jnp.issubdtype(left.dtype, jnp.floating)
        ranked = min(left.ndim, right.ndim) >= 2 and left.shape[-1] > 0
        # `factored_axes` returns batch axes only if the ranks that follow them are equal.
        one_rank = ranked and (factored_axes(leaf).batch or left.shape[-1] == right.shape[0])
        if not (one_rank and floating):
            pair = " and ".join(str(Entry.of(half)) for half in leaf)
            raise ValueError(
                f"the halves of {path!r} are {pair}, and must have one rank and one floating dtype."
            )


def find_leaves(tensors: Tensors, manifest: Manifest) -> dict[str, Any]:
    """Returns the leaves in the order of the file, by path: `StoredTensor` or `Factors` of two."""
    entries = tensors.entries.items()
    stored: dict[str, Any] = {n: StoredTensor(tensors, n, entry.dtype) for n, entry in entries}
    paths = manifest.factors
    if paths is None:  # a manifest may leave the list out, and its plan names the candidates
        paths = [path for path in manifest.plan or () if stored.keys() >= {*halves(path)}]
    double = min(stored.keys() & {*paths, *manifest.parts}, default=None)
    if double is not None:
        raise ValueError(f"{str(tensors.path)!r} has {double!r} dense and as factors: remove one.")
    owners = {name: path for path in paths for name in halves(path)}
    missing = min(owners.keys() - stored.keys(), default=None)
    if missing is not None:
        raise ValueError(f"{str(tensors.path)!r} lacks {missing!r}, of its plan: write it again.")
    factors: dict[str, Any] = {
        path: Factors(*(stored[half] for half in halves(path))) for path in paths
    }
    check_pairs(factors)
    for path, fields in manifest.parts.items():
        factors[path] = _restore_parts(path, fields, stored)
        owners |= dict.fromkeys(named_parts(path, factors[path]), path)
    # The left half may come before or after the right one: the first of them places the kernel.
    places = {owners.get(name, name): leaf for name, leaf in stored.items()}
    return {path: factors.get(path, leaf) for path, leaf in places.items()}


def pair_adapters(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves with each adapter's A and B, by their names in PEFT, as one kernel."""
    paired = dict(leaves)
    for path, inner in leaves.items():
        module, found, end = path.rpartition(".lora_A.")
        outer = leaves.get(f"{module}.lora_B.{end}")
        # Of convolutions, the window belongs to one of both halves.
        if not found or outer is None or isinstance(inner, Factors) or inner.ndim != 2:
            continue
        if inner.ndim == outer.ndim and inner.shape[0] == outer.shape[1]:
            del paired[path], paired[f"{module}.lora_B.{end}"]
            paired[f"{module}.{end}"] = Factors(outer, inner)
    return paired
