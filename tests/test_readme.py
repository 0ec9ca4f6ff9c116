"""The README is short, and its Python runs and prints what stands under it."""

from pathlib import Path

import pytest
from helpers.examples import find_examples, printed_by

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = find_examples(README)


def test_every_example_has_its_output():
    assert len(EXAMPLES) == README.count("```python") == 4


def test_examples_print_what_stands_under_them(tmp_path, monkeypatch):
    """Each example goes on from those before it."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for code, printed in EXAMPLES:
        assert printed_by(code, "README.md", names) == printed


def test_it_is_short():
    # A third of the 20 kB that it had.
    assert len(README.encode()) <= 6_667


@pytest.mark.parametrize(("code", "printed"), EXAMPLES)
def test_examples_are_short(code, printed):
    del printed
    assert len(code.strip().splitlines()) <= 10
