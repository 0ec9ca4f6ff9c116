"""Writes and parses the manifest of a checkpoint: its plan and its entries, as JSON."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple

import jax
import numpy as np

from rmtjax._axes import check_axes, KernelAxes
from rmtjax._types import BulkFit
from rmtjax._version import __version__
from rmtjax.checkpoint._tensors import are_sizes, code_of, Entry, KEY, parse_object, Tensors
from rmtjax.noise import ranks, shrinkage
from rmtjax.planning import Cost, Factorized, Kept, LayerPlan, Plan, Truncated

# Raise it when an older reader would misread the text. New names do not need it: they are ignored.
FORMAT = 3
_WITH_PARTS, _PLAIN = 2, 1  # what manifests without equalized kernels are, for older readers
_ROWS: dict[str, Any] = {row.action: row for row in (Kept, Truncated, Factorized)}
_SHRINKERS = {name: getattr(shrinkage, name) for name in ("frobenius", "operator", "nuclear")}


class Manifest(NamedTuple):
    """Holds what a checkpoint says of its tensors; None for what it does not say."""

    plan: Plan | None  # without spectra
    rule: str | None  # the rank rule of all rows in words; None if there are several
    factors: tuple[str, ...] | None  # paths of the kernels that are stored as factors
    entries: dict[str, Entry] | None  # of every tensor
    # Keys of paths that splitting at "/" would not give back; None where not all nodes have keys.
    keys: dict[str, tuple[str | int, ...] | None]
    # Of each kernel in other parts than factors its kind, the names of its parts, and what it says.
    parts: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


def _dump_numbers(fields: BulkFit | Cost) -> dict[str, Any]:
    # JSON has no NaN and no infinity, so these are written as strings.
    number = lambda n: str(n) if isinstance(n, float) and not math.isfinite(n) else n
    values = {name: np.asarray(value).tolist() for name, value in fields._asdict().items()}
    return jax.tree.map(number, values)


def _dump_row(row: LayerPlan) -> dict[str, Any]:
    names = {function: name for name, function in _SHRINKERS.items()}
    dtype = row.fit and str(np.asarray(row.fit.variance).dtype)
    plain = {name: getattr(row, name) for name in ("rank", "action", "reason", "shape")}
    return plain | {
        "axes": row.axes and row.axes._asdict(),
        "fit": row.fit and {"dtype": dtype, **_dump_numbers(row.fit)},
        "shrink": row.shrink and names.get(row.shrink, str(row.shrink)),
        "cost": row.cost and _dump_numbers(row.cost),
        **({"equalized": True} if row.equalized else {}),
    }


def to_json(
    plan: Plan | None,
    rule: ranks.RankRule | None = None,
    *,
    factors: Collection[str] | None = None,
    entries: Mapping[str, Entry] | None = None,
    keys: Mapping[str, Sequence[str | int] | None] | None = None,
    parts: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Returns the text of a manifest for the key `KEY`; the arguments are as in `Manifest`."""
    equalized = any(row.equalized for row in (plan or {}).values())
    fields = {
        "format": FORMAT if equalized else _WITH_PARTS if parts else _PLAIN,
        "versions": {"rmtjax": __version__, "jax": jax.__version__},
        "rule": None if rule is None else str(rule),
        "plan": None if plan is None else {path: _dump_row(row) for path, row in plan.items()},
        "factors": None if factors is None else sorted(factors),
        "entries": entries and {n: [code_of(e.dtype), *e.shape] for n, e in entries.items()},
        "keys": dict(keys or {}),
    }
    if parts:
        fields["parts"] = {path: dict(fields) for path, fields in parts.items()}
    return json.dumps(fields, allow_nan=False)


