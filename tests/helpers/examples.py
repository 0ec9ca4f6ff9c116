"""The Python examples of a page: finding them with their output, and running them."""

import re
from contextlib import redirect_stdout
from io import StringIO

EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def find_examples(text):
    """Returns pairs of code and expected output."""
    return EXAMPLE.findall(text)


def printed_by(code, page, names):
    """Runs the code in the namespace `names` and returns what it prints."""
    with redirect_stdout(output := StringIO()):
        exec(compile(code, page, "exec"), names)
    return output.getvalue()
