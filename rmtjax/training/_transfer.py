"""The state of an optimizer, carried over from dense kernels to their factors."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rmtjax._axes import factored_axes, Factors, is_factors, kernel_shape
from rmtjax.planning import path_name
from rmtjax.spectra import lift, multiply
from rmtjax.training._prune_entries import PruneEntriesState
from rmtjax.training._prune_spectrum import PruneState

# What optax's states hold of each kernel, by field: sums of gradients, and sums of the squares of
# their entries. Not `ema`, which is as often a mean of parameters: a guess would ruin it.
GRADIENTS = ("trace", "mu", "acc_grads", "previous_gradient")
SQUARES = ("nu", "nu_max", "sum_of_squares")
# Stay whole: they name kernels by strings, which may look like places of moments, and go
# on with the kernels that are left.
BY_PATH = (PruneState, PruneEntriesState)

Key = tuple[Any, ...]  # a place in a tree, as JAX names it


def _pull_back(gradient: Float[Array, "..."], factors: Factors) -> Factors:
    """The gradient of the factors, from that of their product: the chain rule."""
    product, pull = jax.vjp(multiply, jax.tree.map(lift, factors))
    return pull(gradient.astype(product.dtype))[0]


def _square(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.square(lift(leaf)), tree)


def _correlate(batch: int, rank: int, pulled, seen, uncorrelated) -> Float[Array, "..."]:
    """Mean squares, raised in each direction as the squares of a sample are over theirs."""
    others = tuple(axis for axis in range(batch, seen.ndim) if axis != rank)
    total, expected = (jnp.sum(a, others, keepdims=True) for a in (seen, uncorrelated))
    ratio = jnp.where(expected > 0, total / jnp.where(expected > 0, expected, 1), 1)
    # Never lowered: a sample may be small by chance, and steps too long cost more than steps too
    # short. And no mean square is under the square of the mean, as centered RMSProp relies on.
    return jnp.maximum(jnp.maximum(ratio, 1) * pulled, seen)


def _pull_back_squares(squares, gradient, factors: Factors) -> Factors:
    """Mean squares of the gradient of the factors, from those of the entries of a kernel's.

    The directions that training lifts out of a kernel are those along which the entries of
    its gradient are correlated. Mean squares do not tell how much; a sample does.
    """
    pulled = _pull_back(squares, _square(factors))
    if gradient is None:
        return pulled
    seen = _square(_pull_back(gradient, factors))
    uncorrelated = _pull_back(_square(gradient), _square(factors))
    batch = len(factored_axes(factors).batch)
    ranks = (factors.left.ndim - 1, batch)  # the axes of the rank
    return Factors(*map(partial(_correlate, batch), ranks, pulled, seen, uncorrelated))


def _project(field: str, moment: Any, gradient: Any, path: str, factors: Factors) -> Factors:
    """A moment of a kernel, by the field that holds it, as that of the factors."""
    shape = kernel_shape(factors)
    if field not in (*GRADIENTS, *SQUARES) or jnp.shape(moment) != shape:
        raise ValueError(
            f"`opt_state` has {field!r} of {path!r}, of shape {jnp.shape(moment)}: nothing says "
            f"how it follows the kernel of shape {shape} to its factors. Known of a kernel's "
            f"shape are {', '.join((*GRADIENTS, *SQUARES))}; all others can start anew, by "
            '`moments="reset"` with `optimizer`.'
        )
    if field in SQUARES:
        pulled = _pull_back_squares(moment, gradient, factors)
    else:
        pulled = _pull_back(moment, factors)
    return jax.tree.map(lambda factor: factor.astype(moment.dtype), pulled)


def _compare(params: PyTree, factorized: PyTree) -> dict[Key, Factors | None]:
    """The factors that replace each leaf of `params`; None for a leaf that stays."""
    dense, thin = (
        dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_factors))
        for tree in (params, factorized)
    )
    hint = "Give the tree that `rmtjax.factorize` was given, and what it returned."
    if alone := dense.keys() ^ thin.keys():
        key = min(alone, key=path_name)
        holder, other = ("params", "factorized")[:: 1 if key in dense else -1]
        raise ValueError(f"`{holder}` has {path_name(key)!r}, which is not in `{other}`. {hint}")
    found = {}
    for key, leaf in dense.items():
        replaced = is_factors(thin[key]) and not is_factors(leaf)
        seen, new = (jax.tree.map(jnp.shape, tree) for tree in (leaf, thin[key]))
        if (kernel_shape(thin[key]) if replaced else new) != seen:
            hint = "Factors cut again start anew: `optimizer.init`." if is_factors(leaf) else hint
            raise ValueError(
                f"`factorized` has {path_name(key)!r} of shape {new}, which does not stand for "
                f"{seen} in `params`. {hint}"
            )
        found[key] = thin[key] if replaced else None
    if found.get(()):
        raise ValueError("`params` must be a tree with names, got one kernel alone.")
    return found


def _carry(key: Key, nodes: dict[Key, Any], fresh: Any, replaced: dict, reset: bool) -> Any:
    """One node of the state: what belongs to a replaced kernel is changed, all else is kept."""
    node = nodes[key]
    # The longest end of its place that is a place in `params`.
    end = next((key[i:] for i in range(len(key)) if key[i:] in replaced), ())
    factors = replaced.get(end)
    if factors is None or isinstance(node, BY_PATH):
        return node
    left_out = isinstance(node, optax.MaskedNode)
    if left_out and fresh is None:
        raise ValueError(
            f"`opt_state` leaves out {path_name(end)!r}, by `optax.masked` or `partition`. Give "
            "`optimizer`: the state does not tell whether its mask sees one kernel or two factors."
        )
    if left_out or reset:
        return fresh
    *holder, field = key[: -len(end)] or ("",)
    gradient = nodes.get((*holder, jax.tree_util.GetAttrKey("mu"), *end))
    return _project(path_name((field,)), node, gradient, path_name(end), factors)


def _fresh_nodes(treedef, optimizer, factorized: PyTree) -> list[Any]:
    """The state that the optimizer starts with, cut where that of `treedef` has leaves."""
    if optimizer is None:
        return [None] * treedef.num_leaves
    try:
        return treedef.flatten_up_to(optimizer.init(factorized))
    except ValueError as error:
        raise ValueError(
            "`optimizer` does not start with a state like `opt_state`: give the one that made it, "
            "and if it did, start it anew with `optimizer.init(factorized)`."
        ) from error


def transfer(
    opt_state: PyTree,
    params: PyTree,
    factorized: PyTree,
    *,
    moments: str = "project",
    optimizer: optax.GradientTransformation | optax.MultiSteps | None = None,
) -> PyTree:
    r"""The state of an optimizer for the factors of the kernels that it has trained.

    With $W = L R$ a moment M that is linear in the gradient G of W follows by the chain rule,
    $M_L = M R^T$ and $M_R = L^T M$: what the factors would have gathered, had they been
    those of today all the time. Mean squares V of the entries of G become
    $V_L = V (R \odot R)^T$ and $V_R = (L \odot L)^T V$, those of the same products for entries
    that are not correlated. Where the state has M beside V, as Adam's, the column of $V_L$ for
    each direction of the rank is multiplied by how much the column of $M_L \odot M_L$ exceeds
    that of $(M \odot M) (R \odot R)^T$ in sum, if it does, and is at least
    $M_L \odot M_L$; the rows of $V_R$ likewise. All else, step counts among it, stays.

    Known by the names of their fields are the states of SGD with momentum, Adam, AdamW,
    AMSGrad, NAdam, Yogi, Lion, RMSProp and Adagrad, in any chain and wrapper;
    other moments of a factorized kernel are refused. `prune_spectrum` and `prune_entries` go
    on with the kernels that are left.

    Args:
      opt_state: State of an optimizer of `params`.
      params: The dense tree that `opt_state` belongs to.
      factorized: `rmtjax.factorize(params, plan)`.
      moments: "project", as above, or "reset": what is held of a factorized kernel starts
        as `optimizer.init` would start it, and any field may be there.
      optimizer: What made `opt_state`. Needed for "reset", since no state tells its start;
        and where `optax.masked` or `partition` leave a factorized kernel out, since
        their mask may see one kernel there or two factors.

    Returns:
      The state, of the structure, shapes and dtypes of `optimizer.init(factorized)`, but that
      the states of this package keep the entries of all kernels. Works under `jit`.

    Raises:
      ValueError: The trees do not belong together; a field of a factorized kernel is not
        known; or `optimizer` is needed, or has another state.

    Note:
      A step of size a moves the product by a multiple of a that grows with the singular
      values: a learning rate that was high for the kernel may be too high for its factors.

      A `trace` behind a transform that rescales, as in `optax.rmsprop(..., momentum=0.9)`, is
      no sum of gradients: pulled back it keeps its direction but not its size. The `nu` of
      Adamax is a maximum under the name of a mean square, that of AdaBelief a variance. Reset
      these. Since Adam's count stays
      in a reset, its first steps are too long; `optimizer.init(factorized)` has it new.

    Examples:
      >>> import jax, optax, rmtjax
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (80, 60))}
      >>> optimizer = optax.adam(1e-3)
      >>> _, state = optimizer.update(params, optimizer.init(params), params)
      >>> plan = rmtjax.plan(params, rule=rmtjax.ranks.fixed(16))
      >>> thin = rmtjax.factorize(params, plan)
      >>> moved = rmtjax.transfer(state, params, thin)
      >>> optax.tree.get(moved, "nu")["kernel"].left.shape
      (80, 16)
    """
    if moments not in ("project", "reset"):
        raise ValueError(f'`moments` must be "project" or "reset", got {moments!r}.')
    if moments == "reset" and optimizer is None:
        raise ValueError(
            '`moments="reset"` needs `optimizer`: where its moments start is not in its state.'
        )
    replaced = _compare(params, factorized)
    whole = lambda node: isinstance(node, (*BY_PATH, optax.MaskedNode))
    places, treedef = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=whole)
    nodes, fresh = dict(places), _fresh_nodes(treedef, optimizer, factorized)
    carried = (
        _carry(key, nodes, new, replaced, moments == "reset")
        for key, new in zip(nodes, fresh, strict=True)
    )
    return treedef.unflatten(carried)
