"""What tests of the loader share: data sets as files, a server of them, and a machine without."""

import contextlib
import gzip
import hashlib
import http.server
import socket
import struct
import threading

import numpy as np

from experiments import _download, _tfds, data

FILES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


def serve(monkeypatch, archives):
    """Downloads come from what `archives(name)` returns, as `local_archives` makes it."""
    monkeypatch.setattr(_tfds, "archives", archives)


def leave_bare(monkeypatch, tmp_path):
    """No data, no variables, no net."""
    monkeypatch.delenv("RMTJAX_DATA_DIR", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "DEBIAN", {})
    closed = local_archives(closed_port(), make_arrays(1))
    serve(monkeypatch, lambda name: closed)
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
