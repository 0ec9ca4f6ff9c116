"""Reports that tests open in a browser."""

import functools

import numpy as np
import pytest

import rmtjax
from rmtjax.planning import _cost


@functools.cache
def measured():
    """Kernels of all verdicts, timed by a clock that says a millisecond, and a quarter thin."""
    noise = np.random.default_rng(1).normal(size=(4, 100, 120)).astype(np.float32)
    spiked = lambda k: noise[k] * np.where(np.arange(100) < k, 3, 1)[:, None]
    kernels = {
        "Dense_2": spiked(3),
        "Dense_10": noise[0],
        "stack": np.stack([spiked(k) for k in range(4)]),
        "nan": np.full((100, 120), np.nan),
        "short": noise[0, :, :10],
        "truncated": noise[0, :, :40] @ noise[1, :40],
    }
    params = {name: {"kernel": np.float32(kernel)} for name, kernel in kernels.items()}
    axes = {f"{name}/kernel": rmtjax.KernelAxes((0,), (1,)) for name in kernels}
    axes["stack/kernel"] = rmtjax.KernelAxes((1,), (2,), (0,))
    clock = lambda product: np.asarray([[1.0 if r is None else 0.25 for r in product.ranks]] * 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cost, "time_products", clock)
        return rmtjax.analyze(params, axes=axes, batch=8)


def few(*names):
    return rmtjax.Report(
        rmtjax.Plan({f"{name}/kernel": measured().plan[f"{name}/kernel"] for name in names})
    )


THREE = "Dense_10", "Dense_2", "nan"


@functools.cache
def many(count=3000):
    rows = [measured().plan[f"{name}/kernel"] for name in THREE]
    return rmtjax.Report(rmtjax.Plan({f"layers_{i}/kernel": rows[i % 3] for i in range(count)}))
