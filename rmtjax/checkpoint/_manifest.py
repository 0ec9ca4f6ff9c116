"""A plan as the text that a checkpoint carries, and back."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple

import jax
import numpy as np

from rmtjax._axes import check_axes, KernelAxes
from rmtjax._types import BulkFit
from rmtjax._version import __version__
from rmtjax.checkpoint._tensors import CODES, DTYPES, Entry, KEY as KEY, parse_json
from rmtjax.noise import ranks, shrinkage
from rmtjax.planning import Cost, Factorized, Kept, LayerPlan, Plan, Truncated

FORMAT = 1  # higher where an older reader would go wrong; a field may be added without
_CASES = {"keep": Kept, "truncate": Truncated, "factorize": Factorized}
_SHRINKERS = {name: getattr(shrinkage, name) for name in ("frobenius", "operator", "nuclear")}


class Manifest(NamedTuple):
    """What a checkpoint says of itself.

    Attributes:
      plan: The plan, without spectra; None where none was saved.
      rule: The rank rule of all rows in words; None where it was not told, or there are several.
      versions: Of rmtjax and jax when it was written.
      factors: The paths at which factors stand; None where it was not told.
      entries: Name to shape and dtype of every tensor; None where it was not told.
      keys: Path to keys where the path alone does not tell them: an integer, or a key with
        a slash. None in their place where something else than dictionaries leads there.
    """

    plan: Plan | None
    rule: str | None
    versions: dict[str, str]
    factors: tuple[str, ...] | None
    entries: dict[str, Entry] | None
    keys: dict[str, tuple[str | int, ...] | None]


def _tell(number: Any) -> Any:
    """A number as JSON can hold it, which knows no NaN."""
    return str(number) if isinstance(number, float) and not math.isfinite(number) else number


def _tell_fit(fit: BulkFit) -> dict[str, Any]:
    told: dict[str, Any] = {"dtype": str(np.asarray(fit.variance).dtype)}
    for name, value in fit._asdict().items():
        numbers = np.asarray(value).tolist()
        told[name] = [*map(_tell, numbers)] if isinstance(numbers, list) else _tell(numbers)
    return told


def _tell_layer(layer: LayerPlan) -> dict[str, Any]:
    names = {function: name for name, function in _SHRINKERS.items()}
    return {
        "rank": layer.rank,
        "action": layer.action,
        "reason": layer.reason,
        "shape": layer.shape,
        "axes": layer.axes and layer.axes._asdict(),
        "fit": layer.fit and _tell_fit(layer.fit),
        "shrink": layer.shrink and names.get(layer.shrink, str(layer.shrink)),
        "cost": layer.cost and {name: _tell(n) for name, n in layer.cost._asdict().items()},
    }


def to_json(
    plan: Plan | None,
    rule: ranks.RankRule | None = None,
    *,
    factors: Collection[str] | None = None,
    entries: Mapping[str, Entry] | None = None,
    keys: Mapping[str, Sequence[str | int] | None] | None = None,
) -> str:
    """What a checkpoint says of itself, for the key `KEY` of its metadata.

    Args:
      plan: The plan. A shrinker of one's own is told by its name, and read as None.
      rule: The rank rule by which it was made.
      factors: The paths at which factors stand. By default those of the plan for which the
        checkpoint has both.
      entries: Every tensor of the checkpoint, so that a reader can miss one.
      keys: As in `Manifest`.
    """
    told = {
        "format": FORMAT,
        "versions": {"rmtjax": __version__, "jax": jax.__version__},
        "rule": None if rule is None else str(rule),
        "plan": None if plan is None else {path: _tell_layer(row) for path, row in plan.items()},
        "factors": None if factors is None else sorted(factors),
        "entries": entries
        and {name: [CODES[entry.dtype], *entry.shape] for name, entry in entries.items()},
        "keys": dict(keys or {}),
    }
    return json.dumps(told, allow_nan=False)


def _take(value: Any, *kinds: type) -> Any:
    """A value of one of the types that it may have; a boolean is no integer."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{value!r:.60} is no {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _take_sizes(value: Any) -> tuple[int, ...]:
    sizes = tuple(_take(size, int) for size in _take(value, list))
    if min(sizes, default=0) < 0:
        raise ValueError(f"{value!r:.60} has a negative number")
    return sizes


