"""Says in a few sentences what a report has found, and what may be done next."""

from collections import Counter
from collections.abc import Sequence

from rmtjax._text import printable
from rmtjax.planning import Cost, Others
from rmtjax.report._row import Row

_VERDICTS = {"factorize": "factorized", "truncate": "truncated"}


def count(number: int, noun: str) -> str:
    """Returns a number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _analyzed(rows: Sequence[Row], others: Others) -> str:
    numbers = count(sum(row.parameters or 0 for row in rows), "parameter")
    rest = ""
    if others.tensors:
        rest = f" Not analyzed: {count(others.tensors, 'other tensor')} with {others.parameters:,}."
    return f"Analyzed: {count(len(rows), 'kernel')} with {numbers}.{rest}"


def _found(rows: Sequence[Row]) -> str:
    with_fit = [row for row in rows if row.spikes is not None]
    spikes = [row for row in with_fit if row.spikes]
    if not spikes:
        return "No direction stands out of the noise." if with_fit else "No spectrum was fitted."
    most = max(spikes, key=lambda row: row.spikes or 0)
    total = count(sum(row.spikes or 0 for row in spikes), "direction")
    verb = "stands" if total == "1 direction" else "stand"
    where = f"of {most.path}" if len(spikes) == 1 else f"in {count(len(spikes), 'kernel')}"
    words = f"{total} {where} {verb} out of the noise"
    return f"{words}." if len(spikes) == 1 else f"{words}, most in {most.path} ({most.spikes:,})."


def _next(rows: Sequence[Row], totals: Cost, applied: bool) -> str:
    actions = Counter(row.action for row in rows)
    if not actions["factorize"] + actions["truncate"]:
        return "Every kernel is kept: the reasons say why."
    verb = lambda number: "would be" if not applied else "was" if number == 1 else "were"
    words = ((actions[action], word) for action, word in _VERDICTS.items() if actions[action])
    verdicts = [f"{number:,} {verb(number)} {word}" for number, word in words]
    begin = "" if applied else "Nothing is changed yet. "
    before, after = totals.parameters, totals.parameters_after
    size = f": {before:,} -> {after:,} parameters ({after / before - 1:+.1%})" if before else ""
    verdicts += [f"{actions['keep']:,} kept"] if actions["keep"] else []
    # What the data see of a cut counts for more than its squares.
    by_output = any(row.removed_outputs is not None for row in rows)
    share = lambda row: (row.removed_outputs if by_output else row.removed) or 0
    cut = max(rows, key=lambda row: (row.action != "keep") * share(row))
    kind, digits = ("mean square of outputs", 2) if by_output else ("squares", 0)
    lost = f" The largest share of {kind} removed is {share(cut):.{digits}%}, in {cut.path}."
    lost += _alone(rows)
    return f"{begin}{', '.join(verdicts)}{size}.{lost} Measure the outputs before you keep a cut."


def _alone(rows: Sequence[Row]) -> str:
    """Returns a sentence on the only kernel that a budget cuts, such as a table of embeddings."""
    cut = [row for row in rows if row.action != "keep"]
    if len(cut) > 1 or len(rows) < 3 or "under the budget" not in cut[0].reason:
        return ""
    return f" The whole cut is in this one kernel of {len(rows)}: leave it out to cut the others."


def summarize(rows: Sequence[Row], totals: Cost, others: Others, applied: bool) -> list[str]:
    """Returns what was analyzed, what stands out, and what to do next: a paragraph each."""
    if not rows:
        return ["There are no kernels."]
    lines = [_analyzed(rows, others), _found(rows), _next(rows, totals, applied)]
    return [printable(line) for line in lines]
