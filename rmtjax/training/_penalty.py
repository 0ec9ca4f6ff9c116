"""Penalty on the entries of kernels, a term of a loss."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from rmtjax._modes import in_usual_modes
from rmtjax._types import Where
from rmtjax.planning import check_chosen, check_concrete, find_kernels
from rmtjax.spectra import lift, multiply


@in_usual_modes
def penalty(
    params: PyTree,
    *,
    l1: Float[ArrayLike, ""] = 0.0,
    l2: Float[ArrayLike, ""] = 0.0,
    where: Where | None = None,
) -> Float[Array, ""]:
    r"""Returns $\mu_1 \sum |W_{ij}| + \mu_2 \sum W_{ij}^2$ over the kernels, for a loss.

    `Factors` count as the kernel that they stand for: the loss does not jump when a kernel is
    factorized. Each call multiplies them out, with m r n multiplications.

    For squares alone prefer `optax.add_decayed_weights(2 * l2, mask)` before `optax.sgd`, or
    `optax.adamw`: Adam would rescale the gradient of this term with the rest. Neither term makes
    entries exactly zero: `rmtjax.prune_entries` does.

    Args:
      params: A tree of arrays or `Factors`.
      l1: $\mu_1$, at least 0.
      l2: $\mu_2$, at least 0.
      where: Chooses the kernels, as in `rmtjax.plan`.

    Returns:
      A scalar in float32 at least, differentiable. At 0 the gradient of a magnitude is 0.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> params = {"kernel": jnp.array([[3.0, -1.0]]), "bias": jnp.ones(2)}
      >>> print(rmtjax.penalty(params, l1=0.1, l2=0.01))
      0.5

    References:
      Berlyand, Sandier, Shmalo and Zhang (2023), https://arxiv.org/abs/2310.03165. Their code also
      sums over biases, and prints losses with the penalty in them.
    """
    coefficients: dict[str, Any] = {"l1": l1, "l2": l2}
    for name, value in coefficients.items():
        # Arrays may be traced and are not checked. A negative number would reward large entries.
        if not isinstance(value, jax.Array) and not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be at least 0 and finite, got {value}.")
    total = jnp.zeros((), jnp.float32)
    check_concrete(params)
    kernels = find_kernels(params, where)
    check_chosen(kernels, params, where)
    for view in kernels.values():
        kernel = multiply(view.leaf) if view.is_factored else jnp.asarray(view.leaf)
        if jnp.issubdtype(kernel.dtype, jnp.floating):
            kernel = lift(kernel)
            # Not `abs`, whose gradient at 0 is 1 in newer JAX: a zero would be pushed down.
            magnitudes = kernel * jax.lax.stop_gradient(jnp.sign(kernel))
            total += l1 * jnp.sum(magnitudes) + l2 * jnp.sum(jnp.square(kernel))
    return total
