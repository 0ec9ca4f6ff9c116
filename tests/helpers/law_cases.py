"""Ratios and points on which the Marchenko-Pastur law is tested, and its compiled functions."""

import math

import jax
import numpy as np
from scipy import special

from rmtjax import marchenko_pastur as mp

# Down to a very long matrix, both sides of the switch to the series at 0.01, up to a square.
RATIOS = [1e-4, 1e-3, 0.0099, 0.0101, 0.1, 1 / 3, 0.5, 0.784, 0.99, 0.9999, 1.0]
FRACTIONS = [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]  # of the support

# Compiled once for all properties that draw their arguments.
pdf, cdf, ppf = jax.jit(mp.pdf), jax.jit(mp.cdf), jax.jit(mp.ppf)


def textbook_support(ratio):
    return (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2


def inside(ratio):
    lower, upper = textbook_support(ratio)
    return [lower + fraction * (upper - lower) for fraction in FRACTIONS]


NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)


def fredholm(x, beta):
    """The Tracy-Widom law at x as a determinant on Gauss-Legendre nodes, in float64."""
    # The kernel Ai(s + t + x) is below 1e-18 from s = 16 - x on.
    half = (16 - x) / 2
    points, weights = half * (NODES + 1), np.sqrt(half * WEIGHTS)
    airy, *_ = special.airy(points[:, None] + points[None, :] + x)
    kernel = weights[:, None] * airy * weights[None, :]
    return np.linalg.det(np.eye(60) - (kernel if beta == 1 else kernel @ kernel))
