"""Shows the progress of long work, and logs it under the logger `rmtjax` of the standard library.

Both are quiet by default. `logging.basicConfig(level=logging.INFO)` shows what was done in how many
seconds, and `DEBUG` each kernel.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from rmtjax._text import printable

# Called before each step with the number of steps done, the number of all, or -1, and a name.
Step = Callable[[int, int, str], None]
# True writes a line to stderr; a function is called.
Progress = bool | Step | None

LOGGER = logging.getLogger("rmtjax")
LOGGER.addHandler(logging.NullHandler())


def _write(text: str) -> None:
    # Each step overwrites the line: \r goes to its start, \x1b[K clears it.
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def showing(progress: Progress, task: str) -> Iterator[Step]:
    """Yields the function to call before each step of a task, and logs the seconds in the end."""
    begin = time.perf_counter()

    def step(done: int, total: int, name: str) -> None:
        place = f"[{done + 1}/{total}]" if total >= 0 else f"[{done + 1}]"
        LOGGER.debug("%s %s %s", task, place, printable(name))
        if callable(progress):
            progress(done, total, name)
        elif progress:
            _write(f"{place} {printable(name)[:60]}")

    try:
        yield step
    finally:
        if progress is True:
            _write("")
    LOGGER.info("%s took %.1f s", task, time.perf_counter() - begin)