def _take_float(value: Any) -> float:
    if value in ("nan", "inf", "-inf"):
        return float(value)
    return float(_take(value, int, float))


def _take_fit(told: Any) -> BulkFit:
    told = _take(told, dict)
    dtype = np.dtype({"float32": "float32", "float64": "float64"}[told["dtype"]])
    several = isinstance(told["variance"], list)
    numbers: dict[str, Any] = {}
    for name in BulkFit._fields:
        row = _take(told[name], list) if several else [told[name]]
        numbers[name] = [_take(n, int) if name == "num_spikes" else _take_float(n) for n in row]
    if len({len(row) for row in numbers.values()}) > 1:
        raise ValueError("a fit has rows of different lengths")
    for name, row in numbers.items():
        array = np.asarray(row, np.int32 if name == "num_spikes" else dtype)
        numbers[name] = array if several else array[0]
    return BulkFit(**numbers)


def _take_cost(told: Any) -> Cost:
    told = _take(told, dict)
    return Cost(**{name: _take(told[name], int, float, NoneType) for name in Cost._fields})


def _take_layer(path: str, told: Any) -> LayerPlan:
    told = _take(told, dict)
    rank, action, shape, axes = (told[name] for name in ("rank", "action", "shape", "axes"))
    shape, rank = _take_sizes(shape), _take(rank, int, NoneType)
    if axes is not None:
        named = {name: _take_sizes(_take(axes, dict)[name]) for name in KernelAxes._fields}
        axes = KernelAxes(**named)
        check_axes(path, axes, len(shape))
    if action not in tuple(_CASES):
        raise ValueError(f"{action!r:.60} is none of {tuple(_CASES)}")
    fit = None if told["fit"] is None else _take_fit(told["fit"])
    if action != "keep" and None in (rank, axes, fit):
        raise ValueError(f"{path!r} has no rank, no axes or no fit to {action} it")
    fields = {"reason": _take(told["reason"], str), "shape": shape, "axes": axes, "rank": rank}
    fields |= {"fit": fit, "cost": None if told["cost"] is None else _take_cost(told["cost"])}
    shrink = _SHRINKERS.get(_take(told["shrink"] or "", str))
    return Kept(**fields) if action == "keep" else _CASES[action](**fields, shrink=shrink)


def _take_entry(told: Any) -> Entry:
    code, *shape = _take(told, list)
    entry = Entry(_take_sizes(shape), DTYPES[code])
    if not entry.possible:
        raise ValueError(f"{shape} is larger than any memory")
    return entry


def _take_keys(path: str, told: Any) -> tuple[str | int, ...] | None:
    keys = told if told is None else tuple(_take(key, str, int) for key in told)
    if keys is not None and "/".join(map(str, keys)) != path:
        raise ValueError(f"{keys} are not the keys of {path!r}")
    return keys


def _take_all(told: Any) -> Manifest:
    told = _take(told, dict)
    if _take(told["format"], int) > FORMAT:
        raise ValueError(f"format {told['format']}, and this rmtjax knows {FORMAT}: upgrade it")
    plan, entries, factors = told["plan"], told["entries"], told["factors"]
    if plan is not None:
        plan = Plan({path: _take_layer(path, row) for path, row in _take(plan, dict).items()})
    if entries is not None:
        entries = {name: _take_entry(row) for name, row in _take(entries, dict).items()}
    if factors is not None:
        factors = tuple(_take(path, str) for path in _take(factors, list))
    return Manifest(
        plan=plan,
        rule=_take(told["rule"], str, NoneType),
        versions={name: _take(text, str) for name, text in _take(told["versions"], dict).items()},
        factors=factors,
        entries=entries,
        keys={path: _take_keys(path, keys) for path, keys in _take(told["keys"], dict).items()},
    )


def parse(text: str) -> Manifest:
    """All that a checkpoint says of itself.

    Raises:
      ValueError: The text is malformed, or of a newer format.
    """
    try:
        return _take_all(parse_json(text))
    except (KeyError, TypeError, OverflowError, ValueError) as error:
        cause = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"the plan in the metadata cannot be read: {cause}. Where it is damaged, write the "
            "checkpoint again."
        ) from error


def from_json(text: str) -> Plan:
    """The plan of a checkpoint; empty where none was saved.

    Raises:
      ValueError: The text is malformed, or of a newer format.
    """
    plan = parse(text).plan
    return Plan() if plan is None else plan
