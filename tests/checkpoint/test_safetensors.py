"""One .safetensors file against the library of the format's authors, and against damage."""

import json
import os
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import rmtjax
from rmtjax.checkpoint._open import open_tensors
from rmtjax.checkpoint._safetensors import write_tensors
from rmtjax.checkpoint._tensors import CODES, DTYPES, Entry

# What the library itself has in NumPy; it reads the others as bytes.
COMMON = [dtype for code, dtype in DTYPES.items() if not code.startswith(("F8", "BF"))]
ARRAYS = {
    "kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.float16([[1.0], [np.nan]]),
    "step": np.asarray(3, np.int64),
    "mask": np.array([True, False, True]),
    "none": np.zeros((0, 4), np.uint8),
}


def entries_of(arrays):
    return {name: Entry.of(array) for name, array in arrays.items()}


def write(path, arrays, **metadata):
    write_tensors(path, entries_of(arrays), arrays.items(), metadata)
    return path


def read(path):
    with open_tensors(path) as tensors:
        return {name: tensors.read(name) for name in tensors.entries}


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def same(left, right):
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert (array.shape, array.dtype) == (right[name].shape, right[name].dtype)
        assert array.tobytes() == right[name].tobytes()  # NaN, too, bit by bit


TREES = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name != "__metadata__"),
    st.sampled_from(COMMON).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=3))
    ),
    max_size=5,
)


@given(arrays=TREES, metadata=st.dictionaries(st.text(max_size=4), st.text(), max_size=2))
def test_files_are_those_of_the_library(tmp_path_factory, arrays, metadata):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    write_tensors(path, entries_of(arrays), arrays.items(), metadata)
    same(safetensors.numpy.load_file(path), arrays)
    with safetensors.safe_open(path, "np") as opened:
        assert (opened.metadata() or {}) == metadata
    safetensors.numpy.save_file(arrays, path, metadata or None)
    with open_tensors(path) as tensors:
        assert tensors.layout == "safetensors"
        assert tensors.entries == entries_of(arrays)
        assert tensors.metadata == metadata
    same(read(path), arrays)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_every_dtype_comes_back_and_is_known_to_the_library(tmp_path, dtype):
    array = np.arange(6).astype(np.float32).astype(dtype).reshape(3, 2)
    path = write(tmp_path / "a.safetensors", {"x": array})
    same(read(path), {"x": array})
    ((name, told),) = safetensors.deserialize(path.read_bytes())
    assert (name, told["dtype"], told["shape"]) == ("x", CODES[dtype], [3, 2])
    assert bytes(told["data"]) == array.tobytes()


def test_data_are_aligned_to_their_items(tmp_path):
    data = write(tmp_path / "a.safetensors", ARRAYS).read_bytes()
    length = 8 + struct.unpack("<Q", data[:8])[0]
    assert length % 8 == 0
    header = json.loads(data[8:length])
    assert [*header] == ["step", "kernel", "half", "mask", "none"]
    for name, told in header.items():
        assert told["data_offsets"][0] % ARRAYS[name].itemsize == 0


