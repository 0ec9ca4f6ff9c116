"""The command line: `rmtjax analyze`, `compress`, `select`, `diff`, `moments` and `compare`.

Paths to checkpoints come in, and of `moments` a model and its data. A table, a report, a list or a
smaller checkpoint goes out.
"""

from rmtjax.cli._main import main as main

__all__ = ["main"]
