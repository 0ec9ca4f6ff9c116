"""What `test_merge_devices` runs in processes of their own: replicas on a mesh, and on one device.

The arguments are the type of the mesh's axes, the number of processes, the number of this one, and
the port on which they meet. Every line printed is a check that held.
"""

import sys

import jax
import numpy as np
from helpers.devices_trees import gather, put
from helpers.replica_cases import noisy, relative
from jax.sharding import AxisType, PartitionSpec as P

import rmtjax

TURNS = 3e-3  # as in `test_merge`
AXES = {"stack/kernel": rmtjax.KernelAxes((1,), (2,), (0,))}


def make(count):
    """A tree and its replicas, as NumPy arrays."""
    rng = np.random.default_rng(0)
    shapes = {"dense": (64, 48), "wide": (20, 60), "stack": (2, 30, 24), "Conv_0": (3, 3, 4, 16)}
    start = {
        name: {"kernel": noisy(1, shape)[0]} for name, shape in shapes.items() if len(shape) < 4
    }
    start["Conv_0"] = {
        "kernel": noisy(1, (36, 16))[0].reshape(3, 3, 4, 16),
        "bias": np.ones(16, "f"),
    }
    start["thin"] = {"kernel": rmtjax.Factors(noisy(1, (40, 4))[0], noisy(1, (4, 30))[0])}
    move = lambda leaf: leaf[None] + rng.normal(0.3, 1, (count, *leaf.shape)).astype(np.float32)
    return start, jax.tree.map(move, start)


def check_same(start, replicas, mesh):
    """The result of a mesh is that of one device, and is placed as the start."""
    wanted = rmtjax.merge_replicas(start, replicas, axes=AXES, rest=0.1)
    place = lambda tree, spec: jax.tree.map(lambda leaf: put(leaf, mesh, spec), tree)
    placed, parts = place(start, P()), place(replicas, P("replica"))
    found = rmtjax.merge_replicas(placed, parts, axes=AXES, rest=0.1)
    same = lambda a, b: a.sharding.is_equivalent_to(b.sharding, b.ndim)
    assert jax.tree.all(jax.tree.map(same, found.params, placed))
    product = lambda tree: jax.tree.leaves(rmtjax.merge(tree))
    for one, other in zip(product(found.params), product(wanted.params), strict=True):
        assert relative(gather(one), other) < TURNS
    for name in ("kept", "rank"):
        for path, value in getattr(wanted, name).items():
            np.testing.assert_allclose(gather(getattr(found, name)[path]), value, rtol=0.01)
    print("same")
    return placed, parts, found


def check_broken(placed, parts, found):
    """A replica that is not finite spoils one kernel, on all devices."""
    dense = parts["dense"]["kernel"]
    spoil = jax.jit(lambda leaf: leaf.at[1, 2, 3].set(np.nan), out_shardings=dense.sharding)
    broken = parts | {"dense": {"kernel": spoil(dense)}}
    again = rmtjax.merge_replicas(placed, broken, axes=AXES, rest=0.1)
    assert np.isnan(gather(again.params["dense"]["kernel"])).all()
    same = gather(again.params["wide"]["kernel"]), gather(found.params["wide"]["kernel"])
    np.testing.assert_array_equal(*same)
    print("broken")


def main():
    kind, processes, number, port = sys.argv[1], *map(int, sys.argv[2:])
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, number)
    for share in (1, 2):  # replicas of each device
        axis_types = (getattr(AxisType, kind),)
        mesh = jax.make_mesh((jax.device_count(),), ("replica",), axis_types=axis_types)
        check_broken(*check_same(*make(share * jax.device_count()), mesh))


if __name__ == "__main__":
    main()
