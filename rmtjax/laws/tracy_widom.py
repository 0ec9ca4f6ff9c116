r"""The Tracy-Widom law: fluctuations of the largest eigenvalue of noise.

For real noise (`beta=1`) the largest eigenvalue of $W^T W / n$ is close to
$\sigma^2 [(1+\sqrt\gamma)^2 + x\, n^{-2/3} \gamma^{-1/6} (1+\sqrt\gamma)^{4/3}]$, where x has
this law. For complex noise `beta` is 2. `cdf` and `ppf` are exact to 1e-4.

A table holds the normal score $\Phi^{-1}(F_\beta(x))$ at steps of one half. The score is nearly a
straight line, so few points are enough. It comes from the Fredholm determinants
$F_1(x) = \det(1 - A_x)$ and $F_2(x) = \det(1 - A_x^2)$, with the kernel
$A_x(s, t) = \mathrm{Ai}(s + t + x)$ on the half-line. They were computed by Gauss-Legendre
quadrature with 100 nodes, and the test of this module computes them again.

References:
  Tracy and Widom, Commun. Math. Phys. 177 (1996) 727-754. Ferrari and Spohn, J. Phys. A 38
  (2005) L557, https://arxiv.org/abs/math-ph/0505012 (the determinant for `beta=1`).
  Bornemann, Math. Comp. 79 (2010) 871-915, https://arxiv.org/abs/0804.2543 (the quadrature).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jax.typing import ArrayLike
from jaxtyping import Array, Float

__all__ = ["cdf", "ppf"]

# fmt: off
_SCORES = {
    1: (-8.0, np.array([
        -6.951522, -6.324748, -5.715073, -5.122757, -4.548046, -3.991163, -3.452297, -2.931591,
        -2.429124, -1.944889, -1.478776, -1.030542, -0.599799, -0.185991, 0.211599, 0.593842,
        0.961733, 1.316347, 1.658793, 1.990166, 2.311507, 2.623782, 2.927860, 3.224517,
        3.514436, 3.798215, 4.076376, 4.349378, 4.617622, 4.881461, 5.141209, 5.397142,
        5.649507, 5.898527, 6.144399, 6.387303, 6.627403,
    ])),
    2: (-6.5, np.array([
        -6.396555, -5.601544, -4.833317, -4.092255, -3.378643, -2.692629, -2.034161, -1.402925,
        -0.798289, -0.219259, 0.335513, 0.867676, 1.379082, 1.871655, 2.347285, 2.807735,
        3.254598, 3.689277, 4.112995, 4.526810, 4.931634, 5.328260, 5.717371, 6.099567,
        6.475372, 6.845246,
    ])),
}
# fmt: on
_STEP = 0.5


def _table(beta: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the points of the table, their normal scores, and the slopes of these."""
    if beta not in _SCORES:
        raise ValueError(f"`beta` must be 1 (real noise) or 2 (complex noise), got {beta}.")
    first, scores = _SCORES[beta]
    points = first + _STEP * np.arange(len(scores))
    return points, scores, np.gradient(scores, _STEP, edge_order=2)


def _interpolate(x, nodes: np.ndarray, values: np.ndarray, slopes: np.ndarray):
    """Interpolates by cubic Hermite splines, and beyond the table by its last tangents."""
    steps, rises = np.diff(nodes), np.diff(values)
    twist = (slopes[1:] + slopes[:-1] - 2 * rises / steps) / steps
    bend = (rises / steps - slopes[:-1]) / steps - twist
    cells = np.stack([nodes[:-1], values[:-1], slopes[:-1], bend, twist / steps])
    left = jnp.clip(jnp.searchsorted(jnp.asarray(nodes, x.dtype), x) - 1, 0, len(steps) - 1)
    start, value, slope, bend, twist = jnp.asarray(cells, x.dtype)[:, left]
    # Tangents keep the tails monotone, where a cubic would turn back.
    inner = jnp.clip(x, nodes[0], nodes[-1])
    step = inner - start
    cubic = value + step * (slope + step * (bend + step * twist))
    return cubic + (x - inner) * jnp.where(x < nodes[0], slopes[0], slopes[-1])


def _lift(x: ArrayLike) -> Float[Array, "..."]:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


@partial(jax.jit, static_argnames="beta")  # One small program, and not one for each operation.
def cdf(x: ArrayLike, *, beta: int = 1) -> Float[Array, "..."]:
    r"""Returns the probability that the scaled largest eigenvalue is at most x.

    Args:
      x: Any shape.
      beta: 1 for real noise, 2 for complex noise. Others raise ValueError.

    Returns:
      Values in [0, 1], at least float32.

    Examples:
      >>> import rmtjax
      >>> print(f"{rmtjax.tracy_widom.cdf(0.4501):.3f}")
      0.900
    """
    return ndtr(_interpolate(_lift(x), *_table(beta)))


@partial(jax.jit, static_argnames="beta")
def ppf(q: ArrayLike, *, beta: int = 1) -> Float[Array, "..."]:
    r"""Returns quantiles, the inverse of `cdf`.

    Args:
      q: Probabilities in [0, 1], any shape. 0 and 1 give infinite values, others NaN.
      beta: As in `cdf`.

    Returns:
      Values of any sign, at least float32.

    Examples:
      >>> import rmtjax
      >>> print(f"{rmtjax.tracy_widom.ppf(0.9):.3f}")
      0.450
    """
    points, scores, slopes = _table(beta)
    return _interpolate(ndtri(_lift(q)), scores, points, 1 / slopes)
