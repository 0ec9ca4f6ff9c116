r"""The second moment of a kernel's inputs as a cut uses it: raw or centred, and shrunk.

Ledoit and Wolf shrink a moment $S$ of $N$ rows with $m$ entries towards
$\mu I$, $\mu = \operatorname{tr} S / m$:

$S^* = (1 - \delta) S + \delta \mu I$, $\quad \delta = \min(b^2 / d^2, 1)$,
$\quad d^2 = \|S - \mu I\|_F^2$, $\quad b^2 = \frac{1}{N^2} \sum \|x x^T - S\|_F^2
= \frac1N \big(\frac1N \sum |x|^4 - \|S\|_F^2\big)$.

Centred, $x - \bar x$ takes the place of $x$.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rmtjax.moments._moment import Moment


class Second(NamedTuple):
    r"""The second moments of a kernel's inputs, as NumPy arrays of float64.

    Attributes:
      exact: $C = \frac1N \sum x x^T$, or its diagonal; centred, that of $x - \bar x$.
      intensity: $\delta$ of the shrinkage, in [0, 1].
      mean: $\bar x$ where the moments are centred, else None.
      weights: $G$, the second moment of the gradients of the model's outputs with respect to the
        outputs of the kernel, shrunk; None if all outputs count alike.
      transposed: The second moments of the rows that the transpose of the kernel is multiplied
        with, if the model uses it too; else None.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, rmtjax
      >>> module, x = nn.Dense(3), jnp.eye(4)
      >>> variables = module.init(jax.random.key(0), x)
      >>> second = rmtjax.linen.moments(module, variables, [x]).second("kernel", centred=False)
      >>> second.exact.shape, second.mean is None
      ((1, 4, 4), True)
    """

    exact: Float[np.ndarray, "stack m m"] | Float[np.ndarray, "stack m"]
    intensity: Float[np.ndarray, " stack"]
    mean: Float[np.ndarray, "stack m"] | None
    weights: Float[np.ndarray, "stack n n"] | None = None
    transposed: Any = None  # a `Second` as well


def _squared_norm(exact: np.ndarray) -> np.ndarray:
    return np.sum(exact**2, axis=tuple(range(1, exact.ndim)))


def trace(exact: np.ndarray) -> np.ndarray:
    """Returns the trace of each matrix, also of those that are given by their diagonals."""
    return exact.sum(axis=1) if exact.ndim == 2 else np.trace(exact, axis1=1, axis2=2)


def shrink(second: Second, least: float = 0.0) -> np.ndarray:
    """Returns moments, or their diagonals, shrunk by at least a share."""
    exact, share = second.exact, np.maximum(second.intensity, least)
    level = share * trace(exact) / exact.shape[-1]
    share, level = (a.reshape(-1, *[1] * (exact.ndim - 1)) for a in (share, level))
    unit = np.eye(exact.shape[-1]) if exact.ndim == 3 else 1.0
    return (1 - share) * exact + level * unit


def _fourth(moment: Moment, centred: bool) -> np.ndarray:
    r"""Returns $\frac1N \sum |x|^4$, or $\frac1N \sum |x - \bar x|^4$, from sums over x."""
    rows = np.asarray(moment.rows, np.float64)
    fourth = np.asarray(moment.fourth, np.float64) / rows
    if not centred:
        return fourth
    # |x - m|^2 = a - 2 b + c with a = |x|^2, b = m x, c = |m|^2, where the mean of b is c.
    mean = moment.mean
    second = np.asarray(moment.second, np.float64) / rows[:, None, None]
    a, c = trace(second), np.sum(mean**2, axis=1)
    bb = np.einsum("bi,bij,bj->b", mean, second, mean)
    ab = np.sum(mean * np.asarray(moment.third, np.float64), axis=1) / rows
    return fourth + 4 * bb + c**2 - 4 * ab + 2 * a * c - 4 * c**2


def second_moment(moment: Moment, *, centred: bool, shrinkage: float | None) -> Second:
    """Returns the second moments of a kernel, with their shrinkage.

    Args:
      moment: Sums over at least one row.
      centred: Whether the mean is taken off; not of lookups, whose moments are diagonal.
      shrinkage: The intensity, or None for that of Ledoit and Wolf.
    """
    centred = centred and not moment.is_diagonal
    rows = np.asarray(moment.rows, np.float64)
    exact = np.asarray(moment.second, np.float64)
    exact = exact / rows.reshape(-1, *[1] * (exact.ndim - 1))
    mean = moment.mean if centred else None
    if mean is not None:
        exact = exact - mean[:, :, None] * mean[:, None, :]
    if shrinkage is not None:
        return Second(exact, np.full(len(rows), float(shrinkage)), mean)
    norm = _squared_norm(exact)
    spread = norm - trace(exact) ** 2 / moment.size  # d^2
    noise = np.maximum(_fourth(moment, centred) - norm, 0) / rows  # b^2
    # Equal eigenvalues have nothing to be shrunk, and leave nothing to divide by.
    with np.errstate(divide="ignore", invalid="ignore"):
        intensity = np.where(spread > 0, np.minimum(noise / spread, 1), 0.0)
    return Second(exact, intensity, mean)
