"""Transfers the state of an optimizer from dense kernels to their factors."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rmtjax._axes import factored_axes, FactoredKernel, Factors, is_factors, kernel_shape
from rmtjax._modes import in_usual_modes
from rmtjax.planning import path_name
from rmtjax.spectra import lift, multiply
from rmtjax.training._metrics import STATES
from rmtjax.training._prune_state import PruneState

# Fields of optax's states that hold, for each kernel, sums of gradients or sums of the squares of
# their entries. Not `ema`, which is as often a mean of parameters: a guess would ruin it.
GRADIENTS = ("trace", "mu", "acc_grads", "previous_gradient")
SQUARES = ("nu", "nu_max", "sum_of_squares")
# These states stay as they are. They name kernels by strings, which may look like the places of
# moments, and they go on with the kernels that are left.
_by_path = lambda node: isinstance(node, tuple(STATES))

Key = tuple[Any, ...]  # a place in a tree, as JAX names it
Parts = Factors | FactoredKernel


def _pull_back(gradient: Float[Array, "..."], factors: Parts) -> Parts:
    """Returns the gradient of factors from that of their product, by the chain rule."""
    product, pull = jax.vjp(multiply, jax.tree.map(lift, factors))
    return pull(gradient.astype(product.dtype))[0]


def _square(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.square(lift(leaf)), tree)


def _correlate(batch: int, rank: int, pulled, sample, uncorrelated) -> Float[Array, "..."]:
    """Returns mean squares, raised in each direction by what a sample shows of correlation."""
    others = tuple(axis for axis in range(batch, sample.ndim) if axis != rank)
    total, expected = (jnp.sum(a, others, keepdims=True) for a in (sample, uncorrelated))
    ratio = jnp.where(expected > 0, total / jnp.where(expected > 0, expected, 1), 1)
    # Never lowered: a sample may be small by chance, and long steps cost more than short ones. A
    # mean square is at least the square of the mean, which centered RMSProp relies on.
    return jnp.maximum(jnp.maximum(ratio, 1) * pulled, sample)


def _pull_back_squares(squares, gradient, factors: Parts) -> Parts:
    """Returns mean squares of the gradient of factors from those of the gradient of a kernel."""
    # The entries of the gradient are correlated along the directions that training lifts. Mean
    # squares do not show how much, but the gradient of a sample does.
    pulled: Any = _pull_back(squares, _square(factors))
    if gradient is None:
        return pulled
    sample: Any = _square(_pull_back(gradient, factors))
    if isinstance(factors, FactoredKernel):  # whose parts have no common axis of directions
        return jax.tree.map(jnp.maximum, pulled, sample)
    uncorrelated: Any = _pull_back(_square(gradient), _square(factors))
    batch = len(factored_axes(factors).batch)
    ranks = (factors.left.ndim - 1, batch)  # the axes of the rank
    return Factors(*map(partial(_correlate, batch), ranks, pulled, sample, uncorrelated))


def _project(field: str, moment: Any, gradient: Any, path: str, factors: Parts) -> Parts:
    """Returns the moment of factors from that of their kernel, by the name of its field."""
    shape = kernel_shape(factors)
    if field not in (*GRADIENTS, *SQUARES) or jnp.shape(moment) != shape:
        raise ValueError(
            f"`opt_state` has {field!r} of {path!r}, of shape {jnp.shape(moment)}. It is not known "
            f"how to transfer it from the kernel of shape {shape} to factors. Known fields, of the "
            f"shape of the kernel, are {', '.join((*GRADIENTS, *SQUARES))}. Others can start again "
            'by `moments="reset"` with `optimizer`.'
        )
    if field in SQUARES:
        pulled = _pull_back_squares(moment, gradient, factors)
    else:
        pulled = _pull_back(moment, factors)
    return jax.tree.map(lambda factor: factor.astype(moment.dtype), pulled)


def _compare(params: PyTree, factorized: PyTree) -> dict[Key, Parts | None]:
    """Returns the factors that replace each leaf of `params`; None for a leaf that stays."""
    leaves = lambda tree: dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_factors))
    dense, thin = leaves(params), leaves(factorized)
    hint = "Give the tree that `rmtjax.factorize` was given, and what it returned."
    if alone := dense.keys() ^ thin.keys():
        key = min(alone, key=path_name)
        holder, other = ("params", "factorized")[:: 1 if key in dense else -1]
        raise ValueError(f"`{holder}` has {path_name(key)!r}, which is not in `{other}`. {hint}")
    replacements = {}
    for key, leaf in dense.items():
        replaced = is_factors(thin[key]) and not is_factors(leaf)
        old, new = (jax.tree.map(jnp.shape, tree) for tree in (leaf, thin[key]))
        if (kernel_shape(thin[key]) if replaced else new) != old:
            hint = "Factors cut again need `optimizer.init`." if is_factors(leaf) else hint
            raise ValueError(
                f"`factorized` has {path_name(key)!r} of shape {new}, which does not stand for "
                f"{old} in `params`. {hint}"
            )
        replacements[key] = thin[key] if replaced else None
    if replacements.get(()):
        raise ValueError("`params` must be a tree with names, got one kernel alone.")
    return replacements


def _carry(key: Key, nodes: dict[Key, Any], fresh: Any, replaced: dict, reset: bool) -> Any:
    """Returns a node of the state, changed if it belongs to a kernel that factors replace."""
    node = nodes[key]
    # The longest end of its place that is a place in `params`: ends of paths may be paths, too.
    end = next((key[i:] for i in range(len(key)) if key[i:] in replaced), ())
    factors = replaced.get(end)
    if factors is None or _by_path(node):
        return node
    left_out = isinstance(node, optax.MaskedNode)
    if left_out and fresh is None:
        raise ValueError(
            f"`opt_state` leaves out {path_name(end)!r}, by `optax.masked` or `partition`. Give "
            "`optimizer`: the state does not show whether its mask sees one kernel or two factors."
        )
    if left_out or reset:
        return fresh
    *holder, field = key[: -len(end)] or ("",)
    gradient = nodes.get((*holder, jax.tree_util.GetAttrKey("mu"), *end))
    return _project(path_name((field,)), node, gradient, path_name(end), factors)


def _fresh_nodes(treedef, optimizer, factorized: PyTree) -> list[Any]:
    """Returns the nodes of a fresh state at the places of the leaves of `treedef`."""
    if optimizer is None:
        return [None] * treedef.num_leaves
    try:
        with warnings.catch_warnings():
            # The transforms go on with what is left, which may be nothing.
            warnings.filterwarnings("ignore", ".*will never change a kernel")
            return treedef.flatten_up_to(optimizer.init(factorized))
    except ValueError as error:
        raise ValueError(
            "`optimizer` does not start with a state like `opt_state`: give the one that made it. "
            "If it did, start again with `optimizer.init(factorized)`."
        ) from error


@in_usual_modes
def transfer_opt_state(
    opt_state: PyTree,
    params: PyTree,
    factorized: PyTree,
    *,
    moments: str = "project",
    optimizer: optax.GradientTransformation | optax.MultiSteps | None = None,
) -> PyTree:
    r"""Returns the state of an optimizer for the factors of the kernels that it has trained.

    With $W = L R$, a moment M that is linear in the gradient of W follows by the chain rule:
    $M_L = M R^T$ and $M_R = L^T M$. Mean squares V of its entries become
    $V_L = V (R \odot R)^T$ and $V_R = (L \odot L)^T V$, exact for entries without correlation.
    Adam's M shows the correlation: if $M_L \odot M_L$ exceeds $(M \odot M) (R \odot R)^T$ in the
    sum of a column, that column of $V_L$ is multiplied by the quotient, and is at least
    $M_L \odot M_L$. The rows of $V_R$ are treated likewise. All else, as step counts, stays.

    Fields are known by their names: those of SGD with momentum, Adam, AdamW, AMSGrad, NAdam, Yogi,
    Lion, RMSProp and Adagrad, in any chain and wrapper. Other moments of a factorized kernel raise
    an error, also the mean of `average_params`: that of a kernel is none of its factors. All other
    transforms of this library go on with the kernels that are left.

    Args:
      opt_state: State of an optimizer of `params`.
      params: The dense tree that `opt_state` belongs to.
      factorized: `rmtjax.factorize(params, plan)`.
      moments: "project", as above, or "reset": those of a factorized kernel are then those of
        `optimizer.init`, and any field is allowed.
      optimizer: The optimizer of `opt_state`, for "reset", and for "project" if `optax.masked` or
        `partition` leave a factorized kernel out: their mask may see one kernel or two factors.

    Returns:
      The state, with the structure, shapes and dtypes of `optimizer.init(factorized)`. The states
      of this package keep the entries of all kernels. Works under `jit`.

    Raises:
      ValueError: The trees do not belong together, a field of a factorized kernel is not known, or
        `optimizer` is missing or has another state.

    Note:
      Reset a `trace` behind a transform that rescales, as in `optax.rmsprop(..., momentum=0.9)`,
      and the `nu` of Adamax and AdaBelief: they are not sums of gradients and of squares. A reset
      keeps Adam's count, so that its first steps are too long: prefer `optimizer.init`.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> optimizer = optax.adam(1e-3)
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> thin = rmtjax.factorize(params, rmtjax.plan(params, rule=rmtjax.ranks.fixed(16)))
      >>> moved = rmtjax.transfer_opt_state(state, params, thin)
      >>> optax.tree.get(moved, "nu")["kernel"].left.shape
      (80, 16)
    """
    if moments not in ("project", "reset"):
        raise ValueError(f'`moments` must be "project" or "reset", got {moments!r}.')
    if moments == "reset" and optimizer is None:
        raise ValueError(
            '`moments="reset"` needs `optimizer`: a state does not show how its moments started.'
        )
    replaced = _compare(params, factorized)
    is_node = lambda node: _by_path(node) or isinstance(node, optax.MaskedNode)
    places, treedef = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_node)
    nodes, fresh = dict(places), _fresh_nodes(treedef, optimizer, factorized)

    def carry(key: Key, new: Any) -> Any:
        node = _carry(key, nodes, new, replaced, reset=moments == "reset")
        whole = isinstance(node, PruneState) and jax.tree.structure(node.reference) == of_params
        # A copy, since both may be donated.
        return node._replace(reference=jax.tree.map(jnp.copy, factorized)) if whole else node

    of_params = jax.tree.structure(params)
    return treedef.unflatten(map(carry, nodes, fresh))
