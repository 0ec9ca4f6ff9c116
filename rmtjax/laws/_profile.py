r"""The largest eigenvalue of noise whose rows and columns differ in scale.

Entry (i, j) has the variance $a_i b_j$. As both sides n and p grow, the largest eigenvalue of
$W^T W / n$ approaches the upper edge of a law that depends on both profiles. With
$h(d) = \frac1n \sum_i a_i / (1 - a_i d)$ each d in $(0, 1 / \max a)$ has one $x > h \max b$ with
$\frac1n \sum_j b_j / (x - b_j h) = d$, and the edge is the least of these x. For equal scales it is
that of Marchenko and Pastur.

References:
  Couillet and Hachem, Random Matrices: Theory and Applications 3 (2014) 1450016,
  https://arxiv.org/abs/1310.8094, on the support of the law.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_HALVINGS = 14  # of an interval of length 1: at a least value what is left counts squared
_STEPS = 6  # of Newton's method, in which the roots settle to the rounding of float32


def profile_edge(rows: Float[Array, " m"], columns: Float[Array, " n"]) -> Float[Array, ""]:
    """Returns the upper edge of $W^T W$ over the longer side, for noise with these variances.

    Args:
      rows, columns: Variances $a_i$ and $b_j$, at least 0. Those of 0 count for the longer side
        alone.

    Returns:
      The edge, at least float32. NaN if one side has zeros alone.
    """
    dtype = jnp.promote_types(jnp.result_type(rows, columns), jnp.float32)
    rows, columns = rows.astype(dtype), columns.astype(dtype)
    size = max(len(rows), len(columns))
    most = jnp.max(rows), jnp.max(columns)
    a, b = rows / most[0], columns / most[1]

    def point(d):
        """Returns x, and a number that grows with d and is 1 where x is least."""
        parts = a / (1 - a * d)
        h, slope = jnp.sum(parts) / size, jnp.sum(jnp.square(parts)) / size
        terms = lambda y: b / (y + (1 - b) * h)

        def refine(_, y):
            # Newton's method for the inverse of the sum, which is almost a line.
            known = terms(y)
            total, fall = jnp.sum(known), jnp.sum(known / (y + (1 - b) * h))
            step = (total / (size * d) - 1) * total / fall
            return jnp.maximum(y + step, 1 / (size * d))  # one column alone

        y = lax.fori_loop(0, _STEPS, refine, jnp.sum(b) / (size * d))
        return y + h, slope * jnp.sum(jnp.square(terms(y))) / size

    def halve(_, state):
        low, high, _ = state
        middle = (low + high) / 2
        x, slope = point(middle)
        beyond = slope > 1
        return jnp.where(beyond, low, middle), jnp.where(beyond, middle, high), x

    zero = jnp.zeros_like(most[0])
    *_, x = lax.fori_loop(0, _HALVINGS, halve, (zero, zero + 1, zero))
    return x * most[0] * most[1]
