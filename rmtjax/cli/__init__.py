"""The command line: `rmtjax analyze`, `rmtjax compress` and `rmtjax diff`.

A path to a checkpoint comes in. A table, a report or a smaller checkpoint goes out.
"""

from rmtjax.cli._main import main as main

__all__ = ["main"]
