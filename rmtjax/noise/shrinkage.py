r"""Optimal shrinkage: removes from the singular values of the signal what noise added to them.

Let $W = \ell\, u v^T + noise$ have aspect ratio $\gamma$, longer side $n$ and noise entries of
variance $\sigma^2$. Measure the strength $\ell$ in units of $\sqrt n\, \sigma$. If
$\ell > \gamma^{1/4}$, the largest singular value of $W$ is near
$y(\ell) = \sqrt{(\ell + 1 / \ell)(\ell + \gamma / \ell)}$ in the same units. It is too large, and
its singular vectors are turned away from $u$ and $v$. A weaker signal is lost in the bulk, which
ends at $1 + \sqrt\gamma$. In all functions:

- `y` is $s / (\sqrt n\, \sigma)$, at least 0, and `ratio` is $\gamma$ in (0, 1].
- The result is in the units of `y`, and 0 up to the edge of the bulk. Gradients are finite.
- Arguments broadcast, results are at least float32. All work under `jit`, `vmap` and `grad`.

`rmtjax.plan(params, shrink=rmtjax.shrinkage.frobenius)` shrinks the directions that it keeps.

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

__all__ = ["frobenius", "nuclear", "operator"]

# `rmtjax.plan` accepts the functions of this module and any other function of this type.
Shrink = Callable[[Array, Array], Array]


def _roots(y: ArrayLike, ratio: ArrayLike):
    r"""Returns y, a, b and a mask that is True inside the bulk.

    With $a = \sqrt{y^2 - (1 - \sqrt\gamma)^2}$ and $b = \sqrt{y^2 - (1 + \sqrt\gamma)^2}$ the
    published formulas become products and sums that do not cancel.
    """
    lower, upper = marchenko_pastur.support(ratio)
    y = jnp.asarray(y, jnp.promote_types(jnp.result_type(y), jnp.float32))
    y, lower, edge = jnp.broadcast_arrays(y, lower, jnp.sqrt(upper))
    inside = y <= edge  # A NaN compares as False, so it reaches the result.
    # Inside the bulk the roots are imaginary. `where` drops these values, but their gradients
    # must be finite, so any value beyond the edge takes their place.
    y = jnp.where(inside, 3.0, y)
    return y, jnp.sqrt(y**2 - lower), jnp.sqrt((y - edge) * (y + edge)), inside


def frobenius(y: ArrayLike, ratio: ArrayLike) -> Float[Array, "..."]:
    r"""Shrinks for the least squared error: $\eta(y) = a b / y$.

    This is $\sqrt{(y^2 - \gamma - 1)^2 - 4 \gamma}\, / y$, and $\sqrt{y^2 - 4}$ for a square
    matrix. As $n \to \infty$, no other function of the singular values alone has a smaller
    $\|\hat W - \ell\, u v^T\|_F$.

    Args:
      y, ratio: Singular values over $\sqrt n\, \sigma$, and aspect ratio in (0, 1].

    Examples:
      >>> import rmtjax
      >>> print(f"{rmtjax.shrinkage.frobenius(2.5, 1.0):.4f}")
      1.5000
    """
    y, a, b, inside = _roots(y, ratio)
    return jnp.where(inside, 0.0, a / y * b)


def operator(y: ArrayLike, ratio: ArrayLike) -> Float[Array, "..."]:
    r"""Returns the strength of the signal, the inverse of $y(\ell)$: $\eta(y) = (a + b) / 2$.

    For a square matrix this is $(y + \sqrt{y^2 - 4}) / 2$. It estimates the singular values of
    the signal without bias. At the edge it jumps to $\gamma^{1/4}$.

    It was published as the shrinkage of least operator norm. That holds for square matrices.
    For others the optimum is smaller by $\sqrt{(\gamma + \ell^2) / (1 + \ell^2)}$ (Leeb).

    Args:
      y, ratio: As in `frobenius`.

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
    r"""Shrinks for the least nuclear norm of the error: $\max(0, a b / y - \sqrt\gamma / \ell)$.

    Here $\ell$ is the strength that `operator` returns. This function shrinks the most. It is
    0 even for some values beyond the edge.

    Args:
      y, ratio: As in `frobenius`.

    Examples:
      >>> import rmtjax
      >>> print(f"{rmtjax.shrinkage.nuclear(2.5, 1.0):.4f}")
      1.0000
    """
    y, a, b, inside = _roots(y, ratio)
    root = jnp.broadcast_to(jnp.sqrt(jnp.asarray(ratio, a.dtype)), a.shape)
    return jnp.where(inside, 0.0, jnp.maximum(a / y * b - 2 * root / (a + b), 0.0))
