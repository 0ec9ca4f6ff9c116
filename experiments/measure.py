"""What is measured of a trained network: accuracy, size, cost and latency."""

import os
import platform
import time
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
import optax

import rmtjax
from experiments import training

BATCHES = (1, 128)
CURVE = (0, 5, 10, 15, 20, 30, 40, 60, 80, 100, 150, 250, 400)


class Measures(NamedTuple):
    """One network."""

    test_accuracy: float  # %
    train_accuracy: float  # %, on the labels trained on
    parameters: int
    multiply_adds: int  # per image
    latency_ms: dict[int, float]  # by batch size, median


def multiply_adds(params: Any) -> int:
    """Products that a network of dense layers needs for one image: its kernels' entries."""
    return sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2)


def latencies(module, networks: dict[str, Any], images, batch: int) -> dict[str, float]:
    """Median time of a forward pass in ms; the networks take turns, so that noise is shared."""
    images = jax.numpy.resize(images, (batch, *images.shape[1:]))
    forward = jax.jit(lambda params, x: rmtjax.linen.apply(module, {"params": params}, x))
    times: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(60):
        for name, params in networks.items():
            begin = time.perf_counter()
            for _ in range(5):
                forward(params, images).block_until_ready()
            if turn >= 10:  # compiled and warm
                times[name].append((time.perf_counter() - begin) / 5)
    return {name: 1e3 * float(np.median(values)) for name, values in times.items()}


def networks(
    module, params: dict[str, Any], train: training.Split, test: training.Split
) -> dict[str, Measures]:
    """Measures some networks of one module."""
    times = {batch: latencies(module, params, test.images, batch) for batch in BATCHES}
    return {
        name: Measures(
            test_accuracy=training.accuracy(module, tree, test),
            train_accuracy=training.accuracy(module, tree, train),
            parameters=sum(leaf.size for leaf in jax.tree.leaves(tree)),
            multiply_adds=multiply_adds(tree),
            latency_ms={batch: by_name[name] for batch, by_name in times.items()},
        )
        for name, tree in params.items()
    }


def truncation_curve(
    module, params: Any, report: rmtjax.Report, test: training.Split
) -> dict[str, Any]:
    """Test accuracy against the rank of the first kernel, nothing trained again.

    Returns:
      `{"path": ..., "spikes": ..., "points": [(rank, accuracy), ...]}`; no points where no
      kernel has a spectrum.
    """
    for row in report.rows:
        if row.spikes is not None:
            size = min(row.shape)
            ranks = [rank for rank in sorted({*CURVE, row.spikes, size}) if rank <= size]
            trees = (training.truncate_at(params, row.path, rank) for rank in ranks)
            accuracies = [training.accuracy(module, tree, test) for tree in trees]
            points = list(zip(ranks, accuracies, strict=True))
            return {"path": row.path, "spikes": row.spikes, "points": points}
    return {"path": None, "spikes": None, "points": []}


def environment() -> dict[str, Any]:
    """Returns what the numbers depend on apart from the configuration."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "devices": [device.platform, device.device_kind, jax.device_count()],
        "versions": {
            module.__name__: module.__version__ for module in (rmtjax, jax, flax, optax, np)
        },
    }
