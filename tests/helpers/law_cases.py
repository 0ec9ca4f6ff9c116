"""Ratios and points on which the Marchenko-Pastur law is tested, and its compiled functions."""

import math

import jax

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
