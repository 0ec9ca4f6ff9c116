"""Trees saved with their plan and restored: all of it, or an error that names what is not."""

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
from flax.training.train_state import TrainState
from helpers.draws import normal
from helpers.virtual_devices import run_on_devices
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rmtjax
from rmtjax import checkpoint, Factors
from rmtjax.checkpoint import _manifest
from rmtjax.checkpoint._open import open_tensors

KERNEL = normal(0, 80, 60) + 5 * (np.arange(60) < 2)[None]
PARAMS = {
    "Dense_0": {"kernel": KERNEL, "bias": jnp.zeros(60)},
    "Dense_1": {"kernel": KERNEL.T, "bias": jnp.full(80, jnp.nan)},
}
WHERE = lambda path, leaf: path == "Dense_0/kernel"
LAYOUTS = ["thin.safetensors", "thin"]


@pytest.fixture(scope="module")
def plan():
    return rmtjax.plan(PARAMS, where=WHERE)


@pytest.fixture(scope="module")
def thin(plan):
    return rmtjax.factorize(PARAMS, plan)


@pytest.fixture(params=LAYOUTS)
def path(request, tmp_path):
    return tmp_path / request.param


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (one.shape, one.dtype) == (jnp.shape(other), jnp.result_type(other))
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_factorized_tree_comes_back_with_its_plan(path, plan, thin):
    checkpoint.save(path, thin, plan, rmtjax.ranks.bema())
    restored = checkpoint.restore(path)
    same(restored, thin)
    assert isinstance(restored["Dense_0"]["kernel"], Factors)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert str(checkpoint.load_plan(path)) == str(plan)
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), thin)
    same(checkpoint.restore(path, like=spec), thin)
    with open_tensors(path) as tensors:
        told = _manifest.parse(tensors.metadata["rmtjax"])
    assert told.rule == str(rmtjax.ranks.bema())
    assert told.factors == ("Dense_0/kernel",)


def test_what_is_restored_can_be_cut_again_by_the_saved_noise(path, plan, thin):
    checkpoint.save(path, thin, plan)
    fits = {name: row.fit for name, row in checkpoint.load_plan(path).items() if row.fit}
    again = rmtjax.plan(checkpoint.restore(path), fits=fits, multiple=1, where=WHERE)
    assert again["Dense_0/kernel"].reason.startswith("factorized again")
    assert again["Dense_0/kernel"].fit == plan["Dense_0/kernel"].fit


def test_others_read_what_was_saved(tmp_path, thin):
    checkpoint.save(tmp_path / "a.safetensors", thin)
    flat = safetensors.flax.load_file(tmp_path / "a.safetensors")
    checkpoint.save(tmp_path / "a", thin)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), thin)
        args = ocp.args.PyTreeRestore(item=thin, restore_args=as_numpy)
        tree = checkpointer.restore(tmp_path / "a", args=args)
    for name in ("left", "right"):
        factor = getattr(thin["Dense_0"]["kernel"], name)
        np.testing.assert_array_equal(flat[f"Dense_0/kernel/{name}"], factor)
        np.testing.assert_array_equal(getattr(tree["Dense_0"]["kernel"], name), factor)


def test_there_may_be_no_plan(path):
    checkpoint.save(path, PARAMS)
    same(checkpoint.restore(path), PARAMS)
    with pytest.raises(ValueError, match=r"carries no plan: make one by `rmtjax\.plan`"):
        checkpoint.load_plan(path)


LEAVES = {
    "bfloat16": jnp.bfloat16([1, 2]),
    "float16": jnp.float16([[1, 2]]),
    "float8": jnp.float8_e5m2([1, 2]),
    "int8": jnp.int8([1]),
    "bool": jnp.array([True, False]),
    "complex": jnp.complex64([1j]),
    "scalar": jnp.float32(3),
    "numpy": np.arange(3, dtype=np.uint16),
    "double": np.float64([1 / 3]),
    "empty": jnp.zeros((0, 3), jnp.bfloat16),
    "a/b": {"c.d": jnp.ones(1)},
    "layers": {0: {"kernel": jnp.ones((2, 1))}, 1: {"kernel": jnp.ones((1, 2))}},
}


def test_every_leaf_comes_back_in_its_place_and_dtype(path):
    checkpoint.save(path, LEAVES)
    restored = checkpoint.restore(path)
    assert jax.tree.structure(restored) == jax.tree.structure(LEAVES)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(LEAVES), strict=True):
        assert (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())
    assert isinstance(restored["double"], np.ndarray)  # jax has no float64 now
    jax.tree.map(np.testing.assert_array_equal, checkpoint.restore(path, like=LEAVES), restored)


