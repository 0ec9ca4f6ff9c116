"""Renders a report as one HTML page that needs no network and no other file."""

import base64
import functools
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jax
import numpy as np

from rmtjax._modes import in_usual_modes
from rmtjax._text import printable
from rmtjax._types import BulkFit
from rmtjax.laws import law_curve, roots, rounding
from rmtjax.planning import Cost, LayerPlan, NO_OTHERS, Others, Plan
from rmtjax.report._columns import choices_of, COSTS, layout, shown, TEXTS, USUAL
from rmtjax.report._row import Row, to_cell, to_text
from rmtjax.report._words import shares_cut, split_named, verdict, VERDICTS

POINTS, MOST_SPIKES = 60, 500
BARS = 40  # of a bulk, at most
SEEN = 10  # rows of which one is open at once: a figure further down would not be seen
_LONG = ("reason", *COSTS, "removed_outputs")  # of a line each on narrow screens
_HEADS = {
    "path": "kernel",
    "action": "verdict",
    "multiply_adds": "multiply-adds",
    "removed_outputs": "removed of outputs",
}
_ARROW = " \u2192\u00a0"  # a line may break before it, not after
Metrics = Mapping[str, Mapping[str, Any]]


class _Drawn(NamedTuple):
    """Holds the matrix of a kernel that is drawn: in a stack, the one with the most spikes."""

    values: np.ndarray  # square roots of the eigenvalues, descending
    ratio: float
    fit: BulkFit  # of numbers
    place: int
    matrices: int

    @property
    def has_noise(self) -> bool:
        """Returns True if there is noise above rounding, and a direction that is not a spike."""
        floor = rounding(self.values) ** 2
        noise = all(floor < cut < np.inf for cut in (self.fit.edge, self.fit.threshold))
        return noise and bool(self.fit.num_spikes < self.values.size)


def _choose(layer: LayerPlan) -> _Drawn | None:
    """Returns what is drawn of a kernel; None if it has no finite spectrum."""
    if layer.spectrum is None or layer.fit is None:
        return None
    stack = np.asarray(layer.spectrum.eigenvalues)
    stack = stack.reshape(-1, stack.shape[-1])
    i = int(np.argmax(layer.fit.num_spikes))
    if not np.isfinite(stack[i]).all():
        return None
    fit = BulkFit(*(np.ravel(field)[i] for field in layer.fit))
    return _Drawn(roots(stack[i]), float(layer.spectrum.ratio), fit, i + 1, len(stack))


def _short(value: float) -> float | None:
    """Returns a number with four digits, which suffice for every pixel; None if not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


# All curves in one program, which is compiled once for each number of kernels.
_curve = jax.jit(jax.vmap(functools.partial(law_curve, points=POINTS)))


def _laws(drawn: Sequence[_Drawn]) -> list[dict[str, Any]]:
    """Returns the laws of all kernels: ends, peak, and densities in thousandths of the peak."""
    if not drawn:
        return []
    numbers = ((d.ratio, d.values.size, d.fit.num_spikes, d.fit.edge) for d in drawn)
    ratio, size, spikes, edge = map(np.array, zip(*numbers, strict=True))
    # At an edge of 1, and moved in float64: edges may leave the range of float32.
    units = np.ones(len(edge), np.float32)
    grids, densities = map(np.asarray, _curve(np.float32(ratio), size, spikes, units))
    root = np.sqrt(edge.astype(np.float64))[:, None]
    grids, densities = grids * root, densities / root
    peaks = densities.max(axis=1)
    # Integers of three digits: the page of a large model has 180,000 of them.
    heights = np.rint(1000 * densities / peaks[:, None]).astype(int)
    columns = (array.tolist() for array in (grids[:, 0], grids[:, -1], peaks, heights))
    return [
        {"lower": _short(low), "upper": _short(high), "peak": _short(peak), "heights": shape}
        for low, high, peak, shape in zip(*columns, strict=True)
    ]


def count_values(values: np.ndarray, bins: int, stop: float) -> tuple[list[int], int]:
    """Returns the counts of the values in bars from 0 to `stop`, and the number of zeros."""
    # The zeros of a truncated kernel would make one bar so high that no other could be seen.
    present = values > rounding(values)
    counts, _ = np.histogram(values[present], bins, (0, stop))
    return counts.tolist(), int((~present).sum())


def _axis(top: float, cut: float, size: int) -> tuple[int, float]:
    """Returns the number of bars and where the last one ends; about 3 p^(1/3) are in the bulk."""
    # The threshold is an edge of bars: one on both sides of it would show noise as spikes.
    bins = int(np.ceil(np.clip(3 * size ** (1 / 3), 8, BARS)))
    # Spikes that are far away would flatten the bulk. Then bars stop at twice the threshold. Values
    # up to three times the threshold are shown: no reader expects an axis to end just before one.
    last = 2 * cut if top > 3 * cut else max(top, 1.1 * cut)
    number = int(np.ceil(bins * last / cut - 1e-6))
    # Rounding must not leave the largest value outside.
    return number, max(number * cut / bins, last)


def _spectrum(drawn: _Drawn, law: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the numbers from which the script draws a spectrum."""
    top = float(drawn.values[0])
    cut = float(drawn.fit.threshold) ** 0.5 if drawn.has_noise else top
    number, stop = _axis(top, cut or 1.0, drawn.values.size)
    counts, zeros = count_values(drawn.values, number, stop)
    spikes = int(drawn.fit.num_spikes) if law else 0
    numbers = {"ratio": drawn.ratio, **drawn.fit._asdict()}
    names = "ratio", "variance", "edge", "threshold", "distance"
    return {
        **{name: _short(float(numbers[name])) for name in names},
        "size": drawn.values.size,
        "counts": counts,
        "stop": stop,
        "zeros": zeros,
        "law": law,
        "spikes": spikes,
        "beyond": int((drawn.values[:spikes] > stop).sum()),
        "largest": [_short(float(v)) for v in drawn.values[: min(spikes, MOST_SPIKES)]],
        "place": drawn.place,
        "matrices": drawn.matrices,
    }


