"""The trees of `devices_job`, how they lie on a mesh, and how two are compared."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P

import rmtjax

SPECS = {  # as a model that is divided over "model" has them, and both, and none
    "Dense_0": {"kernel": P("data", "model"), "bias": P("model")},
    "Dense_1": {"kernel": P("model")},
    "Conv_0": {"kernel": P(None, None, None, "model")},
    "Embed_0": {"embedding": P(("data", "model"))},
    "up": {"kernel": P(None, "model")},  # and of one shape: columns and rows in turn
    "down": {"kernel": P("model", None)},
    "whole": {"kernel": P()},
    "stack": {"kernel": P("model", "data")},
}
AXES = {"stack/kernel": rmtjax.KernelAxes((1,), (2,), (0,))}
MATRIX = rmtjax.KernelAxes((0,), (1,))
RULE = rmtjax.ranks.bema()
CUTS = {  # shape, division and axes of kernels that are cut where they lie
    "wide": ((64, 96), P("data", "model"), rmtjax.KernelAxes((0,), (1,))),
    "uneven": ((100, 52), P(None, "model"), rmtjax.KernelAxes((0,), (1,))),
    "conv": ((3, 3, 16, 64), P(None, None, "data", "model"), rmtjax.KernelAxes((0, 1, 2), (3,))),
    "heads": ((96, 4, 12), P("data", None, "model"), rmtjax.KernelAxes((0,), (1, 2))),
    "project": ((4, 8, 64), P("model", "data"), rmtjax.KernelAxes((0, 1), (2,))),
    "stack": ((2, 64, 56), P("model", None, "data"), rmtjax.KernelAxes((1,), (2,), (0,))),
    "stacks": ((2, 4, 40, 56), P("model", "data"), rmtjax.KernelAxes((2,), (3,), (0, 1))),
    "middle": ((64, 4, 56), P("model", None, "data"), rmtjax.KernelAxes((0,), (2,), (1,))),
}


def planted(*shape: int) -> np.ndarray:
    """Noise with one direction."""
    rng = np.random.default_rng(shape[-1])
    noise = rng.standard_normal(shape)
    rows = rng.standard_normal((*shape[:-1], 1))
    return (noise + rows * rng.standard_normal(shape[-1])).astype(np.float32)


def make_params():
    return {
        "Dense_0": {"kernel": planted(96, 64), "bias": np.zeros(64, np.float32)},
        "Dense_1": {"kernel": planted(64, 64).astype(jnp.bfloat16)},
        "Conv_0": {"kernel": planted(3, 3, 16, 64)},
        "Embed_0": {"embedding": planted(400, 64)},
        "up": {"kernel": planted(64, 64)},
        "down": {"kernel": planted(64, 64) * 2},
        "whole": {"kernel": planted(72, 64)},
        "stack": {"kernel": planted(2, 64, 56)},
    }


def put(leaf, mesh, spec):
    """As `device_put`, which compares what processes have, and finds that NaN is not NaN."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def gather(tree):
    return multihost_utils.process_allgather(tree, tiled=True)


def assert_close(found, wanted):
    # Two ways to a number in bfloat16 may round it to neighbours.
    check = lambda a, b: np.testing.assert_allclose(
        np.asarray(a, np.float32),
        np.asarray(b, np.float32),
        rtol=2**-7 if b.dtype == jnp.bfloat16 else 1e-4,
        atol=1e-4,
    )
    jax.tree.map(check, gather(found), wanted)


def assert_placed(found, placed):
    same = lambda a, b: a.sharding.is_equivalent_to(b.sharding, b.ndim)
    assert jax.tree.all(jax.tree.map(same, found, placed))
