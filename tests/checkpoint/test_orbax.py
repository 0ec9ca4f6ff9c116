"""Folders of orbax: what it wrote is found and read leaf by leaf, or the damage is named."""

import json
import pathlib
import shutil

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, strategies as st

import rmtjax
from rmtjax.checkpoint import _orbax
from rmtjax.checkpoint._open import open_tensors
from rmtjax.checkpoint._tensors import Entry

TREE = {
    "Dense_0": {
        "kernel": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "bias": np.float32([0.5, np.nan, 2]),
    },
    "a/b": [jnp.float8_e4m3fn([1, 2]), np.asarray(True)],
    "none": None,
    "empty": {},
    "step": np.int64(7),
}
NAMES = ["Dense_0/bias", "Dense_0/kernel", "a/b/0", "a/b/1", "step"]


def save(path, tree, **options):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
    return path


def save_standard(path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, TREE)


def save_step(path):
    with ocp.CheckpointManager(path.parent / "all") as manager:
        manager.save(3, args=ocp.args.StandardSave(TREE))
    (path.parent / "all" / "3").rename(path)


def save_items(path):
    items = ocp.args.Composite(params=ocp.args.PyTreeSave(TREE), config=ocp.args.JsonSave({"a": 1}))
    with ocp.CheckpointManager(path.parent / "all") as manager:
        manager.save(3, args=items)
    (path.parent / "all" / "3").rename(path)


WRITERS = {
    "standard": save_standard,
    "tree": lambda path: save(path, TREE),
    "file a leaf": lambda path: save(path, TREE, use_ocdbt=False),
    "zarr 3": lambda path: save(path, TREE, use_zarr3=True),
    "step": save_step,
    "items": save_items,
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS.keys())
def test_whatever_orbax_wrote_is_read_leaf_by_leaf(tmp_path, writer):
    writer(tmp_path / "saved")
    leaves = dict(zip(NAMES, jax.tree.leaves(TREE), strict=True))
    with open_tensors(tmp_path / "saved") as tensors:
        assert (tensors.layout, tensors.path) == ("orbax", tmp_path / "saved")
        assert tensors.metadata == {}
        assert tensors.entries == {name: Entry.of(a) for name, a in leaves.items()}
        for name, leaf in leaves.items():
            array = tensors.read(name)
            assert type(array) is np.ndarray
            assert array.dtype == leaf.dtype
            np.testing.assert_array_equal(array.astype(np.float32), np.asarray(leaf, np.float32))


def test_the_boxes_of_nnx_have_no_name(tmp_path):
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    with open_tensors(save(tmp_path / "boxed", state)) as tensors:
        assert [*tensors.entries] == ["bias", "kernel"]
        np.testing.assert_array_equal(tensors.read("kernel"), jax.tree.leaves(state)[1])
    named = {"w": {"value": np.ones(2)}, "b": np.ones(1)}
    with open_tensors(save(tmp_path / "named", named)) as tensors:
        assert [*tensors.entries] == ["b", "w/value"]


def test_a_choice_is_left_to_the_user(tmp_path):
    step = tmp_path / "run" / "3"
    for name in ("params", "state"):
        save(step / name, TREE)
    with (
        pytest.raises(ValueError, match="give the path of one of them, params, state"),
        open_tensors(step),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"give the path of one of them, 3\."),
        open_tensors(tmp_path / "run"),
    ):
        pass
    (tmp_path / "empty").mkdir()
    with (
        pytest.raises(ValueError, match="is not a checkpoint: it has neither"),
        open_tensors(tmp_path / "empty"),
    ):
        pass


def damage(folder, change):
    path = folder / "_METADATA"
    told = json.loads(path.read_text())
    change(told["tree_metadata"])
    path.write_text(json.dumps(told))


def read(path):
    with open_tensors(path) as tensors:
        return {name: tensors.read(name) for name in tensors.entries}


def test_a_path_that_leads_out_of_the_folder(tmp_path):
    folder = save(tmp_path / "saved", {"a": {"b": np.ones(2)}}, use_ocdbt=False)

    def lead_out(told):
        (leaf,) = told.values()
        leaf["key_metadata"][0]["key"] = "../../a"

    damage(folder, lead_out)
    shutil.copytree(folder / "a.b", tmp_path.parent / "a.b", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="Invalid file path"):
        read(folder)


