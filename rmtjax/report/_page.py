"""A report as one HTML page, which needs nothing else: no network, and no other file."""

import base64
import functools
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import jax
import numpy as np

from rmtjax._text import printable
from rmtjax._types import BulkFit
from rmtjax.noise import Histogram, histogram, law_curve, roots, rounding
from rmtjax.planning import Cost, LayerPlan, Plan
from rmtjax.report._row import Row, to_cell

BINS, POINTS, MOST_SPIKES = 80, 60, 50
_VERDICTS = {"factorize": "factorized", "truncate": "truncated", "keep": "kept"}
# Heads and fields, in the order that the style sheet of narrow screens numbers.
_COLUMNS = {
    "kernel": "path",
    "verdict": "action",
    "reason": "reason",
    "shape": "shape",
    "spikes": "spikes",
    "rank": "rank",
    "distance": "distance",
    "parameters": "parameters",
    "multiply-adds": "multiply_adds",
    "milliseconds": "milliseconds",
}
_ARROW = " \u2192\u00a0"  # a line may break before it, not after
_TEXTS = ("path", "action", "reason", "shape")
_NUMBERS = [name for name in _COLUMNS.values() if name not in _TEXTS]


class _Drawn(NamedTuple):
    """The one matrix of a kernel that is drawn: of a stack that with most spikes."""

    values: np.ndarray  # square roots of the eigenvalues, descending
    ratio: float
    fit: BulkFit  # of numbers
    place: int
    matrices: int

    @property
    def has_noise(self) -> bool:
        """Whether there is noise above rounding, and a rank that the spikes have left to it."""
        floor = rounding(self.values) ** 2
        noise = all(floor < cut < np.inf for cut in (self.fit.edge, self.fit.threshold))
        return noise and bool(self.fit.num_spikes < self.values.size)


def _choose(layer: LayerPlan) -> _Drawn | None:
    """What to draw of a kernel, or None: it has no spectrum, or one that is not finite."""
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
    """Four digits, which no pixel needs more of; None where there is no number."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


# Compiled once for each number of kernels.
_curve = jax.jit(jax.vmap(functools.partial(law_curve, points=POINTS)))


def _laws(drawn: Sequence[_Drawn]) -> list[dict[str, Any]]:
    """The laws of all kernels at once: ends, peak, and densities in thousandths of it."""
    if not drawn:
        return []
    numbers = ((d.ratio, d.values.size, d.fit.num_spikes, d.fit.edge) for d in drawn)
    ratio, size, spikes, edge = map(np.array, zip(*numbers, strict=True))
    grids, densities = map(np.asarray, _curve(np.float32(ratio), size, spikes, np.float32(edge)))
    peaks = densities.max(axis=1)
    heights = np.rint(1000 * densities / peaks[:, None]).astype(int).tolist()
    ends = np.column_stack([grids[:, 0], grids[:, -1], peaks]).tolist()
    names = "lower", "upper", "peak"
    return [
        dict(zip(names, map(_short, numbers), strict=True), heights=shape)
        for numbers, shape in zip(ends, heights, strict=True)
    ]


def _bars(drawn: _Drawn) -> Histogram:
    """Some 3 p^(1/3) bars share the bulk; spikes that are far away would flatten it."""
    top, bins = float(drawn.values[0]), np.clip(3 * drawn.values.size ** (1 / 3), 8, BINS / 2)
    cut = float(drawn.fit.threshold) ** 0.5 if drawn.has_noise else top
    stop = float(np.clip(top, 1.1 * cut, 2 * cut)) or 1.0
    return histogram(drawn.values, int(np.ceil(bins * stop / (cut or 1.0))), stop)


def _spectrum(drawn: _Drawn, law: dict[str, Any] | None) -> dict[str, Any]:
    """One spectrum, as the script draws it, with its numbers."""
    bars, spikes = _bars(drawn), int(drawn.fit.num_spikes) if law else 0
    numbers = {"ratio": drawn.ratio, **drawn.fit._asdict()}
    names = "ratio", "variance", "edge", "threshold", "distance"
    return {
        **{name: _short(float(numbers[name])) for name in names},
        "size": drawn.values.size,
        "counts": bars.counts.tolist(),
        "stop": bars.stop,
        "zeros": bars.zeros,
        "law": law,
        "spikes": spikes,
        "largest": [_short(float(v)) for v in drawn.values[: min(spikes, MOST_SPIKES)]],
        "place": drawn.place,
        "matrices": drawn.matrices,
    }


def _spectra(plan: Plan) -> list[dict[str, Any] | None]:
    """The spectra of all kernels, None where there is none to draw."""
    drawn = [_choose(layer) for layer in plan.values()]
    laws = iter(_laws([d for d in drawn if d is not None and d.has_noise]))
    return [d and _spectrum(d, next(laws) if d.has_noise else None) for d in drawn]


def to_script(data: Any) -> str:
    """JSON that may stand in a script: no text in it can end the element, or a line."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # in ASCII
    return re.sub("[<>&]", lambda sign: f"\\u{ord(sign[0]):04x}", text)


