"""What tests of plans share: kernels of known rank, a rule that compiles at once, and rows."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

import rmtjax
from rmtjax import BulkFit, KernelAxes

MATRIX, STACK = KernelAxes((0,), (1,)), KernelAxes((1,), (2,), (0,))


def planted(shape, num_spikes=2, seed=3):
    """Unit noise with directions far above its edge; the leading axes make a stack.

    One draw in ten may have a false spike, by the level: these seeds have none.
    """
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    strength = 4 * np.sqrt(max(shape[-2:]))  # the edge is at 2 or below
    signal = strength * u[..., :num_spikes] @ vt[..., :num_spikes, :]
    return (rng.normal(size=shape) + signal).astype(np.float32)


GOOD = planted((60, 80))


@dataclass(frozen=True)
class Count:
    """A rule of a user's own: it need not know about noise, and compiles at once."""

    rank: int
    needs_noise = False

    def fit(self, spectrum):
        return BulkFit(*[jnp.ones_like(spectrum.ratio)] * 4, num_spikes=jnp.asarray(0, jnp.int32))

    def accepts(self, spectrum, fit):
        return jnp.isfinite(spectrum.eigenvalues).all()

    def __call__(self, spectrum, fit=None):
        return jnp.asarray(self.rank, jnp.int32)


def row_of(kernel, **options):
    (row,) = rmtjax.plan({"kernel": kernel}, **options).values()
    return row


def assert_same_row(row, other):
    """The same decision from the same numbers."""
    numbers = lambda row: (row.fit, row.spectrum)
    assert replace(row, fit=other.fit, spectrum=other.spectrum) == other
    # LAPACK sees the same matrix in a batch; only what is summed after it may round otherwise.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(close, numbers(row), numbers(other))
