"""Files from the net: known by their checksum, held in memory until it is right."""

import hashlib
import http.client
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

PATIENCE = 3.0  # seconds for the first sign of life
CHUNK = 2**18  # bytes for a step of the progress bar

T = TypeVar("T")


class Archive(NamedTuple):
    """A file of the net, and what it must be."""

    url: str
    sha256: str  # of the file as it is sent, packed


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """The items, with a progress bar on a terminal and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import track as rich_track

    # The original stream, since `sys.stderr` is replaced while TFDS is kept quiet.
    console = Console(file=sys.__stderr__)
    quiet = not console.is_terminal
    yield from rich_track(items, description, console=console, transient=True, disable=quiet)


def check_connection(url: str) -> None:
    """Asks the server once, for `PATIENCE` seconds at most.

    Raises:
      ConnectionError: It did not answer.
    """
    failure = [f"no answer in {PATIENCE} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # an answer; what is wrong with it the download will say
        except (OSError, http.client.HTTPException) as error:
            failure[:] = [str(error)]
            return
        failure.clear()

    # In a thread, since no timeout bounds the search for the name of a host.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if failure:
        raise ConnectionError(f"{url} can not be reached ({failure[0]}).")


def fetch(archive: Archive) -> bytes:
    """The content of an archive; one try.

    Raises:
      ConnectionError: The server refuses, is silent for long, or breaks off.
      ValueError: What came has another checksum.
    """
    try:
        with urllib.request.urlopen(archive.url, timeout=10 * PATIENCE) as response:
            length = int(response.headers.get("Content-Length", 0))
            steps = track(range(0, length, CHUNK), archive.url.rpartition("/")[2])
            raw = b"".join(response.read(CHUNK) for _ in steps) + response.read()
        if len(raw) < length:
            raise ConnectionError(f"broken off after {len(raw)} of {length} bytes")
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{archive.url} could not be fetched ({error}).") from error
    if (found := hashlib.sha256(raw).hexdigest()) != archive.sha256:
        raise ValueError(
            f"{archive.url}: its sha256 is {found}, not {archive.sha256}. Nothing of it was "
            "kept. Try again from another network, or name another `source`."
        )
    return raw