MALFORMED = {
    "empty": (b"", "it has 0 bytes"),
    "no header": (b"1234567", "too few for a header"),
    "longer header": (struct.pack("<Q", 9) + b"{}", "claims 9 bytes, of 2"),
    "huge header": (struct.pack("<Q", 2**63) + b"{}", "claims 9223372036854775808 bytes"),
    "not JSON": (file_of(b"{'a': 1}"), "not JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "not JSON"),
    "no object": (file_of([]), "not a JSON object"),
    "NaN": (file_of(b'{"a": NaN}'), "NaN is not JSON"),
    "deep": (file_of(b"[" * 200_000), "nested too deeply"),
    "twice": (file_of(b'{"__metadata__": {}, "__metadata__": {}}'), "a name stands twice"),
    "a field twice": (file_of(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "a name stands twice"),
    "surrogate": (file_of(b'{"\\ud800": {}}'), "not Unicode"),
    "metadata": (file_of({"__metadata__": {"a": 1}}), "1 of its metadata is not a text"),
    "no metadata": (file_of({"__metadata__": []}), "metadata is not a JSON object"),
    "field": (file_of({"a": {"dtype": "F32", "shape": []}}), "needs a dtype, a shape"),
    "half a byte": (file_of({"a": tensor("F4", [3], [0, 1])}, bytes(1)), "fill its last byte"),
    "packed": (file_of({"a": tensor("F4", [4], [0, 4])}, bytes(4)), "has 4 bytes and is float4"),
    "list for dtype": (file_of({"a": tensor(dtype=["F32"])}), "has dtype"),
    "fraction": (file_of({"a": tensor(shape=[2.0])}, bytes(8)), "no shape of sizes"),
    "boolean": (file_of({"a": tensor(shape=[2, True])}, bytes(8)), "no shape of sizes"),
    "negative": (file_of({"a": tensor(shape=[-1, -2])}, bytes(8)), "no shape of sizes"),
    "offsets": (file_of({"a": tensor(offsets=[0])}), "no two offsets"),
    "backwards": (file_of({"a": tensor(offsets=[8, 0])}, bytes(8)), "has -8 bytes"),
    "too few": (file_of({"a": tensor()}, bytes(7)), "take 8 bytes, and it has 7"),
    "too many": (file_of({"a": tensor()}, bytes(9)), "take 8 bytes, and it has 9"),
    "another size": (file_of({"a": tensor(shape=[3])}, bytes(8)), "has 8 bytes and is float32"),
    "gap": (file_of({"a": tensor(offsets=[8, 16])}, bytes(16)), "begins at 8, where 0 is next"),
    "overlap": (
        file_of({"a": tensor(), "b": tensor(offsets=[4, 12])}, bytes(12)),
        "'b' begins at 4, where 8 is next",
    ),
    "huge": (file_of({"a": tensor(shape=[2**58], offsets=[0, 2**60])}, bytes(8)), "and it has 8"),
    "overflow": (file_of({"a": tensor(shape=[2**32, 2**30])}, bytes(8)), "larger than any memory"),
}
LENIENT = {
    "no metadata": {"__metadata__": None, "a": tensor()},
    "empty metadata": {"__metadata__": {}, "a": tensor()},
    "other fields": {"a": {**tensor(), "crc32": 1, "more": {"x": [None, 1.5]}}},
    "a list": {"a": ["F32", [2], [0, 8]]},
    "twice": b'{"a": 1, "__metadata__": {"x": "1", "x": "2"}, "a": ["F32", [2], [0, 8]]}',
    "spaces": b' \n {"a": ["F32", [2], [0, 8]]}\t ',
    "empty at the end": {"z": tensor(shape=[0], offsets=[8, 8]), "a": tensor()},
    "empty at first": {"z": tensor(shape=[0, 3], offsets=[0, 0]), "a": tensor()},
}
# Well-formed, and not for us: not to be called damaged.
UNSUPPORTED = {
    "many axes": ({"a": tensor(shape=[2] + [1] * 99)}, bytes(8), "no array can have it"),
    "huge and empty": ({"a": tensor(shape=[2**61, 0], offsets=[0, 0])}, b"", "no array can have"),
    "a new dtype": ({"a": tensor(dtype="F2")}, bytes(8), "has dtype 'F2', .* Upgrade rmtjax"),
}


@pytest.mark.parametrize("header", LENIENT.values(), ids=LENIENT)
def test_what_the_library_reads_is_read(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of(header, np.float32([1, 2]).tobytes()))
    wanted = safetensors.numpy.load_file(path) if header is not LENIENT["twice"] else {}
    found = read(path)
    np.testing.assert_array_equal(found["a"], np.float32([1, 2]))
    same(found | wanted, found)


@pytest.mark.parametrize(("header", "data", "words"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_a_file_that_is_not_for_us_is_not_called_damaged(tmp_path, header, data, words):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of(header, data))
    with pytest.raises(ValueError, match=rf"cannot read '.*a\.safetensors': .*{words}") as caught:
        read(path)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2"])
def test_packed_dtypes_are_told_and_copied_and_not_read(tmp_path, code):
    kernel = (np.random.default_rng(0).normal(size=(80, 60)) + 1).astype(np.float32)
    size = 64 * 64 * int(code[1]) // 8
    packed = np.arange(size, dtype=np.uint8)
    data = kernel.tobytes() + packed.tobytes()
    entries = {
        "a.weight": tensor("F32", [80, 60], [0, kernel.nbytes]),
        "b.weight": tensor(code, [64, 64], [kernel.nbytes, kernel.nbytes + size]),
    }
    path, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    path.write_bytes(file_of(entries, data))
    assert len(safetensors.deserialize(path.read_bytes())) == 2
    report = rmtjax.checkpoint.compress_file(path, out)
    assert [row.spikes for row in report.rows] == [1, None]
    assert report.rows[1].reason.startswith("kept: too few bits (float")
    told = dict(safetensors.deserialize(out.read_bytes()))
    assert (told["b.weight"]["dtype"], told["b.weight"]["shape"]) == (code, [64, 64])
    assert bytes(told["b.weight"]["data"]) == packed.tobytes()
    assert rmtjax.checkpoint.analyze_file(out, rule=rmtjax.ranks.fixed(1)).rows[1] == report.rows[1]
    with pytest.raises(ValueError, match=r"'b.weight' is float.* several share a byte"):
        rmtjax.checkpoint.restore(path)


@pytest.mark.parametrize(("data", "words"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_damaged_file_is_named_and_nothing_is_allocated(tmp_path, data, words):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"cannot read '.*bad\.safetensors'.*") as caught:
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert words in str(caught.value)
    assert "download it again" in str(caught.value)
    assert peak < 2**23  # the JSON of 200 kB, as objects; a claim is 2**60


def test_a_boolean_is_one_bit(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of({"a": tensor("BOOL", [3], [0, 3])}, b"\x01\x02\x00"))
    assert read(path)["a"].tobytes() == b"\x01\x01\x00"


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = write(tmp_path / "a.safetensors", {"kernel": np.ones(100_000)})  # more than a buffer
    with open_tensors(path) as tensors:
        os.truncate(path, path.stat().st_size - 20)
        with pytest.raises(ValueError, match="shorter since it was opened"):
            tensors.read("kernel")


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        read(tmp_path / "none.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")  # to open it would wait for ever
    with pytest.raises(ValueError, match="not a regular file"):
        read(tmp_path / "pipe.safetensors")


def survives(path, data):
    """A well-formed result that the library agrees with, or a ValueError."""
    path.write_bytes(data)
    try:
        arrays = read(path)
    except ValueError:
        return
    # The library may know less of NumPy's dtypes, but it must know the file.
    assert arrays.keys() == {name for name, _ in safetensors.deserialize(data)}


@given(st.data())
def test_flipped_bytes_and_truncations(tmp_path_factory, data):
    path = write(tmp_path_factory.mktemp("fuzz") / "a.safetensors", ARRAYS, made="here")
    good = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=3)):
        good[place] = data.draw(st.integers(0, 255))
    survives(path, bytes(good[: data.draw(st.integers(0, len(good)))]))
    survives(path, bytes(good))


NUMBERS = st.integers(-2, 12) | st.integers() | st.floats() | st.none() | st.booleans()
FIELDS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "f32", None, 3]),
        "shape": st.lists(NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3) | NUMBERS,
    }
)
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b/c", "__metadata__", ""]),
    FIELDS | st.dictionaries(st.text(max_size=2), st.text(max_size=2)) | NUMBERS,
    max_size=3,
)


@given(header=HEADERS | st.binary(max_size=40), data=st.binary(max_size=12))
def test_random_headers(tmp_path_factory, header, data):
    survives(tmp_path_factory.mktemp("fuzz") / "a.safetensors", file_of(header, data))