def _check(value: Any, *kinds: type) -> Any:
    """Returns a value of one of the types; raises ValueError for any other."""
    # In Python a boolean is an integer. In a manifest it is a mistake.
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{value!r:.60} is not {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _parse_sizes(value: Any) -> tuple[int, ...]:
    if not are_sizes(value):
        raise ValueError(f"{value!r:.60} is not a list of sizes of at least 0")
    return tuple(value)


def _parse_fit(fields: Any) -> BulkFit:
    fields = _check(fields, dict)
    dtype = np.dtype({"float32": "float32", "float64": "float64"}[fields["dtype"]])
    several = isinstance(fields["variance"], list)  # one fit for each matrix of a stack
    rows = [_check(fields[n], list) if several else [fields[n]] for n in BulkFit._fields]
    if len({*map(len, rows)}) > 1:
        raise ValueError("a fit has rows of different lengths")
    *floats, spikes = rows
    number = lambda n: float(n if n in ("nan", "inf", "-inf") else _check(n, int, float))
    arrays: list[Any] = [np.asarray([*map(number, row)], dtype) for row in floats]
    arrays.append(np.asarray([_check(count, int) for count in spikes], np.int32))
    return BulkFit(*(array if several else array[0] for array in arrays))


def _parse_row(path: str, fields: Any) -> LayerPlan:
    fields = _check(fields, dict)
    action, shape = fields["action"], _parse_sizes(fields["shape"])
    if action not in [*_ROWS]:  # a list, because the action may be of an unhashable type
        raise ValueError(f"{action!r:.60} is none of {(*_ROWS,)}")
    axes, fit, cost = fields["axes"], fields["fit"], fields["cost"]
    if axes is not None:
        axes = KernelAxes(*(_parse_sizes(_check(axes, dict)[name]) for name in KernelAxes._fields))
        check_axes(path, axes, len(shape))
    number = lambda name: _check(_check(cost, dict)[name], int, float, NoneType)
    row: dict[str, Any] = {
        "reason": _check(fields["reason"], str),
        "shape": shape,
        "axes": axes,
        "rank": _check(fields["rank"], int, NoneType),
        "fit": None if fit is None else _parse_fit(fit),
        "cost": None if cost is None else Cost(*map(number, Cost._fields)),
        "equalized": fields.get("equalized") is True,
    }
    if action == Kept.action:
        return Kept(**row)
    missing = [name for name in ("rank", "axes", "fit") if row[name] is None]
    if missing:
        raise ValueError(f"{path!r} has no {missing[0]} to {action} it")
    return _ROWS[action](**row, shrink=_SHRINKERS.get(_check(fields["shrink"] or "", str)))


def _parse_keys(path: str, value: Any) -> tuple[str | int, ...] | None:
    keys = value if value is None else tuple(_check(key, str, int) for key in value)
    if keys is not None and "/".join(map(str, keys)) != path:
        raise ValueError(f"{keys} are not the keys of {path!r}")
    return keys


def _parse_fields(fields: dict[str, Any]) -> Manifest:
    # Before anything else: a newer format may have other fields.
    if _check(fields["format"], int) > FORMAT:
        raise ValueError(f"format {fields['format']}, and this rmtjax knows {FORMAT}: upgrade it")
    rows = lambda name: _check(fields[name], dict).items()
    plan, entries, factors = fields["plan"], fields["entries"], fields["factors"]
    if plan is not None:
        plan = Plan({path: _parse_row(path, row) for path, row in rows("plan")})
    if entries is not None:
        entries = {n: Entry.parse(n, code, shape) for n, (code, *shape) in rows("entries")}
    if factors is not None:
        factors = tuple(_check(path, str) for path in _check(factors, list))
    rule = _check(fields["rule"], str, NoneType)
    keys = {path: _parse_keys(path, value) for path, value in rows("keys")}
    parts = _check(fields.get("parts", {}), dict)
    return Manifest(plan, rule, factors, entries, keys, parts)


def parse(text: str) -> Manifest:
    """Parses a manifest; raises ValueError if it is malformed, or of a newer format."""
    try:
        return _parse_fields(parse_object(text))
    except (KeyError, TypeError, OverflowError, ValueError) as error:
        cause = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"the plan in the metadata cannot be read: {cause}. If damaged, save it again."
        ) from error


def read_manifest(tensors: Tensors) -> Manifest:
    """Returns the manifest of a checkpoint, which is empty if this package did not write it."""
    text = tensors.metadata.get(KEY)
    return Manifest(None, None, None, None, {}) if text is None else parse(text)
