"""Damaged files: mutated and truncated .safetensors files, indexes and folders of orbax.

Each must be read as the library of its format reads it, or refused with its name. No read of
safetensors may allocate more than the file has bytes, plus a constant.
"""

import contextlib
import json
import multiprocessing
import random
import shutil
import struct
import tempfile
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

import rmtjax
from rmtjax.checkpoint._open import open_tensors

# A header as Python objects and its text take some times its size.
CONSTANT = 2**22
ARRAYS = {
    "Dense_0/kernel": np.arange(48, dtype=np.float32).reshape(8, 6),
    "Dense_0/bias": np.ones(6, np.float16),
    "step": np.asarray(3, np.int64),
    "mask": np.array([True, False]),
}
TOKENS = (
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"-1", b"1e9", b"NaN", b"\\ud800", b"\0"),
    *(b"F32", b"F4", b"BOOL", b"I64", b"99999999999999999999", b"__metadata__", b"data_offsets"),
)


def read(path):
    with open_tensors(path) as tensors:
        return {name: tensors.read(name) for name in tensors.entries}


def mutated(good, rng):
    """Bytes with a few of them changed, put in, or taken out."""
    data = bytearray(good)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[place] = rng.randrange(256)
        elif kind == 1:
            data[place:place] = rng.choice(TOKENS)
        elif kind == 2:
            del data[place : place + rng.randint(1, 12)]
        elif kind == 3:
            del data[place:]
        elif kind == 4 and len(data) >= 8:
            length = rng.choice([0, 1, 2**63, 2**31, len(data), rng.randrange(300)])
            data[:8] = struct.pack("<Q", length)
        elif kind == 5:
            token = rng.choice(TOKENS)
            data[place : place + len(token)] = token
        else:
            data += bytes(rng.randint(1, 9))
    return bytes(data)


def rewritten(good, rng):
    """A file whose header is well-formed JSON with other values in it."""
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    name = rng.choice(list(header))
    values = (None, [], {}, -1, 2**70, 1.5, True, "F6_E2M3", "x", [0, 8], [8, 0], {"a": None})
    place = header[name] if isinstance(header[name], dict) else header
    place[rng.choice([*place, "extra"])] = rng.choice(values)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + good[8 + length :]


def library_reads(path):
    try:
        with safetensors.safe_open(path, "np") as file:
            return set(file.keys())
    except Exception:
        return None


def peak_of_read(path):
    """Returns the most memory that reading has taken, whether it succeeds or not, in bytes."""
    tracemalloc.start()
    with contextlib.suppress(Exception):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def tracing_process():
    """Returns an executor with one process that has no threads but its own.

    Before Python 3.12.9 and 3.13.2, `tracemalloc.stop` crashes a process in which a thread without
    the interpreter's lock allocates memory, as those of orbax and tensorstore do (cpython #128679).
    """
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def survives(tally, kind, path, folder, told, tracing):
    """Reads what may be damaged, within its memory, and names it if it is refused."""
    with tally.trial(kind, told):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        peak = tracing.submit(peak_of_read, path).result()
        assert peak < 20 * size + CONSTANT, (peak, size)
        try:
            read(path)
        except ValueError as error:
            if folder.name not in str(error):
                raise AssertionError("does not name the file") from error
            raise


def run_safetensors(tally, rounds, seed, memory=True):
    """Tries so many mutated files, compares with the library, and measures the memory of some."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root, tracing_process() as tracing:
        folder = Path(root, "mutated")
        folder.mkdir()
        path, out = folder / "a.safetensors", Path(root, "out.safetensors")
        rmtjax.checkpoint.save(path, {"Dense_0": {"kernel": ARRAYS["Dense_0/kernel"]}, "step": 1})
        ours = path.read_bytes()
        safetensors.numpy.save_file(ARRAYS, path, {"format": "np"})
        theirs = path.read_bytes()
        for index in range(rounds):
            good = rng.choice([ours, theirs])
            data = rewritten(good, rng) if rng.random() < 0.4 else mutated(good, rng)
            path.write_bytes(data)
            told = f"seed {seed}, file {index}: {data[:300]!r}"
            if index % 20 or not memory:  # tracing takes ten times as long as reading
                with tally.trial("safetensors", told):
                    found = read(path)
                    names = library_reads(path)
                    assert names == found.keys(), f"the library reads {names}"
            else:
                survives(tally, "safetensors, memory", path, folder, told, tracing)
            names = library_reads(path)
            with tally.trial("safetensors of the library", told):
                if names is not None:
                    try:
                        assert read(path).keys() == names
                    except ValueError as error:
                        # It reads shapes that no array can have.
                        if "no array can have it" not in str(error):
                            raise AssertionError(f"not read: {error}") from error
            if index % 50 == 0:
                for verb in (rmtjax.checkpoint.restore, rmtjax.checkpoint.load_plan):
                    with tally.trial("safetensors verbs", told):
                        verb(path)
                with tally.trial("safetensors verbs", told):
                    rmtjax.checkpoint.compress_file(path, out, min_size=999)


def run_indexes(tally, rounds, seed):
    """Tries so many folders of shards whose index is mutated."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "shards")
        folder.mkdir()
        index = folder / "model.safetensors.index.json"
        for number, names in enumerate((["a", "b"], ["c", "b"]), 1):
            arrays = {name: np.ones((2, 3), np.float32) * number for name in names}
            safetensors.numpy.save_file(arrays, folder / f"model-{number}.safetensors")
        places = {"a": 1, "b": 2, "c": 2}
        shards = {name: f"model-{number}.safetensors" for name, number in places.items()}
        good = json.dumps({"metadata": {"total_size": 72}, "weight_map": shards}).encode()
        for trial in range(rounds):
            index.write_bytes(mutated(good, rng) if trial else good)
            with tally.trial("index", f"seed {seed}, {index.read_bytes()!r}"):
                try:
                    read(folder)
                except ValueError as error:
                    if "shards" not in str(error):
                        raise AssertionError("does not name the folder") from error
                    raise


def run_orbax(tally, rounds, seed):
    """Tries so many folders of orbax, one file of which is mutated."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        good = Path(root, "good")
        tree = {"Dense_0": {"kernel": np.ones((4, 3), np.float32)}}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=bool(seed % 2))) as writer:
            writer.save(good, args=ocp.args.PyTreeSave(tree))
        files = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())
        for index in range(rounds):
            # A path of its own: tensorstore keeps what it has read by path, and may still read on.
            bad = Path(root, f"bad{index}")
            shutil.copytree(good, bad)
            file = rng.choice(files)
            data = mutated((good / file).read_bytes(), rng)
            (bad / file).write_bytes(data)
            told = f"seed {seed}, folder {index}, {file}: {data!r:.200}"
            with tally.trial("orbax", told):
                try:
                    read(bad)
                except ValueError as error:
                    if bad.name not in str(error):
                        raise AssertionError("does not name the folder") from error
                    raise


def run(tally, rounds, seed):
    """Tries so many files of safetensors, and shares of it of the rest."""
    run_safetensors(tally, rounds, seed)
    run_indexes(tally, rounds // 10, seed)
    run_orbax(tally, rounds // 200, seed)
