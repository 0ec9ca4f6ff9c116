"""Runs the command `rmtjax` for `python -m rmtjax`."""

from rmtjax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
