r"""Penalties of SVD training: orthogonality of singular vectors, sparsity of singular values.

Each sums over the `SpectralFactors` of a tree, and over the matrices of a stack, and returns a
scalar in float32 at least. Derivatives have closed forms, which are finite everywhere.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from rmtjax._sharding import by_compiler, typed_sharding
from rmtjax.lowrank._spectral import SpectralFactors
from rmtjax.planning import leaves_by_path
from rmtjax.spectra import lift, matmul


def spectral_leaves(name: str, params: PyTree) -> dict[str, SpectralFactors]:
    """Returns the kernels in spectral form by path; raises ValueError if there is none."""
    held = leaves_by_path(params, lambda _, leaf: isinstance(leaf, SpectralFactors))
    if not held:
        raise ValueError(
            f"`{name}` needs a tree with `SpectralFactors`, and `params` has none: make them by "
            "`rmtjax.lowrank.to_spectral(params)`."
        )
    return held


def _excess(vectors: Float[Array, "b n r"]) -> Float[Array, "b r r"]:
    return matmul(vectors.mT, vectors) - jnp.eye(vectors.shape[-1], dtype=vectors.dtype)[None]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _deviation(part: Float[Array, "..."], unfold: Callable) -> Float[Array, ""]:
    """Returns the deviation of a part whose vectors (b, n, r) `unfold` returns."""
    excess = by_compiler(lambda part: _excess(unfold(part)), part)
    return jnp.sum(jnp.square(excess))


@_deviation.defjvp
def _deviation_jvp(unfold, primals, tangents):
    def slope(part):
        # The derivative 4 U (U^T U - I) is one product. Automatic derivatives take two.
        vectors, fold = jax.vjp(unfold, part)
        return fold(4 * matmul(vectors, _excess(vectors)))[0]

    (part,), (moved,) = primals, tangents
    found = by_compiler(slope, part, out=typed_sharding(part))
    return _deviation(part, unfold), jnp.sum(lift(found) * lift(moved))


def orthogonality(params: PyTree) -> Float[Array, ""]:
    r"""Returns $\sum \frac1{r^2} (\|U^T U - I\|_F^2 + \|V^T V - I\|_F^2)$, for a loss.

    While it is small, $|s|$ are the singular values. The derivative is
    $\frac4{r^2} U (U^T U - I)$, and alike for V. A step costs $2 r^2 (m + n)$ multiply-adds for
    each kernel: much for wide dense layers, little for convolutions.

    Args:
      params: A tree with `SpectralFactors`.

    Raises:
      ValueError: There are none.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> u = v = jnp.eye(4, 2)
      >>> kernel = rmtjax.lowrank.SpectralFactors(2 * u, jnp.ones(2), v.T)
      >>> print(rmtjax.lowrank.orthogonality({"kernel": kernel}))  # 2 * 3^2 / 2^2
      4.5

    References:
      Yang, Tang, Wen, Yan, Hu, Li, Li and Chen (2020), https://arxiv.org/abs/2004.09031.
    """
    total = jnp.zeros((), jnp.float32)
    for kernel in spectral_leaves("orthogonality", params).values():
        *batch, rank = kernel.s.shape
        stack = batch[0] if batch else 1
        left = lambda u, shape=(stack, -1, rank): lift(u).reshape(shape)
        right = lambda v, shape=(stack, rank, -1): lift(v).reshape(shape).mT
        total += (_deviation(kernel.u, left) + _deviation(kernel.v, right)) / rank**2
    return total


def _unit(s: Float[Array, "b r"]) -> Float[Array, "b r"]:
    """Returns values over the largest magnitude, so that no square overflows or underflows."""
    return s / jnp.maximum(jnp.max(jnp.abs(s), axis=-1, keepdims=True), jnp.finfo(s.dtype).tiny)


def _norms(s: Float[Array, "b r"]) -> tuple[Array, Array]:
    """Returns sums of magnitudes, and of squares; those of zeros are 0 and 1."""
    squares = jnp.sum(jnp.square(s), axis=-1, keepdims=True)
    return jnp.sum(jnp.abs(s), axis=-1, keepdims=True), jnp.where(squares > 0, squares, 1)


def _closed(slope: Callable[[Array, Array, Array], Array], power: int) -> Callable[[Array], Array]:
    """Returns (sum |s| / root of sum s^2)^power - 1 with a slope that is finite at zero."""

    @jax.custom_jvp
    def ratio(s):
        s = _unit(s)
        magnitudes, squares = _norms(s)
        value = (magnitudes / jnp.sqrt(squares)) ** power - 1
        return jnp.sum(jnp.where(magnitudes > 0, value, 0))

    @ratio.defjvp
    def _(primals, tangents):
        (s,), (moved,) = primals, tangents
        largest = jnp.max(jnp.abs(s), axis=-1, keepdims=True)
        unit = _unit(s)
        # The ratios do not change with the scale: slopes are those of unit values, over the scale.
        found = slope(unit, *_norms(unit)) / jnp.where(largest > 0, largest, 1)
        return ratio(s), jnp.sum(jnp.where(largest > 0, found, 0) * moved)

    return ratio


_hoyer = _closed(
    lambda s, sum_, squares: (jnp.sign(s) - sum_ * s / squares) / jnp.sqrt(squares), power=1
)
_hoyer_square = _closed(
    lambda s, sum_, squares: 2 * sum_ * (jnp.sign(s) - sum_ * s / squares) / squares, power=2
)


def _sum_over(name: str, ratio: Callable[[Array], Array], params: PyTree) -> Float[Array, ""]:
    values = [kernel.s for kernel in spectral_leaves(name, params).values()]
    rows = [lift(s).reshape(-1, s.shape[-1]) for s in values]
    return jnp.asarray(sum(map(ratio, rows)), jnp.result_type(*rows))


def hoyer(params: PyTree) -> Float[Array, ""]:
    r"""Returns $\sum (\|s\|_1 / \|s\|_2 - 1)$ over the singular values of each kernel, for a loss.

    Each term is between 0, for one value that is not 0, and $\sqrt r - 1$, for r equal ones. It
    does not change with the scale of a kernel. The derivative is
    $\operatorname{sign}(s) / \|s\|_2 - \|s\|_1 s / \|s\|_2^3$, with sign(0) = 0. Of a kernel of
    zeros, the term and its derivative are 0.

    Args:
      params: A tree with `SpectralFactors`.

    Raises:
      ValueError: There are none.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> kernel = rmtjax.lowrank.SpectralFactors(jnp.eye(4), jnp.ones(4), jnp.eye(4))
      >>> print(rmtjax.lowrank.hoyer({"kernel": kernel}))
      1.0

    References:
      Hoyer, J. Mach. Learn. Res. 5 (2004) 1457-1469; Yang et al. (2020),
      https://arxiv.org/abs/2004.09031.
    """
    return _sum_over("hoyer", _hoyer, params)


def hoyer_square(params: PyTree) -> Float[Array, ""]:
    r"""Returns $\sum (\|s\|_1^2 / \|s\|_2^2 - 1)$ over the values of each kernel, for a loss.

    Each term is between 0 and $r - 1$. It pulls small values down harder than `hoyer`, which has
    the same arguments and errors. The derivative is
    $2 \frac{\|s\|_1}{\|s\|_2^2} (\operatorname{sign}(s) - \|s\|_1 s / \|s\|_2^2)$.

    Args:
      params: A tree with `SpectralFactors`.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> kernel = rmtjax.lowrank.SpectralFactors(jnp.eye(4), jnp.ones(4), jnp.eye(4))
      >>> print(rmtjax.lowrank.hoyer_square({"kernel": kernel}))
      3.0

    References:
      Yang, Wen and Li, DeepHoyer (2020), https://arxiv.org/abs/1908.09979.
    """
    return _sum_over("hoyer_square", _hoyer_square, params)
