"""The tail sum of singular values, its derivative and its proximal step."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from rmtjax._axes import KernelAxes, MatrixView, native
from rmtjax._modes import in_usual_modes
from rmtjax._sharding import by_compiler, typed_sharding
from rmtjax.lowrank._judge import kernel_view
from rmtjax.spectra import decompose, lift, matmul, svd


def _check_rank(rank: Any) -> None:
    if not isinstance(rank, jax.Array) and operator.index(rank) < 0:
        raise ValueError(f"`rank` must be at least 0, got {rank}.")


def beyond(s: Float[Array, "b p"], rank: Int[ArrayLike, "..."]) -> Bool[Array, "..."]:
    """Returns True for the values beyond a rank, or beyond the rank of each matrix."""
    return jnp.arange(s.shape[1])[None] >= jnp.reshape(rank, (-1, 1))


@jax.custom_jvp
def _tail_sum(matrices: Float[Array, "b m n"], rank: Int[Array, ""]) -> Float[Array, ""]:
    _, s, _ = svd(matrices)
    return jnp.sum(jnp.where(beyond(s, rank), s, 0))


@_tail_sum.defjvp
def _tail_sum_jvp(primals, tangents):
    # Not the derivative of the decomposition, which divides by the gaps between values.
    matrices, rank = primals
    u, s, vt = svd(matrices)
    tail = jnp.where(beyond(s, rank), s, 0)
    # Vectors of a zero are arbitrary. The smallest subgradient has none of them.
    unit = max(matrices.shape[1:]) * jnp.finfo(s.dtype).eps
    moved = jnp.where(tail > unit * s[:, :1], 1, 0).astype(s.dtype)
    gradient = matmul(u * moved[:, None], vt)
    return jnp.sum(tail), jnp.sum(gradient * tangents[0])


@in_usual_modes
def tail_sum(
    kernel: Float[ArrayLike, "..."],
    rank: Int[ArrayLike, ""] | int,
    axes: KernelAxes | None = None,
) -> Float[Array, ""]:
    r"""Returns the sum of the singular values beyond a rank, $T_h(W) = \sum_{j > h} s_j(W)$.

    The derivative is $U_{>h} V_{>h}^T$. It is finite everywhere. Where $s_h = s_{h+1}$ it is one of
    the subgradients of the two sides. Directions of value 0 add nothing, so that a kernel of zeros
    has the derivative 0. Second derivatives are those of the decomposition: ties make them
    infinite.

    Args:
      kernel: A real matrix of any floating dtype; with `axes`, a kernel of any shape.
      rank: The cut $h$, at least 0; may be traced. 0 gives the nuclear norm.
      axes: The axes of inputs and outputs, and those of a stack, whose sums are added up.

    Returns:
      A scalar in float32 at least; NaN if an entry is not finite.

    Raises:
      ValueError, TypeError: An argument is not as described.

    Examples:
      >>> import jax, jax.numpy as jnp, rmtjax
      >>> kernel = jnp.diag(jnp.array([3.0, 2.0, 2.0, 0.0]))
      >>> print(rmtjax.lowrank.tail_sum(kernel, 1))
      4.0
      >>> print(jnp.diag(jax.grad(rmtjax.lowrank.tail_sum)(kernel, 1)))
      [0. 1. 1. 0.]

    References:
      Lu, Xu, Du, Ishida, Zhang and Sugiyama (2021), https://arxiv.org/abs/2103.00719; Xu, Liu, Tao
      and Xu (2014), https://arxiv.org/abs/1410.6990, for the bound with this sum.
    """
    kernel = jnp.asarray(native(kernel))
    _check_rank(rank)
    return _tail_sum(lift(kernel_view("tail_sum", kernel, axes).matrices()), jnp.asarray(rank))


def shrink_beyond(matrices, directions, rank, strength) -> Float[Array, "b m n"]:
    """Returns matrices whose values beyond a rank are smaller by `strength`, and at least 0."""
    # W - U_t diag(1 - s' / s) U_t^T W needs the vectors of one side only: the shorter. Those of the
    # other side are inexact where a Gram matrix does not distinguish values.
    u, s, vt = directions
    if matrices.shape[1] > matrices.shape[2]:
        turned = shrink_beyond(matrices.mT, (vt.mT, s, u.mT), rank, strength)
        return turned.mT
    kept = jnp.maximum(s - strength, 0) / jnp.where(s > 0, s, 1)
    lost = jnp.where(beyond(s, rank) & (s > 0), 1 - kept, 0)
    return matrices - matmul(u * lost[:, None], matmul(u.mT, matrices))


@in_usual_modes
def prox_tail(
    kernel: Float[ArrayLike, "..."],
    rank: Int[ArrayLike, ""] | int,
    strength: Float[ArrayLike, ""] | float,
    axes: KernelAxes | None = None,
) -> Float[Array, "..."]:
    r"""Returns the proximal step of the tail sum: soft thresholding beyond a rank.

    $\arg\min_X \frac12 \|X - W\|_F^2 + \tau\, T_h(X)$. It leaves $s_j$ for $j \le h$, and has
    $\max(s_j - \tau, 0)$ for $j > h$, with the singular vectors of $W$.

    Args:
      kernel, axes: As in `tail_sum`. Each matrix of a stack is shrunk alone.
      rank: The cut $h$, at least 0; may be traced. 0 gives the step of the nuclear norm.
      strength: $\tau$, at least 0, on the scale of the singular values; may be traced. To minimise
        a loss plus $\lambda T_h$ by gradient steps of size $\eta$, it is $\eta \lambda$ at each.

    Returns:
      A kernel of the same shape and dtype; NaN for a matrix that is not finite.

    Raises:
      ValueError, TypeError: An argument is not as described.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> kernel = jnp.diag(jnp.array([3.0, 2.0, 0.5]))
      >>> print(jnp.diag(rmtjax.lowrank.prox_tail(kernel, 1, 0.75)))
      [3.   1.25 0.  ]

    References:
      Oh, Tai, Bazin, Kim and Kweon, IEEE Trans. Pattern Anal. Mach. Intell. 38 (2016) 744-758: this
      step is exact, although the sum is not convex.
    """
    kernel = jnp.asarray(native(kernel))
    _check_rank(rank)
    check_strength(strength)
    axes = kernel_view("prox_tail", kernel, axes).axes

    def find(kernel, rank, strength):
        view = MatrixView("", kernel, axes)
        matrices = lift(view.matrices())
        directions = decompose(matrices)
        found = shrink_beyond(matrices, directions, rank, strength)
        finite = jnp.isfinite(directions[1][:, :1, None])
        return view.from_matrices(jnp.where(finite, found, jnp.nan))

    found = by_compiler(find, kernel, rank, strength, out=typed_sharding(kernel))
    return found.astype(kernel.dtype)


def check_strength(strength: Any) -> None:
    """Raises ValueError if a step is negative. Arrays may be traced and are not checked."""
    if not isinstance(strength, jax.Array) and not 0 <= strength < float("inf"):
        raise ValueError(f"`strength` must be at least 0 and finite, got {strength}.")