def test_python_numbers_are_what_jax_makes_of_them(path):
    checkpoint.save(path, {"step": 3, "rate": 0.5, "on": True})
    same(checkpoint.restore(path), {"step": jnp.int32(3), "rate": jnp.float32(0.5), "on": True})
    restored = checkpoint.restore(path, like={"step": 0, "rate": 0.0, "on": False})
    assert restored == {"step": 3, "rate": 0.5, "on": True}
    assert jax.tree.map(type, restored) == {"step": int, "rate": float, "on": bool}
    with pytest.raises(ValueError, match="'step' is int32 of shape"):
        checkpoint.restore(path, like={"step": 0.0, "rate": 0.0, "on": False})


def test_the_state_of_a_training_that_orbax_saved(tmp_path):
    params = {"Dense_0": {"kernel": KERNEL}}
    tx = optax.adam(1e-3)
    create = lambda params: TrainState.create(apply_fn=None, params=params, tx=tx)
    state, path = create(params), tmp_path / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(state))  # the step is of 64 bits there
    restored = checkpoint.restore(path, like=create(jax.tree.map(jnp.zeros_like, params)))
    assert (restored.step, type(restored.step)) == (0, int)
    same((restored.params, restored.opt_state), (state.params, state.opt_state))
    # The moments are no kernels, unless they are named.
    assert [row.path for row in checkpoint.analyze_file(path).rows] == ["params/Dense_0/kernel"]
    wanted = "opt_state/0/mu/Dense_0/kernel"
    (row,) = checkpoint.analyze_file(path, where=lambda path, leaf: path == wanted).rows
    assert row.path == wanted


def test_lists_are_restored_into_their_like(path):
    params = {"layers": [{"kernel": jnp.ones((2, 1))}, (jnp.zeros(1), jnp.ones(2))]}
    checkpoint.save(path, params)
    with pytest.raises(ValueError, match="lead to 'layers/0/kernel': give a tree of that form as"):
        checkpoint.restore(path)
    same(checkpoint.restore(path, like=params), params)


def test_a_key_that_is_called_as_a_box(path):
    checkpoint.save(path, {"a": {"value": jnp.ones(1)}})
    same(checkpoint.restore(path), {"a": {"value": jnp.ones(1)}})


class Model(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(3, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)


def test_the_state_of_an_nnx_model(path):
    state = nnx.state(Model(nnx.Rngs(0)))
    checkpoint.save(path, state)
    model = Model(nnx.Rngs(1))
    nnx.update(model, checkpoint.restore(path, like=nnx.state(model)))
    same(nnx.state(model), state)
    same(checkpoint.restore(path), nnx.to_pure_dict(state))


def test_boxed_params_of_linen(path):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    params = nn.Dense(2, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 3)))
    checkpoint.save(path, params)
    same(checkpoint.restore(path), nn.unbox(params))
    restored = checkpoint.restore(path, like=params)
    same(restored, params)
    assert restored["params"]["kernel"].names == (None, "model")


def test_an_array_is_placed_as_its_like(path):
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), "x"), PartitionSpec("x"))
    kernel = jax.device_put(jnp.ones((4, 2)), sharding)
    checkpoint.save(path, {"kernel": kernel})
    spec = jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=sharding)
    for like in (kernel, spec):
        assert checkpoint.restore(path, {"kernel": like})["kernel"].sharding == sharding
    assert not checkpoint.restore(path, {"kernel": jnp.ones((4, 2))})["kernel"].committed


SHARDED = """
import pathlib, sys, jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rmtjax import checkpoint

sharding = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
params = {"kernel": jax.device_put(np.arange(8.0, dtype=np.float32).reshape(4, 2), sharding)}
assert len(params["kernel"].addressable_shards) == 2
for name in ("a.safetensors", "a"):
    path = pathlib.Path(sys.argv[1], name)
    checkpoint.save(path, params)
    restored = checkpoint.restore(path, like=params)["kernel"]
    assert restored.sharding == sharding
    assert (np.asarray(restored) == np.asarray(params["kernel"])).all()
    assert (np.asarray(checkpoint.restore(path)["kernel"]) == np.asarray(restored)).all()
"""


@pytest.mark.slow  # starts a process of its own
def test_arrays_that_lie_on_several_devices(tmp_path):
    run_on_devices(2, SHARDED, tmp_path)
