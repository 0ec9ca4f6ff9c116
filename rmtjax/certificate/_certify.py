"""Computes the bounds on the predictions of a network whose kernels have changed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from rmtjax._axes import native
from rmtjax._modes import in_usual_modes
from rmtjax._sharding import by_compiler, mesh_of
from rmtjax.certificate._chain import check_activation, check_inputs, Pairs, read_chain
from rmtjax.certificate._rounding import (
    affine,
    eps,
    largest,
    Layer,
    lost_squares,
    mean,
    norm,
    operator_norm,
)

Activation = Callable[[Array], Array]


class Certificate(NamedTuple):
    """Bounds on the outputs of a changed network on given samples.

    A value that is not finite is not a bound: the prediction counts as one that may change.

    Attributes:
      change: Bound on the magnitude of the change of each logit.
      unchanged: Whether the prediction, the largest logit, must stay the same.
      loss: Bound on the increase of the mean cross-entropy; may be negative. Without labels
        it holds for all labels. NaN if a label is not a class.
      removed: Sum of the squared entries that the kernels have lost, rounded down. For a
        truncation it is the sum of the squared singular values removed.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> params = {"Dense_0": {"kernel": jnp.eye(2)}}
      >>> bounds = rmtjax.certificate.certify(params, params, jnp.ones((3, 2)), layers=["Dense_0"])
      >>> float(bounds.removed), bounds.change.shape
      (0.0, (3, 2))
    """

    change: Float[Array, "samples outputs"]
    unchanged: Bool[Array, " samples"]
    loss: Float[Array, ""]
    removed: Float[Array, ""]

    def lowers_loss(self, l2: Float[ArrayLike, ""]) -> Bool[Array, ""]:
        r"""Returns True if cross-entropy plus $\mu_2 \sum W_{ij}^2$ over kernels must decrease.

        The condition is `loss` $< \mu_2$ `removed`; `l2` is $\mu_2$, as in `rmtjax.penalty`.
        """
        return self.loss < l2 * self.removed


class _Hidden(NamedTuple):
    """The inputs of a layer, with bounds for each sample."""

    values: Array  # before the change, as computed
    rounding: Array  # bound on the distance between `values` and the exact ones
    distance: Array  # bound on the distance between the exact ones before and after the change
    exact: bool = False  # both bounds are 0, so the norms of the kernel are not needed


class _Outputs(NamedTuple):
    """The outputs of a layer for the inputs as computed, and bounds on their rounding."""

    values: Array  # before the change
    rounding: Array
    shift: Array  # by how much the change of this layer lowers them
    shift_rounding: Array


def _outputs(hidden: Array, old: Layer, new: Layer) -> _Outputs:
    """Returns the outputs of a layer and of its change."""
    return _Outputs(*affine(hidden, old), *affine(hidden, jax.tree.map(jnp.subtract, old, new)))


def _pass(hidden: _Hidden, old: Layer, new: Layer, activation: Activation) -> _Hidden:
    """Returns the inputs of the next layer."""
    out = _outputs(hidden.values, old, new)
    values = activation(out.values)
    # An activation is assumed to be correct to 8 eps: XLA gives no bound for `exp` and `tanh`.
    rounding = norm(out.rounding + 8 * eps(values) * jnp.abs(values), axis=1)
    distance = norm(jnp.abs(out.shift) + out.shift_rounding, axis=1)
    if not hidden.exact:
        rounding += hidden.rounding * operator_norm(old.kernel)
        distance += hidden.rounding * norm(norm(old.kernel - new.kernel, axis=0))
        distance += hidden.distance * operator_norm(new.kernel)
    return _Hidden(values, rounding, distance)


def _pick(array: Array, index: Array) -> Array:
    return jnp.take_along_axis(array, index[:, None], axis=1)


def _leads(logits: Array, doubt: Array, best: Array, apart: Array | float = 0.0) -> Array:
    """Returns True if `best` must lead logits known up to `doubt`, and up to `apart` from it."""
    ahead = _pick(logits, best) - logits > doubt + _pick(doubt, best) + apart
    return jnp.all(ahead | (jnp.arange(logits.shape[1])[None, :] == best[:, None]), axis=1)


def _increase(out: _Outputs, labels: Array, apart: Array) -> Array:
    """Returns a bound on the increase of each sample's cross-entropy, which `certify` explains."""
    unit, classes = eps(out.values), jnp.arange(out.values.shape[1])[None, :]
    gain = _pick(out.shift, labels) - out.shift + apart
    gain += out.shift_rounding + _pick(out.shift_rounding, labels)
    gain = jnp.where(classes == labels[:, None], 0, gain)
    # The largest gain, at least 0, is a bound too.
    most = largest(gain)
    # The probabilities are correct to a factor between exp(-doubt) and exp(doubt).
    doubt = 2 * largest(out.rounding) + (classes.size + 8) * unit
    # Beyond these limits an exponential would overflow, or be meaningless.
    usable = (most < 40) & (doubt < 1)
    factor = jnp.expm1(jnp.where(usable[:, None], gain, 0))
    slack = jnp.sign(factor) * jnp.expm1(jnp.where(usable, doubt, 0))[:, None]
    exact = jnp.log1p(jnp.sum(jax.nn.softmax(out.values) * (1 + slack) * factor, axis=1))
    exact += 8 * unit * (jnp.abs(exact) + unit)
    return jnp.where(usable, jnp.minimum(exact, most), most)


