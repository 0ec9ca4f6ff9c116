"""Prepares spectra for a fit: without rows and columns of zeros, and on a scale near 1.

Zeros are no noise: they change the aspect ratio of what is left. Squares of large and small entries
leave float32, so such a kernel is judged over a power of two, and its fit is moved back in float64.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rmtjax._axes import MatrixView
from rmtjax._types import BulkFit, LiveSpectrum, Spectrum


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


def pad_spectrum(spectrum: Spectrum) -> LiveSpectrum:
    """Returns a spectrum with zeros behind it, so that one program fits kernels of many sizes.

    The lengths are 64, 96, 128, 192, 256 and so on. A fit compiles for longer than it runs.
    """
    if isinstance(spectrum, LiveSpectrum):
        return spectrum
    eigenvalues, ratio = spectrum
    size = eigenvalues.shape[-1]
    power = 1 << max((size - 1).bit_length(), 6)
    length = 3 * power // 4 if 64 < size <= 3 * power // 4 else power
    numbers: Any = np if isinstance(eigenvalues, np.ndarray) else jnp
    padded = numbers.pad(eigenvalues, [(0, 0)] * (eigenvalues.ndim - 1) + [(0, length - size)])
    return LiveSpectrum(padded, ratio, numbers.full(eigenvalues.shape[:-1], size, np.int32))


def level_of(piece: Piece, fit: BulkFit) -> BulkFit:
    """Returns a noise level that is known for a kernel on the scale of a piece of it."""
    level = jax.tree.map(lambda numbers: np.ravel(numbers)[piece.matrices], fit)
    cast = lambda new, old: new.astype(old.dtype)
    return jax.tree.map(cast, rescale(level, piece, back=False), level)


def live_spectra(spectra: Spectrum, matrices: Float[Array, "b m n"]) -> tuple[LiveSpectrum, Array]:
    """Returns spectra of a stack as those of the rows and columns that are not zero, in a program.

    And the longer sides of these over that of the stack. A matrix of zeros keeps its sides.
    """
    present, sides = matrices != 0, matrices.shape[1:]
    live = [present.any(axis).sum(-1, dtype=jnp.int32) for axis in (2, 1)]
    live = [jnp.where(live[0] > 0, one, side) for one, side in zip(live, sides, strict=True)]
    short, long = jnp.minimum(*live), jnp.maximum(*live)
    dtype = spectra.eigenvalues.dtype
    share, ratio = long.astype(dtype) / max(sides), short.astype(dtype) / long.astype(dtype)
    return LiveSpectrum(spectra.eigenvalues / share[:, None], ratio, short), share


def fit_live(rule: Any, least: int, spectra: Spectrum, matrices: Array, rank: Any = None):
    """Returns the noise in a stack without its zeros, and whether a rule accepts it, in a program.

    The scale of the fits is that of the whole matrices, as in a plan. What zeros leave must have a
    short side of at least `least`, if the matrices have.
    """
    live, share = live_spectra(spectra, matrices)
    kept = None if rank is None else jnp.minimum(rank, live.size)
    fits = jax.vmap(lambda spectrum, rank: rule.fit(spectrum, rank))(live, kept)
    accepted = jax.vmap(rule.accepts)(live, fits)
    accepted &= live.size >= min(least, *matrices.shape[1:])
    return fits._replace(edge=fits.edge * share, threshold=fits.threshold * share), accepted


def on_scale(spectrum: Spectrum, exponent: np.ndarray) -> Spectrum:
    """Returns a spectrum on the scale of its kernel: in float64, if it was moved."""
    if not exponent.any():
        return spectrum
    eigenvalues: Any = spectrum.eigenvalues
    with np.errstate(over="ignore", under="ignore"):
        moved: Any = np.ldexp(eigenvalues.astype(np.float64), 2 * exponent[:, None])
    return spectrum._replace(eigenvalues=moved)
