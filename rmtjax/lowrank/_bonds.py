"""The bonds of a tensor train: how they are chosen, their spectra and their entropy."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rmtjax._types import check_type
from rmtjax.lowrank._judge import judge
from rmtjax.lowrank._train import TensorTrain
from rmtjax.noise import ranks
from rmtjax.spectra import each, from_singular_values, lift, matmul, svd


class Bond(NamedTuple):
    r"""A bond of a train, and how it was chosen.

    Attributes:
      rank: The bond.
      size: The largest that it could be: the short side of the unfolding.
      values: Singular values of the unfolding, in descending order; of a stack one row a matrix.
      lost: $\sqrt{\sum_{k > rank} s_k^2}$, the Frobenius norm of what it has cut.
      reason: Why it is `rank`.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> modes = rmtjax.lowrank.state_modes((4,), (4,))
      >>> rule = rmtjax.ranks.fixed(3)
      >>> kernel = jnp.diag(jnp.array([4.0, 3, 2, 1]))
      >>> bond = rmtjax.lowrank.tensor_train(kernel, modes, rule=rule).bonds[0]
      >>> bond.rank, bond.size, round(float(bond.lost), 3)
      (3, 4, 1.0)
    """

    rank: int
    size: int
    values: Float[np.ndarray, "*stack p"]
    lost: float
    reason: str


class Choice(NamedTuple):
    """The way to choose bonds: by a rule, by the norm that each may lose, or not at all."""

    rule: ranks.RankRule | None
    allowed: Float[np.ndarray, " b"] | None  # for each matrix of a stack
    min_size: int


def _rank_by_rule(s, unfolded, choice: Choice, size: int) -> tuple[int, str]:
    """Returns the bond that a rule chooses, and why."""
    rule: Any = choice.rule
    if rule.needs_noise and size < choice.min_size:
        return size, f"kept: short side {size} under {choice.min_size}"
    count, accepted = judge(rule, from_singular_values(jnp.asarray(s), jnp.asarray(unfolded)))
    if not accepted.all():
        return size, "kept: the rule does not accept the spectrum"
    if not count.any():
        return size, "kept: no signal stands out of the noise"
    # One bond for a stack: that of its richest member.
    return int(np.clip(count.max(), 1, size)), f"{count.max()} of {size} are signal"


def choose(s: Any, unfolded: Any, choice: Choice) -> Bond:
    """Returns the bond of an unfolding with singular values (b, p)."""
    values = np.asarray(s, np.float64)
    size = values.shape[1]
    if not np.isfinite(values).all():
        rank, reason = size, "kept: not finite"
    elif choice.rule is not None:
        rank, reason = _rank_by_rule(s, unfolded, choice, size)
    elif choice.allowed is not None:
        tails = np.sqrt(np.cumsum(values[:, ::-1] ** 2, axis=1))[:, ::-1]  # with 0 to p values kept
        rank = max(1, int((tails > choice.allowed[:, None]).sum(axis=1).max()))
        reason = f"{rank} of {size}: the others are within the tolerance"
    else:
        rank, reason = size, "kept: neither rule nor tolerance"
    # NaN of values that are not finite: 0 would say that nothing was lost.
    lost = float(np.sqrt(np.sum(values[:, rank:] ** 2) + 0 * np.sum(values)))
    return Bond(rank, size, np.asarray(s), lost, reason)


def _values(cores: tuple[Array, ...]) -> tuple[Array, ...]:
    """Returns the singular values of each unfolding of one train."""
    chain = [core.reshape(core.shape[0], -1, core.shape[-1]) for core in map(lift, cores)]
    for k in range(len(chain) - 1, 0, -1):
        bond, size, last = chain[k].shape
        # c = t^T q^T: the rows of q^T are orthonormal, and t goes to the core before.
        q, t = jnp.linalg.qr(chain[k].reshape(bond, size * last).T)
        chain[k] = q.T.reshape(-1, size, last)
        chain[k - 1] = matmul(chain[k - 1], t.T)
    found, carry = [], chain[0]
    for following in chain[1:]:
        _, s, vt = svd(carry.reshape(-1, carry.shape[-1]))
        found.append(s)
        carry = jnp.tensordot(s[:, None] * vt, following, 1, precision="highest")
    return tuple(found)


def bond_spectra(train: TensorTrain) -> tuple[Float[Array, "*batch r"], ...]:
    """Returns the singular values at each bond of a train, in descending order.

    They are those of the unfolding of the kernel at this bond, found from the cores alone. At the
    bond in the middle of a state they are the singular values of the matrix.

    Args:
      train: From `tensor_train`, or after training.

    Raises:
      TypeError: `train` is not a `TensorTrain`.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> modes = rmtjax.lowrank.state_modes((2, 2), (4,))
      >>> train = rmtjax.lowrank.tensor_train(jnp.diag(jnp.array([4.0, 3, 2, 1])), modes).train
      >>> [round(float(s[0]), 3) for s in rmtjax.lowrank.bond_spectra(train)]
      [5.0, 4.0]
    """
    check_type("train", train, TensorTrain, "Make one by `rmtjax.lowrank.tensor_train`.")
    batch = train.cores[0].shape[:-4]
    stack = tuple(core.reshape(-1, *core.shape[-4:]) for core in train.cores)
    return tuple(s.reshape(*batch, -1) for s in each(_values, stack))


def bond_entropies(train: TensorTrain) -> Float[Array, "*batch bonds"]:
    r"""Returns the entanglement entropy at each bond, $-\sum_j p_j \ln p_j$.

    $p_j = s_j^2 / \sum_i s_i^2$. It is 0 for a bond with one direction, and at most the logarithm
    of the bond: a bond whose entropy comes close to it is too small.

    Args:
      train: As in `bond_spectra`, with the same errors.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> modes = rmtjax.lowrank.state_modes((4,), (4,))
      >>> train = rmtjax.lowrank.tensor_train(jnp.eye(4), modes).train
      >>> print(jnp.exp(rmtjax.lowrank.bond_entropies(train)).round(4))
      [4.]

    References:
      Jahromi and Orus (2022), https://arxiv.org/abs/2211.14657.
    """

    def entropy(s):
        largest = jnp.maximum(s[..., :1], jnp.finfo(s.dtype).tiny)  # no square under- or overflows
        squares = jnp.square(s / largest)
        shares = squares / jnp.maximum(jnp.sum(squares, axis=-1, keepdims=True), 1)
        return -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1)), axis=-1)

    return jnp.stack([entropy(s) for s in bond_spectra(train)], axis=-1)