def _verdict(action: str) -> str:
    return _VERDICTS.get(action, action)


def _line(row: Row, columns: dict[str, str]) -> str:
    """A row of the table."""
    verdict = _verdict(row.action)
    texts = {name: to_cell(row, name, _ARROW) for name in columns.values()}
    texts["path"] = texts["path"] or "(no name)"
    texts["reason"] = texts["reason"].removeprefix(f"{verdict}: ")
    path, _, *rest = (html.escape(text) for text in texts.values())
    path = re.sub("[/.]", r"\g<0><wbr>", path)  # a name is broken there first
    badge = f'<b class="{html.escape(row.action)}">{html.escape(verdict)}</b>'
    cells = "".join(f"<td>{cell}</td>" for cell in (badge, *rest))
    return f'<tr><th scope="row">{path}</th>{cells}</tr>'


def _head(columns: dict[str, str]) -> str:
    """The heads of the columns; those of numbers tell their field."""
    key = lambda name: "" if name in _TEXTS else f' data-key="{name}"'
    return "".join(f'<th scope="col"{key(name)}>{head}</th>' for head, name in columns.items())


def _percent(ratio: float) -> str:
    return f"{ratio - 1:+.1%}".replace("-", "\u2212")


def _totals(actions: Counter[str], totals: Cost) -> str:
    """The sums above the table."""
    words = ", ".join(f"{count:,} {_verdict(name)}" for name, count in actions.items())
    kernels = f"{actions.total():,} <small>{html.escape(words)}</small>"
    entries = {"kernels": kernels}
    for head, name in list(_COLUMNS.items())[-3:]:
        before, after = getattr(totals, name), getattr(totals, f"{name}_after")
        if before is not None:
            change = f" <small>{_percent(after / before)}</small>" if before != after else ""
            entries[head] = to_cell(totals, name, _ARROW) + change
    return "".join(f"<div><dt>{head}</dt><dd>{text}</dd></div>" for head, text in entries.items())


def _options(actions: Counter[str]) -> str:
    """The choice of verdicts that there are."""
    return "".join(
        f'<option value="{html.escape(action)}">{html.escape(_verdict(action))}</option>'
        for action in actions
    )


@functools.cache
def _asset(suffix: str) -> str:
    return resources.files("rmtjax.report").joinpath(f"page.{suffix}").read_text("utf-8")


def _digest(text: str) -> str:
    """By which a page names the one script, or style, that it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def render(title: str, rows: Sequence[Row], totals: Cost, plan: Plan) -> str:
    """The page of a report: its rows as a table, and what the script needs besides.

    Args:
      title: Its heading.
      rows: Those of the report.
      totals: The sums of their costs.
      plan: The plan behind the rows, in the same order.
    """
    timed = totals.milliseconds is not None
    columns = {head: name for head, name in _COLUMNS.items() if timed or name != "milliseconds"}
    numbers = {name: [getattr(row, name) for row in rows] for name in _NUMBERS}
    actions = Counter(sorted(row.action for row in rows))
    style, script = _asset("css"), _asset("js")
    fields = {
        "title": html.escape(printable(title)),
        "style": style,
        "script": script,
        "style_digest": _digest(style),
        "script_digest": _digest(script),
        "totals": _totals(actions, totals),
        "options": _options(actions),
        "head": _head(columns),
        "rows": "\n".join(_line(row, columns) for row in rows),
        "data": to_script({"numbers": numbers, "spectra": _spectra(plan)}),
    }
    # In one pass: what looks like a field in a name is none.
    return re.sub(r"\{\{(\w+)\}\}", lambda field: fields[field[1]], _asset("html"))
