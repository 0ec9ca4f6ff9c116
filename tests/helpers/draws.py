"""Draws for constants of test modules, which compile nothing when tests are collected."""

import jax
import numpy as np


def normal(seed, *shape):
    """Returns independent standard normal numbers in float32."""
    return jax.device_put(np.random.default_rng(seed).standard_normal(shape, np.float32))
