"""Trees, placements and wrappers: `agree` finds kernels in each, and passes all else on."""

from collections import namedtuple

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.virtual_devices import run_on_devices

from rmtjax import agree, factorize_matrix

KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(12, 20)), jnp.float32)
BIAS = jnp.ones(20)
Pair = namedtuple("Pair", ["weight", "bias"])
# The tree, and the path of its kernel.
TREES = {
    "array": (KERNEL, ""),
    "list": ([BIAS, [KERNEL]], "1/0"),
    "NamedTuple": (Pair(KERNEL, BIAS), "weight"),
    "None": ({"gone": None, "w": KERNEL}, "w"),
    "scalars": ({"w": KERNEL, "scale": 1.0, "count": 3, "rate": np.float32(1)}, "w"),
    "FrozenDict": (flax.core.freeze({"a": {"kernel": KERNEL, "bias": BIAS}}), "a/kernel"),
    "State": (nnx.State({"a": {"kernel": nnx.Param(KERNEL), "bias": nnx.Param(BIAS)}}), "a/kernel"),
}


@pytest.mark.parametrize(("params", "path"), TREES.values(), ids=TREES)
def test_a_kernel_is_merged_in_any_tree_and_nothing_else_is_changed(params, path):
    optimizer = agree(2, start=2, where=lambda name, leaf: name == path)
    state = optimizer.init(params)
    assert list(state.start) == [path]
    moved = params
    for size in (2, -1):
        move = jax.tree.map(lambda leaf: size * jnp.ones_like(leaf), params)  # noqa: B023
        updates, state = optimizer.update(move, state, moved)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        moved = jax.tree.map(lambda p, u: p + u, moved, updates)
    # The halves oppose each other, so the kernel lands where it was. The others move by -1.
    kernels = [leaf for leaf in jax.tree.leaves(updates) if leaf.shape == KERNEL.shape]
    assert len(kernels) == 1
    for leaf in jax.tree.leaves(updates):
        expected = -2.0 if leaf.shape == KERNEL.shape else -1.0
        np.testing.assert_allclose(leaf, jnp.full_like(leaf, expected), atol=1e-5)


PASSING = {
    "vector": {"bias": BIAS},
    "number": 1.0,
    "empty": {},
    "integers": {"kernel": jnp.ones((12, 20), jnp.int32)},
    "8 bits": {"kernel": jnp.ones((12, 20), "float8_e4m3fn")},
    "no matrix": {"cell": {"kernel": jnp.ones((3, 4, 5))}},
    "factors": {"kernel": factorize_matrix(KERNEL, 5)},
}


@pytest.mark.filterwarnings("ignore:.*will never change a kernel")
@pytest.mark.parametrize("params", PASSING.values(), ids=PASSING)
def test_a_tree_without_kernels_passes(params):
    optimizer = agree(2, start=2, where="*")
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert jax.tree.all(jax.tree.map(lambda new, old: new is old, updates, params))
    assert not state.start
    assert int(state.step) == 1


def test_params_and_known_kernels_are_needed():
    params = {"a": {"kernel": KERNEL}}
    optimizer = agree(2)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="`params` must be given"):
        optimizer.update(params, state)
    grown = params | {"c": {"kernel": KERNEL}}
    with pytest.raises(ValueError, match="has the kernel 'c/kernel'"):
        optimizer.update(grown, state, grown)


JOB = """
import jax, jax.numpy as jnp, numpy as np, optax, rmtjax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
kind = {kind}
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(getattr(AxisType, kind),) * 2)
draw = lambda seed: jnp.asarray(np.random.default_rng(seed).normal(size=(16, 24)), jnp.float32)
put = lambda seed: {{"kernel": jax.device_put(draw(seed), NamedSharding(mesh, P("x", "y")))}}
def run(make):
    optimizer, params = rmtjax.agree(2, start=2), make(0)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for seed in (1, 2):
        updates, state = update(make(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params["kernel"], state
one, _ = run(lambda seed: {{"kernel": draw(seed)}})
many, state = run(put)
assert many.sharding.spec == P("x", "y"), many.sharding
assert state.start["kernel"].sharding.spec == P("x", "y"), state.start["kernel"].sharding
print(np.abs(np.asarray(many) - np.asarray(one)).max() < 1e-4)
"""


@pytest.mark.parametrize("kind", ["Auto", pytest.param("Explicit", marks=pytest.mark.slow)])
def test_sharded_kernels_stay_sharded(kind):
    assert run_on_devices(4, JOB.format(kind=repr(kind))) == "True"
