"""Random matrices whose noise is known, and the spectra of many of them.

A sampler takes a generator, a number of draws and the shorter and the longer side, and
returns a stack of matrices in float64. In those of the noise the entries have variance 1.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float

Matrices = Float[np.ndarray, "draws p n"]
Sampler = Callable[[np.random.Generator, int, int, int], Matrices]


def gaussian(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Standard normal entries; drawn in float32, which is quicker."""
    return rng.standard_normal(shape, dtype=np.float32).astype(np.float64)


def uniform(rng: np.random.Generator, draws: int, p: int, n: int) -> Matrices:
    """Entries of lighter tails than Gaussian ones."""
    return rng.uniform(-(3**0.5), 3**0.5, (draws, p, n))


def student(
    rng: np.random.Generator, draws: int, p: int, n: int, *, freedom: float = 5.0
) -> Matrices:
    """Entries of heavier tails; of variance 1 where it is finite, above 2 degrees of freedom.

    Above 4 the largest eigenvalue follows Tracy-Widom in the limit (Ding and Yang, Ann. Appl.
    Probab. 28 (2018) 1679-1738), which for 5 is far away.
    """
    scale = (freedom / (freedom - 2)) ** 0.5 if freedom > 2 else 1.0
    return rng.standard_t(freedom, (draws, p, n)) / scale


def planted(rng: np.random.Generator, draws: int, p: int, n: int, *, share: float) -> Matrices:
    r"""Noise, and random directions on a share of the ranks.

    Their singular values are uniform in 1.5 to 4 times $\sqrt{n} \gamma^{1/4}$, from which
    on a direction can be detected (Baik, Ben Arous and Peche, 2005).
    """
    count = round(share * p)
    left, right = (np.linalg.qr(gaussian(rng, draws, side, count)).Q for side in (p, n))
    strength = rng.uniform(1.5, 4.0, (draws, 1, count)) * n**0.5 * (p / n) ** 0.25
    return gaussian(rng, draws, p, n) + (left * strength) @ right.swapaxes(1, 2)


def scaled_rows(rng: np.random.Generator, draws: int, p: int, n: int, *, sigma: float) -> Matrices:
    """Gaussian rows, each with a scale of its own, log-normal."""
    return np.exp(sigma * gaussian(rng, draws, p, 1)) * gaussian(rng, draws, p, n)


def power_law(rng: np.random.Generator, draws: int, p: int, n: int, *, exponent: float) -> Matrices:
    r"""Gaussian rows whose variances have the density $x^{-exponent}$ from 1 on."""
    variance = (np.arange(0.5, p) / p) ** (-1 / (exponent - 1))
    return np.sqrt(variance)[None, :, None] * gaussian(rng, draws, p, n)


def product(rng: np.random.Generator, draws: int, p: int, n: int, *, inner: float) -> Matrices:
    """Two Gaussian matrices multiplied; the side they share is `inner` times p."""
    width = round(inner * p)
    return gaussian(rng, draws, p, width) @ gaussian(rng, draws, width, n) / width**0.5


ENTRIES: dict[str, Sampler] = {
    "Gaussian": gaussian,
    "uniform": uniform,
    "Student t(5)": student,
}
KERNELS: dict[str, Sampler] = {
    "noise": gaussian,
    "noise, 10 % planted": functools.partial(planted, share=0.1),
    **{f"Student t({v:g})": functools.partial(student, freedom=v) for v in (3, 2, 1.5)},
    **{
        f"log-normal rows, {sigma:g}": functools.partial(scaled_rows, sigma=sigma)
        for sigma in (0.25, 0.5, 1)
    },
    **{f"product, inner {c:g} p": functools.partial(product, inner=c) for c in (2, 1, 0.5)},
    **{f"power law, x^-{a:g}": functools.partial(power_law, exponent=a) for a in (4, 3, 2)},
}


def spectra(
    sample: Sampler, shape: tuple[int, int], draws: int, seed: int
) -> Float[np.ndarray, "draws p"]:
    r"""Eigenvalues $s_k^2 / n$ of random matrices, a row each, descending.

    Of the Gram matrix in float64, which for these sizes is several times quicker than
    singular values. Equal seeds and shapes give equal draws, however many threads there are.
    """
    p, n = sorted(shape)
    size = min(draws, max(2**20 // (p * n), 1))  # matrices at a time: 8 MB of them
    seeds = np.random.SeedSequence([seed, p, n]).spawn(-(-draws // size))

    def chunk(seed: np.random.SeedSequence) -> np.ndarray:
        matrices = sample(np.random.default_rng(seed), size, p, n)
        return np.linalg.eigvalsh(matrices @ matrices.swapaxes(1, 2) / n)[:, ::-1]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        values = np.concatenate(list(pool.map(chunk, seeds)))[:draws]
    return np.maximum(values, 0.0)  # rounding may leave a zero just below
