"""Runs the command `rmtjax` for `python -m rmtjax`."""

import sys

from rmtjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
