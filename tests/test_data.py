"""The loader of the experiments: every source, every kind of damage, and no real net."""

import contextlib
import gzip
import hashlib
import http.server
import os
import socket
import struct
import sys
import threading
import time

import numpy as np
import pytest

from experiments import _download, _idx, _tfds, data

DATA_DIR, REAL_DEBIAN = os.environ.get("RMTJAX_DATA_DIR"), data.DEBIAN
REQUIRED = os.environ.get("RMTJAX_REQUIRE_DATA") == "1"
FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]
CACHE = "mnist/3.0.1/decoded.npz"


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """No data, no variables, no net: each test adds what it needs."""
    monkeypatch.delenv("RMTJAX_DATA_DIR", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "DEBIAN", {})
    closed = local_archives(closed_port(), make_arrays(1))
    monkeypatch.setattr(_tfds, "archives", lambda name: closed)
    resolve = socket.getaddrinfo

    def resolve_local(host, *args, **kwargs):
        assert host == "127.0.0.1", f"a test asks for {host}"
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_local)


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_arrays(count=300):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, count, 28, 28), np.uint8)
    labels = rng.integers(0, 10, (2, count), np.uint8)
    return [images[0], labels[0], images[1], labels[1]]


def idx_bytes(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def local_archives(port, arrays):
    """In place of what `_tfds.archives` gives: the addresses of a server on this machine."""
    packed = [gzip.compress(idx_bytes(array), mtime=0) for array in arrays]
    urls = [f"http://127.0.0.1:{port}/{name}.gz" for name in FILES]
    sums = [hashlib.sha256(raw).hexdigest() for raw in packed]
    return _tfds.Archives(*map(_download.Archive, urls, sums))


def write_idx(folder, arrays, *, dotted=False, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(FILES, arrays, strict=True):
        name = name.replace("-idx", ".idx") if dotted else name
        raw = idx_bytes(array)
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(raw, mtime=0) if packed else raw)
    return folder


def assert_equal(dataset, arrays):
    for found, expected in zip(dataset[2:6], arrays, strict=True):
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected)


def rows(images, labels):
    """The examples in an order of their own, for sources that differ in theirs."""
    flat = np.concatenate([images.reshape(len(images), -1), labels[:, None]], axis=1)
    return flat[np.lexsort(flat.T)]


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
        monkeypatch.setattr(_tfds, "archives", lambda name: answer)
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


# TFDS and the download


@contextlib.contextmanager
def server(folder, *, breaks_off=False):
    asked = []  # (method, path)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def copyfile(self, source, outputfile):
            outputfile.write(source.read()[: 100 if breaks_off else None])

        def log_request(self, code="-", size="-"):
            asked.append((self.command, self.path))

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as local:
        threading.Thread(target=local.serve_forever, daemon=True).start()
        try:
            yield local.server_port, asked
        finally:
            local.shutdown()


@pytest.fixture
def prepared(tmp_path, monkeypatch, capfd):
    """A folder of TFDS with 300 + 300 images, from a download."""
    arrays = make_arrays()
    with server(write_idx(tmp_path / "www", arrays)) as (port, asked):
        monkeypatch.setattr(_tfds, "archives", lambda name: local_archives(port, arrays))
        dataset = data.load("mnist")
        assert [path for command, path in asked if command == "GET"] == [
            f"/{name}.gz" for name in FILES
        ]
    assert capfd.readouterr() == ("", "")  # quiet, not being on a terminal
    assert dataset.source == "download"
    assert [note.partition(":")[0] for note in dataset.notes] == ["tfds", "idx"]
    return tmp_path / "tfds", dataset


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
        monkeypatch.setattr(_tfds, "archives", lambda name: local_archives(port, make_arrays()))
        assert_equal(data.load("mnist", source="download"), prepared[1][2:6])
    again = data.load("mnist")
    assert again.source == "tfds"
    assert "tfrecord" in again.notes[0]


