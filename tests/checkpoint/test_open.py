"""Checkpoints on disk: shards, writes that are whole or not at all, and bounded memory."""

import json
import pathlib
import subprocess
import sys
import tempfile

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rmtjax.checkpoint._open import open_tensors
from rmtjax.checkpoint._safetensors import write_tensors
from rmtjax.checkpoint._tensors import Entry

MODEL = {"a/kernel": np.float32([[1, 2]]), "b/kernel": np.float32([[3]]), "b/bias": np.float32([4])}
SHARDS = {"model-1.safetensors": ["a/kernel"], "model-2.safetensors": ["b/kernel", "b/bias"]}
INDEX = "model.safetensors.index.json"


def write(path, arrays, metadata=()):
    entries = {name: Entry.of(array) for name, array in arrays.items()}
    write_tensors(path, entries, arrays.items(), dict(metadata))


def read(path):
    with open_tensors(path) as tensors:
        return {name: tensors.read(name).tolist() for name in tensors.entries}


def write_index(folder, shards, name=INDEX):
    told = {"metadata": {"total_size": 16}, "weight_map": shards}
    (folder / name).write_text(json.dumps(told))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for shard, names in SHARDS.items():
        write(folder / shard, {name: MODEL[name] for name in names}, {"format": "pt"})
    write_index(folder, {name: shard for shard, names in SHARDS.items() for name in names})
    return folder


def test_a_folder_is_read_by_its_index_and_without(folder):
    expected = {name: array.tolist() for name, array in MODEL.items()}
    write(folder / "other.safetensors", {"stray": np.float32([1])})
    assert read(folder) == read(folder / INDEX) == expected
    (folder / INDEX).rename(folder / "weights.safetensors.index.json")
    assert read(folder) == expected
    (folder / "weights.safetensors.index.json").unlink()
    assert read(folder) == expected | {"stray": [1]}
    with open_tensors(folder) as tensors:
        assert (tensors.path, tensors.metadata) == (folder, {"format": "pt"})


def test_two_indexes_need_a_choice(folder):
    (folder / INDEX).rename(folder / "x.safetensors.index.json")
    write_index(folder, {"a/kernel": "model-1.safetensors"}, "y.safetensors.index.json")
    with pytest.raises(ValueError, match=r"one of x\.safe.*, y\.safe"):
        read(folder)
    assert read(folder / "y.safetensors.index.json") == {"a/kernel": [[1, 2]]}


TRICKS = ["../out.safetensors", "/etc/passwd", "..", ".", "", "a\\b.safetensors", "x\0.safetensors"]


@pytest.mark.parametrize("name", [*TRICKS, "model.bin", INDEX])
def test_a_shard_is_a_file_of_the_folder(folder, name):
    write(folder.parent / "out.safetensors", {"secret": np.float32([1])})
    write_index(folder, {"secret": name})
    with pytest.raises(ValueError, match=r"may only name \.safetensors files of its folder"):
        read(folder)


def test_a_shard_may_not_link_out_of_the_folder(folder):
    outside = folder.parent / "out.safetensors"
    (folder / "model-1.safetensors").rename(outside)
    (folder / "model-1.safetensors").symlink_to(outside)
    with pytest.raises(ValueError, match=r"'model-1\.safetensors' links out of"):
        read(folder)


def test_the_cache_of_hugging_face_links_to_its_blobs(folder):
    snapshot = folder.parent / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (folder.parent / "blobs").mkdir()
    for place, file in enumerate(folder.iterdir()):
        blob = file.rename(folder.parent / "blobs" / str(place))
        (snapshot / file.name).symlink_to(blob)
    assert read(snapshot) == {name: array.tolist() for name, array in MODEL.items()}


@pytest.mark.parametrize("name", ["lost.safetensors", "x" * 300 + ".safetensors"])
def test_a_shard_that_is_missing(folder, name):
    write_index(folder, {"a/kernel": "model-1.safetensors", "c": name})
    with pytest.raises(ValueError, match=f"lacks its shard '{name}'"):
        read(folder)


def test_an_index_that_does_not_fit_its_shards(folder):
    index = {"a/kernel": "model-1.safetensors", "c/kernel": "model-1.safetensors"}
    write_index(folder, index)
    with pytest.raises(ValueError, match=r"'c/kernel' in 'model-1.*', which does not have it"):
        read(folder)


