"""Einsums of inputs with a kernel: the axes of the kernel, and two einsums that stand for one."""

import string

from rmtjax._axes import KernelAxes


def _terms(equation: str) -> list[str]:
    """The letters of inputs, kernel and outputs."""
    return equation.replace(" ", "").replace("->", ",").split(",")


def einsum_axes(equation: str) -> KernelAxes | None:
    """What becomes of the axes of the kernel in `inputs,kernel->outputs`.

    Letters of the kernel and the inputs alone are contracted: the rows. Those of the kernel and
    the outputs alone are the columns; those of all three make a stack.

    Returns:
      None where the kernel is no matrix: a letter comes twice, stands for several axes or is
      the kernel's alone.
    """
    inputs, kernel, outputs = _terms(equation)
    letters = set(kernel)
    if len(letters) < len(kernel) or "." in letters or letters - {*inputs, *outputs}:
        return None
    choose = lambda fits: tuple(axis for axis, letter in enumerate(kernel) if fits(letter))
    return KernelAxes(
        choose(lambda letter: letter not in outputs),
        choose(lambda letter: letter not in inputs),
        choose(lambda letter: letter in inputs and letter in outputs),
    )


def split_einsum(equation: str, axes: KernelAxes) -> tuple[str, str]:
    """The two equations of a kernel in factors, left and right, batch axes first in both."""
    inputs, kernel, outputs = _terms(equation)
    batch, rows, columns = (
        "".join(kernel[axis] for axis in group) for group in (axes.batch, axes.inputs, axes.outputs)
    )
    rank = next(letter for letter in string.ascii_letters if letter not in equation)
    hidden = "".join(letter for letter in inputs if letter not in rows) + rank
    return f"{inputs},{batch}{rows}{rank}->{hidden}", f"{hidden},{batch}{rank}{columns}->{outputs}"
