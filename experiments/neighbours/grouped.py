"""Arms that keep N of each M consecutive inputs of an output, as hardware multiplies them."""

from collections.abc import Callable
from functools import cache

import jax.numpy as jnp
import numpy as np

import rmtjax
from experiments.neighbours import allocation, sizes, tracks
from experiments.neighbours.few_entries import pruning
from experiments.neighbours.sizes import Thin
from experiments.neighbours.tracks import Track
from experiments.neighbours.trainer import fit, Phase, pretrained, Setting

Pattern = tuple[int, int]


def ordered(params, track: Track, pattern: Pattern):
    """Returns the network with channels in an order in which the pattern keeps more."""
    for before, after in track.feeds:
        kernel = sizes.leaves_by_path(params)[f"{after}/kernel"]
        # All places of a convolution share the order of the channels.
        matrix = np.moveaxis(np.asarray(kernel), -2, 0).reshape(kernel.shape[-2], -1)
        order = rmtjax.patterns.permute_inputs(matrix, pattern).order
        axes = {f"{before}/kernel": -1, f"{before}/bias": 0, f"{after}/kernel": -2}
        params = rmtjax.patterns.permute(params, order, axes)
    return params


@cache
def _phase(pattern: Pattern, restores: bool, axes: tuple) -> Phase:
    return pruning(restores, pattern=pattern, axes=dict(axes))


def n_of_m(
    pattern: Pattern, restores: bool = False, permuted: bool = True
) -> Callable[[Setting], Thin]:
    """Returns an arm that prunes by a pattern.

    Args:
      pattern: N and M.
      restores: Whether a round prunes further and puts a part back, inside each group.
      permuted: Whether channels are first put into a better order.
    """

    def arm(setting: Setting) -> Thin:
        track, training = setting.track, pretrained(setting, allocation.FIRST)
        if permuted:
            training = training._replace(params=ordered(training.params, track, pattern))
        axes = tracks.dense(track.module, track).axes
        weights = {path: jnp.float32(1) for path in track.kernels}
        extra = {"sparsity": jnp.float32(1 - pattern[0] / pattern[1]), "weights": weights}
        phase = _phase(pattern, restores, tuple(axes.items()))
        return Thin(fit(setting, training, phase, extra=extra), sparse=True)

    return arm
