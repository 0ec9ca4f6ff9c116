"""EfficientNet-Lite0 in linen: inverted bottlenecks without squeeze and excitation."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

# Repeats, side of the depthwise kernel, stride of the first, widening, and channels that leave.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
EPSILON = 1e-3  # of the normalizations, as the network was trained
# The normalization after each kernel, of the network and of a block.
NORMS = {"stem": "norm0", "head": "norm1"}
BLOCK_NORMS = {"expand": "norm0", "depthwise": "norm1", "project": "norm2"}


def convolve(
    x: jax.Array, channels: int, side: int, name: str, norm: str | None, **options: Any
) -> jax.Array:
    """Convolves, and normalizes as `norm` names it; without one the convolution has a bias."""
    conv = nn.Conv(channels, (side, side), use_bias=norm is None, name=name, **options)
    if norm is None:
        return conv(x)
    return nn.BatchNorm(use_running_average=True, epsilon=EPSILON, name=norm)(conv(x))


class Block(nn.Module):
    """Widens by a 1 x 1 convolution, convolves each channel, and narrows again."""

    side: int
    stride: int
    widening: int
    channels: int
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (batch, rows, columns, channels)."""
        norms = {} if self.folded else BLOCK_NORMS
        conv = lambda x, channels, side, name, **options: convolve(
            x, channels, side, name, norms.get(name), **options
        )
        wide, y = self.widening * x.shape[-1], x
        if self.widening > 1:
            y = nn.relu6(conv(y, wide, 1, "expand"))
        options = {"strides": self.stride, "feature_group_count": wide}
        y = nn.relu6(conv(y, wide, self.side, "depthwise", **options))
        y = conv(y, self.channels, 1, "project")
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """Logits of the 1,000 classes of ImageNet.

    Images are (batch, 224, 224, 3), each value $(v - 127) / 128$ for $v$ in 0 to 255.

    Attributes:
      folded: Convolutions have biases, and there are no normalizations.
    """

    folded: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns (batch, 1000)."""
        norms = {} if self.folded else NORMS
        x = nn.relu6(convolve(images, 32, 3, "stem", norms.get("stem"), strides=2))
        index = 0
        for repeats, side, stride, widening, channels in STAGES:
            for place in range(repeats):
                first = stride if place == 0 else 1
                x = Block(side, first, widening, channels, self.folded, name=f"block_{index}")(x)
                index += 1
        x = nn.relu6(convolve(x, 1280, 1, "head", norms.get("head")))
        return nn.Dense(1000, name="classes")(jnp.mean(x, axis=(1, 2)))


def _fold(params: PyTree, stats: PyTree, norms: Mapping[str, str]) -> PyTree:
    """Returns the parameters of a block, or of the network, without normalizations."""
    folded = {}
    for name, inside in params.items():
        if name in norms:
            norm, found = params[norms[name]], stats[norms[name]]
            scale = norm["scale"] * jax.lax.rsqrt(found["var"] + EPSILON)
            kernel = inside["kernel"] * scale.reshape(1, 1, 1, -1)
            folded[name] = {"kernel": kernel, "bias": norm["bias"] - found["mean"] * scale}
        elif name.startswith("block_"):
            folded[name] = _fold(inside, stats[name], BLOCK_NORMS)
        elif not name.startswith("norm"):
            folded[name] = inside
    return folded


def fold(variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
    r"""Returns variables of the same network without normalizations.

    A normalization of the outputs $z$ of a kernel is $\gamma (z - \mu) / \sqrt{v + \epsilon} +
    \beta$. The kernel takes over the scale of each of its channels, and a bias the rest.

    Args:
      variables: Of `EfficientNetLite0()`, with "params" and "batch_stats".

    Returns:
      Variables of `EfficientNetLite0(folded=True)` that give the same logits.
    """
    return {"params": _fold(variables["params"], variables["batch_stats"], NORMS)}
