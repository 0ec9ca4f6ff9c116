"""Names for the types that several layers share, and a check of them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from rmtjax._axes import KernelAxes
from rmtjax._text import brief_fields

Scalar = Float[Array, ""]
Count = Int[Array, ""]


class Spectrum(NamedTuple):
    r"""The empirical spectral density (ESD) of a matrix $W$, each eigenvalue with mass $1/p$.

    Attributes:
      eigenvalues: $\lambda_k = s_k^2 / n$, descending, for the singular values $s_k$
        of $W$ and $n$ its longer side. Their mean is the mean square of the entries.
      ratio: Aspect ratio $\gamma = p / n$ in (0, 1], $p$ the shorter side.

    Examples:
      >>> import jax.numpy as jnp, rmtjax
      >>> rmtjax.spectrum(jnp.diag(jnp.array([2.0, 1.0])))
      Spectrum(eigenvalues=float32[2] from 0.5 to 2, ratio=1)
    """

    eigenvalues: Float[Array, "*batch p"]
    ratio: Float[Array, ""]

    __repr__ = brief_fields


@jax.tree_util.register_pytree_node_class
class LiveSpectrum(Spectrum):
    """The spectrum of a matrix without its rows and columns of zeros, for compiled programs.

    Only the first `size` eigenvalues are those of what is left, whose ratio it has. Zeros follow,
    since shapes must not depend on values.
    """

    size: Int[Array, ""]

    def __new__(cls, eigenvalues, ratio, size):
        spectrum = super().__new__(cls, eigenvalues, ratio)
        spectrum.size = size
        return spectrum

    def tree_flatten(self):
        """Returns the arrays."""
        return (self.eigenvalues, self.ratio, self.size), None

    @classmethod
    def tree_unflatten(cls, _, arrays):
        """Returns a spectrum of arrays."""
        return cls(*arrays)


def size_of(spectrum: Spectrum) -> Any:
    """Returns the number of directions that a law is about: an integer, or a traced one."""
    return getattr(spectrum, "size", spectrum.eigenvalues.shape[-1])


class BulkFit(NamedTuple):
    r"""The Marchenko-Pastur bulk of a spectrum, and what stands out of it.

    All scales are those of the eigenvalues $s^2 / n$; the singular value that belongs to
    one of them is $\sqrt{n \lambda}$. A spectrum that is not finite gives NaN.

    Attributes:
      variance: $\sigma^2$, the variance of one entry of the noise.
      edge: $\lambda_+$, the end of the bulk: $\sigma^2 (1 + \sqrt\gamma)^2$ without spikes.
        Spikes take their share of the noise and push the rest of the bulk down.
      threshold: The cut for a spike.
      distance: Kolmogorov distance between the eigenvalues of the noise and their law, in
        [0, 1]; 1 where the variance is zero and there is no law to compare with.
      num_spikes: Number of eigenvalues above the threshold.

    Examples:
      >>> import jax, rmtjax
      >>> noise = jax.random.normal(jax.random.key(0), (200, 400))
      >>> fit = rmtjax.fit_bema(rmtjax.spectrum(noise.at[:, 0].add(5.0)))
      >>> int(fit.num_spikes), bool(fit.edge < fit.threshold)
      (1, True)
    """

    variance: Float[Array, "*batch"]
    edge: Float[Array, "*batch"]
    threshold: Float[Array, "*batch"]
    distance: Float[Array, "*batch"]
    num_spikes: Int[Array, "*batch"]

    __repr__ = brief_fields


def in_range(spectrum: Spectrum, fit: BulkFit) -> tuple[Spectrum, BulkFit, int]:
    """Returns the spectrum of one matrix and its fit over $4^e$, and e: usually 0.

    Plans have those of very large and very small kernels as NumPy's float64. Programs would take
    them in float32, whose range they leave.
    """
    eigenvalues: Any = spectrum.eigenvalues
    top = eigenvalues[0] if isinstance(eigenvalues, np.ndarray) else 1.0
    if not 0 < top < np.inf or 1e-31 < top < 1e35:
        return spectrum, fit, 0
    exponent = int(np.frexp(np.float64(top))[1]) // 2
    over: Any = lambda array: np.ldexp(np.float64(array), -2 * exponent).astype(np.float32)
    scales = {name: over(getattr(fit, name)) for name in ("variance", "edge", "threshold")}
    return spectrum._replace(eigenvalues=over(eigenvalues)), fit._replace(**scales), exponent


def no_fit(shape: tuple[int, ...], dtype: Any) -> BulkFit:
    """Returns what stands in a state for a noise level that is not known yet: it has no NaN."""
    # One array each: a buffer that appears twice in a state cannot be donated to `jit`.
    zeros = [jnp.zeros(shape, dtype) for _ in range(3)]
    return BulkFit(*zeros, distance=jnp.ones(shape, dtype), num_spikes=jnp.zeros(shape, jnp.int32))


def is_known(fit: BulkFit) -> Bool[Array, "*batch"]:
    """Returns True where a fit of a state is a noise level, and not what stands for none."""
    return (fit.threshold > 0) & (fit.threshold < jnp.inf)


def from_state(fit: BulkFit) -> BulkFit:
    """Returns a fit of a state as rules return it: NaN where no noise level is known."""
    known = is_known(fit)
    unknown = lambda number: jnp.where(known, number, jnp.nan)
    return BulkFit(*map(unknown, fit[:4]), num_spikes=fit.num_spikes)


def to_state(fit: BulkFit) -> BulkFit:
    """Returns a fit as a state holds it: numbers that are not finite are those of `no_fit`."""
    known, none = is_known(fit), no_fit(fit.threshold.shape, fit.threshold.dtype)
    finite = lambda new, old: jnp.where(known & jnp.isfinite(new), new, old)
    return jax.tree.map(finite, fit, none)


def is_patterns(where: Any) -> bool:
    """Returns True for a pattern and for a list of them, which is no tree of booleans."""
    one = lambda item: isinstance(item, str | re.Pattern)
    return one(where) or (isinstance(where, list | tuple) and bool(where) and all(map(one, where)))


def check_type(name: str, value: Any, kind: type, remedy: str) -> None:
    """Raises TypeError for an argument of another type, with a remedy."""
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be a {kind.__name__}, got {type(value).__name__}. {remedy}")


# A glob of a complete path such as "*/attention/*", or a regular expression: compiled, or a string
# that begins with "re:".
Pattern = str | re.Pattern[str]
# Chooses leaves: a function of a path such as "Dense_0/kernel" and the leaf, a pattern, a list of
# patterns, or a tree of booleans as optax's masks.
Where = Callable[[str, Any], bool] | Pattern | Sequence[Pattern] | PyTree
# Names the axes of a chosen leaf, by a function or by its path; None for one that is no matrix.
Axes = Callable[[str, Any], KernelAxes | None] | Mapping[str, KernelAxes | None]
