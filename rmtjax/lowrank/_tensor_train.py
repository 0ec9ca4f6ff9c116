"""The tensor train of a kernel by successive decompositions of its unfoldings (TT-SVD)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from rmtjax._axes import FactoredKernel, Factors, KernelAxes, MatrixView
from rmtjax._sharding import fetch, mesh_of
from rmtjax._types import Axes
from rmtjax.lowrank._bonds import Bond, Choice, choose
from rmtjax.lowrank._judge import in_order, kernel_view
from rmtjax.lowrank._modes import check_modes
from rmtjax.lowrank._train import Modes, TensorTrain
from rmtjax.noise import check_rule, ranks
from rmtjax.planning import check_count, find_kernels, map_kernels
from rmtjax.spectra import Directions, lift, matmul, singular_vectors


class TrainFit(NamedTuple):
    """A kernel as a train.

    Attributes:
      train: The cores.
      bonds: The `Bond`s between them.
      error: Bound on the Frobenius norm of the difference from the kernel: the root of the sum of
        the squares that the bonds have lost. Up to rounding it is the difference.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> modes = rmtjax.lowrank.operator_modes((2, 2), (2, 2))
      >>> fit = rmtjax.lowrank.tensor_train(jnp.eye(4), modes)
      >>> fit.train.bonds, round(float(fit.error), 3)
      ((4,), 0.0)
    """

    train: TensorTrain
    bonds: tuple[Bond, ...]
    error: float


class Trains(NamedTuple):
    """A tree with kernels as trains.

    Attributes:
      params: The tree.
      fits: Path to the `TrainFit` of each kernel that was replaced.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> modes = {"kernel": rmtjax.lowrank.operator_modes((2, 2), (2, 2))}
      >>> trains = rmtjax.lowrank.to_trains({"kernel": jnp.eye(4)}, modes)
      >>> trains.fits["kernel"].train.bonds
      (4,)
    """

    params: PyTree
    fits: dict[str, TrainFit]


def _decompose(unfolded: Any) -> Directions:
    """Returns all singular directions of a stack of matrices: in NumPy on the host."""
    view = MatrixView("", unfolded, KernelAxes((1,), (2,), (0,)))
    ((_, found),) = singular_vectors({"": view}, {"": view.short})
    return found


def _cut_all(carry: Any, sizes: Sequence[int], choice: Choice) -> tuple[list, list[Bond], Any]:
    """Splits off a core (b, bond, size, next bond) for each size; also returns what is left."""
    cores, bonds, bond = [], [], carry.shape[1]
    for size in sizes:
        unfolded = carry.reshape(len(carry), bond * size, -1)
        u, s, vt = _decompose(unfolded)
        found = choose(s, unfolded, choice)
        kept = slice(found.rank)
        cores.append(u[:, :, kept].reshape(len(carry), bond, size, found.rank))
        bonds.append(found)
        carry, bond = s[:, kept, None] * vt[:, kept], found.rank
    return cores, bonds, carry


def _of_dense(matrices: Float[Array, "b m n"], modes: Modes, choice: Choice):
    """Returns the cores and bonds of a stack of matrices."""
    rows, columns = zip(*modes, strict=True)
    count, sizes = len(modes), [math.prod(pair) for pair in modes]
    tensor = matrices.reshape(len(matrices), *rows, *columns)
    places = [1 + k + side * count for k in range(count) for side in (0, 1)]
    carry = tensor.transpose(0, *places).reshape(len(matrices), 1, -1)
    cores, bonds, last = _cut_all(carry, sizes[:-1], choice)
    return [*cores, last.reshape(len(last), -1, sizes[-1], 1)], bonds


def _of_factors(factors: Factors, modes: Modes, middle: int, choice: Choice):
    """Returns the cores and bonds of a stack of products, which are not formed."""
    rows, columns = [n for n, _ in modes[:middle]], [m for _, m in modes[middle:]]
    # With right^T = Q T, the unfoldings of left T^T have the values of those of the product.
    q, t = jnp.linalg.qr(factors.right.mT)
    left = matmul(factors.left, t.mT)
    cores, bonds, carry = _cut_all(left[:, None].reshape(len(left), 1, -1), rows[:-1], choice)
    # The rank of the matrix was chosen before. What it has left out cannot be fitted any more.
    decided = choice.rule is not None and choice.rule.needs_noise
    once = Choice(None, None, choice.min_size) if decided else choice
    (core,), (bond,), carry = _cut_all(carry, rows[-1:], once)
    bond = bond._replace(reason="kept: the rank of the factors") if decided else bond
    carry = matmul(carry, q.mT)
    others, more, last = _cut_all(carry, columns[:-1], choice)
    cores = [*cores, core, *others, last.reshape(len(last), -1, columns[-1], 1)]
    return cores, [*bonds, bond, *more]


def _to_stack(view: MatrixView, modes: Modes) -> tuple[Any, int]:
    """Returns a stack of matrices, or of factors of a state, and how many cores its rows have."""
    if any(map(mesh_of, jax.tree.leaves(view.leaf))):
        # Modes do not fit the division of a kernel over devices, and its cores are small.
        view = MatrixView(view.path, jax.tree.map(jnp.asarray, fetch(view.leaf)), view.axes)
    stack = jax.tree.map(lift, view.matrices())
    middle = next((k for k, (_, m) in enumerate(modes) if m > 1), len(modes))
    is_state = 0 < middle < len(modes) and all(n == 1 for n, _ in modes[middle:])
    if isinstance(stack, Factors) and not is_state:
        stack = matmul(*stack)
    return stack, middle


def _fit(view: MatrixView, modes: Modes, rule, tolerance, min_size: int) -> TrainFit:
    """Returns the train of a kernel."""
    inputs, outputs, batch = (tuple(view.shape[a] for a in group) for group in view.axes)
    stack, middle = _to_stack(view, modes)
    share = None if tolerance is None else tolerance / math.sqrt(len(modes) - 1)
    choice = Choice(rule, None if share is None else share * _norms(stack), min_size)
    if isinstance(stack, Factors):
        cores, bonds = _of_factors(stack, modes, middle, choice)
    else:
        cores, bonds = _of_dense(stack, modes, choice)
    dtype = jax.dtypes.canonicalize_dtype(view.dtype)
    ends = [(core.shape[1], core.shape[-1]) for core in cores]
    shapes = [(*batch, r, *pair, last) for (r, last), pair in zip(ends, modes, strict=True)]
    reshaped = [core.reshape(shape) for core, shape in zip(cores, shapes, strict=True)]
    cores = [jnp.asarray(core).astype(dtype) for core in reshaped]
    if not batch:
        bonds = [bond._replace(values=bond.values[0]) for bond in bonds]
    error = math.sqrt(sum(bond.lost**2 for bond in bonds))
    return TrainFit(TensorTrain(tuple(cores), inputs, outputs), tuple(bonds), error)


def _norms(stack: Any) -> Float[np.ndarray, " b"]:
    """Returns the Frobenius norms of a stack of matrices, or of products."""
    if isinstance(stack, Factors):
        _, t = jnp.linalg.qr(stack.right.mT)
        stack = matmul(stack.left, t.mT)
    return np.linalg.norm(np.asarray(stack, np.float64), axis=(1, 2))


def _check(rule, tolerance, min_size) -> None:
    if rule is not None:
        check_rule(rule)
    if tolerance is not None and not 0 <= tolerance < 1:
        raise ValueError(
            f"`tolerance` must be in [0, 1), got {tolerance}: the share of the Frobenius norm that "
            "may be lost."
        )
    if rule is not None and tolerance is not None:
        raise ValueError("give `rule` or `tolerance`, and not both: each chooses the bonds.")
    check_count("min_size", min_size)


def tensor_train(
    kernel: Float[ArrayLike, "..."] | Factors | FactoredKernel,
    modes: Sequence[tuple[int, int]],
    *,
    rule: ranks.RankRule | None = None,
    tolerance: float | None = None,
    axes: KernelAxes | None = None,
    min_size: int = 50,
) -> TrainFit:
    r"""Returns a kernel as a tensor train, with bonds by a rank rule or by a tolerance.

    TT-SVD cuts the unfolding $(r_{k-1} n_k m_k) \times rest$ at each bond k to its first singular
    directions, from the first core to the last. Each cut is an orthogonal projection, so that

    $$\|W - \hat W\|_F \le \sqrt{\sum_k \epsilon_k^2}, \qquad \epsilon_k^2 = \sum_{j > r_k} s_j^2.$$

    Without `rule` and `tolerance` nothing is cut. `Factors` are not multiplied out if `modes` are
    those of a state: their rank becomes the bond in the middle, and their halves are compressed.

    Args:
      kernel: A matrix (rows, columns), `Factors` or another kernel in parts; with `axes`, an array
        of any shape.
      modes: The pair $(n_k, m_k)$ of each core: `rmtjax.lowrank.operator_modes` or `state_modes`.
        Their products are the rows and the columns. For a convolution the $n_k$ multiply to its
        input channels, and a core (window, 1) is put before them.
      rule: A rank rule of `rmtjax.ranks`, for each unfolding. `rmtjax.ranks.bema()` cuts at the
        Marchenko-Pastur edge. An unfolding that the rule does not accept is not cut.
      tolerance: $\epsilon$ in [0, 1). Each bond may lose $\epsilon \|W\|_F / \sqrt{d - 1}$, so that
        the error is at most $\epsilon \|W\|_F$.
      axes: The axes of the kernel, in the order batch, inputs, outputs.
      min_size: Unfoldings with a shorter short side are not cut by a rule with a noise level.

    Returns:
      `TrainFit(train, bonds, error)`, which tells why each bond is as it is.

    Raises:
      ValueError, TypeError: An argument is not as described.

    Examples:
      >>> import jax, rmtjax
      >>> matrix = jax.random.normal(jax.random.key(0), (64, 64))
      >>> modes = rmtjax.lowrank.operator_modes((8, 8), (8, 8))
      >>> fit = rmtjax.lowrank.tensor_train(matrix, modes, rule=rmtjax.ranks.fixed(16))
      >>> fit.train.bonds, [core.shape for core in fit.train.cores]
      ((16,), [(1, 8, 8, 16), (16, 8, 8, 1)])
      >>> error = jax.numpy.linalg.norm(matrix - fit.train.multiply())
      >>> bool(error <= 1.0001 * fit.error)
      True

    References:
      Oseledets, SIAM J. Sci. Comput. 33 (2011) 2295-2317, for TT-SVD and the bound; Jahromi and
      Orus (2022), https://arxiv.org/abs/2211.14657, for operators in dense layers; "Tensor train
      decompositions on recurrent networks" (2020), https://arxiv.org/abs/2006.05442, for states.
    """
    _check(rule, tolerance, min_size)
    view = kernel_view("tensor_train", kernel, axes)
    if not in_order(view):
        raise ValueError(
            f"`axes` must be in the order batch, inputs, outputs, got {view.axes}: transpose the "
            "kernel first."
        )
    return _fit(view, check_modes(modes, view), rule, tolerance, min_size)


def to_trains(
    params: PyTree,
    modes: Mapping[str, Sequence[tuple[int, int]]],
    *,
    rule: ranks.RankRule | None = None,
    tolerance: float | None = None,
    axes: Axes | None = None,
    min_size: int = 50,
) -> Trains:
    """Replaces kernels of a tree by tensor trains.

    Run the tree with `rmtjax.linen.apply` or `rmtjax.nnx.replace`. Layers contract their inputs
    with one core after another, or with the two halves of a state. `Factors` become states, as a
    second compression after `rmtjax.factorize`.

    Args:
      params: A tree of arrays, `Factors` or kernels in other parts.
      modes: Path of each kernel that is replaced to its modes, as in `tensor_train`.
      rule, tolerance, min_size: As in `tensor_train`.
      axes: As in `rmtjax.plan`.

    Returns:
      `Trains(params, fits)`. Other leaves are the same objects.

    Raises:
      ValueError, TypeError: An argument is not as described, a path is not in the tree, or its
        kernel is no matrix with axes in the order batch, inputs, outputs.

    Examples:
      >>> import jax, rmtjax
      >>> params = {"Dense_0": {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}}
      >>> modes = {"Dense_0/kernel": rmtjax.lowrank.operator_modes((8, 10), (6, 10))}
      >>> trains = rmtjax.lowrank.to_trains(params, modes, rule=rmtjax.ranks.fixed(4))
      >>> trains.params["Dense_0"]["kernel"].bonds
      (4,)
    """
    _check(rule, tolerance, min_size)
    views = find_kernels(params, lambda path, _: path in modes, axes)
    fits = {}
    for path, pairs in modes.items():
        view = views.get(path)
        if not isinstance(view, MatrixView) or not in_order(view):
            cause = (
                "is not in `params`" if view is None else "is no matrix in the order of its axes"
            )
            raise ValueError(f"`modes` has {path!r}, which {cause}: leave it out, or give `axes`.")
        fits[path] = _fit(view, check_modes(pairs, view), rule, tolerance, min_size)
    replaced = map_kernels(lambda path, _: fits[path].train, params, fits)
    return Trains(replaced, fits)
