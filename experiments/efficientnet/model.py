"""EfficientNet-Lite0 in linen: inverted bottlenecks without squeeze and excitation."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

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
norm = partial(nn.BatchNorm, use_running_average=True, epsilon=EPSILON)
conv = partial(nn.Conv, use_bias=False, padding="SAME")


class Block(nn.Module):
    """Widens by a 1 x 1 convolution, convolves each channel, and narrows again."""

    side: int
    stride: int
    widening: int
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns (batch, rows, columns, channels)."""
        wide, y = self.widening * x.shape[-1], x
        if self.widening > 1:
            y = nn.relu6(norm(name="norm0")(conv(wide, (1, 1), name="expand")(y)))
        depthwise = partial(conv, strides=self.stride, feature_group_count=wide, name="depthwise")
        y = nn.relu6(norm(name="norm1")(depthwise(wide, (self.side, self.side))(y)))
        y = norm(name="norm2")(conv(self.channels, (1, 1), name="project")(y))
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """Logits of the 1,000 classes of ImageNet.

    Images are (batch, 224, 224, 3), each value $(v - 127) / 128$ for $v$ in 0 to 255.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns (batch, 1000)."""
        x = nn.relu6(norm(name="norm0")(conv(32, (3, 3), 2, name="stem")(images)))
        index = 0
        for repeats, side, stride, widening, channels in STAGES:
            for place in range(repeats):
                first = stride if place == 0 else 1
                x = Block(side, first, widening, channels, name=f"block_{index}")(x)
                index += 1
        x = nn.relu6(norm(name="norm1")(conv(1280, (1, 1), name="head")(x)))
        return nn.Dense(1000, name="classes")(jnp.mean(x, axis=(1, 2)))
