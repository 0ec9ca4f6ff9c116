"""Bounds on the predictions of a network whose kernels were changed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from rmtjax._sharding import by_compiler, mesh_of
from rmtjax.certificate._chain import check_activation, check_chain, check_labels, read_layers
from rmtjax.certificate._rounding import (
    affine,
    eps_of,
    Layer,
    lost_squares,
    mean,
    norm,
    operator_norm as operator_norm,
)

Activation = Callable[[Array], Array]


class Certificate(NamedTuple):
    """What is certain of a changed network, on the samples given.

    What is not finite bounds nothing: the prediction counts as one that may change.

    Attributes:
      change: Bound on the magnitude of the change of each logit.
      unchanged: Whether the prediction, the largest logit, certainly stays the same.
      loss: Bound on the increase of the mean cross-entropy; may be negative. Without labels
        it holds for any. NaN where a label is no class.
      removed: Squares of entries that the kernels have lost, rounded down: for a truncation
        the sum of the squared singular values removed.
    """

    change: Float[Array, "samples outputs"]
    unchanged: Bool[Array, " samples"]
    loss: Float[Array, ""]
    removed: Float[Array, ""]

    def lowers_loss(self, l2: Float[ArrayLike, ""]) -> Bool[Array, ""]:
        r"""Whether cross-entropy plus $\mu_2 \sum W_{ij}^2$, the kernels', certainly falls.

        That is `loss` $< \mu_2$ `removed`; `l2` is $\mu_2$, as in `rmtjax.penalty`.
        """
        return self.loss < l2 * self.removed


class _Hidden(NamedTuple):
    """The inputs of a layer, as far as they are known."""

    values: Array  # before the change, as computed
    rounding: Array  # bound on the distance from these to the exact ones, of each sample
    distance: Array  # bound on the distance from the exact ones before to those after
    exact: bool = False  # whether both are 0: no need for the norms of the first kernel then


class _Outputs(NamedTuple):
    values: Array  # before the change, as computed
    rounding: Array
    shift: Array  # what the layer's own change takes from them
    shift_rounding: Array


def _outputs(hidden: Array, old: Layer, new: Layer) -> _Outputs:
    """What a layer and its change make of the inputs as computed."""
    removed = jax.tree.map(jnp.subtract, old, new)
    return _Outputs(*affine(hidden, old), *affine(hidden, removed))


def _pass(hidden: _Hidden, old: Layer, new: Layer, activation: Activation) -> _Hidden:
    """The inputs of the layer after this one."""
    out = _outputs(hidden.values, old, new)
    values = activation(out.values)
    # An activation is taken to be right to 8 eps.
    rounding = norm(out.rounding + 8 * eps_of(values) * jnp.abs(values), axis=1)
    distance = norm(jnp.abs(out.shift) + out.shift_rounding, axis=1)
    if not hidden.exact:
        rounding += hidden.rounding * operator_norm(old.kernel)
        distance += hidden.rounding * norm(norm(old.kernel - new.kernel, axis=0))
        distance += hidden.distance * operator_norm(new.kernel)
    return _Hidden(values, rounding, distance)


def _pick(array: Array, index: Array) -> Array:
    return jnp.take_along_axis(array, index[:, None], axis=1)


def _leads(logits: Array, doubt: Array, best: Array, apart: Array | float = 0.0) -> Array:
    """Whether a class certainly has the largest logit.

    Each logit is known up to `doubt`, and differences from the best up to `apart` besides.
    """
    ahead = _pick(logits, best) - logits > doubt + _pick(doubt, best) + apart
    return jnp.all(ahead | (jnp.arange(logits.shape[1])[None, :] == best[:, None]), axis=1)


def _increase(out: _Outputs, labels: Array, apart: Array) -> Array:
    r"""Bound on the increase of each sample's cross-entropy.

    It is $\log \sum_j p_j e^{u_j}$ for probabilities $p$ before the change and $u_j$ what the
    logit $j$ gains on that of the label, here its upper bound.
    """
    eps, classes = eps_of(out.values), jnp.arange(out.values.shape[1])[None, :]
    gain = _pick(out.shift, labels) - out.shift + apart
    gain += out.shift_rounding + _pick(out.shift_rounding, labels)
    gain = jnp.where(classes == labels[:, None], 0, gain)
    largest = jnp.max(gain, axis=1)  # at least 0, and a bound by itself
    # The probabilities are right to a factor between exp(-doubt) and exp(doubt).
    doubt = 2 * jnp.max(out.rounding, axis=1) + (classes.size + 8) * eps
    usable = (largest < 40) & (doubt < 1)  # so that no exponential overflows
    factor = jnp.expm1(jnp.where(usable[:, None], gain, 0))
    slack = jnp.sign(factor) * jnp.expm1(jnp.where(usable, doubt, 0))[:, None]
    exact = jnp.log1p(jnp.sum(jax.nn.softmax(out.values) * (1 + slack) * factor, axis=1))
    exact += 8 * eps * (jnp.abs(exact) + eps)
    return jnp.where(usable, jnp.minimum(exact, largest), largest)


def _bound(
    hidden: _Hidden, old: Layer, new: Layer, labels: Array | None
) -> tuple[Array, Array, Array]:
    """`change`, `unchanged` and `loss` from the inputs of the last layer."""
    out = _outputs(hidden.values, old, new)
    # The rounding of the inputs becomes one of the outputs.
    spread = lambda kernel: hidden.rounding[:, None] * norm(kernel, axis=0)[None, :]
    rounding = out.rounding + spread(old.kernel)
    shift_rounding = out.shift_rounding + spread(old.kernel - new.kernel)
    out = _Outputs(out.values, rounding, out.shift, shift_rounding)
    moved = hidden.distance[:, None]
    between = lambda column: norm(new.kernel - column[:, None], axis=0)
    distances = lax.map(between, new.kernel.T)  # not at once: as large as a kernel each
    change = jnp.abs(out.shift) + shift_rounding + moved * norm(new.kernel, axis=0)[None, :]
    best, doubt = jnp.argmax(out.values, axis=1), rounding + shift_rounding
    unchanged = _leads(out.values, rounding, best)
    unchanged &= _leads(out.values - out.shift, doubt, best, moved * distances[best])
    if labels is None:
        return change, unchanged, mean(2 * jnp.max(change, axis=1))
    known = (labels >= 0) & (labels < change.shape[1])
    safe = jnp.where(known, labels, 0)
    increase = _increase(out, safe, moved * distances[safe])
    return change, unchanged, mean(jnp.where(known, increase, jnp.nan))


def _certify(
    values: Array,
    old: list[Layer],
    new: list[Layer],
    labels: Array | None,
    layers: Sequence[str],
    activation: Activation,
) -> Certificate:
    """What is computed of arrays that have been checked."""
    # One dtype for all, or a difference would be rounded more than is reckoned with.
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves((values, old, new)))
    values, old, new = jax.tree.map(lambda a: a.astype(dtype), (values, old, new))
    zero = jnp.zeros(len(values), dtype)
    hidden = _Hidden(values, zero, zero, exact=True)
    for pair in zip(old[:-1], new[:-1], strict=True):
        hidden = _pass(hidden, *pair, activation)
    once = dict(zip(layers, zip(old, new, strict=True), strict=True))  # one may come again
    removed = [lost_squares(a.kernel, b.kernel) for a, b in once.values()]
    return Certificate(*_bound(hidden, old[-1], new[-1], labels), sum(removed, zero[0]))


def certify(
    before: PyTree,
    after: PyTree,
    inputs: Float[ArrayLike, "samples inputs"],
    *,
    layers: Sequence[str],
    labels: Int[ArrayLike, " samples"] | None = None,
    activation: Activation = jax.nn.relu,
) -> Certificate:
    r"""What a change of some kernels can change in the predictions for given inputs.

    Bounds as told at the head of this module. The loss: with $p$ the probabilities before
    the change and $u_j$ the bound on what the logit $j$ gains on that of the label, the
    cross-entropy of a sample increases by at most $\log \sum_j p_j e^{u_j}$; without labels by
    at most $2 \max_k$ `change`, which is the budget of the source.

    On the same inputs both networks can also be run, which is sharper where layers before
    the last were changed. The certificate never runs the changed one, holds whatever the
    layers between do at their worst, and is not at the mercy of rounding.

    Args:
      before: Nested dictionaries of arrays, as `module.init(...)["params"]`.
      after: The changed tree: truncated, masked, quantized or trained on; factors merged
        by `rmtjax.merge`. Biases may differ too.
      inputs: What the first of the layers receives, shape (samples, inputs). To bound the
        change of a network's last layers, capture the activations before them.
      layers: Paths of the dense layers in the order in which they are applied.
      labels: Class of each sample.
      activation: Between the layers: elementwise with slopes in [-1, 1], as relu, tanh
        and sigmoid. A slope above that which a grid of points shows is refused.

    Returns:
      A `Certificate` in float32 at least; works under `jit` with `layers` and `activation`
      held fixed.

    Raises:
      ValueError: Layers are missing or do not fit, labels have another shape, or the
        activation is too steep.
      TypeError: A kernel or the inputs are not floating, labels are no integers, or a
        kernel is factorized.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> before = {"Dense_0": {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}}
      >>> after = {"Dense_0": {"kernel": jnp.array([[3.0, 0.0], [0.0, 0.0]])}}
      >>> inputs = jnp.array([[1.0, 2.0], [1.0, 4.0]])
      >>> found = rmtjax.certificate.certify(before, after, inputs, layers=["Dense_0"])
      >>> print(found.change.round(3))
      [[0. 2.]
       [0. 4.]]
      >>> print(found.unchanged)
      [ True False]

    References:
      Berlyand, Bourdais, Owhadi and Shmalo (2026), https://arxiv.org/abs/2606.02608. They sum
      a Lipschitz constant times $2 \|a R\|_\infty$; here it is the Euclidean norm, for
      which a product of norms is such a constant.
    """
    values = jnp.asarray(inputs)
    old, new = read_layers("before", before, layers), read_layers("after", after, layers)
    check_chain(old, new, values)
    check_activation(activation)
    if labels is not None:
        labels = jnp.asarray(labels)
        check_labels(labels, len(values))
    find = partial(_certify, layers=layers, activation=activation)
    if any(map(mesh_of, jax.tree.leaves((values, old, new)))):
        # At once: of several processes each step by itself might wait for another one's.
        find = jax.jit(find)
    return by_compiler(find, values, old, new, labels, anew=True)
