r"""Dyson equalizer: scales of the noise by rows and by columns, from the diagonal of the resolvent.

For noise whose entries have the variances $x_i y_j$, the diagonals of the resolvents
$g = \eta\, (W W^T + \eta^2)^{-1}$ and $h = \eta\, (W^T W + \eta^2)^{-1}$ solve the Dyson equations
$1 / g_i - \eta = x_i \sum_j y_j h_j$ and $1 / h_j - \eta = y_j \sum_i x_i g_i$. A few strong
directions of signal hardly change these diagonals, while they dominate sums of squares.
"""

from functools import partial
from typing import Any, get_args, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from rmtjax._axes import MatrixView, native
from rmtjax._modes import in_usual_modes
from rmtjax._sharding import by_compiler, fetch
from rmtjax._text import brief_fields
from rmtjax.laws import tracy_widom

Sides = Literal["both", "rows", "columns"]

# Steps shrink what is left by a factor of five or more. Log-normal scales of 1 take six.
_MAX_STEPS = 30
# Of the variances of rows and columns, in a step. Their errors by the draw are above 0.05.
_MOVES = 1e-3
_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class Equalized(NamedTuple):
    r"""Holds a matrix over the scales of its noise, and these scales.

    The standard deviation of the noise in the entry (i, j) of the matrix that was given is
    `rows[i] * columns[j]`. Both have the same mean square.

    Attributes:
      matrix: The matrix over its scales. Its noise has a variance near 1.
      rows: Scales of the m rows, positive.
      columns: Scales of the n columns, positive.
      converged: False if the steps have not come to rest, and for a matrix that is not finite,
        which stays as it is.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (100, 200)).at[:50].multiply(3.0)
      >>> even = rmtjax.equalize(noise)
      >>> print(f"{even.rows[:50].mean() / even.rows[50:].mean():.1f}")
      3.0
    """

    matrix: Float[Array, "m n"]
    rows: Float[Array, " m"]
    columns: Float[Array, " n"]
    converged: Bool[Array, ""]

    __repr__ = brief_fields


