"""The loader of the experiments: files, the sample, every kind of damage, and no real net."""

import gzip
import socket
import sys
import time

import numpy as np
import pytest
from helpers.data_files import (
    assert_equal,
    FILES,
    idx_bytes,
    leave_bare,
    local_archives,
    make_arrays,
    serve,
    write_idx,
)

from experiments import _download, data


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """No data, no variables, no net: each test adds what it needs."""
    leave_bare(monkeypatch, tmp_path)


# IDX files


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "raw"])
@pytest.mark.parametrize("dotted", [True, False], ids=["dot", "dash"])
@pytest.mark.parametrize("subfolder", ["", "mnist"])
def test_idx_files_are_read_in_every_spelling(tmp_path, packed, dotted, subfolder):
    arrays = make_arrays(20)
    write_idx(tmp_path / subfolder, arrays, dotted=dotted, packed=packed)
    dataset = data.load("mnist", source="idx", data_dir=tmp_path)
    assert (dataset.name, dataset.source) == ("mnist", "idx")
    assert_equal(dataset, arrays)
    dataset.train_images[0] = 0  # writable


def test_idx_looks_in_the_argument_then_the_variable_then_debian(tmp_path, monkeypatch):
    folders = [tmp_path / place for place in ("argument", "variable", "debian")]
    for seed, folder in enumerate(folders):
        write_idx(folder, [array[seed:] for array in make_arrays(20)])
    monkeypatch.setattr(data, "DEBIAN", {"fashion_mnist": folders[2]})
    sizes = [len(data.load("fashion_mnist", source="idx").train_images)]
    monkeypatch.setenv("RMTJAX_DATA_DIR", str(folders[1]))
    sizes += [len(data.load("fashion_mnist", source="idx").train_images)]
    sizes += [len(data.load("fashion_mnist", source="idx", data_dir=folders[0])[2])]
    assert sizes == [18, 19, 20]
    dataset = data.load("fashion_mnist", source="idx", data_dir=tmp_path / "nothing")
    assert len(dataset.train_images) == 19
    assert str(tmp_path / "nothing") in dataset.notes[0]


