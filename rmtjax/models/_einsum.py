"""Einsum equations `inputs,kernel->outputs`: the kernel's axes, and the equations of its factors.

Example: in `bsd,dhk->bshk`, the kernel has the input axis d and the output axes h and k. With
factors, `bsd,da->bsa` and `bsa,ahk->bshk` compute the same outputs.
"""

import string

from rmtjax._axes import KernelAxes


def _terms(equation: str) -> list[str]:
    """Returns the letters of the inputs, of the kernel and of the outputs."""
    return equation.replace(" ", "").replace("->", ",").split(",")


def einsum_axes(equation: str) -> KernelAxes | None:
    """Returns the axes of the kernel in `inputs,kernel->outputs`.

    Letters that it shares with the inputs only are input axes, with the outputs only output axes,
    with both batch axes. None if a letter is repeated, is an ellipsis, or is in the kernel only.
    """
    inputs, kernel, outputs = _terms(equation)
    letters = set(kernel)
    # A repeated letter is a diagonal and a letter of the kernel alone is a sum. In neither case are
    # the outputs a product with the kernel as it is stored.
    if len(letters) < len(kernel) or "." in letters or letters - {*inputs, *outputs}:
        return None
    groups = letters - {*outputs}, letters - {*inputs}, letters & {*inputs} & {*outputs}
    return KernelAxes(*(tuple(sorted(map(kernel.index, group))) for group in groups))


def split_einsum(equation: str, axes: KernelAxes) -> tuple[str, str]:
    """Returns the equations for the left and the right factor, with batch axes first in both."""
    inputs, kernel, outputs = _terms(equation)
    rows, columns, batch = ("".join(kernel[axis] for axis in group) for group in axes)
    rank = next(letter for letter in string.ascii_letters if letter not in equation)
    # The first einsum contracts the rows, so the second one sees every other letter of the inputs.
    hidden = "".join(letter for letter in inputs if letter not in rows) + rank
    return f"{inputs},{batch}{rows}{rank}->{hidden}", f"{hidden},{batch}{rank}{columns}->{outputs}"