def _median(values: Float[Array, " p"], matrix: Float[Array, "m n"]) -> Array:
    """Returns the median of ascending singular values without those of zero rows and columns."""
    size, present = len(values), matrix != 0
    live = jnp.minimum(jnp.sum(present.any(axis=0)), jnp.sum(present.any(axis=1)))
    first = size - jnp.maximum(live, 1)
    return (values[(first + size - 1) // 2] + values[(first + size) // 2]) / 2


def _variances(matrix: Float[Array, "m n"], sides: Sides) -> tuple[Array, Array]:
    """Returns the variances of rows and columns that solve the equations of a wide matrix."""
    squares, vectors = jnp.linalg.eigh(_matmul(matrix, matrix.T))
    squares = jnp.maximum(squares, 0)
    eta = _median(jnp.sqrt(squares), matrix)
    eta = jnp.where(eta > 0, eta, 1)
    # At unit eta: one minus a small sum would lose the digits of the columns.
    weights = 1 / (squares / eta**2 + 1)
    inner = _matmul(vectors**2, weights)
    rest = _matmul(vectors**2, squares / eta**2 * weights)
    outer = _matmul(_matmul(matrix.T, vectors) ** 2, weights) / eta**2
    of_rows, of_columns = rest / inner, outer / (1 - outer)
    if sides == "rows":
        return eta**2 * of_rows / jnp.sum(1 - outer), jnp.ones_like(outer)
    if sides == "columns":
        return jnp.ones_like(rest), eta**2 * of_columns / jnp.sum(inner)
    total = jnp.sqrt(jnp.sum(rest))
    return eta * of_rows / total, eta * of_columns / total


def _step(matrix: Float[Array, "m n"], sides: Sides) -> tuple[Array, Array]:
    """Returns the variances of rows and columns, with one mean; 1 for those of zeros."""
    if matrix.shape[0] > matrix.shape[1]:
        turned: Any = {"rows": "columns", "columns": "rows"}.get(sides, sides)
        columns, rows = _variances(matrix.T, turned)
    else:
        rows, columns = _variances(matrix, sides)
    if sides == "both":  # only their products are known
        means = jnp.mean(rows), jnp.mean(columns)
        share = jnp.where(means[0] > 0, jnp.sqrt(means[1] / means[0]), 1)
        rows, columns = rows * share, columns / share
    return jnp.where(rows > 0, rows, 1), jnp.where(columns > 0, columns, 1)


def _equalize(matrix: Float[Array, "m n"], sides: Sides) -> Equalized:
    lifted = matrix if jnp.finfo(matrix.dtype).bits > 32 else matrix.astype(jnp.float32)
    finite = jnp.isfinite(lifted).all()
    # A decomposition may not end on NaN. Squares of large entries leave float32.
    safe = jnp.where(finite, lifted, 0)
    peak = jnp.max(jnp.abs(safe))
    unit = safe / jnp.where(peak > 0, peak, 1)

    def moves(state):
        *_, moved, steps = state
        return (moved > _MOVES) & (steps < _MAX_STEPS)

    def step(state):
        rows, columns, _, steps = state
        x, y = _step(unit / rows[:, None] / columns[None], sides)
        moved = jnp.max(jnp.abs(jnp.log(jnp.concatenate([x, y]))))
        return rows * jnp.sqrt(x), columns * jnp.sqrt(y), moved, steps + 1

    ones = [jnp.ones(side, lifted.dtype) for side in matrix.shape]
    start = (*ones, jnp.full((), jnp.inf, lifted.dtype), jnp.zeros((), jnp.int32))
    rows, columns, moved, _ = lax.while_loop(moves, step, start)
    mean_square = lambda scales: jnp.mean(scales**2)
    balance = (mean_square(columns) / mean_square(rows)) ** 0.25
    root = jnp.sqrt(jnp.where(peak > 0, peak, 1))
    rows, columns = (
        jnp.where(finite, scales, 1) for scales in (rows * balance * root, columns / balance * root)
    )
    even = lifted / rows[:, None] / columns[None]
    return Equalized(even, rows, columns, finite & (moved <= _MOVES))


_compiled = jax.jit(_equalize, static_argnames="sides")


@partial(jax.jit, static_argnames="sides")
def _equalize_each(stack: Float[Array, "b m n"], *, sides: Sides) -> Equalized:
    """Equalizes the matrices of a stack, one after another: each ends when it is done."""
    return lax.map(lambda matrix: _equalize(matrix, sides), stack)


def equalizes(rule: object) -> bool:
    """Returns True for a rule that judges kernels over the scales of their rows and columns."""
    return getattr(rule, "equalize", False) is True


def advises(rule: object) -> bool:
    """Returns True for a rule that tells of refused kernels whether they fit once equalized."""
    return getattr(rule, "equalize", False) == "advise"


def level_after(level: float, ratio: float) -> float:
    r"""Returns the level to ask for, so that noise whose both sides were equalized has `level`.

    Scales that are estimated make the bulk narrower, and the largest eigenvalue stands out more: by
    $1.1 \gamma^{3/2}$ on the Tracy-Widom scale. That was simulated for p = 60 to 200.
    """
    moved = tracy_widom.ppf(1 - level) + 1.1 * ratio**1.5
    return float(np.clip(1 - tracy_widom.cdf(moved), 1e-6, level))


def check_sides(name: str, sides: Any) -> None:
    """Raises ValueError unless `sides` names rows, columns or both."""
    if sides not in get_args(Sides):
        raise ValueError(f"`{name}` must be one of {get_args(Sides)}, got {sides!r}.")


@in_usual_modes
def equalize(matrix: Float[ArrayLike, "m n"], *, sides: Sides = "both") -> Equalized:
    r"""Finds the scales of the noise by rows and by columns, and divides the matrix by them.

    For $W_{ij} = S_{ij} + r_i c_j Z_{ij}$ with noise Z of variance 1 and a signal S of low rank.
    With $\eta$ the median singular value, each step computes $g = \eta \operatorname{diag}
    (W W^T + \eta^2)^{-1}$ and $h = \eta \operatorname{diag} (W^T W + \eta^2)^{-1}$, and divides
    the rows and columns of W by the roots of

    $x_i = (1 / g_i - \eta) / \sqrt{m - \eta \sum g}, \quad
    y_j = (1 / h_j - \eta) / \sqrt{n - \eta \sum h}$.

    The first step is the Dyson equalizer. The steps go on until no variance moves by 0.1 %, at
    most thirty times. A step costs the eigenvectors of a Gram matrix.

    Args:
      matrix: Real matrix of any floating dtype; below float32 it is lifted to float32. Works
        under `jit` and `vmap`.
      sides: What has scales of its own: "both", "rows" or "columns". The scales of the other side
        are then equal.

    Returns:
      `Equalized(matrix, rows, columns, converged)`. The scales of rows and columns of zeros mean
      nothing.

    Raises:
      ValueError, TypeError: `matrix` does not have two axes, entries, or a real floating dtype, or
        `sides` is another word.

    Examples:
      >>> import jax, rmtjax
      >>> scales = jax.numpy.exp(0.5 * jax.random.normal(jax.random.key(1), (200, 1)))
      >>> kernel = scales * jax.random.normal(jax.random.key(0), (200, 400))
      >>> even = rmtjax.equalize(kernel)
      >>> count = lambda matrix: int(rmtjax.fit_bema(rmtjax.spectrum(matrix)).num_spikes)
      >>> count(kernel), count(even.matrix), bool(even.converged)
      (94, 0, True)

    A fit of the matrix that is returned has more false alarms than its level: two or three times
    as many. `ranks.bema(equalize=True)` allows for that.

    It finds nothing for noise that is not independent, such as a product of matrices. A row that
    has both noise and a strong signal of its own, in few columns, keeps a part of the signal in
    its scale.

    References:
      Landa and Kluger, Inf. Inference 14 (2025) iaae036, https://arxiv.org/abs/2306.11263, for the
      Dyson equalizer; its authors repeat it in BRINE, https://klugerlab.github.io/BRINE.
    """
    check_sides("sides", sides)
    array = jnp.asarray(native(matrix))
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"`matrix` must have two axes and entries, got shape {array.shape}. Reshape a "
            "convolution kernel to (window * in, out) first."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`matrix` must be real and floating, got dtype {array.dtype}: cast it.")
    return by_compiler(partial(_compiled, sides=sides), array)


def equalize_stack(view: MatrixView, sides: Sides = "both") -> Equalized:
    """Returns what `equalize` finds of each matrix of a dense kernel, with a leading axis."""
    leaf = view.leaf if isinstance(view.leaf, jax.core.Tracer) else fetch(view.leaf)
    stack = MatrixView(view.path, jnp.asarray(leaf), view.axes).matrices()
    return by_compiler(partial(_equalize_each, sides=sides), stack)


def equalized_view(view: MatrixView, sides: Sides = "both") -> MatrixView:
    """Returns a dense kernel over the scales of its noise."""
    even = equalize_stack(view, sides)
    return MatrixView(view.path, view.from_matrices(even.matrix), view.axes)
