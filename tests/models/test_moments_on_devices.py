"""Moments of batches that are divided over devices: those of one device, summed where they are."""

import pytest
from helpers.virtual_devices import EXPLICIT, run_on_devices

CODE = """
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import rmtjax


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(16)(x)), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3,), name="conv")(x)) if explicit == "Auto" else x[..., :16]
        lift = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Step, **lift, length=3)(name="stack")(x, None)
        return nn.Dense(300, name="head")(x)


explicit = sys.argv[1]
x = np.random.default_rng(0).normal(size=(16, 6, 20)).astype(np.float32)
module = Net()
variables = module.init(jax.random.key(0), x)
one = rmtjax.linen.moments(module, variables, [x])
mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(AxisType, explicit),))
axes = rmtjax.linen.kernel_axes(module, variables, x)
placed = jax.device_put(x, NamedSharding(mesh, P("data")))
everywhere = jax.device_put(variables, NamedSharding(mesh, P()))
with jax.set_mesh(mesh) if explicit == "Explicit" else mesh:
    eight = rmtjax.linen.moments(module, everywhere, [placed], axes=axes)
assert eight.names == one.names, (eight.names, one.names)
for path, moment in one.items():
    for name, value in vars(moment).items():
        found = getattr(eight[path], name)
        np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5 * np.abs(value).max())
print("equal", len(one))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"), [("Auto", 3), pytest.param("Explicit", 2, marks=EXPLICIT)]
)
def test_eight_devices_sum_what_one_sums(kind, count):
    assert run_on_devices(8, CODE, kind) == f"equal {count}"
