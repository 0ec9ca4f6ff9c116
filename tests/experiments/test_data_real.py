"""The registered archives, the real data where they are, and the sample that was taken of them."""

import os

import numpy as np
import pytest
from helpers.data_files import FILES, leave_bare

from experiments import _idx, _tfds, data

DATA_DIR, REAL_DEBIAN = os.environ.get("RMTJAX_DATA_DIR"), data.DEBIAN
REQUIRED = os.environ.get("RMTJAX_REQUIRE_DATA") == "1"


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """No data, no variables, no net: each test adds what it needs."""
    leave_bare(monkeypatch, tmp_path)


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