def test_idx_files_of_another_set_are_not_taken_for_it(tmp_path):
    arrays = make_arrays(20)
    arrays[1][:10] = [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # as MNIST begins
    write_idx(tmp_path, arrays)
    assert data.load("mnist", source="idx", data_dir=tmp_path).name == "mnist"
    with pytest.raises(FileNotFoundError, match="holds MNIST"):
        data.load("fashion_mnist", source="idx", data_dir=tmp_path)


def damage(at, change, packed=False):
    """Rewrites file `at` of `FILES` by a function of its bytes, unpacked or not."""

    def apply(folder):
        path = folder / f"{FILES[at]}.gz"
        raw = path.read_bytes()
        path.write_bytes(change(raw) if packed else gzip.compress(change(gzip.decompress(raw))))

    return apply


def replace(at, array):
    return damage(at, lambda raw: idx_bytes(array))


LABELS = np.zeros(20, np.uint8)
DAMAGES = {
    "gzip cut": (damage(0, lambda raw: raw[:-100], packed=True), FILES[0], "gzip"),
    "gzip flipped": (
        damage(0, lambda raw: raw[:500] + bytes([raw[500] ^ 255]) + raw[501:], packed=True),
        FILES[0],
        "gzip",
    ),
    "no gzip": (damage(2, lambda raw: b"<html>", packed=True), FILES[2], "no IDX file"),
    "empty": (damage(1, lambda raw: b"", packed=True), FILES[1], "no IDX file"),
    "magic": (damage(0, lambda raw: b"\0\0\x0d\3" + raw[4:]), FILES[0], "no IDX file"),
    "header cut": (damage(0, lambda raw: raw[:9]), FILES[0], "cut short"),
    "cut": (damage(3, lambda raw: raw[:-1]), FILES[3], "promises 20 values, but 19"),
    "too long": (damage(3, lambda raw: raw + b"\0"), FILES[3], "promises 20 values, but 21"),
    "counts": (replace(1, LABELS[:19]), FILES[1], "19 labels for the 20 images"),
    "size": (replace(0, np.zeros((20, 28, 27), np.uint8)), FILES[0], "28, 27"),
    "axes": (replace(1, np.zeros((20, 1), np.uint8)), FILES[1], "expected labels"),
    "labels": (replace(3, LABELS + 10), FILES[3], r"must be in 0\.\.9, got 10\.\.10"),
    "gone": (lambda folder: (folder / f"{FILES[2]}.gz").unlink(), FILES[2], "no t10k"),
}


@pytest.mark.parametrize("source", ["idx", "auto"])
@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_idx_files_are_named_and_never_passed_over(tmp_path, case, source):
    apply, name, problem = DAMAGES[case]
    apply(write_idx(tmp_path, make_arrays(20)))
    with pytest.raises(ValueError, match=problem) as failure:
        data.load("mnist", source=source, data_dir=tmp_path)
    assert name in str(failure.value)
    assert "Get it again, or move it away" in str(failure.value)


def test_a_set_without_images_is_damaged(tmp_path):
    write_idx(tmp_path, [array[:0] for array in make_arrays(20)])
    with pytest.raises(ValueError, match="no images"):
        data.load("mnist", source="idx", data_dir=tmp_path)


# The sample, arguments, and a machine without anything


def test_the_sample_is_stratified_and_its_licence_is_beside_it():
    dataset = data.load("fashion_mnist", source="sample")
    assert np.bincount(dataset.train_labels).tolist() == [200] * 10
    assert np.bincount(dataset.test_labels).tolist() == [100] * 10
    assert data.describe(dataset) == (
        "Fashion-MNIST from the packaged sample: 2,000 training and 1,000 test images"
    )
    assert "2017 Zalando SE" in (data.SAMPLE.parent / "LICENSE").read_text()
    with pytest.raises(ValueError, match='`source="sample"` needs `name="fashion_mnist"`'):
        data.load("mnist", source="sample")


def test_unknown_arguments_are_answered_with_the_known():
    with pytest.raises(ValueError, match="`name` must be one of mnist, fashion_mnist, got 'cifar'"):
        data.load("cifar")
    with pytest.raises(ValueError, match=r"`source` must be one of auto, tfds, .*, got 'web'"):
        data.load(source="web")


@pytest.mark.parametrize("source", ["tfds", "idx", "download"])
def test_missing_data_name_the_ways_to_get_them(monkeypatch, tmp_path, source):
    monkeypatch.setattr(data, "DEBIAN", {"fashion_mnist": tmp_path / "nothing"})
    with pytest.raises(FileNotFoundError, match=r"Ways to Fashion-MNIST: .*_DATA_DIR.*apt-get"):
        data.load("fashion_mnist", source=source, download=False)


@pytest.mark.parametrize("download", [True, False])
def test_offline_the_sample_comes_at_once_and_says_so(download):
    start = time.monotonic()
    dataset = data.load("mnist", download=download)
    assert time.monotonic() - start < 5  # seconds; TFDS itself would try for 204
    assert (dataset.name, dataset.source) == ("fashion_mnist", "sample")
    assert [note.partition(":")[0] for note in dataset.notes] == list(data.SOURCES)
    assert ("`download=False`" in dataset.notes[2]) != download
    assert "in place of MNIST: 2,000 training" in data.describe(dataset)
    assert "in place of" not in data.describe(data.load("fashion_mnist", download=download))


def test_a_silent_server_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(_download, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes calls, says nothing
        answer = local_archives(silent.getsockname()[1], make_arrays(1))
        serve(monkeypatch, lambda name: answer)
        with pytest.raises(ConnectionError, match=r"can not be reached.*Ways to MNIST"):
            data.load("mnist", source="download")


def test_without_tfds_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    for source in ("tfds", "download"):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'rmtjax\[experiments\]'"):
            data.load("mnist", source=source)
    dataset = data.load("fashion_mnist")
    assert dataset.source == "sample"
    assert "rmtjax[experiments]" in dataset.notes[0]
