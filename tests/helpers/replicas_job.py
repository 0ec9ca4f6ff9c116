"""What `test_merge_devices` runs in processes of their own: replicas on a mesh, and on one device.

The arguments are the type of the mesh's axes, the number of processes, the number of this one, and
the port on which they meet. Every line printed is a check that held.
"""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec as P

import rmtjax
from helpers.devices_trees import gather, put
from helpers.replica_cases import noisy, relative
from helpers.virtual_devices import for_each_kind
from rmtjax.spectra import _fold

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
    sizes, folds = set(), _fold.folds
    spy = lambda part, *others: (sizes.add(len(part)), folds(part, *others))[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fold, "folds", spy)
        found = rmtjax.merge_replicas(placed, parts, axes=AXES, rest=0.1)
    count = jax.tree.leaves(replicas)[0].shape[0]
    assert sizes == {count // mesh.size}, sizes
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


def check_broken(start, replicas, mesh, placed, parts, found):
    """A replica that is not finite spoils one kernel, on all devices."""
    dense = replicas["dense"]["kernel"].copy()
    dense[1, 2, 3] = np.nan
    broken = parts | {"dense": {"kernel": put(dense, mesh, P("replica"))}}
    again = rmtjax.merge_replicas(placed, broken, axes=AXES, rest=0.1)
    assert np.isnan(gather(again.params["dense"]["kernel"])).all()
    same = gather(again.params["wide"]["kernel"]), gather(found.params["wide"]["kernel"])
    np.testing.assert_array_equal(*same)
    print("broken")


def check_divided(axis_types):
    """Kernels that are divided themselves keep their division."""
    devices = np.reshape(jax.devices(), (-1, 2))
    mesh = Mesh(devices, ("replica", "model"), axis_types=axis_types * 2)
    changes = noisy(len(devices) * 2, (64, 48))
    wanted = rmtjax.merge_replicas({"kernel": changes[0]}, {"kernel": changes}).params["kernel"]
    start = {"kernel": put(changes[0], mesh, P(None, "model"))}
    replicas = {"kernel": put(changes, mesh, P("replica", None, "model"))}
    found = rmtjax.merge_replicas(start, replicas).params["kernel"]
    assert found.sharding.is_equivalent_to(start["kernel"].sharding, 2)
    assert relative(gather(found), wanted) < TURNS
    print("divided")


def check_mesh(kind):
    """All checks, on a mesh with axes of one type."""
    axis_types = (getattr(AxisType, kind),)
    for share in (1, 2):  # replicas of each device
        mesh = jax.make_mesh((jax.device_count(),), ("replica",), axis_types=axis_types)
        trees = make(share * jax.device_count())
        check_broken(*trees, mesh, *check_same(*trees, mesh))
    check_divided(axis_types)


if __name__ == "__main__":
    for_each_kind(check_mesh)