def _bound(hidden: _Hidden, old: Layer, new: Layer, labels: Array | None) -> tuple[Array, ...]:
    """Returns `change`, `unchanged` and `loss` from the inputs of the last layer."""
    out = _outputs(hidden.values, old, new)
    # The rounding of the inputs spreads to the outputs.
    spread = lambda kernel: hidden.rounding[:, None] * norm(kernel, axis=0)[None, :]
    rounding = out.rounding + spread(old.kernel)
    shift_rounding = out.shift_rounding + spread(old.kernel - new.kernel)
    out = out._replace(rounding=rounding, shift_rounding=shift_rounding)
    moved = hidden.distance[:, None]
    between = lambda column: norm(new.kernel - column[:, None], axis=0)
    # One class at a time: each step needs as much memory as the kernel.
    distances = lax.map(between, new.kernel.T)
    change = jnp.abs(out.shift) + shift_rounding + moved * norm(new.kernel, axis=0)[None, :]
    best, doubt = jnp.argmax(out.values, axis=1), rounding + shift_rounding
    unchanged = _leads(out.values, rounding, best)
    unchanged &= _leads(out.values - out.shift, doubt, best, moved * distances[best])
    if labels is None:
        return change, unchanged, mean(2 * largest(change))
    known = (labels >= 0) & (labels < change.shape[1])
    safe = jnp.where(known, labels, 0)
    increase = _increase(out, safe, moved * distances[safe])
    return change, unchanged, mean(jnp.where(known, increase, jnp.nan))


def _certify(
    values: Array, pairs: Pairs, labels: Array | None, layers: Sequence[str], activation: Activation
) -> Certificate:
    """Returns the certificate of layers that have been checked."""
    # In one dtype: a difference of two dtypes is rounded more than the bounds allow for.
    # Not by promotion, which floats of 8 bits do not have.
    dtypes = {a.dtype for a in jax.tree.leaves((values, pairs))}
    dtype = jnp.result_type(jnp.float32, *(one for one in dtypes if one == jnp.float64))
    values, pairs = jax.tree.map(lambda a: a.astype(dtype), (values, pairs))
    zero = jnp.zeros(len(values), dtype)
    hidden = _Hidden(values, zero, zero, exact=True)
    for pair in pairs[:-1]:
        hidden = _pass(hidden, *pair, activation)
    # A layer that is applied several times lost its entries once.
    distinct = dict(zip(layers, pairs, strict=True))
    removed = [lost_squares(a.kernel, b.kernel) for a, b in distinct.values()]
    return Certificate(*_bound(hidden, *pairs[-1], labels), removed=sum(removed, zero[0]))


@in_usual_modes
def certify(
    before: PyTree,
    after: PyTree,
    inputs: Float[ArrayLike, "samples inputs"],
    *,
    layers: Sequence[str],
    labels: Int[ArrayLike, " samples"] | None = None,
    activation: Activation = jax.nn.relu,
) -> Certificate:
    r"""Bounds how much changed kernels can change the predictions for given inputs.

    `rmtjax.certificate` derives the bounds on logits. Let $p$ be the probabilities before the
    change and $u_j$ a bound on the gain of logit $j$ over that of the label. Then the cross-entropy
    of a sample increases by at most $\log \sum_j p_j e^{u_j}$. Without labels it increases by at
    most $2 \max_k$ `change`, the budget of the source. The changed network is not run. To run both
    networks on the same inputs is sharper if layers before the last have changed.

    Args:
      before: Nested dictionaries of arrays, such as `module.init(...)["params"]`.
      after: The changed tree; merge factors with `rmtjax.merge`. Biases may differ too.
      inputs: Inputs of the first of the layers, shape (samples, inputs). To bound the change of
        the last layers of a network, capture the activations before them.
      layers: Paths of the dense layers in the order in which they are applied.
      labels: Class of each sample.
      activation: Between the layers: elementwise with slopes in [-1, 1], such as relu, tanh
        and sigmoid. Slopes are checked on a grid of points.

    Returns:
      A `Certificate` in float32 at least. Works under `jit` if `layers` and `activation` are
      static.

    Raises:
      ValueError: Layers are missing or do not fit, labels have another shape, or the
        activation is too steep.
      TypeError: A kernel or the inputs are not floating, labels are not integers, or a
        kernel is factorized.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> before = {"Dense_0": {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}}
      >>> after = {"Dense_0": {"kernel": jnp.array([[3.0, 0.0], [0.0, 0.0]])}}
      >>> inputs = jnp.array([[1.0, 2.0], [1.0, 4.0]])
      >>> bounds = rmtjax.certificate.certify(before, after, inputs, layers=["Dense_0"])
      >>> print(bounds.change[:, 1].round(3), bounds.unchanged)
      [2. 4.] [ True False]

    References:
      Berlyand, Bourdais, Owhadi and Shmalo (2026), https://arxiv.org/abs/2606.02608. They sum
      a Lipschitz constant times $2 \|a R\|_\infty$. This function uses the Euclidean norm, for
      which a product of operator norms is such a constant.
    """
    values = jnp.asarray(native(inputs))
    labels = None if labels is None else jnp.asarray(labels)
    check_inputs(values, labels)
    pairs = read_chain(before, after, layers, values.shape[1])
    check_activation(activation)
    compute = partial(_certify, layers=layers, activation=activation)
    if any(map(mesh_of, jax.tree.leaves((values, pairs)))):
        # As one program. Processes that run single operations may do so in different orders, and
        # then they wait for each other forever.
        compute = jax.jit(compute)
    return by_compiler(compute, values, pairs, labels)
