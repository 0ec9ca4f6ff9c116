"""The command line: `rmtjax analyze`, `compress`, `select` and `diff`.

Paths to checkpoints come in. A table, a report, a list or a smaller checkpoint goes out.
"""

from rmtjax.cli._main import main as main

__all__ = ["main"]
