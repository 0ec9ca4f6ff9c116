"""Says in a few sentences what a report has found, and what may be done next."""

from collections import Counter
from collections.abc import Sequence

from rmtjax._text import printable
from rmtjax.planning import Cost, Others, UNNAMED
from rmtjax.report._row import Row

VERDICTS = {"factorize": "factorized", "truncate": "truncated", "keep": "kept"}


def verdict(action: str, applied: bool) -> str:
    """Returns the verdict on a kernel; "would be" stands before it until a plan is carried out."""
    word = VERDICTS[action]
    return word if applied or action == "keep" else f"would be {word}"


def split_named(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Returns the rows of kernels, and those of tensors that are no kernels by their names."""
    named = lambda row: not row.reason.startswith(UNNAMED)
    return [row for row in rows if named(row)], [row for row in rows if not named(row)]


def shares_cut(rows: Sequence[Row]) -> tuple[list[float], bool]:
    """Returns the share that each row loses, and whether it is one of outputs, or of squares."""
    # What the data see of a cut counts for more than its squares.
    by_output = any(row.removed_outputs is not None for row in rows)
    share = lambda row: (row.removed_outputs if by_output else row.removed) or 0.0
    return [share(row) if row.action != "keep" else 0.0 for row in rows], by_output


def count(number: int, noun: str) -> str:
    """Returns a number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _analyzed(rows: Sequence[Row], others: Others) -> str:
    kernels, unnamed = split_named(rows)
    size = lambda rows: sum(row.parameters or 0 for row in rows)
    rest = ""
    if unnamed:
        words = "not a kernel by its name" if len(unnamed) == 1 else "not kernels by their names"
        rest = f" Kept: {count(len(unnamed), 'tensor')} with {size(unnamed):,}, {words}."
    if others.tensors:
        rest += (
            f" Not analyzed: {count(others.tensors, 'other tensor')} with {others.parameters:,}."
        )
    numbers = count(size(kernels), "parameter")
    return f"Analyzed: {count(len(kernels), 'kernel')} with {numbers}.{rest}"


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


def _planned(rows: Sequence[Row], totals: Cost, applied: bool) -> str:
    actions = Counter(row.action for row in rows)
    if not actions["factorize"] + actions["truncate"]:
        return "Every kernel is kept: the reasons say why."
    verb = lambda number: "would be" if not applied else "was" if number == 1 else "were"
    cuts = ("factorize", "truncate")
    words = ((actions[action], VERDICTS[action]) for action in cuts if actions[action])
    verdicts = [f"{number:,} {verb(number)} {word}" for number, word in words]
    begin = "" if applied else "Nothing is changed yet. "
    before, after = totals.parameters, totals.parameters_after
    size = f": {before:,} -> {after:,} parameters ({after / before - 1:+.1%})" if before else ""
    verdicts += [f"{actions['keep']:,} kept"] if actions["keep"] else []
    shares, by_output = shares_cut(rows)
    most = max(shares)
    kind, digits = ("mean square of outputs", 2) if by_output else ("squares", 0)
    lost = f" The largest share of {kind} removed is {most:.{digits}%}, in "
    lost += f"{rows[shares.index(most)].path}.{_alone(rows)}"
    return f"{begin}{', '.join(verdicts)}{size}.{lost}"


def _call(rows: Sequence[Row], applied: bool, difference: bool) -> str:
    """Returns the calls that carry a plan out; nothing for a plan that cuts nothing."""
    if all(row.action == "keep" for row in rows):
        return ""
    if difference:
        return "To write these directions as an adapter, call `rmtjax.adapters.extract_lora`."
    last = "Measure the outputs before you keep a cut."
    if applied:
        return last
    by_output = shares_cut(rows)[1]
    given = "report.plan, moments=moments" if by_output else "report.plan"
    calls = f"`rmtjax.factorize(params, {given})`, or `rmtjax.nnx.factorize(model, {given})`"
    moments = (
        "With `moments=` from `rmtjax.linen.moments` or `rmtjax.nnx.moments`, `analyze` cuts what "
        "the outputs need least. "
    )
    return (
        f"To cut, call {calls}; for a file, `rmtjax compress`. {'' if by_output else moments}{last}"
    )


def _alone(rows: Sequence[Row]) -> str:
    """Returns a sentence on the only kernel that a budget cuts, such as a table of embeddings."""
    cut = [row for row in rows if row.action != "keep"]
    if len(cut) > 1 or len(rows) < 3 or "under the budget" not in cut[0].reason:
        return ""
    return f" One kernel of {len(rows)} takes the whole cut. To spread it, leave that one out."


def summarize(
    rows: Sequence[Row], totals: Cost, others: Others, *, applied: bool, difference: bool
) -> list[str]:
    """Returns what was analyzed, what stands out, what a plan does, and the calls for it."""
    if not rows:
        return ["There are no kernels."]
    kernels, _ = split_named(rows)
    lines = [_analyzed(rows, others), _found(kernels), _planned(kernels, totals, applied)]
    return [printable(line) for line in (*lines, _call(kernels, applied, difference)) if line]
