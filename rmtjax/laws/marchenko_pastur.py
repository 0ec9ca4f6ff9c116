r"""The Marchenko-Pastur law: the eigenvalues of pure noise.

Let $W$ have $n$ rows and $p \le n$ columns of independent entries, of mean 0 and variance
$\sigma^2$. The law is the limit of the spectrum of $W^T W / n$ as $n \to \infty$ with
$p / n \to \gamma$. In all functions:

- `ratio` is the aspect ratio $\gamma = p / n$ in (0, 1]. `variance` is $\sigma^2 > 0$.
- Arguments broadcast, results are at least float32. All work under `jit`, `vmap` and `grad`.
- A Python or NumPy number out of range raises `ValueError`. The values of JAX arrays are not
  checked, because that would wait for the device. Out of range they give NaN.

With $a = \sqrt\gamma$, let $x / \sigma^2 = 1 + a^2 - 2 a \cos\theta$ define the angle $\theta$ in
$[0, \pi]$. The density in x has infinite slopes at both ends, and a pole at $\gamma = 1$. In the
angle it is the smooth $\frac{2}{\pi} \sin^2\theta / (1 + a^2 - 2 a \cos\theta)$, so all functions
compute in the angle.

References:
  Marchenko and Pastur, Math. USSR Sbornik 1 (1967) 457-483,
  https://doi.org/10.1070/SM1967v001n04ABEH001994. The closed form of the distribution function in
  the angle is derived for this package and tested against quadrature.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

__all__ = ["cdf", "noise_quantiles", "pdf", "ppf", "support"]

# Below this root of the ratio the closed form of the distribution function cancels, and a short
# series is exact.
_SMALL = 0.1
# Cells of the table that brackets a quantile. With 64, three Newton steps reach float32 rounding.
_CELLS = 64


def _check(ratio: ArrayLike, variance: ArrayLike) -> None:
    """Raises ValueError for numbers out of range. The values of arrays are not read."""
    if isinstance(ratio, int | float | np.number) and not 0 < ratio <= 1:
        raise ValueError(
            f"`ratio` must be in (0, 1], got {ratio}. Divide the shorter side by the longer."
        )
    if isinstance(variance, int | float | np.number) and not 0 < variance < math.inf:
        raise ValueError(f"`variance` must be positive and finite, got {variance}.")


def _prepare(ratio: ArrayLike, variance: ArrayLike, *others: ArrayLike):
    """Returns all arguments as arrays of one shape and dtype, NaN where out of range."""
    arrays = ratio, variance, *others
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    ratio, variance, *rest = jnp.broadcast_arrays(*(jnp.asarray(a, dtype) for a in arrays))
    # Every result depends on both parameters, so NaN reaches it through any branch.
    ratio = jnp.where((ratio > 0) & (ratio <= 1), ratio, jnp.nan)
    variance = jnp.where((variance > 0) & (variance < jnp.inf), variance, jnp.nan)
    return ratio, variance, *rest


def _unit_support(ratio):
    root = jnp.sqrt(ratio)
    # 1 - a = (1 - a^2) / (1 + a): no cancellation near a ratio of 1.
    return ((1 - ratio) / (1 + root)) ** 2, (1 + root) ** 2


def _angle(x, ratio):
    """Returns the angle of x at unit variance, and a mask of x outside the open support."""
    lower, upper = _unit_support(ratio)
    outside = (x <= lower) | (x >= upper)  # A NaN compares as False, so it reaches the result.
    # Callers drop the angles outside, but gradients there must be finite. Any point inside is.
    safe = zip((lower, x, upper), (0.0, 1.0, 2.0), strict=True)
    lower, x, upper = (jnp.where(outside, inner, value) for value, inner in safe)
    return 2 * jnp.arctan2(jnp.sqrt(x - lower), jnp.sqrt(upper - x)), outside


def _angle_pdf(angle, root):
    # 1 + a^2 - 2 a cos(theta) as a sum of squares; 0 only at an angle of 0 and a = 1,
    # where the quotient tends to 1 + cos(theta).
    value = (1 - root) ** 2 + 4 * root * jnp.sin(angle / 2) ** 2
    safe = jnp.where(value > 0, value, 1.0)
    limit = (1 + jnp.cos(angle)) / jnp.pi
    return jnp.where(value > 0, 2 / jnp.pi * jnp.sin(angle) ** 2 / safe, limit)


def _angle_cdf(angle, root):
    r"""Returns the distribution function of the angle, the integral of `_angle_pdf`.

    $F = \frac{1}{\pi} [\theta + \sin\theta / a - (1 / a^2 - 1) A]$ with
    $A = \sum_k a^k \sin(k \theta) / k$ in closed form.
    """
    half = jnp.sin(angle / 2)
    sine, cosine = jnp.sin(angle), 1 - 2 * half**2
    # 1 - a cos(theta) without cancellation. `tiny` keeps it positive at an angle of 0 and a = 1.
    rest = (1 - root) + 2 * root * half**2 + jnp.finfo(angle.dtype).tiny
    arc = jnp.arctan(root * sine / rest)
    small = root < _SMALL
    safe = jnp.where(small, 1.0, root)  # Keeps the gradients of unused branches finite.
    closed = (safe * sine - (1 - safe**2) * arc) / safe**2
    few, slope = jnp.where(small, root, 0.0), sine / rest
    short = arc - slope * (cosine - few * slope**2 * _arc_rest(few * slope))
    return (angle + jnp.where(small, short, closed)) / jnp.pi


def _arc_rest(t):
    r"""Returns $(t - \arctan t) / t^3$ for $t < 1/9$, by its series."""
    square, total = t**2, 0.0
    # The terms left out are below the rounding unit: 81^-4 / 11 in float32.
    for k in reversed(range(8 if t.dtype == jnp.float64 else 4)):
        total = (-1) ** k / (2 * k + 3) + square * total
    return total


def _counted(angle, root, lack):
    r"""Returns $F(\theta) + lack\, (1/4 - \theta / 2\pi)$: see `noise_quantiles`."""
    return _angle_cdf(angle, root) + lack * (0.25 - angle / (2 * jnp.pi))


@jax.custom_jvp
@jax.jit  # Without it, each eager call would compile the loop again, for half a second.
def _angle_ppf(
    q: Float[Array, "..."], root: Float[Array, ""], lack: Float[Array, ""]
) -> Float[Array, "..."]:
    """Inverts `_counted` by Newton's method, started from a table and held in its cell.

    Cells are narrow at both ends, where the distribution function is flat. In float32 three steps
    reach the rounding everywhere. In float64 twelve do, except for the last 1e-15 of probability.
    """
    table = np.pi * np.sin(np.pi * np.arange(_CELLS + 1) / (2 * _CELLS)) ** 2
    # The table starts above 0, because at 0 and a = 1 the derivative in a is 0 / 0.
    table = jnp.asarray(np.maximum(table, jnp.finfo(q.dtype).eps), q.dtype)
    below = _counted(table, root, lack)
    cell = jnp.clip(jnp.searchsorted(below, q, method="scan"), 1, _CELLS)
    low, high = table[cell - 1], table[cell]
    width = below[cell] - below[cell - 1]
    share = (q - below[cell - 1]) / jnp.where(width > 0, width, 1.0)

    def refine(_, angle):
        slope = _angle_pdf(angle, root) - lack / (2 * jnp.pi)
        step = (q - _counted(angle, root, lack)) / jnp.where(slope > 0, slope, 1.0)
        return jnp.clip(angle + step, low, high)

    start = jnp.clip(low + (high - low) * share, low, high)
    return lax.fori_loop(0, 12 if q.dtype == jnp.float64 else 3, refine, start)


@_angle_ppf.defjvp
def _angle_ppf_jvp(primals, tangents):
    """Differentiates by the implicit function theorem, not through the iteration."""
    (q, root, lack), (dq, droot, dlack) = primals, tangents
    angle = _angle_ppf(q, root, lack)
    slope = _angle_pdf(angle, root) - lack / (2 * jnp.pi)
    shift = jax.jvp(lambda *p: _counted(angle, *p), (root, lack), (droot, dlack))[1]
    # At the ends of the support the slope is 0. The ends are fixed angles, so their tangent is 0.
    tangent = jnp.where(slope > 0, (dq - shift) / jnp.where(slope > 0, slope, 1.0), 0.0)
    return angle, tangent


# Functions are compiled whole: called outside `jit`, each step would be a program of its own.
@jax.jit
def _quantiles(q: ArrayLike, ratio: ArrayLike, variance: ArrayLike, lack: ArrayLike):
    shared = jnp.ndim(ratio) == jnp.ndim(lack) == 0  # Then one table serves all quantiles.
    ratio, variance, lack, q = _prepare(ratio, variance, lack, q)
    valid = (q >= 0) & (q <= 1)
    find = _angle_ppf if shared else jnp.vectorize(_angle_ppf)
    one = lambda parameter: parameter.ravel()[0] if shared and parameter.size else parameter
    angle = find(jnp.where(valid, q, 0.5), one(jnp.sqrt(ratio)), one(lack))
    # Newton's method can stop a rounding error before the ends.
    angle = jnp.where(q == 0, 0.0, jnp.where(q == 1, jnp.pi, angle))
    value = _unit_support(ratio)[0] + 4 * jnp.sqrt(ratio) * jnp.sin(angle / 2) ** 2
    return jnp.where(valid, variance * value, jnp.nan)


def noise_quantiles(
    q: ArrayLike, ratio: ArrayLike, variance: ArrayLike, ranks: ArrayLike
) -> Float[Array, "..."]:
    r"""Returns quantiles of the mean spectrum of real noise of finite size.

    Of p eigenvalues, $p F + 1/4 - \theta / 2\pi$ are expected below the value of an angle. The
    correction to the law moves the variance of a fit by 0.5 % at p = 50.

    Args:
      q: Probabilities inside (0, 1), such as midpoints.
      ratio, variance: Aspect ratio in (0, 1], and variance of a noise entry, positive.
      ranks: Number of ranks p.

    Returns:
      Values in the support. They are slightly below those of `ppf` under
      $(1 + \gamma) \sigma^2$, and slightly above them beyond it.

    Examples:
      >>> import rmtjax
      >>> print(f"{rmtjax.marchenko_pastur.noise_quantiles(0.5, 1.0, 1.0, 50):.4f}")
      0.6462

    References:
      Dumitriu and Edelman, J. Math. Phys. 47 (2006) 063302.
    """
    _check(ratio, variance)
    return _quantiles(q, ratio, variance, 1 / jnp.asarray(ranks))


def support(
    ratio: ArrayLike, variance: ArrayLike = 1.0
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    r"""Returns the lower and the upper edge of the bulk, $\sigma^2 (1 \pm \sqrt\gamma)^2$.

    Args:
      ratio, variance: Aspect ratio in (0, 1], and variance of a noise entry, positive.

    Examples:
      >>> import rmtjax
      >>> lower, upper = rmtjax.marchenko_pastur.support(0.25)
      >>> float(lower), float(upper)
      (0.25, 2.25)
    """
    _check(ratio, variance)
    return _support(ratio, variance)


@jax.jit
def _support(ratio, variance):
    ratio, variance = _prepare(ratio, variance)
    lower, upper = _unit_support(ratio)
    return variance * lower, variance * upper


def pdf(x: ArrayLike, ratio: ArrayLike, variance: ArrayLike = 1.0) -> Float[Array, "..."]:
    r"""Returns the density $\sqrt{(\lambda_+ - x)(x - \lambda_-)} / (2 \pi \gamma \sigma^2 x)$.

    Args:
      x: Eigenvalues, on the scale $s^2 / n$.
      ratio, variance: Aspect ratio in (0, 1], and variance of a noise entry, positive.

    Returns:
      The density. It is 0 outside the open support, and at ratio 1 also at the pole $x = 0$.

    Examples:
      >>> import rmtjax
      >>> print(f"{rmtjax.marchenko_pastur.pdf(1.0, 0.5):.4f}")
      0.4211
    """
    _check(ratio, variance)
    return _pdf(x, ratio, variance)


@jax.jit
def _pdf(x, ratio, variance):
    ratio, variance, x = _prepare(ratio, variance, x)
    angle, outside = _angle(x / variance, ratio)
    # The square root is 2 a sigma^2 sin(theta), and a / gamma = 1 / a.
    safe = jnp.where(outside, 1.0, x)
    return jnp.where(outside, 0.0, jnp.sin(angle) / (jnp.pi * jnp.sqrt(ratio) * safe))


def cdf(x: ArrayLike, ratio: ArrayLike, variance: ArrayLike = 1.0) -> Float[Array, "..."]:
    """Returns the share of the eigenvalues of noise that are at most x, in [0, 1].

    Args:
      x, ratio, variance: As in `pdf`.

    Examples:
      >>> import rmtjax
      >>> print(f"{rmtjax.marchenko_pastur.cdf(1.0, 0.5):.4f}")
      0.5760
    """
    _check(ratio, variance)
    return _cdf(x, ratio, variance)


@jax.jit
def _cdf(x, ratio, variance):
    ratio, variance, x = _prepare(ratio, variance, x)
    angle, outside = _angle(x / variance, ratio)
    _, upper = _unit_support(ratio)
    beyond = jnp.where(x / variance >= upper, 1.0, 0.0)
    # Next to the edges, rounding can leave [0, 1] by one unit in the last place.
    inner = jnp.clip(_angle_cdf(angle, jnp.sqrt(ratio)), 0, 1)
    return jnp.where(outside, beyond, inner)


def ppf(q: ArrayLike, ratio: ArrayLike, variance: ArrayLike = 1.0) -> Float[Array, "..."]:
    """Returns quantiles, the inverse of `cdf`.

    Args:
      q: Probabilities in [0, 1]. Others give NaN.
      ratio, variance: Aspect ratio in (0, 1], and variance of a noise entry, positive.

    Returns:
      Values in the support, and its ends for 0 and 1. They are differentiable in all arguments.
      At the ends the slope in q is infinite, and the derivative in q is set to 0.

    Examples:
      >>> import rmtjax
      >>> print(f"{rmtjax.marchenko_pastur.ppf(0.5, 1.0):.4f}")  # the median
      0.6528
    """
    _check(ratio, variance)
    return _quantiles(q, ratio, variance, 0.0)