@pytest.mark.parametrize("source", ["download", "auto"])
def test_a_download_with_another_checksum_is_refused(tmp_path, monkeypatch, source):
    write_idx(tmp_path / "www", make_arrays(20))
    with server(tmp_path / "www") as (port, _):
        monkeypatch.setattr(_tfds, "archives", lambda name: local_archives(port, make_arrays(21)))
        with pytest.raises(ValueError, match="its sha256 is"):
            data.load("mnist", source=source)
    assert not any((tmp_path / "tfds").iterdir())


def test_a_download_that_fails_is_reported_or_passed_over(tmp_path, monkeypatch):
    (tmp_path / "www").mkdir()
    with server(tmp_path / "www") as (port, _):  # answers 404
        monkeypatch.setattr(_tfds, "archives", lambda name: local_archives(port, make_arrays(20)))
        with pytest.raises(ConnectionError, match=r"could not be fetched .*404"):
            data.load("mnist", source="download")
        assert data.load("mnist").source == "sample"


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    with server(write_idx(tmp_path / "www", make_arrays(20)), breaks_off=True) as (port, _):
        answer = local_archives(port, make_arrays(20))
        monkeypatch.setattr(_tfds, "archives", lambda name: answer)
        with pytest.raises(ConnectionError, match="could not be fetched"):
            data.load("mnist", source="download")
    assert not any((tmp_path / "tfds").iterdir())


def test_a_download_that_can_not_be_kept_is_not_begun(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with server(write_idx(tmp_path / "www", make_arrays(20))) as (port, asked):
        monkeypatch.setattr(_tfds, "archives", lambda name: local_archives(port, make_arrays(20)))
        with pytest.raises(FileNotFoundError, match="Nothing can be kept in"):
            data.load("mnist", source="download", data_dir=tmp_path / "file")
        assert all(command == "HEAD" for command, _ in asked)


# The registered archives and the real data


def test_the_registered_archives_are_those_of_both_sets(monkeypatch):
    monkeypatch.undo()
    for name in data.TITLES:
        archives = _tfds.archives(name)
        assert [url.rpartition("/")[2] for url, _ in archives] == [f"{n}.gz" for n in FILES]
        assert len({checksum for _, checksum in archives}) == 4


@pytest.fixture
def load_real(monkeypatch):
    """Loads a real data set; skips, or fails where data are required, without it."""

    def load(name):
        monkeypatch.setattr(data, "DEBIAN", REAL_DEBIAN)
        try:
            return data.load(name, source="idx", data_dir=DATA_DIR)
        except FileNotFoundError as error:
            if REQUIRED:
                raise
            pytest.skip(str(error))

    return load


REAL = {  # images of each class in the training set, means of the pixels
    "mnist": ([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], 0.1307, 0.1325),
    "fashion_mnist": ([6000] * 10, 0.2860, 0.2868),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_data_are_whole(load_real, name):
    dataset = load_real(name)
    counts, *means = REAL[name]
    assert dataset.train_images.shape == (60_000, 28, 28)
    assert dataset.test_images.shape == (10_000, 28, 28)
    assert np.bincount(dataset.train_labels).tolist() == counts
    found = [images.mean() / 255 for images in (dataset.train_images, dataset.test_images)]
    np.testing.assert_allclose(found, means, atol=5e-5)  # known to four digits
    assert _idx.recognize(_idx.Arrays(*dataset[2:6])) == name
    assert "60,000 training and 10,000 test images" in data.describe(dataset)


def test_the_sample_is_the_first_of_each_class(load_real):
    full, sample = load_real("fashion_mnist"), data.load("fashion_mnist", source="sample")
    for i, size in ((2, 200), (4, 100)):
        labels = full[i + 1]
        chosen = np.sort([np.flatnonzero(labels == k)[:size] for k in range(10)], axis=None)
        np.testing.assert_array_equal(sample[i], full[i][chosen])
        np.testing.assert_array_equal(sample[i + 1], labels[chosen])
