"""Reports that tests open in a browser."""

import functools

import numpy as np

import rmtjax
from rmtjax.planning import make_plan, PlanOptions


def quarter_clock(product):
    """A clock by which a product takes a millisecond, and a quarter of it as factors."""
    return np.asarray([[1.0 if rank is None else 0.25 for rank in product.ranks]] * 5)


@functools.cache
def measured():
    """Kernels of all verdicts, timed by the quarter clock."""
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
    options = PlanOptions(axes=axes, batch=8, multiple=1)
    return rmtjax.Report(make_plan(params, options, quarter_clock))


def few(*names):
    return rmtjax.Report(
        rmtjax.Plan({f"{name}/kernel": measured().plan[f"{name}/kernel"] for name in names})
    )


THREE = "Dense_10", "Dense_2", "nan"


@functools.cache
def many(count=3000):
    rows = [measured().plan[f"{name}/kernel"] for name in THREE]
    return rmtjax.Report(rmtjax.Plan({f"layers_{i}/kernel": rows[i % 3] for i in range(count)}))
