"""The data-path certificate: what a changed kernel does to the inputs that reach it."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from rmtjax.certificate._rounding import affine, eps, largest, Layer, lost_squares, mean
from rmtjax.spectra import as_matrix, lift


class PathCertificate(NamedTuple):
    """Bounds on what a change of one kernel does to each sample, and to the loss.

    Attributes:
      shift: Bound on the change of each logit, for each sample. A prediction whose largest logit
        leads the others by more than twice of it stays the same.
      loss: Bound on the increase of the mean cross-entropy: twice the mean of `shift`.
      penalty: By how much the penalty on the kernel has fallen, rounded down.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> kernel, inputs = jnp.array([[1.0, 0.5], [0.0, 2.0]]), jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> found = rmtjax.certificate.data_path(kernel, kernel.at[0, 1].set(0.0), inputs)
      >>> found.shift.round(3).tolist(), round(float(found.loss), 3)
      ([0.5, 0.5], 1.0)
    """

    shift: Float[Array, " samples"]
    loss: Float[Array, ""]
    penalty: Float[Array, ""]

    @property
    def lowers(self) -> Bool[Array, ""]:
        """True if cross-entropy plus penalty must have fallen."""
        return self.loss < self.penalty


def _lost_magnitudes(old: Array, new: Array) -> Array:
    """Returns the sum of magnitudes of `old` minus that of `new`, rounded down."""
    terms = jnp.abs(old) - jnp.abs(new)
    # A sum of sums of columns is rounded less than one long sum, which XLA would make of it.
    columns = lax.optimization_barrier([jnp.sum(a, axis=0) for a in (terms, jnp.abs(terms))])
    total, magnitudes = map(jnp.sum, columns)
    return total - (sum(old.shape) + 8) * eps(old) * magnitudes


def data_path(
    kernel: Float[ArrayLike, "m n"],
    changed: Float[ArrayLike, "m n"],
    inputs: Float[ArrayLike, "samples m"],
    *,
    lipschitz: Float[ArrayLike, "*samples"] = 1.0,
    l1: float = 0.0,
    l2: float = 0.0,
) -> PathCertificate:
    r"""Bounds the rise of the loss by the change of one kernel on the inputs that reach it.

    With $R = W - W'$, the inputs $x$ of the kernel and $L_x$ the Lipschitz constant, in the largest
    magnitude, of what follows it, each logit changes by at most $L_x \|x R\|_\infty$. So the mean
    cross-entropy rises by at most

    $$B = \frac{2}{|D|} \sum_x L_x \|x R\|_\infty.$$

    The penalty $\mu_2 \sum W_{ij}^2 + \mu_1 \sum |W_{ij}|$ falls by a known amount; if that is
    more than $B$, the sum of both must fall. This holds for any change, by a mask or by a
    truncation. To restore removed entries makes the certificate better if B falls by more than
    their penalty rises: call it for both kernels.

    For chains of dense layers `certify` gives a tighter bound and finds the constants.

    Args:
      kernel, changed: The kernel before and after, as matrices (inputs, outputs).
      inputs: What reaches the kernel, before the change of this kernel. If several kernels change,
        one after another, those of the network in which the earlier ones have changed; the bounds
        add up.
      lipschitz: $L_x$, for all samples or for each; 1 for the last layer. For a dense layer it is
        the largest sum of magnitudes of a column of the kernel (inputs, outputs), for ReLU 1, and
        for layers in a row the product. The certificate holds only if these constants do.
      l1, l2: $\mu_1$ and $\mu_2$ of `rmtjax.penalty`, at least 0.

    Returns:
      The bounds, rounded up, in float32 at least.

    Raises:
      ValueError, TypeError: Shapes do not fit, or a number is negative.

    Examples:
      >>> import jax, jax.numpy as jnp, rmtjax
      >>> kernel = jax.random.normal(jax.random.key(0), (20, 10))
      >>> pruned = jnp.where(jnp.abs(kernel) > 0.1, kernel, 0.0)
      >>> inputs = 0.1 * jax.random.normal(jax.random.key(1), (100, 20))
      >>> found = rmtjax.certificate.data_path(kernel, pruned, inputs, l1=0.1)
      >>> print(f"{found.loss:.3f} {found.penalty:.3f}", bool(found.lowers))
      0.030 0.071 True

    References:
      Berlyand, Bourdais, Owhadi and Shmalo (2026), https://arxiv.org/abs/2606.02608.
    """
    old, new, samples = (lift(as_matrix("data_path", one)) for one in (kernel, changed, inputs))
    if new.shape != old.shape or samples.shape[1] != len(old):
        raise ValueError(
            f"`changed` must have the shape of `kernel`, {old.shape}, and `inputs` the shape "
            f"(samples, {len(old)}); got {new.shape} and {samples.shape}."
        )
    for name, value in (("l1", l1), ("l2", l2)):
        if not value >= 0:
            raise ValueError(f"`{name}` must be at least 0, got {value}.")
    layer = Layer(old - new, jnp.zeros(old.shape[1], old.dtype))
    moved, rounding = affine(samples, layer)
    constants = jnp.asarray(lipschitz, moved.dtype)
    # One product is rounded.
    shift = constants * largest(jnp.abs(moved) + rounding) * (1 + 2 * eps(moved))
    # Squares may overflow where magnitudes do not.
    terms = (l1, _lost_magnitudes), (l2, lost_squares)
    penalty = sum(
        (value * lost(old, new) for value, lost in terms if value), jnp.zeros((), old.dtype)
    )
    return PathCertificate(shift, 2 * mean(shift), penalty - 4 * eps(old) * jnp.abs(penalty))
