"""The loader's download, which TFDS then reads: kept whole or not at all, and from no real net."""

import os

import numpy as np
import pytest
from helpers.data_files import (
    assert_equal,
    FILES,
    leave_bare,
    local_archives,
    make_arrays,
    serve,
    server,
    write_idx,
)

from experiments import _tfds, data

CACHE = "mnist/3.0.1/decoded.npz"


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """No data, no variables, no net: each test adds what it needs."""
    leave_bare(monkeypatch, tmp_path)


@pytest.fixture
def prepared(tmp_path, monkeypatch, capfd):
    """A folder of TFDS with 300 + 300 images, from a download."""
    arrays = make_arrays()
    with server(write_idx(tmp_path / "www", arrays)) as (port, asked):
        serve(monkeypatch, lambda name: local_archives(port, arrays))
        dataset = data.load("mnist")
        assert [path for command, path in asked if command == "GET"] == [
            f"/{name}.gz" for name in FILES
        ]
    assert capfd.readouterr() == ("", "")  # quiet, not being on a terminal
    assert dataset.source == "download"
    assert [note.partition(":")[0] for note in dataset.notes] == ["tfds", "idx"]
    return tmp_path / "tfds", dataset


def rows(images, labels):
    """The examples in an order of their own, for sources that differ in theirs."""
    flat = np.concatenate([images.reshape(len(images), -1), labels[:, None]], axis=1)
    return flat[np.lexsort(flat.T)]


def test_a_download_is_kept_for_tfds(prepared):
    root, downloaded = prepared
    arrays = make_arrays()
    for i in (0, 2):
        expected = rows(*arrays[i : i + 2])
        np.testing.assert_array_equal(rows(*downloaded[2 + i : 4 + i]), expected)
    for source in ("auto", "tfds", "download"):
        again = data.load("mnist", source=source, download=False)
        assert (again.source, again.notes) == ("tfds", ())
        assert_equal(again, downloaded[2:6])
    assert data.describe(again) == (
        f"MNIST from TFDS files in {root}/mnist/3.0.1: 300 training and 300 test images"
    )
    left = {path.name for path in (root / "mnist").iterdir()}
    assert left == {"3.0.1"}  # nothing half-written


def test_what_is_kept_is_what_tfds_reads(prepared):
    tfds = _tfds.package()
    records = tfds.data_source("mnist", split="test", data_dir=prepared[0], download=False)
    example = records[7]
    np.testing.assert_array_equal(example["image"][..., 0], prepared[1].test_images[7])
    assert example["label"] == prepared[1].test_labels[7]


def test_images_are_decoded_once(prepared, monkeypatch):
    monkeypatch.setattr(_tfds.package(), "data_source", None)  # can not be called
    assert_equal(data.load("mnist", source="tfds"), prepared[1][2:6])


@pytest.mark.parametrize("change", ["cut", "flipped", "emptied", "other"])
def test_damaged_decoded_images_are_decoded_again(prepared, change):
    cache = prepared[0] / CACHE
    raw = bytearray(cache.read_bytes())
    if change == "cut":
        cache.write_bytes(raw[: len(raw) // 2])
    elif change == "flipped":
        raw[len(raw) // 4] ^= 255
        cache.write_bytes(raw)
    elif change == "emptied":
        cache.write_bytes(b"")
    else:  # of files that are no longer there
        os.utime(prepared[0] / "mnist/3.0.1/features.json", (0, 0))
    before = cache.read_bytes()
    assert_equal(data.load("mnist", source="tfds"), prepared[1][2:6])
    assert cache.read_bytes() != before
    assert_equal(data.load("mnist", source="tfds"), prepared[1][2:6])


def test_images_that_can_not_be_kept_are_used_all_the_same(prepared):
    cache = prepared[0] / CACHE
    cache.unlink()
    cache.mkdir()
    dataset = data.load("mnist", source="tfds")
    assert_equal(dataset, prepared[1][2:6])
    assert "could not be kept" in dataset.notes[0]


@pytest.mark.parametrize("source", ["tfds", "auto"])
@pytest.mark.parametrize("file", ["mnist-train.array_record-00000-of-00001", "dataset_info.json"])
@pytest.mark.parametrize("change", ["cut", "gone"])
def test_a_damaged_tfds_folder_is_named_and_never_passed_over(prepared, file, change, source):
    path = prepared[0] / "mnist/3.0.1" / file
    raw = path.read_bytes()
    path.unlink() if change == "gone" else path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"tfds/mnist.*TFDS .*move it away"):
        data.load("mnist", source=source)


def test_tfrecord_is_passed_over_and_a_download_finds_its_place_beside(
    prepared, monkeypatch, tmp_path
):
    folder = prepared[0] / "mnist/3.0.1"
    for path in folder.iterdir():
        path.rename(folder / path.name.replace("array_record", "tfrecord"))
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(FileNotFoundError, match=r"holds tfrecord.*Ways to MNIST"):
        data.load("mnist", source="tfds")
    assert "tfds: " + str(folder) in data.load("mnist", download=False).notes[0]
    with server(tmp_path / "www") as (port, _):
        serve(monkeypatch, lambda name: local_archives(port, make_arrays()))
        assert_equal(data.load("mnist", source="download"), prepared[1][2:6])
    again = data.load("mnist")
    assert again.source == "tfds"
    assert "tfrecord" in again.notes[0]


@pytest.mark.parametrize("source", ["download", "auto"])
def test_a_download_with_another_checksum_is_refused(tmp_path, monkeypatch, source):
    write_idx(tmp_path / "www", make_arrays(20))
    with server(tmp_path / "www") as (port, _):
        serve(monkeypatch, lambda name: local_archives(port, make_arrays(21)))
        with pytest.raises(ValueError, match="its sha256 is"):
            data.load("mnist", source=source)
    assert not any((tmp_path / "tfds").iterdir())


def test_a_download_that_fails_is_reported_or_passed_over(tmp_path, monkeypatch):
    (tmp_path / "www").mkdir()
    with server(tmp_path / "www") as (port, _):  # answers 404
        serve(monkeypatch, lambda name: local_archives(port, make_arrays(20)))
        with pytest.raises(ConnectionError, match=r"could not be fetched .*404"):
            data.load("mnist", source="download")
        assert data.load("mnist").source == "sample"


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    with server(write_idx(tmp_path / "www", make_arrays(20)), breaks_off=True) as (port, _):
        answer = local_archives(port, make_arrays(20))
        serve(monkeypatch, lambda name: answer)
        with pytest.raises(ConnectionError, match="could not be fetched"):
            data.load("mnist", source="download")
    assert not any((tmp_path / "tfds").iterdir())


def test_a_download_that_can_not_be_kept_is_not_begun(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with server(write_idx(tmp_path / "www", make_arrays(20))) as (port, asked):
        serve(monkeypatch, lambda name: local_archives(port, make_arrays(20)))
        with pytest.raises(FileNotFoundError, match="Nothing can be kept in"):
            data.load("mnist", source="download", data_dir=tmp_path / "file")
        assert all(command == "HEAD" for command, _ in asked)