@pytest.mark.parametrize("fields", [["shape", "chunks"], ["shape"], ["chunks"]])
def test_a_huge_claim_is_refused_before_anything_is_allocated(tmp_path, fields):
    folder = save(tmp_path / "saved", {"a": np.ones((2, 2))}, use_ocdbt=False)
    array = json.loads((folder / "a" / ".zarray").read_text())
    array |= {field: [2**30, 2**27] for field in fields}
    (folder / "a" / ".zarray").write_text(json.dumps(array))
    with pytest.raises(ValueError, match=r"'a' claims float64 of shape \(1073741824, "):
        read(folder)


def test_a_constant_that_is_stored_in_few_bytes_is_no_claim(tmp_path):
    folder = save(tmp_path / "saved", {"a": np.zeros((2048, 4096), np.float32)})
    assert not read(folder)["a"].any()


def test_a_leaf_that_is_lost(tmp_path):
    folder = save(tmp_path / "saved", {"a": np.ones(2)}, use_ocdbt=False)
    shutil.rmtree(folder / "a")
    with pytest.raises(ValueError, match=r"cannot read '.*saved'.*copy it again"):
        read(folder)


@pytest.mark.parametrize("dtype", [jnp.int4])
def test_a_dtype_that_no_file_of_safetensors_holds(tmp_path, dtype):
    kernel = (np.random.default_rng(0).normal(size=(80, 60)) + 1).astype(np.float32)
    tree = {"a": {"kernel": kernel}, "b": {"kernel": jnp.ones((64, 64), dtype)}}
    folder = save(tmp_path / "saved", tree)
    np.testing.assert_array_equal(read(folder)["b/kernel"], tree["b"]["kernel"])
    rows = rmtjax.checkpoint.analyze_file(folder).rows
    assert [row.spikes for row in rows] == [1, None]
    assert rows[1].reason == f"kept: not floating ({jnp.dtype(dtype)})"
    with pytest.raises(ValueError, match=r"'b/kernel' has dtype u?int4, which a .safetensors file"):
        rmtjax.checkpoint.compress_file(folder, tmp_path / "out.safetensors")
    assert [*tmp_path.iterdir()] == [folder]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    # One leaf: when orbax fails at one of several, it prints the fate of the others.
    tree = {"Dense_0": {"kernel": np.ones((2, 3), np.float32)}}
    return save(tmp_path_factory.mktemp("fuzz") / "saved", tree, use_ocdbt=False)


@given(data=st.data())
def test_flipped_bytes_and_truncations(saved, data):
    files = sorted(path for path in saved.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    good = path.read_bytes()
    bad = bytearray(good)
    for place in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=2)) if good else ():
        bad[place] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(bad[: data.draw(st.integers(0, len(bad)))])
        arrays = read(saved)
    except ValueError:
        return
    finally:
        path.write_bytes(good)
    assert all(isinstance(array, np.ndarray) for array in arrays.values())


def test_a_save_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "saved"
    with pytest.raises(ValueError, match="zero size"):
        _orbax.save_folder(path, {"a": np.ones(2), "b": np.ones(0)}, {})
    assert [*tmp_path.iterdir()] == []
    _orbax.save_folder(path, {"a": np.ones(2)}, {"rmtjax": "é"})
    assert [*tmp_path.iterdir()] == [path]
    with open_tensors(path) as tensors:
        assert tensors.metadata == {"rmtjax": "é"}
    with pytest.raises(ValueError, match="exists: remove it first"):
        _orbax.save_folder(path, {"a": np.zeros(2)}, {})
    np.testing.assert_array_equal(read(path)["a"], np.ones(2))


def test_keys_that_orbax_would_take_for_one_another(tmp_path):
    with pytest.raises(ValueError, match=r"two leaves would be 'a\.b' for orbax"):
        _orbax.save_folder(tmp_path / "saved", {"a.b": np.ones(1), "a": {"b": np.zeros(1)}}, {})


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _orbax.save_folder(pathlib.Path("saved"), {"a": np.ones(2)}, {})
    np.testing.assert_array_equal(read("saved")["a"], np.ones(2))
