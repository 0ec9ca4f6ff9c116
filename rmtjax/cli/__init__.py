"""The command `rmtjax`."""

from rmtjax.cli._main import main as main

__all__ = ["main"]
