"""MNIST-1D, generated as its authors do: the same seed gives the same numbers as their package.

References:
  Greydanus and Kobak (2020), https://arxiv.org/abs/2011.14439.
"""

from functools import cache

import numpy as np
from scipy.ndimage import gaussian_filter

# The ten digits as curves of twelve points.
TEMPLATES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
PADDING = 36, 60
SCALE, TRANSLATION, SHEAR = 0.4, 48, 0.75
CORRELATED_NOISE, NOISE = 0.25, 0.02
LENGTH = 40


def _templates() -> np.ndarray:
    x = np.array(TEMPLATES, float)
    x -= x.mean(1, keepdims=True)
    x /= x.std(1, keepdims=True)
    return (x - x[:, :1]) / 6


def _resample(x: np.ndarray, size: int) -> np.ndarray:
    return np.interp(np.linspace(0, 1, size), np.linspace(0, 1, len(x)), x)


def _sample(template: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """Returns a template that is padded, stretched, scaled, moved, noisy, sheared and resampled."""
    low, high = PADDING
    padded = np.concatenate([template + 1e-8, np.zeros(low + int(rng.rand() * (high - low + 1)))])
    x = _resample(padded, len(template) + high)
    x = x * (1 + SCALE * (rng.rand() - 0.5))
    x = np.roll(x, rng.choice(TRANSLATION))
    noise = gaussian_filter(CORRELATED_NOISE * rng.randn(x.size), 2)
    x = np.where(x != 0, x, noise) + NOISE * rng.randn(x.size)
    x = x - SHEAR * (rng.rand() - 0.5) * np.linspace(-0.5, 0.5, x.size)
    return _resample(x, LENGTH)


@cache
def generate(size: int, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """Returns samples (size, 40) of mean 0 and deviation 1, and labels, in random order.

    Args:
      size: A multiple of 10.
      seed: 42 and a size of 5,000 are those of the published data.
    """
    # The authors draw from NumPy's global generator, of which this is a copy.
    rng, templates = np.random.RandomState(seed), _templates()
    x = np.array([_sample(one, rng) for one in templates for _ in range(size // 10)])
    order = rng.permutation(size)
    x, y = x[order], np.repeat(np.arange(10), size // 10)[order]
    return ((x - x.mean()) / x.std()).astype(np.float32), y.astype(np.int32)
