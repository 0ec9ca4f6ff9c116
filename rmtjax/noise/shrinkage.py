r"""Shrinkage: what noise has added to the singular values of the signal, taken off again.

A matrix $W = \ell\, u v^T + noise$ of aspect ratio $\gamma$, with noise entries of variance
$\sigma^2$ and the strength $\ell$ in units of $\sqrt n\, \sigma$, $n$ the longer side, has its
largest singular value near $y(\ell) = \sqrt{(\ell + 1 / \ell)(\ell + \gamma / \ell)}$ in the
same units, if $\ell > \gamma^{1/4}$: too large, and with singular vectors that are turned away
from $u$ and $v$. A weaker signal is lost in the bulk, which ends at $1 + \sqrt\gamma$. In all
functions:

- `y` is $s / (\sqrt n\, \sigma)$, at least 0, and `ratio` is $\gamma$ in (0, 1];
- the result is 0 up to the edge of the bulk, and has finite gradients everywhere;
- arguments broadcast, results are float32 at least; all works under `jit`, `vmap`, `grad`.

`rmtjax.plan(params, shrink=rmtjax.shrinkage.frobenius)` applies one to all that it keeps.
With $a = \sqrt{y^2 - (1 - \sqrt\gamma)^2}$ and $b = \sqrt{y^2 - (1 + \sqrt\gamma)^2}$ the
published formulas become those below, which do not cancel.

References:
  Gavish and Donoho, IEEE Trans. Inf. Theory 63 (2017) 2137-2152,
  https://arxiv.org/abs/1405.7511. Benaych-Georges and Nadakuditi, J. Multivar. Anal. 111
  (2012) 120-135, https://arxiv.org/abs/1103.2221.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from rmtjax.laws import marchenko_pastur

# What `rmtjax.plan` takes: the functions of this module, or one of a user's own.
Shrink = Callable[[Array, Array], Array]


def _roots(y: ArrayLike, ratio: ArrayLike):
    """The value y, the roots a and b, and whether y is in the bulk, where all three are not."""
    lower, upper = marchenko_pastur.support(ratio)
    y = jnp.asarray(y, jnp.promote_types(jnp.result_type(y), jnp.float32))
    y, lower, edge = jnp.broadcast_arrays(y, lower, jnp.sqrt(upper))
    inside = y <= edge  # False for NaN, which so goes through
    # Any value beyond the edge will do: gradients of what is thrown away must be finite.
    y = jnp.where(inside, 3.0, y)
    return y, jnp.sqrt(y**2 - lower), jnp.sqrt((y - edge) * (y + edge)), inside


def frobenius(y: ArrayLike, ratio: ArrayLike) -> Float[Array, "..."]:
    r"""The shrinkage of least squared error: $a b / y$.

    $\eta(y) = \sqrt{(y^2 - \gamma - 1)^2 - 4 \gamma}\, / y$, for a square matrix
    $\sqrt{y^2 - 4}$. Of all functions of the singular values alone it leaves, as
    $n \to \infty$, the smallest $\|\hat W - \ell\, u v^T\|_F$.

    Args:
      y: Singular values over $\sqrt n\, \sigma$.
      ratio: Aspect ratio in (0, 1].

    Returns:
      The shrunken values, in the same units.

    Examples:
      >>> import rmtjax
      >>> print(f"{rmtjax.shrinkage.frobenius(2.5, 1.0):.4f}")
      1.5000
    """
    y, a, b, inside = _roots(y, ratio)
    return jnp.where(inside, 0.0, a / y * b)


def operator(y: ArrayLike, ratio: ArrayLike) -> Float[Array, "..."]:
    r"""The strength of the signal, the inverse of $y(\ell)$: $(a + b) / 2$.

    $\eta(y) = \sqrt{(y^2 - \gamma - 1 + \sqrt{(y^2 - \gamma - 1)^2 - 4 \gamma}) / 2}$, for a
    square matrix $(y + \sqrt{y^2 - 4}) / 2$. It gives the singular values of the signal
    without bias, and at the edge it jumps to $\gamma^{1/4}$.

    Published as the shrinkage of least operator norm, which it is for square matrices. For
    others that is smaller by the factor $\sqrt{(\gamma + \ell^2) / (1 + \ell^2)}$ (Leeb).

    Args:
      y: Singular values over $\sqrt n\, \sigma$.
      ratio: Aspect ratio in (0, 1].

    Returns:
      The shrunken values, in the same units.

    Examples:
      >>> import rmtjax
      >>> print(f"{rmtjax.shrinkage.operator(2.5, 1.0):.4f}")
      2.0000

    References:
      Leeb, Stat. Probab. Lett. 186 (2022) 109472.
    """
    _, a, b, inside = _roots(y, ratio)
    return jnp.where(inside, 0.0, (a + b) / 2)


def nuclear(y: ArrayLike, ratio: ArrayLike) -> Float[Array, "..."]:
    r"""The shrinkage of least nuclear norm of the error: $\max(0, a b / y - \sqrt\gamma / \ell)$.

    $\eta(y) = \max(0, \ell^4 - \gamma - \sqrt\gamma\, \ell\, y) / (\ell^2 y)$ with the
    strength $\ell$ of `operator`. It shrinks the most, and to 0 well beyond the edge.

    Args:
      y: Singular values over $\sqrt n\, \sigma$.
      ratio: Aspect ratio in (0, 1].

    Returns:
      The shrunken values, in the same units.

    Examples:
      >>> import rmtjax
      >>> print(f"{rmtjax.shrinkage.nuclear(2.5, 1.0):.4f}")
      1.0000
    """
    root = jnp.sqrt(jnp.asarray(ratio, jnp.promote_types(jnp.result_type(ratio), jnp.float32)))
    y, a, b, inside = _roots(y, ratio)
    root = jnp.broadcast_to(root, y.shape)
    return jnp.where(inside, 0.0, jnp.maximum(a / y * b - 2 * root / (a + b), 0.0))
