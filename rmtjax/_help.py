"""Makes `dir` and `help` of public modules readable: public names only, and short annotations."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from jax.typing import ArrayLike

from rmtjax._types import Axes, Where

_MODULES = re.compile(r"\b(?:[a-z_]\w*\.)+(?=\w)")
_ARRAYS = re.compile(r"(?:Float|Int|Bool|Num|UInt8|Inexact)\[(?:Array|ndarray), '[^']*'\]")


def _strip(annotation: Any) -> str:
    """Returns an annotation as text, without modules, and with arrays of any shape as `Array`."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return _ARRAYS.sub("Array", _MODULES.sub("", text)).replace("NoneType", "None")


def _with_bars(text: str) -> str:
    """Returns a text with `A | B` in the place of `Union[A, B]`, each alternative once."""
    begin = text.rfind("Union[")
    if begin < 0:
        return text
    depth, parts = 0, [""]
    for end, sign in enumerate(text[begin + 6 :], begin + 6):
        depth += (sign == "[") - (sign == "]")
        if depth < 0:
            alternatives = dict.fromkeys(part.strip() for part in parts)
            return _with_bars(text[:begin] + " | ".join(alternatives) + text[end + 1 :])
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return text


_NAMES = {
    _with_bars(_strip(kind)): name
    for kind, name in ((ArrayLike, "ArrayLike"), (Where, "Where"), (Axes, "Axes"))
}


class _Text:
    """An annotation that is shown as a text."""

    def __init__(self, annotation: Any):
        text = _with_bars(_strip(annotation))
        for known, name in _NAMES.items():
            text = text.replace(known, name)
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _shorten(function: Callable[..., Any]) -> None:
    """Gives a function a signature whose annotations are short texts."""
    signature = inspect.signature(function)
    short = lambda kind: kind if kind is inspect.Signature.empty else _Text(kind)
    parameters = [p.replace(annotation=short(p.annotation)) for p in signature.parameters.values()]
    shown = signature.replace(
        parameters=parameters, return_annotation=short(signature.return_annotation)
    )
    function.__signature__ = shown  # pyright: ignore[reportFunctionMemberAccess]


def tidy(module: ModuleType) -> None:
    """Lets `dir` list the public names of a module, and `help` show short signatures."""
    module.__dir__ = partial(sorted, module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value):
            _shorten(value)