def _spectra(plan: Plan) -> list[dict[str, Any] | None]:
    """Returns the spectra of all kernels, None for those that are not drawn."""
    drawn = [_choose(layer) for layer in plan.values()]
    laws = iter(_laws([d for d in drawn if d is not None and d.has_noise]))
    return [d and _spectrum(d, next(laws) if d.has_noise else None) for d in drawn]


def _to_open(rows: Sequence[Row], spectra: Sequence[dict[str, Any] | None]) -> int | None:
    """Returns the row that is open at once: the largest cut, or the first with a law; or None."""
    shares, _ = shares_cut(rows)
    drawn = [(i, one["law"] is not None) for i, one in enumerate(spectra) if one]
    near = [(i, law) for i, law in drawn if i < SEEN] or drawn
    return max(near, key=lambda pair: (shares[pair[0]], pair[1]), default=(None,))[0]


def to_script(data: Any) -> str:
    """Returns JSON for a script element."""
    # A name such as "</script>" would end the element.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # in ASCII
    return re.sub("[<>&]", lambda sign: f"\\u{ord(sign[0]):04x}", text)


def _head(name: str) -> str:
    """Returns the head of a column; a long name may break where it has an underscore."""
    # The script sorts a column of numbers by the field in its key, and others by their text.
    key = "" if name in TEXTS else f' data-key="{name}"'
    text = _HEADS.get(name, name.replace("_", "_<wbr>"))
    return f'<th scope="col"{key}>{text}</th>'


def _line(row: Row, columns: Sequence[str], metrics: Metrics, applied: bool) -> str:
    """Returns a row of the table."""
    known = lambda name: metrics.get(row.path, {}).get(name)
    texts = {
        name: to_cell(row, name, _ARROW) if name in Row._fields else to_text(known(name))
        for name in columns
    }
    texts["path"] = texts["path"] or "(no name)"
    texts["reason"] = texts["reason"].removeprefix(f"{VERDICTS[row.action]}: ")
    path, _, *rest = (html.escape(text) for text in texts.values())
    path = re.sub("[/.]", r"\g<0><wbr>", path)  # where a long name may break
    badge = f'<td><b class="{row.action}">{verdict(row.action, applied)}</b></td>'
    cells = badge + "".join(map(_cell, columns[2:], rest))
    return f'<tr><th scope="row">{path}</th>{cells}</tr>'


def _cell(name: str, text: str) -> str:
    """Returns a cell after that of the verdict."""
    # On a narrow screen, where there is no head, the style sheet writes the name before a number.
    label = "" if name == "reason" else f' data-name="{_HEADS.get(name, name)}"'
    if name in COSTS:  # a line may break before the positions, not within
        text = re.sub(" of (.+) ", " of\u00a0\\1\u00a0", text)
    kind = ' class="long"' if name in _LONG else ' class="shape"' if name == "shape" else ""
    if name == "shape":
        text = text.replace("x", "x<wbr>")  # never within a number
    return f"<td{kind}{label}>{text}</td>"


