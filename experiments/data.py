"""MNIST and Fashion-MNIST as NumPy arrays, from wherever they can be had.

    dataset = load("mnist")  # the first source that has it; `describe` says which

| source     | what it reads                                                               |
|------------|-----------------------------------------------------------------------------|
| `tfds`     | a folder prepared by TensorFlow Datasets as array_record; no TensorFlow     |
| `idx`      | the four original files: in `data_dir`, `$RMTJAX_DATA_DIR` or Debian's path |
| `download` | the same files from the net, by checksum; kept as a `tfds` folder           |
| `sample`   | 3,000 images of Fashion-MNIST that lie beside this file                     |

The order of the examples is that of the source: TFDS shuffles once when it writes. Equal
seeds give equal batches for equal sources only.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from experiments import _download, _idx, _tfds
from experiments._arrays import Arrays, check, Folder, load_npz

TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}
SOURCES = ("tfds", "idx", "download", "sample")
VARIABLE = "RMTJAX_DATA_DIR"
DEBIAN = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}
SAMPLE = Path(__file__).parent / "sample" / "fashion_mnist.npz"


class Dataset(NamedTuple):
    """A data set, and where it comes from."""

    name: str  # what it is; not always what was asked for, see `load`
    source: str  # one of `SOURCES`
    train_images: UInt8[np.ndarray, "train 28 28"]
    train_labels: UInt8[np.ndarray, " train"]
    test_images: UInt8[np.ndarray, "test 28 28"]
    test_labels: UInt8[np.ndarray, " test"]
    notes: tuple[str, ...] = ()  # what was tried before, and why it was passed over
    origin: str = ""  # the source in words, with its folder


def load(
    name: str = "mnist",
    *,
    source: str = "auto",
    data_dir: Folder | None = None,
    download: bool = True,
) -> Dataset:
    """Loads all images of a data set.

    Args:
      name: `"mnist"` or `"fashion_mnist"`.
      source: One of `SOURCES`; `"auto"` takes the first that has the data. If none has
        MNIST, that is the sample of Fashion-MNIST: the result is then called
        `"fashion_mnist"`, and its notes and `describe` say so.
      data_dir: A folder of TFDS (default: `$TFDS_DATA_DIR`, then
        `~/tensorflow_datasets`), or one of IDX files, itself or in a subfolder `name`; if
        it has none, `$RMTJAX_DATA_DIR` and Debian's path are looked at as without it. A
        download is kept there.
      download: Whether the net may be used.

    Returns:
      Arrays of uint8, their source, and notes on every source passed over. They may be
      written to.

    Raises:
      ValueError: An unknown name or source; or data that are there but damaged, under
        `"auto"` too.
      FileNotFoundError: The source named has no such data.
      ConnectionError: `"download"` was named, and the net does not give the data.
      ModuleNotFoundError: The source named needs a package that is not installed.

    Examples:
      >>> dataset = load("fashion_mnist", source="sample")
      >>> dataset.train_images.shape, dataset.test_labels.shape
      ((2000, 28, 28), (1000,))
      >>> print(describe(dataset))
      Fashion-MNIST from the packaged sample: 2,000 training and 1,000 test images
    """
    _check_choice("name", name, tuple(TITLES))
    _check_choice("source", source, ("auto", *SOURCES))
    read = {
        "tfds": lambda: _from_tfds(name, data_dir),
        "idx": lambda: _from_idx(name, data_dir),
        "download": lambda: _from_download(name, data_dir, download),
        "sample": lambda: _from_sample(name),
    }
    if source == "auto":
        return _first(read, name, data_dir)
    try:
        return read[source]()
    except (FileNotFoundError, ConnectionError) as error:
        raise type(error)(f"{error} {_ways(name)}") from error


def describe(dataset: Dataset) -> str:
    """One line: what the data set is, where it comes from, and how many images it has."""
    sizes = len(dataset.train_images), len(dataset.test_images)
    counts = "{:,} training and {:,} test images".format(*sizes)
    return f"{TITLES[dataset.name]} from {dataset.origin}: {counts}"


def _check_choice(argument: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{argument}` must be one of {', '.join(allowed)}, got {value!r}.")


def _ways(name: str) -> str:
    debian = ", or `apt-get install dataset-fashion-mnist`" if name in DEBIAN else ""
    return (
        f'Ways to {TITLES[name]}: `source="download"`; a folder with {_idx.FILES["train_images"]}'
        f".gz and its three companions as `data_dir` or ${VARIABLE}{debian}; a folder prepared "
        f'by TFDS as array_record. `load("fashion_mnist", source="sample")` needs nothing.'
    )


def _first(read: dict[str, Callable[[], Dataset]], name: str, data_dir: Folder | None) -> Dataset:
    notes = []
    for source in ("tfds", "idx", "download"):
        try:
            dataset = read[source]()
        except (FileNotFoundError, ConnectionError, ModuleNotFoundError) as error:
            notes.append(f"{source}: {error}")
        else:
            return dataset._replace(notes=(*notes, *dataset.notes))
    if data_dir is not None and not Path(data_dir).expanduser().exists():
        raise FileNotFoundError(f"`data_dir` {data_dir} does not exist. {' '.join(notes)}")
    sample = _from_sample("fashion_mnist")
    if name != sample.name:
        notes.append(f"sample: it is {TITLES[sample.name]}, used in place of {TITLES[name]}.")
        sample = sample._replace(origin=f"{sample.origin}, in place of {TITLES[name]}")
    return sample._replace(notes=tuple(notes))


def _from_sample(name: str) -> Dataset:
    if name != "fashion_mnist":  # the licence of MNIST lets none of it be packaged
        raise ValueError(
            f'`source="sample"` needs `name="fashion_mnist"` (--dataset), got {name!r}.'
        )
    return Dataset(name, "sample", *load_npz(SAMPLE), origin="the packaged sample")


def _from_idx(name: str, data_dir: Folder | None) -> Dataset:
    given = [Path(root).expanduser() for root in (data_dir, os.environ.get(VARIABLE)) if root]
    passed_over = []
    for root in [*given, *filter(None, [DEBIAN.get(name)])]:
        for folder in (root / name, root):
            arrays = _idx.read_folder(folder)
            if arrays is None:
                continue
            if (found := _idx.recognize(arrays) or name) == name:
                notes = tuple(f"idx: {reason}" for reason in passed_over)
                origin = f"IDX files in {folder}"
                return Dataset(name, "idx", *arrays, notes=notes, origin=origin)
            passed_over.append(f"{folder} holds {TITLES[found]}.")
        passed_over.append(f"No IDX files of {TITLES[name]} in {root}.")
    raise FileNotFoundError(" ".join(passed_over) or f"`data_dir` and ${VARIABLE} are not set.")


def _from_tfds(name: str, data_dir: Folder | None) -> Dataset:
    arrays, folder, remarks = _tfds.read(name, data_dir)
    notes = tuple(f"tfds: {remark}" for remark in remarks)
    return Dataset(name, "tfds", *arrays, notes=notes, origin=f"TFDS files in {folder}")


def _from_download(name: str, data_dir: Folder | None, download: bool) -> Dataset:
    if _tfds.is_readable(name, data_dir):
        return _from_tfds(name, data_dir)
    if not download:
        raise FileNotFoundError("Not tried, since `download=False`.")
    archives = _tfds.archives(name)
    _download.check_connection(archives.train_images.url)
    root = _tfds.free_root(name, data_dir)
    urls = [archive.url for archive in archives]
    raw = [_download.fetch(archive) for archive in archives]
    _tfds.prepare(name, check(Arrays(*map(_idx.parse, raw, urls)), urls), root)
    dataset = _from_tfds(name, data_dir)
    return dataset._replace(source="download", origin=f"a download, now {dataset.origin}")
