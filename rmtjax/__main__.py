"""`python -m rmtjax` is the command `rmtjax`."""

import sys

from rmtjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