def _totals(rows: Sequence[Row], totals: Cost, others: Others, applied: bool) -> str:
    """Returns the totals that are shown above the table."""
    kernels, unnamed = split_named(rows)
    actions = Counter(sorted(row.action for row in kernels))
    words = ", ".join(f"{count:,} {verdict(name, applied)}" for name, count in actions.items())
    entries = {"kernels": f"{actions.total():,} <small>{words}</small>"}
    if unnamed:
        numbers = f"{sum(row.parameters or 0 for row in unnamed):,} numbers, kept"
        entries["tensors under other names"] = f"{len(unnamed):,} <small>{numbers}</small>"
    if others.tensors:
        numbers = f"{others.parameters:,} numbers, not looked at"
        entries["other tensors"] = f"{others.tensors:,} <small>{numbers}</small>"
    for name in COSTS:
        before, after = getattr(totals, name), getattr(totals, f"{name}_after")
        if before is not None:
            percent = f"{after / before - 1:+.1%}".replace("-", "\u2212") if before else ""
            change = f" <small>{percent}</small>" if before != after else ""
            entries[_HEADS.get(name, name)] = to_cell(totals, name, _ARROW) + change
    return "".join(f"<div><dt>{head}</dt><dd>{text}</dd></div>" for head, text in entries.items())


@functools.cache
def _asset(suffix: str) -> str:
    return resources.files("rmtjax.report").joinpath(f"page.{suffix}").read_text("utf-8")


def _digest(text: str) -> str:
    """Returns the digest by which the policy of the page allows a script or a style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _columns(rows: Sequence[Row], totals: Cost, asked: Sequence[str]) -> tuple[str, ...]:
    """Returns the columns of the page: those that it always has, and those that were asked for."""
    unknown = {"milliseconds"} if totals.milliseconds is None else set()
    if all(row.removed_outputs is None for row in rows):
        unknown.add("removed_outputs")
    usual = (name for name in USUAL if name not in unknown)
    others = (name for name in shown(asked) if name not in unknown)
    return tuple(dict.fromkeys((*usual, *others)))


def _number(row: Row, name: str, metrics: Metrics) -> float | int | None:
    """Returns the number by which a column is sorted."""
    if name in Row._fields:
        return getattr(row, name)
    value = metrics.get(row.path, {}).get(name)
    return float(f"{value:.6g}") if isinstance(value, float) else value


@in_usual_modes
def render(
    title: str,
    rows: Sequence[Row],
    totals: Cost,
    plan: Plan,
    others: Others = NO_OTHERS,
    *,
    summary: str,
    applied: bool = False,
    asked: Sequence[str] = (),
    metrics: Metrics | None = None,
) -> str:
    """Returns the page of a report; `plan` has the spectra of the rows, in the same order.

    The page has the `summary` on top. It opens with the columns `asked`, whose numbers `metrics`
    has, or else a narrow table.
    """
    known: Metrics = metrics or {}
    columns = _columns(rows, totals, asked)
    choices = choices_of(columns, asked)
    numbers = {
        name: [_number(row, name, known) for row in rows] for name in columns if name not in TEXTS
    }
    actions, spectra = sorted({row.action for row in rows}), _spectra(plan)
    option = lambda action: f'<option value="{action}">{verdict(action, applied)}</option>'
    choice = lambda name: f'<option value="{name}">{name}</option>'
    style, script = f"{_asset('css')}{layout(columns, choices)}\n", _asset("js")
    fields = {
        "title": html.escape(printable(title)),
        "style": style,
        "script": script,
        "style_digest": _digest(style),
        "script_digest": _digest(script),
        "summary": "".join(
            re.sub("`(.*?)`", r"<code>\1</code>", f"<p>{html.escape(line)}</p>")
            for line in summary.splitlines()
        ),
        "totals": _totals(rows, totals, others, applied),
        "options": "".join(map(option, actions)),
        "one_choice": " hidden" if len(choices) == 1 else "",
        "choices": "".join(map(choice, choices)),
        "first": next(iter(choices)),
        "head": "".join(map(_head, columns)),
        "rows": "\n".join(_line(row, columns, known, applied) for row in rows),
        "data": to_script(
            {"numbers": numbers, "spectra": spectra, "open": _to_open(rows, spectra)}
        ),
    }
    # In one pass, because a kernel may have a name such as "{{rows}}".
    return re.sub(r"\{\{(\w+)\}\}", lambda field: fields[field[1]], _asset("html"))