def test_an_index_decides_which_shard_counts(folder):
    other = {"a/kernel": MODEL["a/kernel"] + 1, "c/kernel": MODEL["a/kernel"]}
    write(folder / "model-3.safetensors", other)
    of_third = {"c/kernel": "model-3.safetensors"}
    for shard, kernel in (("model-1", MODEL), ("model-3", other)):
        index = {"a/kernel": f"{shard}.safetensors", "b/kernel": "model-2.safetensors"}
        write_index(folder, index | of_third)
        found = read(folder)
        assert found["a/kernel"] == kernel["a/kernel"].tolist()
        # What no index names is read all the same, if there is one of it.
        assert found["b/bias"] == MODEL["b/bias"].tolist()


def test_one_tensor_in_two_shards(folder):
    write(folder / "model-3.safetensors", {"a/kernel": MODEL["a/kernel"]})
    (folder / INDEX).unlink()
    with pytest.raises(
        ValueError, match=r"model-3.*and .*model-1.*both have the tensor 'a/kernel'"
    ):
        read(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{" * 10**5]
)
def test_a_damaged_index(folder, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"cannot read '.*{INDEX}'"):
        read(folder)


def test_a_folder_in_the_place_of_a_file(folder):
    (folder / "model-2.safetensors").unlink()
    (folder / "model-2.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"'.*model-2\.safetensors': it is not a regular file"):
        read(folder)
    with pytest.raises(ValueError, match=r"model-2\.safetensors' is not a regular file: give"):
        write(folder / "model-2.safetensors", MODEL)


def failing():
    yield "a/kernel", MODEL["a/kernel"]
    raise RuntimeError("the disk is full")


def changed(change):
    return lambda: ((name, change(array)) for name, array in MODEL.items())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (failing, "disk is full"),
        (changed(np.transpose), "(2, 1) for 'a/kernel'"),
        (changed(np.float16), "gave float16"),
        (lambda: [*MODEL.items()][:2], "lacks 'b/bias'"),
        (lambda: [*MODEL.items(), ("c", MODEL["b/bias"])], "has 'c' twice, or `entries` does not"),
        (lambda: [*MODEL.items()] * 2, "has 'a/kernel' twice"),
    ],
)
def test_a_write_that_fails_leaves_what_was_there(tmp_path, source, words):
    entries = {name: Entry.of(array) for name, array in MODEL.items()}
    path = tmp_path / "a.safetensors"
    for before in ({}, {"a.safetensors": b"old"}):
        for name, data in before.items():
            (tmp_path / name).write_bytes(data)
        with pytest.raises((RuntimeError, ValueError)) as caught:
            write_tensors(path, entries, source(), {})
        assert words in str(caught.value)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_write_replaces_what_was_there(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"old")
    write(tmp_path / "a.safetensors", MODEL)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert read(tmp_path / "a.safetensors") == {n: array.tolist() for n, array in MODEL.items()}


def test_a_dtype_that_no_file_holds(tmp_path):
    with pytest.raises(ValueError, match=r"'x' has dtype int4, .*: cast it to one of bool"):
        write_tensors(tmp_path / "a", {"x": Entry((1,), np.dtype(jnp.int4))}, [], {})


SIZE, COUNT = 2**22, 40  # 160 MB in tensors of 4 MB
PEAK = """
import resource, sys
from rmtjax.checkpoint._open import open_tensors
from rmtjax.checkpoint._safetensors import write_tensors

unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
with open_tensors(sys.argv[1]) as tensors:
    tensors.read(next(iter(tensors.entries)))  # what is imported late is no part of it
    before = peak()
    arrays = ((name, tensors.read(name)) for name in tensors.entries)
    write_tensors(sys.argv[2], tensors.entries, arrays, {})
    print(peak() - before)
"""
# A process starts with the peak of the one that started it: here a small one in between.
SMALL = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True)"


@pytest.mark.parametrize("layout", ["safetensors", pytest.param("orbax", marks=pytest.mark.slow)])
def test_memory_is_that_of_a_few_tensors(layout):
    kernels = {f"Dense_{i}": np.full((SIZE // 4096, 1024), i, np.float32) for i in range(COUNT)}
    with tempfile.TemporaryDirectory() as folder:  # pytest would keep these files for days
        path, copy = pathlib.Path(folder, "large"), pathlib.Path(folder, "copy.safetensors")
        if layout == "orbax":
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                checkpointer.save(path, args=ocp.args.PyTreeSave(kernels))
        else:
            write(path, kernels)
        command = [sys.executable, "-c", SMALL, "-c", PEAK, path, copy]
        told = subprocess.run(command, capture_output=True, check=True, text=True)
        # Three of the 40 tensors may be in memory at once. On a busy machine the threads of orbax
        # let go of others late, so half of the file is the bound: more means that all are kept.
        assert int(told.stdout) < COUNT // 2 * SIZE
        with open_tensors(copy) as tensors:
            assert all((tensors.read(name) == kernels[name]).all() for name in kernels)
