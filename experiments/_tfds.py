"""TensorFlow Datasets (TFDS) without TensorFlow: it is imported in this file only.

TFDS reads and writes array_record files without TensorFlow, and tfrecord files not at all.
"""

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from experiments import _idx
from experiments._arrays import Arrays, check, damaged, Folder, load_npz, save_npz
from experiments._download import Archive, track

BATCH = 1000  # records decoded at once


class Archives(NamedTuple):
    """The files to download for `Arrays`."""

    train_images: Archive
    train_labels: Archive
    test_images: Archive
    test_labels: Archive


def package() -> ModuleType:
    """The package `tensorflow_datasets`.

    Raises:
      ModuleNotFoundError: It is not installed, or Pillow is not.
    """
    try:
        import PIL.Image  # noqa: F401 - its images are PNG
        import tensorflow_datasets
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: `pip install 'rmtjax[experiments]'`."
        raise ModuleNotFoundError(message, name=error.name) from error
    return tensorflow_datasets


@contextlib.contextmanager
def _failing_as_damaged(place: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # protobuf, array_record and Pillow share no class of error
        raise damaged(place, f"TFDS can not read it ({error})") from error


def _roots(data_dir: Folder | None) -> tuple[Path, Path]:
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = Path(root).expanduser()
    # The second is for those whose first is taken by tfrecord files, TFDS's default.
    return root, root / "array_record"


def _prepared(name: str, root: Path) -> tuple[Path, set[str]]:
    """The folder of a data set, and the formats of its files: none if it is not there."""
    tfds = package()
    with _failing_as_damaged(root / name):
        builder = tfds.builder(name, data_dir=root)
        folder = Path(builder.data_dir)
        # Asked before anything else: for missing data TFDS would try the net for minutes.
        if folder.exists() and builder.is_prepared():
            return folder, {str(f.value) for f in builder.info.available_file_formats()}
    if folder.exists():
        raise damaged(folder, "TFDS did not finish it")
    return folder, set()


def is_readable(name: str, data_dir: Folder | None) -> bool:
    """Returns True if `read` would find the data set."""
    return any("array_record" in _prepared(name, root)[1] for root in _roots(data_dir))


def read(name: str, data_dir: Folder | None) -> tuple[Arrays, Path, list[str]]:
    """Reads a prepared data set, in the order in which TFDS has shuffled it.

    Returns:
      The arrays, the folder they are from, and remarks on what was passed over.

    Raises:
      FileNotFoundError: It is not prepared, or not as array_record.
      ValueError: It is damaged.
    """
    remarks = []
    for root in _roots(data_dir):
        folder, formats = _prepared(name, root)
        if "array_record" in formats:
            arrays, more = _decode_once(name, root, folder)
            return arrays, folder, [*remarks, *more]
        if formats:
            found = f"{folder} holds {', '.join(sorted(formats))}"
            remarks.append(f"{found}, and without TensorFlow only array_record is read.")
    nowhere = f"TFDS has prepared no {name} in {_roots(data_dir)[0]}."
    raise FileNotFoundError(" ".join(remarks) or nowhere)


def _decode_once(name: str, root: Path, folder: Path) -> tuple[Arrays, list[str]]:
    """Decodes the images, or finds that done: seconds become tenths."""
    cache = folder / "decoded.npz"
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(cache.name))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(repr(stats).encode()).hexdigest()
    with contextlib.suppress(FileNotFoundError, ValueError):  # not yet, out of date, damaged
        return load_npz(cache, key), []
    with _failing_as_damaged(folder):
        arrays = Arrays(*_decode(name, root, "train"), *_decode(name, root, "test"))
    arrays = check(arrays, [folder] * 4)
    try:
        save_npz(cache, arrays, key)
    except OSError as error:  # someone else's folder, or a full disk
        return arrays, [f"The decoded images could not be kept ({error})."]
    return arrays, []


def _decode(name: str, root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    import PIL.Image

    tfds = package()
    # Records in batches and PNG by Pillow: 4 s, where TFDS takes 20 s for the same.
    png = {"image": tfds.decode.SkipDecoding()}
    records = tfds.data_source(name, split=split, data_dir=root, download=False, decoders=png)
    images, labels, every = [], [], range(len(records))
    for start in track(every[::BATCH], f"decoding {name}, {split}"):
        for record in records.__getitems__(every[start : start + BATCH]):
            images.append(np.asarray(PIL.Image.open(io.BytesIO(record["image"]))))
            labels.append(record["label"])
    return np.stack(images), np.asarray(labels)


def archives(name: str) -> Archives:
    """The archives of a data set, as TFDS registers them.

    The seam for tests, which replace this function: every address comes from here.
    """
    infos = package().builder_cls(name).url_infos
    urls = {url.rpartition("/")[2]: url for url in infos}
    wanted = [urls[f"{_idx.FILES[field]}.gz"] for field in Archives._fields]
    return Archives(*(Archive(url, infos[url].checksum) for url in wanted))


def _png(image: np.ndarray) -> bytes:
    import PIL.Image

    PIL.Image.fromarray(image).save(file := io.BytesIO(), "PNG", compress_level=1)
    return file.getvalue()


def free_root(name: str, data_dir: Folder | None) -> Path:
    """Where `prepare` may write a data set.

    Raises:
      FileNotFoundError: Nowhere.
    """
    free = [root for root in _roots(data_dir) if not _prepared(name, root)[1]]
    if not free:
        taken = " and ".join(map(str, _roots(data_dir)))
        raise FileNotFoundError(f"{taken} hold {name} in other formats already.")
    root = free[0]
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise FileNotFoundError(f"Nothing can be kept in {root} ({error}).") from error
    return root


def prepare(name: str, arrays: Arrays, root: Path) -> None:
    """Writes the folder that TFDS itself would write, whole or not at all.

    The builder is the one of TFDS, with its name, version and features, but for the two
    methods that need TensorFlow. It is given PNG files, since it would hand an array to
    TensorFlow, too.
    """
    stock = package().builder_cls(name)

    class Local(stock, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        VERSION = stock.VERSION

        def _split_generators(self, dl_manager):
            del dl_manager
            splits = {"train": arrays[:2], "test": arrays[2:]}
            return {split: self._generate_examples(split, *splits[split]) for split in splits}

        def _generate_examples(self, split, images, labels):
            for i in track(range(len(images)), f"writing {name}, {split}"):
                yield i, {"image": _png(images[i]), "label": int(labels[i])}

    Local.name = name
    # It prints, and draws bars on what may be a log.
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        Local(data_dir=root, file_format="array_record").download_and_prepare()
