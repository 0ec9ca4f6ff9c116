"""Makes names safe to print, and numbers, arrays and tables short enough to read."""

import html
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.core
import numpy as np

SCREEN = 20  # rows that a representation shows
_TEXTS = ("path", "reason")  # columns of words, which may go on in a second line
_NARROWEST = 20  # characters of a column of reasons
# The columns that a narrow table keeps longest come first.
_WANTED = [
    "spikes",
    "rank",
    "removed",
    "removed_outputs",
    "parameters",
    "distance",
    "milliseconds",
    "shape",
]


def printable(name: str) -> str:
    """Returns a name in which control characters, which could steer a terminal, are escaped."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def _is_known(value: Any) -> bool:
    """Returns True for an array whose entries this process can read."""
    if isinstance(value, jax.Array):
        traced = isinstance(value, jax.core.Tracer)
        return not traced and value.is_fully_addressable and not value.is_deleted()
    return isinstance(value, np.ndarray | np.generic)


def brief(value: Any) -> str:
    """Returns a number with four digits; of an array its type and shape, and its range if known."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return f"{value:.4g}" if isinstance(value, float) else repr(value)
    kind = f"{value.dtype}{[*value.shape]}"
    if not _is_known(value) or np.asarray(value).dtype.kind not in "iuf" or not value.size:
        return kind
    array = np.asarray(value)
    text = lambda number: f"{number}" if array.dtype.kind in "iu" else f"{number:.4g}"
    low, high = text(array.min()), text(array.max())
    return high if array.ndim == 0 else f"{kind} from {low} to {high}"


def brief_fields(self: Any) -> str:
    """Returns a named tuple as text: the `__repr__` of those that hold arrays."""
    fields = ", ".join(f"{name}={brief(value)}" for name, value in self._asdict().items())
    return f"{type(self).__name__}({fields})"


class ThinType(type):
    """The type of kernels in parts: it prints a hint for who meets one unawares.

    Where two trees differ, the error of JAX prints the types of both subtrees. Nothing else in it
    is ours, and the usual cause is the state of an optimizer that belongs to the dense kernels.
    """

    def __repr__(cls) -> str:
        """Returns the name and the hint."""
        return (
            f"<class 'rmtjax.{cls.__name__}'>, a kernel in parts. If the other tree is the state "
            "of an optimizer for the dense kernels, carry it over by "
            "`rmtjax.transfer_opt_state(opt_state, params, thin)`, or call `optimizer.init(thin)`."
        )


class InParts(metaclass=ThinType):
    """A kernel in parts, which is no array and says so. A tuple would repeat and join its parts."""

    __slots__ = ()

    def _refuse(self, *others: Any) -> Any:
        """Raises TypeError, with the remedies."""
        del others
        raise TypeError(
            f"arithmetic needs arrays, got {type(self).__name__}: a kernel in parts. Multiply it "
            "out by `rmtjax.merge(params)`, or run the model by `rmtjax.linen.apply`. In an "
            "optimizer, parameters and state do not belong together: carry the state over by "
            "`rmtjax.transfer_opt_state(opt_state, params, thin)`, or call `optimizer.init`."
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __pow__ = __neg__ = _refuse


def first_lines(lines: Sequence[str]) -> list[str]:
    """Returns as many lines as fit a screen, and how many more there are."""
    more = len(lines) - SCREEN
    return [*lines[:SCREEN], *([f"... and {more} more"] if more > 0 else [])]


def no_such_path(path: Any, paths: Iterable[str]) -> KeyError:
    """Returns the error for a kernel that is not in a plan or a report."""
    known = [repr(printable(name)) for name in paths]
    some = ", ".join(known[:SCREEN]) + (", ..." if len(known) > SCREEN else "")
    return KeyError(f"there is no kernel {path!r}; there are {some or 'none'}")


def _fit(columns: dict[str, list[str]], width: int) -> dict[str, int]:
    """Returns the widths of the columns that a line has room for. It leaves out whole columns."""
    widths = {name: max(map(len, cells)) for name, cells in columns.items()}
    most = {"path": 3 * width // 5, "reason": _NARROWEST}
    least = {name: min(widths[name], most[name]) for name in _TEXTS if name in widths}
    order = {name: place for place, name in enumerate(_WANTED)}
    numbers = [name for name in widths if name not in least]
    room = lambda: width - 2 * (len(widths) - 1) - sum(widths[name] for name in numbers)
    while numbers and room() < sum(least.values()):
        dropped = max(numbers, key=lambda name: order.get(name, len(order)))
        numbers.remove(dropped)
        del widths[dropped]
    for name in least:  # the path first, and the reason has what is left
        others = sum(least.values()) - least[name] if name == _TEXTS[0] else 0
        space = max(room() - others, 8)
        used = min(widths[name], space)
        widths[name], width = used, width - used
    return widths


def align(head: Sequence[str], lines: Iterable[Sequence[str]], width: int | None = None) -> str:
    """Returns a table as aligned text.

    With a `width`, columns that have no room are left out, and words go on in a second line.
    """
    table = [head, *lines]
    columns = {name: list(cells) for name, *cells in zip(head, *table, strict=True)}
    widths = {name: max(map(len, cells)) for name, cells in columns.items()}
    if width is not None and sum(widths.values()) + 2 * (len(widths) - 1) > width:
        widths = _fit(columns, width)
    text = []
    for cells in zip(*(columns[name] for name in widths), strict=True):
        wrap = lambda cell, size: textwrap.wrap(cell, size) if len(cell) > size else [cell]
        parts = [wrap(cell, size) for cell, size in zip(cells, widths.values(), strict=True)]
        for place in range(max(map(len, parts))):
            line = [part[place] if place < len(part) else "" for part in parts]
            text.append("  ".join(map(str.ljust, line, widths.values())).rstrip())
    return "\n".join(text)


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], foot: Sequence[str] = ()) -> str:
    """Returns an HTML table without a style."""
    cells = lambda line, tag: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
    line = lambda line, tag="td": f"<tr>{cells(line, tag)}</tr>"
    body = "\n".join(map(line, rows))
    tail = f"\n<tfoot>{line(foot)}</tfoot>" if foot else ""
    # With these classes, notebooks do not take a dollar sign in a name for mathematics.
    table = '<table class="tex2jax_ignore mathjax_ignore">'
    return f"{table}\n<thead>{line(head, 'th')}</thead>\n<tbody>\n{body}\n</tbody>{tail}\n</table>"
