"""Chooses the columns of a report: fields of rows, metrics of spectra, and groups of both."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rmtjax._types import BulkFit, Spectrum
from rmtjax.noise import metrics_of_each, SpectralMetrics
from rmtjax.planning import LayerPlan, Plan
from rmtjax.report._extra import ExtraMetrics, SpectralChange
from rmtjax.report._row import Row, to_number

_NORMS = ("spectral_norm", "frobenius_norm", "stable_rank", "effective_rank", "numerical_rank")
_ALPHA = ("alpha", "alpha_error", "alpha_tail", "alpha_start", "alpha_distance")
_TESTS = ("lognormal_ratio", "lognormal_p", "exponential_ratio", "exponential_p")
_HILL = ("hill", "hill_error", "hill_tail", "alpha_weighted", "log_alpha_norm")
_LAW = ("ratio", "variance", "edge", "threshold", "spikes", "distance")
_SIGNAL = ("mp_softrank", "snr", "snr_noise")
_SHUFFLED, _POOLED = ExtraMetrics._fields[:3], ExtraMetrics._fields[3:]
_OTHERS = (*ExtraMetrics._fields, *SpectralChange._fields)  # that a spectrum does not have
GROUPS = {
    "summary": ("path", "shape", "spikes", "distance", "stable_rank", "alpha", "reason"),
    "law": ("path", *_LAW, *_SIGNAL),
    "ranks": ("path", "rank", "removed", *_NORMS, "condition"),
    "tails": ("path", *_ALPHA, *_TESTS, *_HILL),
    "cost": ("path", "parameters", "multiply_adds", "milliseconds"),
    "traps": ("path", "spikes", *_SHUFFLED),
    "pooled": ("path", "hill", *_POOLED),
    "change": ("path", "spikes", *SpectralChange._fields),
    "all": (*Row._fields, *SpectralMetrics._fields),
}
TEXTS = ("path", "action", "reason", "shape")
COSTS = ("parameters", "multiply_adds", "milliseconds")
# The columns that a page always has, and those among them that have to be measured.
USUAL = (*TEXTS, "spikes", "rank", "distance", "removed", *COSTS, "removed_outputs")
_UNKNOWN = ("milliseconds", "removed_outputs")
_KINDS = {int | None: "Int64", float | None: "float64"}
_COUNTS = {"numerical_rank", "alpha_tail", "hill_tail"}
# Least and usual widths on a page where a number does not have that of its name.
_WIDTHS = {"path": ("9em", "3fr"), "action": ("7em",), "reason": ("10em", "4fr")}
_WIDTHS |= {"shape": ("8.5em",), "spikes": ("5.5em",), "rank": ("4.5em",)}
_WIDTHS |= dict.fromkeys(("milliseconds", "removed_outputs"), ("9em",))
_WIDTHS |= {"parameters": ("8em",), "multiply_adds": ("9.5em",)}


def expand_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """Returns names of columns, each once, in the place of names and groups.

    Raises:
      ValueError: A name is neither that of a column nor that of a group.
    """
    names = tuple(name for column in columns for name in GROUPS.get(column, (column,)))
    unknown = sorted(set(names) - set(GROUPS["all"]) - set(_OTHERS))
    if unknown:
        raise ValueError(
            f"`columns` must be fields of `Row` {Row._fields}, of `SpectralMetrics` "
            f"{SpectralMetrics._fields} or {_OTHERS}, or groups {tuple(GROUPS)}, got "
            f"{unknown[0]!r}."
        )
    return tuple(dict.fromkeys(names))


def width_of(name: str) -> tuple[str, str]:
    """Returns the least and the usual width of a column on a page, as CSS has them."""
    longest = max(map(len, name.split("_")))
    widths = _WIDTHS.get(name, (f"{max(6.8, 0.55 * longest + 3):.4g}em",))
    return widths[0], widths[-1]


def shown(names: Sequence[str]) -> list[str]:
    """Returns columns without those whose number stands behind an arrow, as a cost after a plan."""
    return [name for name in names if not name.endswith("_after")]


def choices_of(columns: Sequence[str], asked: Sequence[str]) -> dict[str, list[str]]:
    """Returns what a reader of a page can choose among: groups by name, with their columns."""
    usual = [name for name in columns if name in USUAL]
    if not asked:
        return {"default": list(columns)}
    present = {*columns, *_UNKNOWN}
    wanted = {"as asked": asked, "default": usual}
    wanted |= {name: group for name, group in GROUPS.items() if present.issuperset(shown(group))}
    choices: dict[str, list[str]] = {}
    for title, names in wanted.items():
        chosen = [name for name in columns if name in (*TEXTS[:2], *names)]
        if chosen not in choices.values():
            choices[title] = chosen
    return choices


def layout(columns: Sequence[str], choices: Mapping[str, Sequence[str]]) -> str:
    """Returns the style of each choice: the widths of its columns; the others are not shown."""
    rules = []
    for title, chosen in choices.items():
        table = f'table[data-columns="{title}"]'
        widths = [width_of(name) for name in chosen]
        grid = " ".join(
            least if least == usual else f"minmax({least},{usual})" for least, usual in widths
        )
        least = sum(float(least.removesuffix("em")) for least, _ in widths)
        rules.append(f"{table} {{ --grid: {grid}; --least: {least:.4g}em; }}")
        hidden = [i for i, name in enumerate(columns, 1) if name not in chosen]
        cells = ", ".join(f"{table} tr > :nth-child({i})" for i in hidden)
        rules += [f"{cells} {{ display: none; }}"] if hidden else []
    return "\n".join(rules)


def dtypes(columns: Sequence[str]) -> dict[str, str]:
    """Returns the types of the columns of numbers in pandas."""
    # pandas would make floats of integers among which one is missing.
    kinds = {name: _KINDS.get(kind) for name, kind in Row.__annotations__.items()}
    floats = (*SpectralMetrics._fields, *_OTHERS)
    kinds |= {name: "float64" for name in floats} | dict.fromkeys(_COUNTS, "Int64")
    return {name: kind for name in columns if (kind := kinds[name])}


def _matrices(layer: LayerPlan) -> list[tuple[Spectrum, BulkFit, int]]:
    """Returns spectrum, noise and rank of each matrix of a kernel; none if not finite."""
    spectrum, fit = layer.spectrum, layer.fit
    if spectrum is None or fit is None or not np.isfinite(spectrum.eigenvalues).all():
        return []
    stack = spectrum.eigenvalues.reshape(-1, spectrum.eigenvalues.shape[-1])
    fits = [BulkFit(*numbers) for numbers in zip(*map(np.ravel, fit), strict=True)]
    rows = zip(stack, fits, strict=True)
    return [(Spectrum(row, spectrum.ratio), fit, int(layer.rank or 0)) for row, fit in rows]


def _of_stack(members: Sequence[SpectralMetrics]) -> dict[str, Any]:
    """Returns the mean over a stack, and the largest of its counts."""
    columns = zip(SpectralMetrics._fields, zip(*members, strict=True), strict=True)
    one = lambda name, numbers: (
        int(max(numbers)) if name in _COUNTS else to_number(np.mean(np.float64(numbers)))
    )
    return {name: one(name, numbers) for name, numbers in columns}


def spectral_metrics(plan: Plan) -> dict[str, dict[str, Any]]:
    """Returns the metrics of each kernel by path and name: numbers, None for what is not there."""
    matrices = {path: _matrices(layer) for path, layer in plan.items()}
    parts = tuple(zip(*itertools.chain(*matrices.values()), strict=True)) or ((), (), ())
    found = iter(metrics_of_each(*parts))
    none: dict[str, Any] = dict.fromkeys(SpectralMetrics._fields)
    return {
        path: _of_stack([next(found) for _ in members]) if members else none
        for path, members in matrices.items()
    }
