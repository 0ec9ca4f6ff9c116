"""Prepares spectra for a fit: without rows and columns of zeros, and on a scale near 1.

Zeros are no noise: they change the aspect ratio of what is left. Squares of large and small entries
leave float32, so such a kernel is judged over a power of two, and its fit is moved back in float64.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from rmtjax._axes import MatrixView
from rmtjax._types import BulkFit, Spectrum


class Piece(NamedTuple):
    """Matrices of a kernel with as many rows and columns that are not zero.

    Rows and columns of zeros are no noise, and the law is that of the others.
    """

    path: str
    matrices: slice
    spectra: Spectrum  # of the others
    shrunk: float  # their longer side over that of the kernel
    exponent: Int[np.ndarray, " b"]


def split_pieces(path: str, values: Any, view: MatrixView) -> list[Piece]:
    """Returns a kernel as one piece, or matrix by matrix if there are zeros.

    `values` are those that `rmtjax.spectra` has found.
    """
    (eigenvalues, ratio), _, live, exponent = values
    sides = np.array((view.rows, view.columns))
    if (live == sides).all() or not live.any():
        return [Piece(path, slice(None), values.spectrum, 1.0, exponent)]
    pieces = []
    for index, counts in enumerate(live):
        short, long = sorted(map(int, counts if counts.all() else sides))
        one = slice(index, index + 1)
        kept: Any = eigenvalues[one, :short] * ratio.dtype.type(view.long / long)
        new: Any = np.full(1, short / long, ratio.dtype)
        pieces.append(Piece(path, one, Spectrum(kept, new), long / view.long, exponent[one]))
    return pieces


def rescale(fits: BulkFit, piece: Piece, *, back: bool) -> BulkFit:
    """Returns fits on the scale of a piece, or back on that of the kernel."""
    if piece.shrunk == 1 and not piece.exponent.any():
        return fits
    power, factor = (
        (2 * piece.exponent, piece.shrunk) if back else (-2 * piece.exponent, 1 / piece.shrunk)
    )
    # In float64, which has room for squares of float32, unless only zeros were left out.
    wide = lambda number: number.astype(np.float64) if piece.exponent.any() else number
    move = lambda number: np.ldexp(wide(np.asarray(number)), power)
    along = lambda number: (move(number) * factor).astype(move(number).dtype)
    with np.errstate(over="ignore", under="ignore"):
        # The variance of an entry does not depend on how many there are.
        return fits._replace(
            variance=move(fits.variance), edge=along(fits.edge), threshold=along(fits.threshold)
        )


def on_scale(spectrum: Spectrum, exponent: np.ndarray) -> Spectrum:
    """Returns a spectrum on the scale of its kernel: in float64, if it was moved."""
    if not exponent.any():
        return spectrum
    eigenvalues: Any = spectrum.eigenvalues
    with np.errstate(over="ignore", under="ignore"):
        moved: Any = np.ldexp(eigenvalues.astype(np.float64), 2 * exponent[:, None])
    return spectrum._replace(eigenvalues=moved)
